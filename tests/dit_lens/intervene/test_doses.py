"""Doses against planted images, and against prompts that say the same in words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

import dit_lens.intervene.doses
from dit_lens import scenes, steering
from dit_lens.task import DIRECTIONS, Scene

DRAWN = [  # every relation's phrase has a word-for-word counterpart; colours are sometimes unnamed
    *scenes.sample(5, seed=3),
    Scene("circle", "red", 40, 64, "square", "blue", 90, 64, "left", "left of", False, False),
]


def mirrored(scene: Scene) -> Scene:
    """The scene with its objects in each other's place, as the opposite relation has it."""
    relation = scenes.OPPOSITE[scene.relation]
    return replace(scene, x1=scene.x2, y1=scene.y2, x2=scene.x1, y2=scene.y1, relation=relation)


def judged_by_hand(draw):
    """`verdicts` with `draw(texts, added, seeds)` in the place of a model."""

    def verdicts(model, texts, seeds, conditions, judge, **how):
        parts = []
        vectors = [[one.action.vector for one in several] for several in conditions.values()]
        none = torch.zeros_like(next(own[0] for own in vectors if own))
        for own in vectors:
            added, rows = (*own, none)[0], np.arange(len(texts))
            by_seed = [judge(draw(texts, added, [seed] * len(texts)), rows) for seed in seeds]
            parts.append({n: np.stack([one[n] for one in by_seed], 1) for n in by_seed[0]})
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    return verdicts


def test_doses_are_given_as_said_and_each_image_is_judged_as_its_own(micro, monkeypatch):
    by_caption = {scenes.caption(scene): scene for scene in DRAWN}
    swaps = {
        t: steering.swap_vectors(micro, [t], [scenes.OPPOSITE[s.relation]])[0]
        for t, s in by_caption.items()
    }

    def draw(texts, added, seeds):
        """Draws the opposite of what is said if all of V_to − V_from is there, in odd seeds; else
        what is said.
        """
        images = []
        for text, row, seed in zip(texts, added, seeds, strict=True):
            here = torch.zeros_like(row)
            here[: len(swaps[text])] = swaps[text]
            moved = torch.allclose(row, here, atol=1e-4) and seed % 2
            images.append(mirrored(by_caption[text]) if moved else by_caption[text])
        return scenes.render(images)

    monkeypatch.setattr(dit_lens.intervene.doses, "verdicts", judged_by_hand(draw))
    found = steering.dose_response(micro, DRAWN, doses=(0, 1, 2), seeds=(4, 7), draws=2)
    assert dict(found.sizes) == {"condition": 5, "k": 3, "scene": 6, "seed": 2}
    assert list(found.kind.values) == [
        "steered",
        "random_vector",
        "random_vector",
        "wrong_token",
        "wrong_token",
    ]
    moved = xr.zeros_like(found.target_loose)
    moved.loc[{"condition": "steered", "k": 1, "seed": 7}] = True
    # scenes of the sample do not overlap, so what they show is judged without error
    for how in ("strict", "loose"):
        xr.testing.assert_equal(found[f"target_{how}"], moved)
        xr.testing.assert_equal(found[f"original_{how}"], ~moved)
    assert found[["color", "shape", "unique_binding"]].all().to_array().all()
    for i, scene in enumerate(DRAWN):
        dx, dy = DIRECTIONS[scenes.OPPOSITE[scene.relation]]
        offset = ((scene.x1 - scene.x2) * dx + (scene.y1 - scene.y2) * dy) / np.hypot(dx, dy)
        expected = xr.where(moved.isel(scene=i), -offset, offset)
        # centres are measured to a pixel each
        np.testing.assert_allclose(found.offset.isel(scene=i), expected, atol=2.01)


