"""Effective numbers of heads against those of known shares."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dit_lens.readout.screening import AXES
from recipes import sparsity


def course(*gains: tuple[float, ...]) -> pd.DataFrame:
    """A course of training, one tuple of gains a point; other quantities stand beside them."""
    rows = [
        {"samples": 10 * (point + 1), "quantity": quantity, "source": source}
        | {"layer": head // 2, "head": head % 2, "value": value}
        for point, of_heads in enumerate(gains)
        for quantity in (*(f"gain_{axis}" for axis in AXES), "cosine")
        for source in ("words", "shape2")
        for head, value in enumerate(of_heads if source == "words" else (9.0, 0.0, 0.0, 0.0))
    ]
    return pd.DataFrame(rows)


def test_equal_heads_count_in_full_and_one_head_counts_once() -> None:
    found = sparsity.effective_heads(course((1, 1, 1, 1), (0, -3, 0, 0), (1, -1, 0, 0)))
    assert found["samples"].tolist() == [10, 20, 30]
    np.testing.assert_allclose(found["effective"], [4, 1, 2])


def test_claims_compare_runs_of_one_setting() -> None:
    courses = {
        run: sparsity.effective_heads(course(gains))
        for run, gains in {
            (3, "0"): (1, 1, 0, 0),
            (3, "0.5"): (1, 0, 0, 0),
            (12, "0"): (1, 1, 1, 1),
        }.items()
    }
    claims = {claim.what: claim for claim in sparsity.claims_of(courses)}
    assert len(claims) == 6
    fewer = claims["3 heads a layer: effective heads with weight decay .5 minus without"]
    assert (fewer.here.mean, fewer.verdict) == (pytest.approx(-1), "as predicted")
    growth = claims["weight decay 0: effective heads of 12 heads a layer, in those of 3"]
    assert growth.here.mean == pytest.approx(2)
    assert sum(claim.verdict == "not run here" for claim in claims.values()) == 4
