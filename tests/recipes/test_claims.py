"""Verdicts by the interval, and what the recipes that read evaluations and courses make of made-up
ones.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from dit_lens.stats import Interval
from hooked_models import HookedTextToImage
from recipes import learning_dynamics, positions_needed, robustness
from recipes.claims import Claim, report, stage, together


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.5, 0.45, 0.55), "replicates"),
        ((0.5, 0.35, 0.55), "undecided"),
        ((0.1, 0.05, 0.15), "does not replicate here"),
        ((0.9, 0.85, 0.95), "does not replicate here"),
        ((np.nan, np.nan, np.nan), "not run here"),
    ],
)
def test_a_verdict_is_by_the_whole_interval(interval, verdict):
    contrast = Interval(0.2, 0.1, 0.3)
    assert Claim("x", ".5", Interval(*interval), (0.4, 0.6), contrast=contrast).verdict == verdict
    beyond = verdict.replace("replicates", "as predicted").replace(
        "does not replicate here", "not as predicted"
    )
    assert Claim("x", "–", Interval(*interval), (0.4, 0.6)).verdict == beyond


@pytest.mark.parametrize(
    "contrast", [None, Interval(0.1, -0.1, 0.3), Interval(0.1, np.nan, np.nan)]
)
def test_nothing_replicates_without_a_contrast_beyond_doubt(contrast):
    claim = Claim("x", ".5", Interval(0.5, 0.45, 0.55), (0.4, 0.6), contrast=contrast)
    assert claim.verdict == "as predicted"


def test_a_verdict_among_many_is_by_an_interval_that_holds_for_all():
    """Against exact intervals of a count of zero; a normal interval is widened by more than it
    needs.
    """
    for n in (8, 64):
        alone, of_ten = (1 - alpha ** (1 / n) for alpha in (0.025, 0.0025))
        wider = together(Interval(0.0, 0.0, alone), 10)
        assert wider.low == 0
        assert wider.high == pytest.approx(of_ten, rel=0.2)
    half = norm.ppf(0.975)
    assert together(Interval(0.0, -half, half), 10).high > norm.ppf(1 - 0.0025)
    alone = Claim("x", "–", Interval(0.9, 0.82, 0.95), (0.8, 1.0), share=True)
    assert alone.verdict == "as predicted"
    assert replace(alone, questions=10).verdict == "undecided"
    assert replace(alone, questions=10).told_basis.endswith("one of 10 questions")
    certain = Claim("x", "–", Interval(1.0, 0.95, 1.0), (0.8, 1.0), questions=10, share=True)
    assert certain.verdict == "as predicted"


def test_what_was_not_predicted_is_exploratory():
    assert Claim("x", ".5", Interval(0.5, 0.45, 0.55), None).verdict == "exploratory"
    assert Claim("x", ".5", Interval(*[np.nan] * 3), None).verdict == "not run here"


def test_a_report_is_written_whole(tmp_path, capsys):
    beyond = Interval(0.2, 0.1, 0.3)
    claims = [
        Claim("a", ".5", Interval(0.5, 0.45, 0.55), (0.4, 0.6), contrast=beyond, basis="64 images"),
        Claim("b", "–", Interval(*[np.nan] * 3), (0, 1)),
    ]
    report("title", claims, tmp_path, model="m")
    assert "title" in capsys.readouterr().out
    written = json.loads((tmp_path / "claims.json").read_text())
    assert written["model"] == "m"
    assert [row["verdict"] for row in written["claims"]] == ["replicates", "not run here"]
    assert written["claims"][1]["mean"] is None
    assert pd.read_parquet(tmp_path / "claims.parquet")["verdict"].tolist() == [
        "replicates",
        "not run here",
    ]


def test_a_stage_is_made_again_when_its_code_has_changed(tmp_path):
    model = HookedTextToImage.from_pretrained("rte-nano")
    module: dict[str, object] = {"__name__": "recipe", "pd": pd}
    for helper, expected in (("1", 1), ("1", 1), ("2", 2)):
        exec(
            f"def value(): return {helper}\ndef make(model, n): return pd.DataFrame({{'x': "
            f"[value()] * n}})",
            module,
        )
        assert stage(tmp_path, "s", model, module["make"], 2)["x"].tolist() == [expected] * 2
    assert len(list((tmp_path / "stages").iterdir())) == 2


def test_what_a_bag_of_words_cannot_tell_apart():
    """Three images bind; one is right, one the opposite, one on the other axis."""
    nan = np.nan
    rows = pd.DataFrame(
        {
            "relation": ["above", "above", "upper_left", "left"],
            "unique_binding": [1.0, 1.0, 1.0, 0.0],
            "relation_loose": [1.0, 0.0, 0.0, 0.0],
            "x1": [50, 50, 80, nan],
            "x2": [50, 50, 40, nan],
            "y1": [20, 80, 20, nan],
            "y2": [80, 20, 80, nan],
        }
    )
    found = {question: answer.mean for question, answer in positions_needed.answer(rows).items()}
    assert found == pytest.approx(
        {
            "binds": 3 / 4,
            "relates": 1 / 4,
            "relates, of those that bind": 1 / 3,
            "has the axis right, of those that bind": 2 / 3,
        }
    )


def test_the_goes_before_the_second_object():
    assert (
        robustness.the_second("red circle is above blue square")
        == "red circle is above the blue square"
    )
    assert (
        robustness.the_second("circle is to the left of square")
        == "circle is to the left of the square"
    )


def test_changes_by_a_template_are_of_the_same_scenes():
    rows = [
        {"split": "train", "template": "is", "scene": i, "relation_loose": float(i < 6)}
        for i in range(8)
    ]
    rows += [
        {"split": "train", "template": "the both", "scene": i, "relation_loose": 0.0}
        for i in (7, 1)
    ]
    table = pd.DataFrame(rows)
    assert robustness.changes(table, "the both", "relation_loose").to_dict() == {1: -1.0, 7: 0.0}
    assert robustness.change(table, "the both", "relation_loose").mean == -0.5
    assert len(robustness.changes(table, "navy", "relation_loose")) == 0


def test_later_is_a_ratio_of_samples_with_its_bracket():
    came = pd.DataFrame(
        {"samples": [100, 400, pd.NA], "before": [50, 200, pd.NA]}, index=["a", "b", "never"]
    ).astype("Int64")
    assert learning_dynamics.later(came, "a", "b") == pytest.approx((2, 1, 3))
    assert np.isnan(learning_dynamics.later(came, "a", "never").mean)
    assert learning_dynamics.times(came, "b", "never") == "b 400, never never"
