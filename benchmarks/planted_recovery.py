"""How well each method recovers a planted circuit: AUROC over heads by kind, and false positives
where there is no circuit.

`python benchmarks/planted_recovery.py --seeds 5` prints both tables (about a minute a kind and seed
on one core, most of it for the interventions; `--methods screening synopsis` takes seconds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import pandas as pd
import tyro
from rich.console import Console
from rich.progress import track

from dit_lens.planted import Kind, planted_circuit, recovery


@dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 5
    kinds: tuple[Kind, ...] = get_args(Kind)
    methods: tuple[str, ...] = (*recovery.HEAD_METHODS, "arithmetic")
    level: float = 0.05
    """Threshold of the p-values, for false positives."""


def main(config: Config) -> None:
    rows = []
    jobs = [
        (kind, seed, method)
        for kind in config.kinds
        for seed in range(config.seeds)
        for method in config.methods
    ]
    for kind, seed, method in track(jobs, "methods on planted circuits"):
        model, truth = planted_circuit(kind, seed)
        row: dict[str, object] = {"kind": kind, "seed": seed, "method": method}
        if method == "arithmetic":
            if kind != "no-relation":
                moved = recovery.by_arithmetic(model, recovery.relation_role(truth))
                row |= {"moved": moved["steered"], "moved by controls": moved.drop("steered").max()}
        else:
            find, positive = recovery.HEAD_METHODS[method]
            found = find(model, truth)
            row["AUROC"] = recovery.auroc(found["score"], positive(truth))
            others = found.loc[[place not in positive(truth) for place in found.index]]
            row["largest other score"] = (
                others["score"].abs().max() / found["score"].abs().max()
                if len(others) < len(found)
                else None
            )
            if "p" in found:
                row["false positives"] = float((others["p"] <= config.level).mean())
        rows.append(row)
    show(
        pd.DataFrame(rows),
        ["AUROC", "largest other score", "false positives", "moved", "moved by controls"],
    )


def show(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Mean over seeds, and the worst seed's AUROC."""
    known = [column for column in columns if column in table]
    grouped = table.groupby(["method", "kind"], sort=False)
    summary = grouped[known].mean().astype(float).round(3)
    if "AUROC" in known:
        summary.insert(1, "worst AUROC", grouped["AUROC"].min().astype(float).round(3))
    Console(width=160).print(summary.to_string())


if __name__ == "__main__":
    main(tyro.cli(Config))
