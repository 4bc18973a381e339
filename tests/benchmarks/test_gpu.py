"""Each row of the GPU benchmarks runs, at its smallest size and on the CPU."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu


@pytest.mark.slow
@pytest.mark.parametrize("row", gpu.RUNS, ids=[row.name or row.module for row in gpu.RUNS])
def test_a_row_runs_and_is_written(row, tmp_path):
    gpu.dry_run(row, tmp_path / "row.json")
    assert json.loads((tmp_path / "row.json").read_text())["rows"]
