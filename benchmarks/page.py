"""The table of docs/benchmarks.md, made from the scripts' JSON.

`python -m benchmarks.page --take` reads results/bench/*.json into `measured.json` beside this file:
a row's numbers, the machine, and its load. A row whose script was not run here keeps what it had.
Without `--take` only the table is written again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro

HERE = Path(__file__).parent
PAGE, MEASURED = HERE.parent / "docs" / "benchmarks.md", HERE / "measured.json"
START, END = "<!-- measured: benchmarks.page -->", "<!-- /measured -->"


@dataclass(frozen=True)
class Cell:
    """A number of a script's table, in words."""

    column: str
    where: dict[str, Any]
    form: str = "{:.3f}"

    def read(self, table: pd.DataFrame) -> str:
        """Raises KeyError unless one row of the table is meant."""
        for column, value in self.where.items():
            table = table[table[column] == value]
        if len(table) != 1:
            raise KeyError(f"{len(table)} rows have {self.where}.")
        return self.form.format(table[self.column].iloc[0])


@dataclass(frozen=True)
class Row:
    """A row of the page."""

    what: str
    peer: str
    aim: str
    script: str
    cells: tuple[Cell, ...]
    between: str = " / "


NODES, EDGES, AUTOGRAD = "all nodes", "all edges", "autograd over the whole generation"
OURS, GENERATIONS = "hooked, nothing attached", "plain generations"
SYNOPSIS = "synopsis, cross-attention, sum"


def _by_steps(condition: str, form: str = "{:.1f}") -> tuple[Cell, ...]:
    return tuple(Cell(GENERATIONS, {"condition": condition, "steps": n}, form) for n in (3, 7, 14))


def _swept(peer: str, metric: str = "image") -> tuple[Cell, ...]:
    where = {"metric": metric, "peer": peer}
    return Cell("ratio", where, "{:.2f}×"), Cell("of bound", where, "{:.0%} of it")


def _raced(grid: str, budget: float) -> tuple[Cell, ...]:
    where = {"metric": "relation", "grid": grid, "truth": "population", "budget": budget}
    return Cell("share", where, "{:.2f}"), Cell("swept share", where, "(sweep {:.2f})")


def _mapped(column: str, form: str) -> tuple[Cell, ...]:
    """FLUX.1 and SD3 with our heat map, and in parentheses with those of the peers."""
    peers = "attention-map-diffusers"
    sides = (("heatmap", "", ""), ("nnsight", "(nnsight ", ","), (peers, f"{peers} ", ")"))
    return tuple(
        Cell(column, {"model": model, "side": side}, words)
        for side, before, after in sides
        for model, words in (("flux", before + form), ("sd3", form + after))
    )


