"""The comparison of heat maps runs, and all sides' maps are equal, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import heat_maps


@pytest.mark.slow
def test_all_sides_give_one_map(tmp_path: Path) -> None:
    out = tmp_path / "heat_maps.json"
    how = {"layers": 1, "heads": 2, "side": 16, "repeats": 1, "memory": False}
    heat_maps.main(heat_maps.Config(**how, out=out))
    rows = json.loads(out.read_text())["rows"]
    sides = {row["side"] for row in rows}
    assert {heat_maps.PLAIN, heat_maps.OURS, heat_maps.TRACE} <= sides
    assert len(rows) == 2 * len(sides)
    assert all(row["difference"] < 1e-4 for row in rows if row["side"] != heat_maps.PLAIN)