def test_controls_have_the_same_norms_at_the_same_or_at_other_tokens(micro, monkeypatch):
    given = {}

    def record(texts, added, seeds):
        for text, row in zip(texts, added, strict=True):
            given.setdefault(text, []).append(row)
        return torch.zeros(len(texts), 3, 128, 128)

    monkeypatch.setattr(dit_lens.intervene.doses, "verdicts", judged_by_hand(record))
    steering.dose_response(micro, DRAWN, doses=(2.0,), draws=2)
    for scene in DRAWN:
        text = scenes.caption(scene)
        own, *random, wrong_0, wrong_1 = (row.norm(dim=1) for row in given[text])
        steered, random_0, random_1 = given[text][:3]
        exact = 2 * steering.swap_vectors(micro, [text], [scenes.OPPOSITE[scene.relation]])[0]
        torch.testing.assert_close(steered[: len(exact)], exact)
        for norms in random:
            torch.testing.assert_close(norms, own)
        here = own > 0
        cosines = torch.cosine_similarity(random_0[here], random_1[here])
        assert cosines.abs().max() < 0.5
        assert torch.cosine_similarity(random_0[here], steered[here]).abs().max() < 0.5
        for norms in (wrong_0, wrong_1):
            torch.testing.assert_close(norms.sort().values, own.sort().values)
            assert not (norms[here] > 0).any()
            assert not (norms[micro.to_tokens(text).shape[1] :] > 0).any()  # no pads


@torch.no_grad()
def test_a_dose_of_one_draws_what_the_swapped_caption_does(micro):
    wanted = [Scene("circle", "red", 40, 64, "square", "blue", 90, 64, "left", "left of")]
    found = steering.dose_response(
        micro, wanted, "right", doses=(0, 1), seeds=(0, 1), draws=0, batch_size=3, num_steps=8
    )
    texts = [scenes.caption(wanted[0], phrase) for phrase in ("left of", "right of")]
    for k, text in enumerate(texts):
        images = micro([text, text], seed=[0, 1], num_steps=8)
        verdict, mirror = (
            scenes.evaluate(images, [scene] * 2) for scene in (wanted[0], mirrored(wanted[0]))
        )
        for how in ("strict", "loose"):
            own, goal = (
                found[f"{by}_{how}"].isel(condition=0, k=k, scene=0)
                for by in ("original", "target")
            )
            np.testing.assert_array_equal(own, verdict[f"relation_{how}"])
            np.testing.assert_array_equal(goal, mirror[f"relation_{how}"])
        np.testing.assert_allclose(
            found.offset.isel(condition=0, k=k, scene=0), verdict.x1 - verdict.x2, atol=1
        )
    assert found.original_loose.isel(k=0).any()
    assert found.target_loose.isel(k=1).any()
    with pytest.raises(ValueError, match="'left' already"):
        steering.dose_response(micro, wanted, "left")


def test_a_summary_has_the_means_and_their_paired_differences():
    rng = np.random.default_rng(0)
    kinds = ["steered", "random_vector", "random_vector"]
    values = {
        name: (("condition", "k", "scene", "seed"), rng.random((3, 2, 40, 3)))
        for name in steering.METRICS
    }
    values["target_strict"][1][0] += 1
    values["offset"][1][:, :, 0, 0] = np.nan
    doses = xr.Dataset(values, {"k": [0.5, 1.0], "kind": ("condition", kinds)})
    table = steering.summarise(doses).set_index(["kind", "k", "metric"])
    for metric in steering.METRICS:
        data = values[metric][1]
        assert table.loc[("steered", 1.0, metric), "mean"] == pytest.approx(np.nanmean(data[0, 1]))
        assert table.loc[("random_vector", 0.5, metric), "mean"] == pytest.approx(
            np.nanmean(data[1:, 0])
        )
        difference = np.nanmean(data[0, 0] - data[1:, 0].mean(axis=0))
        assert table.loc[("steered − random_vector", 0.5, metric), "mean"] == pytest.approx(
            difference
        )
    low, high = table.loc[("steered − random_vector", 1.0, "target_strict"), ["low", "high"]]
    assert 0.9 < low < 1 < high < 1.1
