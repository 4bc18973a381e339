"""Every recipe runs at smoke settings, leaves its claims and figures, and measures nothing a second
time.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib import pyplot

from dit_lens import screening
from dit_lens.store import Store
from hooked_models import HookedTextToImage
from hooked_models.pipelines.hub import ZOO
from recipes import edge_circuit, held_out_diagonal, relation_head, run_all

SMOKE: dict[str, dict[str, Any]] = {
    "accuracy_table": {"models": ("rte-micro", "rte-trios-micro")},
    "attention_synopsis": {"model": "rte-nano", "scenes": 6, "comparison": ""},
    "edge_circuit": {"model": "rte-nano", "ig_steps": 1},
    "held_out_diagonal": {"images": 2},
    "improve_relations": {"tasks": ("rte-nano",), "choosing": 2, "reporting": 2},
    "learning_dynamics": {"runs": ("rte-nano", "rte-nopos-micro", "not there")},
    "object_heads": {"model": "rte-nano", "scenes": 6, "patched": 1},
    "positions_needed": {},
    "recurrence": {"models": ("rte-nano", "rte-micro", "rte-nopos-micro"), "looks": 3},
    "relation_circuit": {"models": ("rte-nano",), "looks": 8, "images": 3},
    "relation_heads": {"looked": 4, "singles": 1, "pairs": 2},
    "robustness": {"looks": 3, "images": 1},
    "sparsity": {},
    "t5_fusion": {"rte": "rte-nano", "looks": 2, "images": 1},
    "text_carrier": {"bundled": ("rte-nano",), "scenes": 3, "images": 2},
    "three_objects": {"model": "rte-micro", "scenes": 2, "knockouts": 2, "shares": 2, "served": 2},
}
"""Recipe → its smallest settings."""
STEPS = 6
"""Steps of every generation, in the place of 14; recipes look at steps 0 to 3 and from 4 on."""
DRAWS_AGAIN = ("edge_circuit", "object_heads")
"""Recipes that run the model for a figure, after all that they measure."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    """Counts that are no settings."""
    solver = HookedTextToImage.solver
    monkeypatch.setattr(
        HookedTextToImage,
        "solver",
        lambda model, num_steps: replace(solver(model, STEPS), num_steps=num_steps),
    )
    monkeypatch.setattr(edge_circuit, "SHARES", (0.05, 0.5))
    monkeypatch.setattr(edge_circuit, "HALVINGS", 1)
    monkeypatch.setattr(edge_circuit, "RELATIONS", ("above", "left"))
    yield
    pyplot.close("all")


def study_models(folder: Path) -> Path:
    """A folder of finished runs, each of them rte-nano; gains of heads are made up."""
    for name in (*held_out_diagonal.RUNS, "heads-3-decay-0", "heads-3-decay-0.5"):
        run = folder / name
        Store(run, {"steps": 2}).close()
        (run / "pipeline").symlink_to(ZOO / "rte-nano")
        (run / "metrics.jsonl").write_text('{"step": 2}\n')
        gains = [
            {"samples": samples, "quantity": f"gain_{axis}", "source": "words", "layer": 0}
            | {"head": head, "value": 1.0 + head * samples}
            for axis in screening.AXES
            for samples in (8, 16)
            for head in range(3)
        ]
        pd.DataFrame(gains).to_parquet(run / "dynamics.parquet")
    return folder


def test_every_recipe_has_smoke_settings() -> None:
    assert set(SMOKE) == set(run_all.FIGURES)


@pytest.mark.parametrize("name", SMOKE)
def test_a_recipe_runs_and_goes_on_where_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = importlib.import_module(f"recipes.{name}"), tmp_path / "out"
    runs = {"runs": study_models(tmp_path / "runs")} if name in run_all.STUDIES else {}
    config = recipe.Config(**SMOKE[name], **runs, out=out)
    recipe.main(config)
    printed, written = capsys.readouterr().out, json.loads((out / "claims.json").read_text())
    assert len(written["claims"]) == len(pd.read_parquet(out / "claims.parquet")) >= 3
    assert all(claim["verdict"] for claim in written["claims"])
    # whose figures are named by run
    assert (out / run_all.FIGURES[name]).exists() or name == "learning_dynamics"
    assert list(out.glob("*.png"))
    stages = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stages/*.parquet")}

    def measured_again(*_: object, **__: object) -> None:
        raise AssertionError("what was measured is measured again")

    if stages and name not in DRAWS_AGAIN:
        monkeypatch.setattr(HookedTextToImage, "forward", measured_again)
    recipe.main(config)
    assert capsys.readouterr().out == printed
    assert json.loads((out / "claims.json").read_text()) == written
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stages/*.parquet")} == stages


def test_the_demonstration_redraws_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relation_head.main(relation_head.Config(images=4, out=tmp_path))
    assert "L1H1" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "redrawn.csv",
        "redrawn.png",
        "result.json",
    }
    table = pd.read_csv(tmp_path / "redrawn.csv").set_index(["heads", "relation drawn"])["mean"]
    assert (
        table["found heads", "opposite"]
        == table["random heads", "as prompted"]
        == table["as prompted", "as prompted"]
        == 1
    )
    assert table["random heads", "opposite"] == table["found heads", "as prompted"] == 0


def test_the_demonstration_says_what_it_needs() -> None:
    with pytest.raises(SystemExit, match="--heads"):
        relation_head.main(relation_head.Config(model="rte-nano"))
