"""The page of recipes is made from what they wrote, and is the one that stands in the folder."""

from __future__ import annotations

import io
import json
import pkgutil
import re

import numpy as np
import pandas as pd
import pytest

import recipes
from dit_lens.stats import Interval, finite
from hooked_models import list_models
from recipes import run_all
from recipes.claims import Claim, report

SHOWN_ELSEWHERE = {"pixart_sigma", "relation_head"}
SHARED = {
    "circuit_figures",
    "claims",
    "dose_figure",
    "knockouts",
    "relation_das",
    "relation_figure",
}
TOOLS = {"bundle_model", "bundle_text_encoder", "memory_plan", "run_all", "zoo_cards"}


def test_every_recipe_is_on_the_page():
    assert {
        module.name for module in pkgutil.iter_modules(recipes.__path__)
    } == SHOWN_ELSEWHERE | SHARED | TOOLS | set(run_all.FIGURES)
    text = (run_all.HERE / "README.md").read_text()
    for name in run_all.FIGURES:
        assert f"## {name}\n\n{run_all.question(name)}" in text
        assert (run_all.HERE / "figures" / f"{name}.png").stat().st_size < 200_000


def test_a_page_has_verdicts_numbers_and_escaped_bars(tmp_path, capsys):
    claims = [
        Claim(
            "a|b",
            ".5",
            Interval(0.5, 0.45, 0.55),
            (0.4, 0.6),
            "control",
            Interval(0.2, 0.1, 0.3),
            "64 images",
        ),
        Claim("d", "–", finite(18), None),
        Claim("c", "–", Interval(*[float("nan")] * 3), (0, 1)),
    ]
    report("title", claims, tmp_path)
    page = run_all.page(
        {"t5_fusion": json.loads((tmp_path / "claims.json").read_text())},
        {"m": "0123456789abcdef" * 4},
    )
    assert (
        "| a\\|b | .5 | 0.500 [0.450, 0.550] | 0.4 … 0.6 | control; 64 images | **replicates** |"
        in page
    )
    assert "| d | – | 18.000 | – |  | **exploratory** |" in page
    assert "| c | – | – | 0 … 1 |  | **not run here** |" in page
    assert "| `m` | `0123456789abcdef` |" in page
    assert "replicates 1, exploratory 1, not run here 1" in page


def test_the_tables_stand_as_numbers_beside_the_page(tmp_path, capsys):
    """Each row of each table, and the same numbers; of a recipe, with all digits."""
    text, stored = (run_all.HERE / "README.md").read_text(), run_all.HERE / "claims.csv"
    pd.testing.assert_frame_equal(pd.read_csv(stored, keep_default_na=True), as_read(text))
    assert len(pd.read_csv(stored)) == text.count("** |\n")
    claims = [
        Claim("a|b", ".5", Interval(0.5123456, -0.45, 0.55), (-0.4, 0.6), "x 3"),
        Claim("d", "–", finite(18), None),
        Claim("c", "–", Interval(*[float("nan")] * 3), (0, 1)),
    ]
    report("title", claims, tmp_path)
    whole = pd.read_csv(tmp_path / "claims.csv")
    found = run_all.numbers(
        run_all.page({"t5_fusion": json.loads((tmp_path / "claims.json").read_text())}, {})
    )
    assert found["claim"].tolist() == whole["claim"].tolist() == ["a|b", "d", "c"]
    columns = ["mean", "low", "high", "predicted_low", "predicted_high"]
    assert all(
        np.issubdtype(table[name].dtype, np.number) for table in (found, whole) for name in columns
    )
    np.testing.assert_allclose(found[columns], whole[columns].to_numpy(float), atol=5e-4)
    assert whole["mean"][0] == 0.5123456


def as_read(text):
    return pd.read_csv(io.StringIO(run_all.numbers(text).to_csv(index=False)))


def test_recipes_that_were_not_run_again_stay_on_the_page_while_weights_are_the_same():
    text, weights = (run_all.HERE / "README.md").read_text(), "0123456789abcdef" * 4
    text = re.sub(r"^\| `([\w-]+)` \| `\w+` \|$", rf"| `\1` | `{weights[:16]}` |", text, flags=re.M)
    hashes = dict.fromkeys(list_models(), weights)
    gone = "\n## gone\n\nA recipe that is no more.\n"
    older = run_all.kept(text + gone, hashes)
    assert list(older) == list(run_all.FIGURES)
    again = run_all.page({}, hashes, older)
    assert again.split("Python ")[0] == text.split("Python ")[0]
    assert again.split("|---|---|\n")[2] == text.split("|---|---|\n")[2]
    new = run_all.page({"t5_fusion": {"claims": []}}, hashes, older)
    assert set(again.splitlines()) - set(new.splitlines()) == set(section_rows(older["t5_fusion"]))


def test_a_recipe_leaves_the_page_with_the_weights_it_was_run_on():
    asked = {name: run_all.models_of(name) for name in run_all.FIGURES}
    assert asked["three_objects"] == {"rte-trios-micro"}
    assert asked["recurrence"] == set(list_models())
    assert {name for name, models in asked.items() if not models} < set(run_all.STUDIES)
    text = (run_all.HERE / "README.md").read_text()
    hashes = dict(re.findall(r"^\| `([\w-]+)` \| `(\w+)` \|$", text, flags=re.M))
    for name in list_models():
        left = {recipe for recipe, models in asked.items() if name in models}
        assert set(run_all.kept(text, hashes | {name: "f" * 64})) == set(run_all.FIGURES) - left
        assert left, f"no recipe asks {name}"


def test_results_of_other_weights_are_not_shown(tmp_path):
    folder = tmp_path / "t5_fusion"
    folder.mkdir()
    assert run_all.current(tmp_path, {"m": "new"}) == {}
    (folder / "claims.json").write_text("{}")
    # run by hand, who knows on what
    assert run_all.current(tmp_path, {"m": "new"}) == {"t5_fusion": folder}
    for asked, shown in ({"m": "new"}, 1), ({"m": "old"}, 0), ({"gone": "old"}, 0):
        (folder / "models.json").write_text(json.dumps(asked))
        assert len(run_all.current(tmp_path, {"m": "new", "other": "x"})) == shown


def section_rows(part: tuple[str, str]) -> list[str]:
    """A recipe's row of the overview and those of its table."""
    row, section = part
    return [row, *[line for line in section.splitlines() if line.endswith("** |")]]


def test_an_unknown_recipe_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no recipe 'typo': choose accuracy_table"):
        run_all.main(run_all.Config(only=("typo",), results=tmp_path))
