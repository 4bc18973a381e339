"""The page of all hooks is made of the table."""

from __future__ import annotations

from pathlib import Path

from hooked_models.hooks.page import page


def test_the_page_is_the_tables() -> None:
    written = Path(__file__).parents[3] / "docs" / "hooks.md"
    assert written.read_text() == page(), "run: python -m hooked_models.hooks.page > docs/hooks.md"
