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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "own_task" else ()) for name in NAMES],
)
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
    assert path.stat().st_size < 500_000
    assert "/tmp/" not in path.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_first_code_cell_installs_the_wheel_where_there_is_none(name, monkeypatch, tmp_path):
    """As on Colab: the wheel beside the notebook, or a sentence."""
    code = [cell for cell in jupytext.read(FOLDER / f"{name}.py").cells if cell.cell_type == "code"]
    monkeypatch.chdir(tmp_path)
    called = []
    monkeypatch.setattr("subprocess.run", lambda command, check: called.append(command))
    exec(code[0].source, {})
    assert not called
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="Upload the wheel"):
        exec(code[0].source, {})
    (tmp_path / "dit_lens-0.1.0-py3-none-any.whl").touch()
    exec(code[0].source, {})
    extras = "viz,remote" if name == "remote" else "viz"
    assert called[0][-1] == f"dit_lens-0.1.0-py3-none-any.whl[{extras}]"


def test_there_are_six():
    assert NAMES == [
        "activation_cache",
        "circuits",
        "own_task",
        "remote",
        "transformer_lens_patching",
        "your_model",
    ]