ROWS = (
    Row(
        "one denoiser call, inert hooks, width 192",
        "`PixArtTransformer2DModel`",
        "≤ 1.02",
        "forward",
        (Cell("ratio", {"width": 192}),),
    ),
    Row("the same, width 1152", "", "≤ 1.00", "forward", (Cell("ratio", {"width": 1152}),)),
    Row(
        "generation, `rte-micro`, batch 1 / 8",
        "`PixArtSigmaPipeline`",
        "≤ 0.90",
        "generation",
        tuple(
            Cell("ratio to diffusers", {"model": "rte-micro", "batch": n, "condition": OURS})
            for n in (1, 8)
        ),
    ),
    Row(
        "generation, two XL-width blocks, 300 text tokens",
        "",
        "≤ 1.00",
        "generation",
        (
            Cell(
                "ratio to diffusers",
                {"model": "2 XL blocks, 300 text tokens", "condition": OURS},
            ),
        ),
    ),
    *(
        Row(
            f"caching {words} of every layer and step",
            "raw PyTorch hooks",
            "≤ 1.10, < nnsight",
            "caching",
            (
                Cell("ratio to raw", {"what": what, "side": "hooked"}),
                Cell("ratio to raw", {"what": what, "side": "nnsight"}, "(nnsight trace: {:.3f})"),
            ),
            " ",
        )
        for words, what in (("z", "z"), ("patterns", "pattern"))
    ),
    *(
        Row(f"sweep, {metric}, against {peer}", "", aim, "sweep", _swept(peer, metric), ", ")
        for metric, peer, aim in (
            ("x0", "TransformerLens, a step view", "≥ 70 % of the bound"),
            ("image", "hooks, a generation a cell", ""),
            ("image", "nnsight, an invoke a cell", ""),
            ("image", "diffusers, attention processor", ""),
        )
    ),
    *(
        Row(
            f"search at the cost of {cost}, share of the top ten's effect, relation, {grid}",
            "the exhaustive sweep of 8 scenes",
            aim,
            "search_race",
            _raced(grid, budget),
            " ",
        )
        for budget, cost, aim in ((8.0, "8 scenes", "≥ 0.9"), (1.0, "one", "≥ the sweep's"))
        for grid in ("cross-attention", "both attentions")
    ),
    *(
        Row(
            f"attribution, {condition}, 3 / 7 / 14 steps, in plain generations",
            peer,
            aim,
            "attribution",
            _by_steps(condition),
        )
        for condition, peer, aim in (
            (NODES, "a generation", "≤ 6"),
            (EDGES, "", ""),
            (AUTOGRAD, "(the peer: heads alone, memory grows with the steps)", ""),
        )
    ),
    Row(
        "`run_with_cache(out=…)`, z and patterns of all layers and steps, by the clock",
        "plain sampling",
        "≤ 1.15",
        "disk",
        (
            Cell("ratio to plain", {"side": "on disk"}, "{:.2f} (processor, both threads:"),
            Cell("of the processor", {"side": "on disk"}, "{:.2f}),"),
            Cell("ratio to plain", {"side": "in memory"}, "in memory {:.2f}"),
            Cell("of the processor", {"side": "in memory"}, "({:.2f})"),
        ),
        " ",
    ),
    Row(
        "reading one tensor of that cache",
        "",
        "< 20 ms of 1 GB",
        "disk",
        (
            Cell("ms a read", {"side": "on disk"}, "{:.1f} ms"),
            Cell("GB", {"side": "on disk"}, "of {:.2f} GB"),
        ),
        " ",
    ),
    Row(
        "synopsis of cross-attention, time, batch 1 / 8",
        "plain sampling",
        "≤ 1.05 / 1.02",
        "synopsis",
        tuple(Cell("ratio to plain", {"batch": n, "condition": SYNOPSIS}) for n in (1, 8)),
    ),
    Row(
        "… memory added, batch 1 / 8",
        "",
        "≤ 1.10",
        "synopsis",
        tuple(Cell("memory ratio", {"batch": n, "condition": SYNOPSIS}, "{:.2f}") for n in (1, 8)),
    ),
    *(
        Row(f"{what}, FLUX.1, SD3", peer, "≤ 1.10", "heat_maps", _mapped(column, form), " ")
        for what, peer, column, form in (
            (
                "heat map of a word, 8 heads, 1,024 image tokens, time",
                "plain pipeline",
                "ratio to plain",
                "{:.3f}",
            ),
            ("… most memory that torch allocates in the call", "", "memory to plain", "{:.2f}"),
        )
    ),
    Row(
        "`import hooked_models`, which loads nothing yet / `from hooked_models import HookedTextToImage`",
        "torch + diffusers + transformer_lens, with the pipeline's classes",
        "≤ 1.00",
        "imports",
        tuple(
            Cell("× the same, with the pipeline's classes", {"process": process})
            for process in ("hooked_models", "HookedTextToImage")
        ),
    ),
    Row(
        "`dit-lens models`",
        "",
        "< 0.5 s",
        "imports",
        (Cell("seconds", {"process": "dit-lens models"}, "{:.2f} s"),),
    ),
    Row(
        "`dit-lens --help`",
        "",
        "no torch",
        "imports",
        (Cell("seconds", {"process": "dit-lens --help"}, "{:.2f} s"),),
    ),
    Row(
        "training, steps of `dit-lens train`, one AVX2 core",
        "a plain diffusers loop, float32",
        "≥ 1.0",
        "training",
        (Cell("× plain, float32", {"loop": "dit-lens train"}, "{:.2f}"),),
    ),
    Row("the same with bfloat16 products in hardware (AMX)", "", "≥ 2.5", "training", ()),
    Row("peak memory at 4,096 image tokens", "plain sampling", "≤ 1.10", "memory", ()),
    Row("cluster of two workers, one thread each", "one worker", "≥ 1.9", "scaling", ()),
)
"""Cells of a row without any are read off by hand: another machine, or a script that keeps no
table."""


@dataclass(frozen=True)
class Config:
    """Settings of the command."""

    take: bool = False
    """Read results/bench/*.json first."""
    results: Path = Path("results/bench")


def taken(row: Row, content: dict[str, Any]) -> dict[str, str]:
    """A row's numbers and machine, from its script's JSON."""
    table = pd.DataFrame(content["rows"])
    machine = content["machine"]
    if not isinstance(machine, str):
        machine = (
            f"{machine['processor']}, {machine['threads']} thread(s), load {machine['load']:.1f}, "
            f"torch {machine['torch']}"
        )
    return {"measured": row.between.join(cell.read(table) for cell in row.cells), "on": machine}


def table(measured: dict[str, dict[str, str]]) -> str:
    """The generated part of docs/benchmarks.md; machines are numbered below it."""
    machines = list(dict.fromkeys(measured[row.what]["on"] for row in ROWS))
    lines = ["| what | peer | aim | measured | on |", "|---|---|---|---|---|"]
    for row in ROWS:
        found = measured[row.what]
        lines.append(
            f"| {row.what} (`{row.script}`) | {row.peer} | {row.aim} | {found['measured']} "
            f"| {machines.index(found['on']) + 1} |"
        )
    return "\n".join(
        [*lines, "", *(f"{n}. {machine}" for n, machine in enumerate(machines, start=1))]
    )


def main(config: Config) -> None:
    """Write `measured.json` and the page."""
    measured = json.loads(MEASURED.read_text())
    for row in ROWS if config.take else ():
        path = config.results / f"{row.script}.json"
        if row.cells and path.exists():
            measured[row.what] = taken(row, json.loads(path.read_text()))
    known = {row.what: measured[row.what] for row in ROWS}
    MEASURED.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n{table(known)}\n{END}{after}")


if __name__ == "__main__":
    main(tyro.cli(Config))
