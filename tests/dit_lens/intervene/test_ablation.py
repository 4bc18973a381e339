"""Ablation presets against identities, controls against what they must match, effects against runs
and hooks made by hand.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_lens import scenes, stats
from dit_lens.intervene.ablation import (
    VERDICTS,
    ablate_heads,
    ablation_effects,
    knockout_role,
)
from dit_lens.intervene.interventions import Intervention, Scale
from dit_lens.text.prompts import role_mask
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline

PROMPTS = [
    "red circle is above blue square",
    "red square is above left of blue circle",
    "circle is left of square",
]


STEPS = 4
"""Enough for the bundled model to draw two shapes."""


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline().to(torch.float64))


@pytest.fixture(scope="module")
def trained(trained_micro) -> HookedTextToImage:
    return trained_micro


def hooks(model: HookedTextToImage, interventions, **kwargs):
    return [hook for one in interventions for hook in one.hooks(model, PROMPTS, **kwargs)]


def test_heads_are_grouped_by_layer():
    assert knockout_role("relation", heads=["L1H1", "L0H1", "L1H0"], steps=2) == [
        Intervention("blocks.1.cross_attn.hook_pattern", [1, 0], "relation", 2, "cond", "knockout"),
        Intervention("blocks.0.cross_attn.hook_pattern", [1], "relation", 2, "cond", "knockout"),
    ]
    assert ablate_heads("L1H0", "mean", "attn", branch="both") == [
        Intervention("blocks.1.attn.hook_z", [0], None, None, "both", "mean")
    ]
    with pytest.raises(ValueError, match="heads or layers"):
        knockout_role("relation", heads="L1H1", layers=1)


def test_dropped_words_are_not_read(model):
    """Their keys and values may then be anything, for the steps and the branch that are dropped."""

    def scramble(tensor, hook):
        hidden = role_mask(model, PROMPTS, "shape2")
        return torch.where(hidden[..., None, None], 3 * tensor.flip(1) + 1, tensor)

    drop = hooks(model, knockout_role("shape2", steps=slice(1, None)), num_steps=3)
    names = [
        f"steps.{s}.cond.blocks.{layer}.cross_attn.hook_{x}"
        for s in (1, 2)
        for layer in (0, 1)
        for x in "kv"
    ]
    with torch.no_grad():
        dropped = model.run_with_hooks(PROMPTS, num_steps=3, fwd_hooks=drop)
        scrambled = model.run_with_hooks(
            PROMPTS, num_steps=3, fwd_hooks=[*drop, *((name, scramble) for name in names)]
        )
        torch.testing.assert_close(scrambled, dropped, rtol=0, atol=1e-12)
        early = names[0].replace("steps.1", "steps.0")
        not_dropped = model.run_with_hooks(
            PROMPTS, num_steps=3, fwd_hooks=[*drop, (early, scramble)]
        )
    assert (not_dropped - dropped).abs().max() > 1e-6


def test_layers_are_knocked_out_one_by_one_or_all(model):
    both = hooks(model, knockout_role("relation", layers=[0, 1], branch="both"), num_steps=1)
    every = hooks(model, knockout_role("relation"), num_steps=1)
    assert [name for name, _ in both] == [name for name, _ in every]
    assert [
        name
        for name, _ in hooks(model, knockout_role([2, 3], layers=1, branch="both"), num_steps=1)
    ] == [f"steps.0.{branch}.blocks.1.cross_attn.hook_attn_scores" for branch in ("cond", "uncond")]


@pytest.fixture(scope="module")
def effects(trained):
    wanted = scenes.sample(3, seed=1, split="all", color_words="both")
    conditions = {
        "identity": [Intervention("blocks.2.cross_attn.hook_z", action=Scale(1.0))],
        "drop": knockout_role("relation"),
    }
    return wanted, ablation_effects(
        trained, wanted, conditions, seeds=[0, 7], controls=1, batch=4, num_steps=STEPS
    )


def test_an_identity_has_no_effect(effects):
    _, found = effects
    for verdict in VERDICTS:
        assert (
            found[f"{verdict}_effect"].sel(condition=["none", "identity"], interval="mean") == 0
        ).all()
    for variable in ("x1", "y1", "n_objects"):
        left, right = (found[variable].sel(condition=name).values for name in ("none", "identity"))
        np.testing.assert_array_equal(left, right)


def test_effects_are_those_of_runs_by_hand(trained, effects):
    """Scene by scene, with relation words masked by a hook; above, batches hold several scenes and
    cut across seeds.
    """
    wanted, found = effects
    values = {"none": [], "drop": []}

    def mask(scores, hook):
        scores[..., hidden[0]] = -10000.0

    layers, steps = range(trained.cfg.n_layers), range(STEPS)
    fwd_hooks = [
        (f"steps.{s}.cond.blocks.{layer}.cross_attn.hook_attn_scores", mask)
        for s in steps
        for layer in layers
    ]
    for scene in wanted:
        prompt = scenes.caption(scene)
        hidden = role_mask(trained, [prompt], "relation")
        for name, attached in (("none", []), ("drop", fwd_hooks)):
            with torch.no_grad():
                images = trained.run_with_hooks(
                    [prompt] * 2, seed=[0, 7], num_steps=STEPS, fwd_hooks=attached
                )
            values[name].append(scenes.evaluate(images, [scene] * 2))
    for verdict in VERDICTS:
        by_hand = {
            name: np.array([v[verdict].values for v in vs], float) for name, vs in values.items()
        }
        for name, expected in by_hand.items():
            np.testing.assert_array_equal(
                found[verdict].sel(condition=name).values.astype(float), expected
            )
        interval = stats.paired_difference(by_hand["none"], by_hand["drop"])
        np.testing.assert_array_equal(found[f"{verdict}_effect"].sel(condition="drop"), interval)
    assert found["relation_loose_effect"].sel(condition="drop", interval="mean") < 0


def test_effects_are_labelled(trained, effects):
    wanted, found = effects
    assert found["relation_loose"].dims == ("condition", "scene", "seed")
    assert found["relation"].values.tolist() == [scene.relation for scene in wanted]
    assert found["noise_seed"].values.tolist() == [[0, 7]] * 3

    conditions = {
        "drop": knockout_role("relation"),
        "head": knockout_role("relation", "L2H2"),
        "layer": [],
    }
    plan = ablation_effects(trained, wanted[:1], conditions, seeds=[0], num_steps=1)
    table = plan[["kind", "control_for"]].to_dataframe()
    assert table.loc[table.kind == "condition"].index.tolist() == ["drop", "head", "layer"]
    controls = table[table.control_for != ""]
    assert sorted(zip(controls.control_for, controls.kind, strict=True)) == [
        *[("drop", "random tokens")] * 2,
        *[("head", "random heads")] * 2,
        *[("head", "random tokens")] * 2,
    ]


def test_every_scene_may_have_its_own_seeds(trained):
    wanted = scenes.sample(2, seed=1, split="all", color_words="both")
    found = ablation_effects(trained, wanted, {}, seeds=np.array([[3, 4], [5, 6]]), num_steps=STEPS)
    assert found["unique_binding"].any()
    for row, seeds in enumerate([[3, 4], [5, 6]]):
        with torch.no_grad():
            images = trained([scenes.caption(wanted[row])] * 2, seed=seeds, num_steps=STEPS)
        np.testing.assert_array_equal(
            found["x1"][0, row], scenes.evaluate(images, [wanted[row]] * 2)["x1"]
        )
    with pytest.raises(ValueError, match=r"\[2 seed\]"):
        ablation_effects(trained, wanted, {}, seeds=np.zeros((3, 1), dtype=int))
    with pytest.raises(ValueError, match="another name"):
        ablation_effects(trained, wanted, {"none": []}, seeds=[0])
