"""Accuracy tables: intervals by statsmodels, pairing by hand, sentences word for word, and the
cards that are made of them.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from statsmodels.stats.proportion import proportion_confint

from dit_lens import evaluation, planted, scenes
from dit_lens.task import Scene
from dit_lens.task.captions import TEMPLATES, render_caption
from hooked_models import HookedTextToImage

SCENE = Scene("triangle", "red", 30, 40, "square", "blue", 90, 42, "left", "left of")
N, TEMPLATE = 8, "no is"


@pytest.fixture(scope="module")
def model(planted_model) -> HookedTextToImage:
    return planted_model("two-stage", 0)[0]


@pytest.fixture(scope="module")
def rows(model) -> pd.DataFrame:
    return evaluation.evaluate_model(model, N, templates=[TEMPLATE])


def test_every_template_word_for_word():
    assert {name: render_caption(SCENE, name) for name in TEMPLATES} == {
        "is": "red triangle is left of blue square",
        "no is": "red triangle left of blue square",
        "no is, the second": "red triangle left of the blue square",
        "the second": "red triangle is left of the blue square",
        "the both": "the red triangle is left of the blue square",
        "inverted": "left of blue square is red triangle",
        "inverted, the first": "left of blue square is the red triangle",
        "inverted, the second": "left of the blue square is red triangle",
        "crimson": "crimson triangle is left of blue square",
        "navy": "red triangle is left of navy square",
    }
    unnamed = Scene(
        "triangle", "red", 30, 40, "square", "blue", 90, 42, "left", "left of", names_color1=False
    )
    assert render_caption(unnamed, "the both") == "the triangle is left of the blue square"
    with pytest.raises(ValueError, match="no template 'yoda': choose 'is', 'no is'"):
        render_caption(SCENE, "yoda")


def test_rows_are_what_single_runs_give(model, rows):
    assert len(rows) == 2 * N + N // 4
    held_out = {(s.shape1, s.shape2, s.color1, s.relation) for s in scenes.HELD_OUT}
    for split, part in rows.groupby("split"):
        of_split = {
            *part[["shape1", "shape2", "color1", "relation"]].itertuples(index=False, name=None)
        }
        assert of_split <= held_out if split == "held_out" else not of_split & held_out
    wanted = {
        split: scenes.sample(N, seed=100, split=split, color_words="both")
        for split in evaluation.SPLITS
    }
    for at in (0, N + 3, 2 * N + 1):
        row = rows.iloc[at]
        scene = wanted[row["split"]][row["scene"]]
        assert row["prompt"] == render_caption(scene, row["template"])
        with torch.no_grad():
            verdict = scenes.evaluate(model(row["prompt"], seed=int(row["scene"])), [scene])
        for name in (*evaluation.METRICS, *evaluation.GEOMETRY):
            assert row[name] == pytest.approx(float(verdict[name].item()), nan_ok=True), name


def test_a_model_without_a_relation_head_is_told_from_one_with(rows):
    trained = rows[rows["template"] == "is"]
    assert (
        evaluation.accuracies(trained, ["template"])
        .set_index("metric")
        .loc["relation_loose", "mean"]
        == 1
    )
    control = evaluation.evaluate_model(
        planted.planted_circuit("no-relation", seed=0)[0], N, templates=[]
    )
    table = evaluation.accuracies(control, ["template"]).set_index("metric")
    assert table.loc["unique_binding", "mean"] == 1
    assert table.loc["relation_loose", "high"] < 0.9


def test_intervals_are_wilson_s():
    rows = pd.DataFrame({"group": list("aaaabbb"), "color": [1, 1, 0, np.nan, 1, 1, 1]})
    table = evaluation.accuracies(rows, ["group"], ["color"]).set_index("group")
    assert table["images"].tolist() == [3, 3]
    # of three out of three exactly
    for group, hits, method in (("a", 2, "wilson"), ("b", 3, "beta")):
        low, high = proportion_confint(hits, 3, method=method)
        assert table.loc[group, ["mean", "low", "high"]].tolist() == pytest.approx(
            [hits / 3, low, high]
        )
    nothing = evaluation.accuracies(rows.assign(color=np.nan), ["group"], ["color"])
    assert nothing["mean"].isna().all()


def test_a_template_s_effect_is_that_of_pairs():
    scene = np.arange(40)
    rng = np.random.default_rng(0)
    places = {name: rng.normal(60, 20, 40) for name in evaluation.GEOMETRY}
    trained = pd.DataFrame(
        {"split": "train", "template": "is", "scene": scene, "color": 1.0, **places}
    )
    moved = trained.assign(
        template="the second",
        color=(scene % 4 > 0).astype(float),
        x1=places["x1"] - 7,
        y2=places["y2"] - 3,
    )
    moved.loc[:9, ["x1", "y1", "x2", "y2"]] = np.nan
    table = evaluation.template_effects(pd.concat([moved[::-1], trained]), ["color"]).set_index(
        "metric"
    )
    assert table.loc["color", "mean"] == -0.25
    assert table.loc["color", "low"] < -0.25 < table.loc["color", "high"] < 0
    assert table.loc["drift_x", ["images", "mean", "low", "high"]].tolist() == pytest.approx(
        [30, -7, -7, -7]
    )
    assert table.loc["drift_y", "mean"] == pytest.approx(3)


def test_every_scene_has_its_own_noise_whatever_the_batches(model):
    wanted = scenes.sample(5, seed=3, color_words="both")
    found = evaluation.score(model, wanted, batch_size=2)
    for i, scene in enumerate(wanted):
        alone = scenes.evaluate(model([scenes.caption(scene)], seed=i), [scene])
        for name in ("relation_loose", "x1", "y1", "x2", "y2"):
            np.testing.assert_allclose(
                found[name].values[i], alone[name].values[0], err_msg=f"{name} of scene {i}"
            )
    assert len(
        {tuple(place) for place in zip(found.x1.values, found.y1.values, strict=True)}
    ) == len(wanted)
    table = evaluation.summarise(found)
    assert table["mean"].to_dict() == {
        name: pytest.approx(float(found[name].mean())) for name in evaluation.METRICS
    }


def test_a_stopped_evaluation_goes_on_and_refuses_another_model(model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 8)
    judge, drawn = scenes.evaluate, itertools.count()

    def twice(images, wanted):
        if next(drawn) == 2:
            raise KeyboardInterrupt
        return judge(images, wanted)

    monkeypatch.setattr(evaluation, "evaluate", twice)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_model(model, N, templates=[TEMPLATE], out=tmp_path)
    found = evaluation.evaluate_model(model, N, templates=[TEMPLATE], out=tmp_path)
    assert next(drawn) == 4  # two batches, the one that failed, and the third again
    pd.testing.assert_frame_equal(found, rows)
    with pytest.raises(ValueError, match="made with other model"):
        evaluation.evaluate_model(
            planted.planted_circuit("two-stage", seed=1)[0], N, templates=[TEMPLATE], out=tmp_path
        )


def test_hooks_and_a_folder_exclude_each_other(model, tmp_path):
    hook = ("steps.0.cond.blocks.1.cross_attn.hook_z", lambda z, hook: z * 0)
    with model.hooks([hook]), pytest.raises(ValueError, match="reset_hooks"):
        evaluation.evaluate_model(model, 2, templates=[], out=tmp_path)


def test_a_template_that_never_shows_both_objects_has_a_table():
    nothing = pd.DataFrame(
        {"split": "train", "template": ["is", "is", "the both", "the both"], "scene": [0, 1, 0, 1]}
    )
    nothing = nothing.assign(**dict.fromkeys(evaluation.GEOMETRY, np.nan), color=0.0)
    table = evaluation.template_effects(nothing, ["color"]).set_index("metric")
    assert table.loc["drift_x", ["mean", "low", "high"]].isna().all()
    assert table.loc["color", "mean"] == 0


def test_only_templates_whose_words_are_known():
    model = HookedTextToImage.from_pretrained("rte-micro")
    assert set(TEMPLATES) - set(evaluation.known_templates(model)) == {"crimson", "navy"}


def test_tables_have_every_group(rows):
    text = evaluation.to_markdown(rows)
    trained = rows[rows["split"] == "train"]
    for group in {*rows["split"], *trained["relation"], *trained["phrase"], *trained["template"]}:
        assert f"| {group} |" in text
    assert "drift_x" in text
