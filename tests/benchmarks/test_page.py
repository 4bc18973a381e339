"""The table of docs/benchmarks.md is what its numbers give, and these come from the scripts' JSON."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from benchmarks import page


def test_the_page_holds_the_table():
    measured = json.loads(page.MEASURED.read_text())
    text = page.PAGE.read_text()
    inside = text.partition(page.START)[2].partition(page.END)[0].strip()
    assert inside == page.table(measured)
    assert list(measured) == [row.what for row in page.ROWS]


def test_numbers_are_taken_from_one_row_of_a_scripts_table(tmp_path, monkeypatch):
    rows = [{"width": 192, "ratio": 0.5}, {"width": 1152, "ratio": 0.25}]
    machine = {"processor": "P", "threads": 1, "load": 0.5, "torch": "2"}
    (tmp_path / "forward.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    copy, text = tmp_path / "measured.json", tmp_path / "page.md"
    copy.write_text(page.MEASURED.read_text())
    text.write_text(f"before\n{page.START}\nold\n{page.END}\nafter\n")
    monkeypatch.setattr(page, "MEASURED", copy)
    monkeypatch.setattr(page, "PAGE", text)
    page.main(page.Config(take=True, results=tmp_path))
    assert "| 0.250 | " in text.read_text()
    assert "P, 1 thread(s), load 0.5" in text.read_text()
    assert text.read_text().startswith("before")
    assert text.read_text().endswith("after\n")
    assert "old" not in text.read_text()
    with pytest.raises(KeyError, match="0 rows"):
        page.Cell("ratio", {"width": 7}).read(pd.DataFrame(rows))
