"""The recipe on sizes: its rules on made-up tables, and its heads against a planted circuit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dit_lens import planted
from dit_lens.planted.recovery import ramp_heads
from recipes import recurrence


def ranking(shares: list[float], axis: str = "vertical") -> pd.DataFrame:
    """Heads 0 and 1 of every layer, with their shares."""
    layer, head = np.divmod(np.arange(len(shares)), 2)
    return pd.DataFrame(
        {
            "axis": axis,
            "layer": layer,
            "head": head,
            "share": shares,
            "gain": np.sqrt(shares),
            "depth": layer / layer.max(),
            "word": "relation",
        }
    )


def test_the_fewest_heads_that_hold_enough_are_found():
    assert recurrence.found(ranking([0.1, 0.5, 0.4, 0.0]), "vertical")["name"].tolist() == [
        "L0H1",
        "L1H0",
    ]
    assert recurrence.found(ranking([0.1, 0.45, 0.4, 0.05]), "vertical")["name"].tolist() == [
        "L0H1",
        "L1H0",
        "L0H0",
    ]


def test_heads_are_counted_and_their_depth_is_between_the_first_and_the_last_layer():
    table = pd.concat([ranking([0.5, 0.0, 0.0, 0.5]), ranking([0.0, 0.0, 1.0, 0.0], "horizontal")])
    count, depth, alone, late = recurrence.head_claims("model", table)
    assert (count.here.mean, depth.here.mean, alone.here.mean, late.here.mean) == (2, 0.5, 1, 1)
    assert count.control == "L0H0 0.50, L1H1 0.50; paper: one of 144"
    assert late.verdict == "not as predicted"


def test_random_sets_are_the_units_of_their_interval():
    rows = [
        {"axis": "vertical", "heads": heads, "scene": scene, "cosine": value}
        for heads, value in (("none", 1.0), ("found", -0.9), ("random 0", 0.9), ("random 1", 1.1))
        for scene in range(5)
    ]
    turned, random = recurrence.turn_claims("model", pd.DataFrame(rows))
    assert turned.here.mean == pytest.approx(-1.9)
    assert random.here.mean == pytest.approx(0)
    assert random.here.high > 1  # two sets say little
    assert random.basis.startswith("2 sets")


def test_the_planted_heads_of_an_axis_are_found():
    """Decoys that share their ramps are found, too: weights alone cannot tell them apart."""
    model, truth = planted.planted_circuit("two-stage", seed=0)
    ramps = {f"L{layer}H{head}" for layer, head in ramp_heads(truth)}
    table = recurrence.screening_by_axis(model)
    for axis, end in (("vertical", "_y"), ("horizontal", "_x")):
        own = {
            f"L{head.layer}H{head.head}"
            for head in truth.relation_heads
            if head.writes[0].endswith(end)
        }
        names = set(recurrence.found(table, axis)["name"])
        assert names <= ramps
        assert names & own


def test_without_a_gain_the_null_is_small():
    nothing, some = (
        pd.concat([ranking([size, 0.0, 0.0, 0.0], axis) for axis in ("vertical", "horizontal")])
        for size in (1e-4, 1.0)
    )
    assert [claim.verdict for claim in recurrence.null_claims(nothing, some)] == [
        "as predicted"
    ] * 2
