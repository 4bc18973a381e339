"""The page about this suite is what the suite says."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import table
from .oracles import TESTS


def test_the_page_is_up_to_date(pytestconfig: pytest.Config) -> None:
    tests, folder = pytestconfig.stash[TESTS], Path(__file__).parent
    if {test.path for test in tests} != set(folder.glob("test_*.py")):
        pytest.skip("only a part of the suite was collected")
    assert table.PAGE.read_text() == table.page(tests), "run `python -m tests.conformance.table`"
