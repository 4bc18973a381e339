"""Every figure that a recipe writes is legible; it is drawn once, in few pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from dit_lens.viz import style


@pytest.fixture(autouse=True)
def _legible(monkeypatch: pytest.MonkeyPatch) -> None:
    write, checked = Figure.savefig, set()

    def savefig(figure: Figure, path: Any, **options: Any) -> None:
        if path in checked and Path(path).exists():  # by a run that goes on
            return
        assert style.problems(figure) == [], path
        figure.set_layout_engine("none")  # everything is in its place now
        checked.add(path)
        write(figure, path, **options | {"dpi": 50})

    monkeypatch.setattr(Figure, "savefig", savefig)
