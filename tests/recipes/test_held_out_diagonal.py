"""The unread diagonal's claims on made-up images."""

from __future__ import annotations

import pandas as pd
import pytest

from dit_lens.readout.screening import AXES
from recipes import held_out_diagonal as recipe


def heads(*shares: tuple[float, float]) -> pd.DataFrame:
    """Screening of one layer, a pair of shares (vertical, horizontal) a head."""
    return pd.DataFrame(
        [
            {
                "layer": 0,
                "head": head,
                "axis": axis,
                "share": dict(zip(AXES, pair, strict=True))[axis],
            }
            for head, pair in enumerate(shares)
            for axis in AXES
        ]
    )


def images(right: int, wrong: int) -> pd.DataFrame:
    """Bound images of the unread diagonal, one that is not bound, and 40 of those read, all right."""
    row = {"bound": 1.0, "x": 1.0, "y": 1.0}
    rows = [row | {"relation": recipe.UNREAD, "right": 1.0}] * right
    rows += [row | {"relation": recipe.UNREAD, "right": 0.0, "y": 0.0}] * wrong
    rows += [row | {"relation": recipe.UNREAD, "right": 0.0, "bound": 0.0}]
    return pd.DataFrame(rows + [row | {"relation": recipe.READ[0], "right": 1.0}] * 40)


@pytest.mark.parametrize(
    ("shares", "right", "verdict"),
    [
        (((0.9, 0.1), (0.1, 0.9)), 40, "as predicted"),
        (((0.9, 0.1), (0.1, 0.9)), 10, "not as predicted"),
        (((0.6, 0.5), (0.4, 0.5)), 10, "as predicted"),
        (((0.6, 0.5), (0.4, 0.5)), 40, "not as predicted"),
    ],
)
def test_the_prediction_depends_on_the_heads(
    shares: tuple[tuple[float, float], ...], right: int, verdict: str
) -> None:
    shared, unread, placed, beside = recipe.claims_of(
        "run", heads(*shares), images(right, 40 - right)
    )
    assert shared.here.mean == pytest.approx(max(min(pair) for pair in shares))
    assert (unread.here.mean, unread.verdict) == (right / 40, verdict)
    assert placed.here.mean == pytest.approx((right + 1) / 41)
    assert beside.here.mean == pytest.approx(right / 40 - 1)
