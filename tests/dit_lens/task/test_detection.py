"""Positions of objects relative to each other, from the boxes of any detector."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dit_lens.task.detection import COLUMNS, pair_positions, read_boxes

ROWS = [
    ("a.png", "cat", 0.9, 2.0, 10.0, 12.0, 40.0),  # centre (7, 25)
    ("a.png", "cat", 0.3, 50.0, 50.0, 60.0, 60.0),
    ("a.png", "dog", 0.8, 30.0, 0.0, 44.0, 20.0),  # centre (37, 10)
    ("b.png", "dog", 0.7, 0.0, 0.0, 8.0, 4.0),  # centre (4, 2)
    ("b.png", "dog", 0.8, 20.0, 30.0, 28.0, 36.0),  # centre (24, 33)
    ("b.png", "cat", 0.2, 100.0, 7.0, 104.0, 9.0),  # centre (102, 8)
    ("c.png", "cat", 0.6, 1.0, 1.0, 2.0, 2.0),
]
BOXES = pd.DataFrame(ROWS, columns=list(COLUMNS))


def test_the_surest_boxes_centres_are_compared() -> None:
    found = pair_positions(
        BOXES,
        {
            "b.png": ("dog", "cat"),
            "a.png": ("cat", "dog"),
            "c.png": ("cat", "dog"),
            "d.png": ("cat", "dog"),
        },
    )
    expected = pd.DataFrame(
        {
            "both": [True, True, False, False],
            "dx": [24.0 - 102.0, 7.0 - 37.0, np.nan, np.nan],
            "dy": [33.0 - 8.0, 25.0 - 10.0, np.nan, np.nan],
        },
        index=pd.Index(["b.png", "a.png", "c.png", "d.png"], name="image"),
    )
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(column: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=rf"no column {column}: they need image, label"):
        pair_positions(BOXES.drop(columns=column), {"a.png": ("cat", "dog")})
    BOXES.drop(columns=column).to_csv(tmp_path / "boxes.csv", index=False)
    with pytest.raises(
        ValueError, match=rf"boxes\.csv has no column {column}: boxes need image, label"
    ):
        read_boxes(tmp_path / "boxes.csv")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_boxes_are_read_back(suffix: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path, more = tmp_path / f"boxes.{suffix}", BOXES.assign(model="x")
    more.to_csv(path, index=False) if suffix == "csv" else more.to_parquet(path)
    pd.testing.assert_frame_equal(read_boxes(path), BOXES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "wide"])
@pytest.mark.parametrize("column", COLUMNS[2:])
def test_a_number_that_is_none_is_refused(column: str, value: object) -> None:
    wrong = BOXES.astype({column: object})
    wrong.loc[0, column] = value
    with pytest.raises(ValueError, match=column):
        pair_positions(wrong, {"a.png": ("cat", "dog")})
