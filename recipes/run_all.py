"""Run every recipe at its default settings, and write recipes/README.md, and claims.csv with its
numbers, from their results.

`python -m recipes.run_all`

A recipe that crashes makes the run fail, after the others have run; a verdict, whatever it is, does
not. Recipes resume, so a run that was stopped goes on where it was. Claims of recipes
that have left no results here stay on the page, as long as the weights of the models that a recipe asks
have not changed: `--only` brings one recipe up to date.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from PIL import Image
from rich.console import Console

from dit_lens.stats import Interval
from dit_lens.store import Index, Store, write_whole
from hooked_models import HookedTextToImage, list_models

HERE = Path(__file__).parent
FIGURE_WIDTH = 900
PACKAGES = ("torch", "diffusers", "transformers", "transformer-lens")
FIGURES = {
    "accuracy_table": "accuracies.png",
    "attention_synopsis": "heads.png",
    "relation_heads": "three_ways.png",
    "recurrence": "recurrence.png",
    "object_heads": "dependence.png",
    "t5_fusion": "variance.png",
    "robustness": "robustness.png",
    "positions_needed": "positions_needed.png",
    "learning_dynamics": "t5-micro.png",
    "relation_circuit": "circuit.png",
    "edge_circuit": "faithfulness.png",
    "text_carrier": "text_carrier.png",
    "held_out_diagonal": "diagonals.png",
    "sparsity": "effective_heads.png",
    "improve_relations": "dose_response.png",
    "three_objects": "shares.png",
}
"""Every recipe that states claims, in the order of the page → the figure of its that is shown
there.
"""
COLUMNS = (
    *("recipe", "claim", "paper", "mean", "low", "high"),
    *("predicted_low", "predicted_high", "control", "verdict"),
)
"""Columns of claims.csv."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|-?inf")
STUDIES = ("text_carrier", "held_out_diagonal", "sparsity")
"""Recipes that read study models, which are not bundled (docs/training.md)."""


@dataclass(frozen=True)
class Config:
    """Settings of the run."""

    only: tuple[str, ...] = ()
    """Recipes to run; all unless given."""
    run: bool = True
    """Off: only write the page."""
    results: Path = Path("results")
    runs: Path = Path("runs")
    """Folder with the study models' runs; without it, the recipes that read them do not run."""


