"""Every figure that a recipe writes is legible."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

from dit_lens.viz import style


@pytest.fixture(autouse=True)
def _legible(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Figure.savefig

    def savefig(figure: Figure, path: Any, **options: Any) -> None:
        assert style.problems(figure) == [], path
        write(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
