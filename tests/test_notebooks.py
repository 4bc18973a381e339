"""Notebooks run, on small settings, and what is shown is what their text says."""

from __future__ import annotations

import runpy
from pathlib import Path

import jupytext
import matplotlib
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setenv("DIT_LENS_SMALL", "1")
    runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
def test_the_executed_notebook_is_that_of_the_text(name):
    path = FOLDER / f"{name}.ipynb"
    text, shown = jupytext.read(FOLDER / f"{name}.py"), nbformat.read(path, as_version=4)
    assert [(cell.cell_type, cell.source) for cell in shown.cells] == [
        (cell.cell_type, cell.source) for cell in text.cells
    ]
    code = [cell for cell in shown.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert path.stat().st_size < 300_000
    assert "/tmp/" not in path.read_text()


def test_there_are_three():
    assert NAMES == ["activation_cache", "circuits", "transformer_lens_patching"]
