"""The page of recipes is made from what they wrote, and is the one that stands in the folder."""

from __future__ import annotations

import json
import pkgutil

import pytest

import recipes
from dit_lens.stats import Interval
from recipes import run_all
from recipes.claims import Claim, report

SHOWN_ELSEWHERE = {"pixart_sigma", "relation_head"}
SHARED = {"circuit_figures", "claims", "knockouts"}
TOOLS = {"bundle_model", "bundle_text_encoder", "memory_plan", "run_all", "zoo_cards"}


def test_every_recipe_is_on_the_page():
    assert {module.name for module in pkgutil.iter_modules(recipes.__path__)} == SHOWN_ELSEWHERE | SHARED | TOOLS | set(
        run_all.FIGURES
    )
    text = (run_all.HERE / "README.md").read_text()
    for name in run_all.FIGURES:
        assert f"## {name}\n\n{run_all.question(name)}" in text
        assert (run_all.HERE / "figures" / f"{name}.png").stat().st_size < 200_000


def test_a_page_has_verdicts_numbers_and_escaped_bars(tmp_path, capsys):
    claims = [
        Claim("a|b", ".5", Interval(0.5, 0.45, 0.55), (0.4, 0.6), "control"),
        Claim("c", "–", Interval(*[float("nan")] * 3), (0, 1)),
    ]
    report("title", claims, tmp_path)
    page = run_all.page({"t5_fusion": json.loads((tmp_path / "claims.json").read_text())}, {"m": "0123456789abcdef" * 4})
    assert "| a\\|b | .5 | 0.500 [0.450, 0.550] | 0.4 … 0.6 | control | **replicates** |" in page
    assert "| c | – | – | 0 … 1 |  | **not run here** |" in page
    assert "| `m` | `0123456789abcdef` |" in page
    assert "replicates 1, not run here 1" in page


def test_an_unknown_recipe_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no recipe 'typo': choose accuracy_table"):
        run_all.main(run_all.Config(only=("typo",), results=tmp_path))
