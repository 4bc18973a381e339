"""Methods that strengthen a circuit follow their formulas; doses are chosen where they should be."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from dit_lens import ablation, prompts, scenes
from dit_lens.training.dynamics import layout
from hooked_models import HookedTextToImage
from recipes import improve_relations
from recipes.improve_relations import DOSES, METHODS, NEUTRAL, TASKS, VERDICTS, strengthened

WANTED = scenes.sample(2, seed=5, color_words="both")
TEXTS = [scenes.caption(scene) for scene in WANTED]
STEPS = len(improve_relations.EARLY)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pretrained("rte-nano")


@pytest.mark.parametrize("method", METHODS)
def test_the_neutral_dose_changes_nothing_and_another_does(model, method):
    vectors = torch.randn(2, model.cfg.d_model)

    def drawn(hooks):
        return model.run_with_hooks(TEXTS, [0, 1], num_steps=STEPS, fwd_hooks=hooks)

    neutral, strong = (
        strengthened(model, TEXTS, method, dose, "relation", ["L0H1", "L1H0"], vectors)
        for dose in (NEUTRAL[method], DOSES[method][-1])
    )
    # the same kernels, nothing edited
    plain = drawn([(name, lambda tensor, hook: tensor) for name, _ in neutral])
    assert {name.split(".")[1] for name, _ in neutral} == {str(step) for step in range(STEPS)}
    assert torch.equal(drawn(neutral), plain)
    assert not torch.allclose(drawn(strong), plain, atol=1e-3)


def test_guidance_through_a_head_is_an_extrapolation_of_two_runs(model):
    name, weight = "steps.0.cond.blocks.1.cross_attn.hook_z", 1.5

    def z(hooks):
        with model.hooks([hook for hook in hooks if hook[0].startswith("steps.0.")]):
            return model.run_with_cache(TEXTS, [0, 1], num_steps=1, names_filter=[name])[1][name]

    (hide,) = ablation.knockout_role("relation", "L1H2")
    whole, without = z([]), z(hide.hooks(model, TEXTS, num_steps=1))
    found = z(strengthened(model, TEXTS, "guide", weight, "relation", ["L1H2"]))
    by_hand = whole + weight * (whole - without)
    assert (by_hand - whole).abs().amax() > 0.1
    assert found == pytest.approx(by_hand, abs=1e-4)
    assert found[:, :, :2] == pytest.approx(whole[:, :, :2], abs=1e-5)


def test_steering_adds_the_relations_own_vector_to_its_words_alone(model):
    vectors = improve_relations.relation_vectors(model, "relation")
    of_scenes = torch.stack([vectors[scene.relation] for scene in WANTED])
    name = "steps.0.cond.hook_caption"

    def caption(hooks):
        with model.hooks([hook for hook in hooks if hook[0].startswith("steps.0.")]):
            return model.run_with_cache(TEXTS, [0, 1], num_steps=1, names_filter=[name])[1][name]

    added = caption(
        strengthened(model, TEXTS, "steer", 2.0, "relation", vectors=of_scenes)
    ) - caption([])
    mask = prompts.role_mask(model, TEXTS, "relation")
    for row, on, vector in zip(added, mask, of_scenes, strict=True):
        assert row[on] == pytest.approx(2 * vector.expand(int(on.sum()), -1), abs=1e-4)
        assert not row[~on].any()
    assert sum(vectors.values()) == pytest.approx(torch.zeros(model.cfg.d_model), abs=1e-3)
    for relation, other in improve_relations.random_vectors(vectors, 0).items():
        assert float(other.norm()) == pytest.approx(float(vectors[relation].norm()), rel=1e-4)


def test_a_heads_layout_loss_is_that_of_a_run_without_its_words(model):
    wanted = scenes.sample(4, seed=3, color_words="both")
    texts = [scenes.caption(scene) for scene in wanted]

    def turned(hooks):
        with model.hooks(hooks):
            cache = model.run_with_cache(
                texts, range(4), guidance=1.0, names_filter=["steps.0.hook_x0"]
            )[1]
        return layout(model.decode(cache["steps.0.hook_x0"]), wanted).mean()

    lost = improve_relations.layout_loss(model, "relation", seed=0, n=4)
    (hide,) = ablation.knockout_role("relation", "L1H2", steps=0)
    assert len(lost) == model.cfg.n_layers * model.cfg.n_heads
    assert list(lost.values()) == sorted(lost.values(), reverse=True)
    assert lost["L1H2"] == pytest.approx(turned([]) - turned(hide.hooks(model, texts)), abs=1e-5)


def test_scenes_of_choosing_and_reporting_share_neither_prompt_nor_noise():
    chosen, told = (improve_relations.drawn(split, 64, 0) for split in ("train", "held_out"))
    assert not {scenes.caption(scene) for scene in chosen[0]} & {
        scenes.caption(scene) for scene in told[0]
    }
    assert not set(chosen[1]) & set(told[1])


def test_the_dose_is_chosen_on_the_training_split_and_reported_on_the_other(
    tmp_path, monkeypatch, capsys
):
    """Planted: the middle dose is best on the training split and harmful on the other, where the
    others would do better.
    """
    asked = []

    def judged(
        model,
        template,
        split,
        n,
        seed,
        method="none",
        doses=(0.0,),
        carrier="relation",
        heads=(),
        kind="none",
    ):
        asked.append((split, method, tuple(doses), kind))
        rows = []
        for dose in doses:
            middle = method != "none" and dose == DOSES[method][1]
            share = (
                {"train": 0.8 if middle else 0.6, "held_out": 0.3 if middle else 0.9}[split]
                if kind == "circuit"
                else 0.5
            )
            right = (np.arange(n) < round(share * n)).astype(float)
            rows.append(
                pd.DataFrame(
                    {
                        verdict: right if verdict == "relation_loose" else np.ones(n)
                        for verdict in VERDICTS
                    }
                ).assign(method=method, dose=dose, kind=kind, scene=np.arange(n))
            )
        return pd.concat(rows, ignore_index=True)

    monkeypatch.setattr(improve_relations, "judged", judged)
    heads = pd.DataFrame({"head": ["L0H1"], "other": ["L0H2"]})
    monkeypatch.setattr(improve_relations, "heads_and_others", lambda model, carrier, seed: heads)
    improve_relations.main(
        improve_relations.Config(("rte-nano",), choosing=10, reporting=400, out=tmp_path)
    )
    effects = pd.read_parquet(tmp_path / "effects.parquet")
    relation = effects[(effects["verdict"] == "relation_loose") & (effects["method"] != "none")]
    tried, told = (relation[relation["phase"] == phase] for phase in ("choosing", "reporting"))
    assert len(tried) == sum(map(len, DOSES.values()))
    assert told.groupby("method")["dose"].unique().map(tuple).to_dict() == {
        m: (DOSES[m][1],) for m in METHODS
    }
    assert told.groupby("kind")["mean"].unique().map(tuple).to_dict() == {
        "circuit": (pytest.approx(-0.2),),
        "control": (0.0,),
        "difference": (pytest.approx(-0.2),),
    }
    assert {(split, doses) for split, method, doses, _ in asked if method == "scale"} == {
        ("train", DOSES["scale"]),
        ("held_out", (DOSES["scale"][1],)),
    }
    assert (tmp_path / "dose_response.png").exists()
    claims = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert [claim["verdict"] for claim in claims] == ["not as predicted", "as predicted"] * len(
        METHODS
    )


def test_of_equally_good_doses_the_smallest_is_taken():
    rows = [
        {
            "method": "scale",
            "dose": dose,
            "kind": "circuit",
            "verdict": "relation_loose",
            "accuracy": accuracy,
        }
        for dose, accuracy in ((3.0, 0.8), (1.5, 0.6), (2.0, 0.8))
    ]
    assert improve_relations.best_dose(pd.DataFrame(rows), "scale") == 2.0


@pytest.mark.slow
def test_it_runs_from_end_to_end_and_goes_on(tmp_path, capsys):
    config = improve_relations.Config(choosing=2, reporting=3, out=tmp_path)
    improve_relations.main(config)
    first = json.loads((tmp_path / "claims.json").read_text())
    assert {name: len(set(heads)) for name, heads in first["heads"].items()} == dict.fromkeys(
        config.tasks, 4
    )
    assert set(first["heads"]) < set(TASKS)
    stages = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
    # two models and two splits: tasks of one model share theirs
    assert sum("-none-" in path.name for path in stages) == 2 * 2
    improve_relations.main(config)
    assert json.loads((tmp_path / "claims.json").read_text()) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()} == stages
