"""Every figure that a recipe writes is legible."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

from dit_lens.viz import style


@pytest.fixture(autouse=True)
def _legible(monkeypatch: pytest.MonkeyPatch) -> None:
    write, checked = Figure.savefig, set()

    def savefig(figure: Figure, path: Any, **options: Any) -> None:
        if path not in checked:  # a run that goes on writes the same figure again
            assert style.problems(figure) == [], path
            checked.add(path)
        write(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
