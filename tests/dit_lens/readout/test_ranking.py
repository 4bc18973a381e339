"""A planted head is ranked first; p values are those of random labels."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from dit_lens import synopsis

from .groups import planted


def test_the_planted_head_is_ranked_first_with_interval_and_control():
    seen = planted()
    table = synopsis.rank_heads(seen, "object1", "relation", step=1)
    assert list(table.columns) == ["layer", "head", "mean", "low", "high", "control", "p"]
    assert (table.loc[0, "layer"], table.loc[0, "head"]) == (1, 0)
    assert table.loc[0, "p"] == 1 / 1000
    assert (table.loc[1:, "p"] > 0.01).all()
    one = seen.sel(layer=1, head=0, step=1, branch="cond", image_group="object1")
    by_prompt = one.groupby("prompt").mean()
    assert table.loc[0, "mean"] == pytest.approx(float(by_prompt.sel(text_group="relation").mean()))
    assert table.loc[0, "low"] < table.loc[0, "mean"] < table.loc[0, "high"]
    # over random labels, a prompt's expected value is the mean of its groups, pads left out
    expected = float(
        by_prompt.sel(text_group=["color1", "shape1", "relation", "eos"]).mean("text_group").mean()
    )
    assert table.loc[0, "control"] == pytest.approx(expected, abs=0.01)
    later = synopsis.rank_heads(seen, "object1", "color1", step="max")
    assert (later.loc[0, "layer"], later.loc[0, "head"]) == (0, 1)
    assert (
        later.loc[0, "mean"]
        > synopsis.rank_heads(seen, "object1", "color1", step="mean").loc[0, "mean"]
    )


def test_p_is_the_chance_that_random_labels_do_as_well():
    seen = planted(4, 1).isel(prompt=slice(1, 3), step=[0], text_group=slice(0, 4))
    seen[:] = 0.0
    seen.loc[{"text_group": "relation"}] = 1.0
    table = synopsis.rank_heads(seen, "object1", "relation", step=0, shuffles=4000)
    exact = (1 / 4) ** 2  # both prompts must draw that label
    low, high = binom.interval(0.9999, 4000, exact)
    assert ((low <= table["p"] * 4001 - 1) & (table["p"] * 4001 - 1 <= high)).all()
    assert (table["mean"] == 1).all()