def main(config: Config) -> None:
    console = Console()
    if unknown := [name for name in config.only if name not in FIGURES]:
        sys.exit(f"There is no recipe {unknown[0]!r}: choose {', '.join(FIGURES)}.")
    failed = []
    hashes = {name: HookedTextToImage.from_pretrained(name).digest() for name in list_models()}
    for name in config.only or FIGURES if config.run else ():
        console.rule(name)
        start = time.perf_counter()
        command = [sys.executable, "-m", f"recipes.{name}", "--out", str(config.results / name)]
        if name in STUDIES:
            if not config.runs.exists():
                console.print(f"Not run: there are no study models in {config.runs} (--runs).")
                continue
            command += ["--runs", str(config.runs)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        else:
            asked = {model: hashes[model] for model in models_of(name)}
            with Store(config.results / name, {}, wait=True) as store:
                store.put_json("models.json", asked)
        console.print(f"{name}: {time.perf_counter() - start:.0f} s")
    found = {
        name: folder
        for name, folder in current(config.results, hashes).items()
        if name not in failed
    }
    pictures = HERE / "figures"
    pictures.mkdir(exist_ok=True)
    for name, folder in found.items():
        shrink(folder / FIGURES[name], pictures / f"{name}.png")
    readme = HERE / "README.md"
    reports = {name: json.loads(whole(at, "claims.json").read_text()) for name, at in found.items()}
    older = kept(readme.read_text(), hashes)
    text = page(reports, hashes, older)
    write_whole(readme, lambda path: path.write_text(text))
    write_whole(HERE / "claims.csv", lambda path: numbers(text).to_csv(path, index=False))
    if gone := [name for name in FIGURES if name not in {*reports, *older}]:
        console.print(
            "Not on the page, since they have left no results here and their models have changed: "
            f"{', '.join(gone)}."
        )
    if failed:
        sys.exit(f"Crashed: {', '.join(failed)}.")


def current(results: Path, hashes: dict[str, str]) -> dict[str, Path]:
    """Recipe → its folder, of those that have left claims, unless models.json says that it was of
    other weights.
    """
    found = {}
    for name in FIGURES:
        folder, asked = results / name, results / name / "models.json"
        same = (
            not asked.exists()
            or json.loads(whole(folder, asked.name).read_text()).items() <= hashes.items()
        )
        if (folder / "claims.json").exists() and same:
            found[name] = folder
    return found


def whole(folder: Path, name: str) -> Path:
    """A file of a recipe. Raises OSError if it differs from the file written."""
    index = Index.read(folder)
    return folder / name if index is None or name not in index.files else index.path(name)


def kept(text: str, hashes: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Recipe → its row and its section on an older page, of those whose models' weights are still
    those of the page.
    """
    listed = dict(re.findall(r"^\| `([\w-]+)` \| `(\w+)` \|$", text, flags=re.M))
    same = {name for name, value in listed.items() if hashes.get(name, "").startswith(value)}
    rows = {name: row for row, name in re.findall(r"^(\| \[`(\w+)`\].*)$", text, flags=re.M)}
    sections = re.findall(r"^(## (\w+)\n.*?\n)(?=\n## |\Z)", text, flags=re.M | re.S)
    return {
        name: (rows[name], section)
        for section, name in sections
        if name in FIGURES and models_of(name) <= same
    }


def models_of(recipe: str) -> set[str]:
    """The bundled models that a recipe asks unless told otherwise: those named in the defaults of
    its settings.
    """
    named: set[str] = set()
    for value in vars(importlib.import_module(f"recipes.{recipe}").Config()).values():
        named |= {
            text.split("/")[0]
            for text in (value if isinstance(value, tuple) else (value,))
            if isinstance(text, str)
        }
    return named & set(list_models())


def page(
    found: dict[str, dict[str, Any]],
    hashes: dict[str, str],
    older: dict[str, tuple[str, str]] | None = None,
) -> str:
    """The page, in markdown, of the recipes' claims.json by name and of the models' hashes; other
    recipes as `kept`.
    """
    parts = dict(older or {})
    for name, report in found.items():
        verdicts = Counter(claim["verdict"] for claim in report["claims"])
        told = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.most_common())
        parts[name] = f"| [`{name}`](#{name}) | {question(name)} | {told} |", section(name, report)
    shown = [parts[name] for name in FIGURES if name in parts]
    overview = ["| recipe | asks | verdicts |", "|---|---|---|", *(row for row, _ in shown)]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    models = "\n".join(f"| `{name}` | `{value[:16]}` |" for name, value in hashes.items())
    return f"""# Recipes

Made by `make recipes` from what the recipes found, at their default settings; nothing is typed. Each recipe states what it
predicts before it measures, and its docstring what would falsify it. A verdict is by the whole 95 % interval: inside the
predicted range ("replicates", or "as predicted" of what is not in the paper), outside of it, or neither ("undecided"). The paper:
Wang, Fan, Pan, *Circuit Mechanisms for Spatial Relation Generation in Diffusion Transformers* (arXiv 2601.06338), whose models
are larger and whose data differ (docs/scenes.md).

What they say together is on [one page](../docs/findings.md); predictions that are not in a docstring are in
[PREDICTIONS.md](PREDICTIONS.md). The tables below as numbers: [claims.csv](claims.csv).

{chr(10).join(overview)}

Two are not here: `relation_head`, the short demonstration (`make demo`), and `pixart_sigma`, which needs a GPU and the pretrained
weights (`python -m recipes.pixart_sigma --detector google/owlv2-base-patch16-ensemble`).

Python {platform.python_version()}, {versions}.

| model | weights |
|---|---|
{models}

{chr(10).join(whole for _, whole in shown)}"""


def numbers(text: str) -> pd.DataFrame:
    """The tables of a page as numbers, to three decimals as they stand there; `claims.parquet` in a
    recipe's results has all.
    """
    rows = []
    for name, section in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S):
        for line in re.findall(r"^\| (.*\*\*) \|$", section, flags=re.M):
            claim, paper, here, predicted, control, verdict = re.split(r" (?<!\\)\| ", line)
            mean, low, high = (*(float(x) for x in NUMBER.findall(here)), *[np.nan] * 3)[:3]
            if "[" not in here:
                low = high = mean
            bounds = (*(float(x) for x in NUMBER.findall(predicted)), np.nan, np.nan)[:2]
            found = [name, claim.replace("\\|", "|"), paper, mean, low, high, *bounds]
            rows.append([*found, control.replace("\\|", "|"), verdict.strip("*")])
    return pd.DataFrame(rows, columns=COLUMNS)


def question(name: str) -> str:
    """Question of a recipe: the first sentence of its docstring, without its command."""
    return (importlib.import_module(f"recipes.{name}").__doc__ or "").split("`python")[0].strip()


def section(name: str, report: dict[str, Any]) -> str:
    """One recipe's command, figure and table."""
    rows = [f"| {' | '.join(map(cell, row))} |" for row in map(claim_row, report["claims"])]
    return f"""## {name}

{question(name)} `python -m recipes.{name}`

![{name}](figures/{name}.png)

| claim | paper | here [95 %] | predicted | control | verdict |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def claim_row(claim: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one claim."""
    bounds = [np.nan if claim[bound] is None else claim[bound] for bound in Interval._fields]
    here = "–" if np.isnan(bounds[0]) else str(Interval(*bounds))
    predicted = "{:g} … {:g}".format(*claim["predicted"]) if claim["predicted"] else "–"
    beside = "; ".join(filter(None, (claim["control"], claim.get("basis"))))
    return claim["claim"], claim["paper"], here, predicted, beside, f"**{claim['verdict']}**"


def cell(text: str) -> str:
    """A text that a table can hold."""
    return text.replace("|", "\\|").replace("\n", " ")


def shrink(source: Path, target: Path) -> None:
    """A copy of a figure at the page's width, transparent where it is, with values in steps of 5:
    half the bytes.
    """
    image = Image.open(source).convert("RGBA")
    if image.width > FIGURE_WIDTH:
        height = round(image.height * FIGURE_WIDTH / image.width)
        image = image.resize((FIGURE_WIDTH, height), Image.Resampling.BOX)
    image.point(lambda value: 5 * round(value / 5)).save(target, optimize=True, quality=90)


if __name__ == "__main__":
    main(tyro.cli(Config))
