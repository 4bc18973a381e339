"""Searches against the exhaustive sweep, judged by scenes that neither has seen.

Effects and scores of 504 cells (every head of both attentions of rte-micro, at each of 14 steps) on
all scenes of `search_race.parquet`, which `python -m benchmarks.search_table` made. A simulated
search draws its scenes from there:

- *population*: scenes are drawn with replacement, and the table's means are the truth;
- *held out*: the scenes of half the captions, without replacement; the truth is the means of the
  other half's.

`share`: effect of the ten found, over that of the ten largest, in the truth. `signed`: in the
direction found, negative where that is wrong. `told n`: the share of a search that is told the n
largest cells and runs only these, which no search without that knowledge can be expected to beat.
`python -m benchmarks.search_race --write` puts the
table into docs/searches.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from jaxtyping import Float

from dit_lens.sweep.numbers import CHAIN
from dit_lens.sweep.race import Prices, Race, Rules, run_race

from .measuring import record

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "searches.md"
LAYERS, STEPS, BRANCHES = 6, 14, 2
CLEAN = float(LAYERS * STEPS * BRANCHES)
K, SWEPT, MOST = 10, 8, 150
TOLD = (20, 40)
OTHER_NOISE = 1000
"""Added to the number of a caption's scene with noise 0 in the place of its own."""
Table = Float[np.ndarray, "cell scene"]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    searches: int = 200
    held_out: int = 60
    """Searches of half the scenes."""
    table: Path = HERE / "search_race.parquet"
    budgets: tuple[float, ...] = (8.0, 1.0)
    """In exhaustive sweeps of one scene."""
    write: bool = False
    out: Path | None = None


@dataclass
class Drawn:
    """Oracle of a search: scenes of a table, in the order in which they are drawn."""

    effects: Table
    predicted: Table
    order: np.ndarray
    """Places of the scenes that are drawn."""

    def exact(self, cells: np.ndarray, scenes: range) -> np.ndarray:
        """As in `race.Oracle`."""
        return self.effects[np.ix_(cells, self.order[scenes.start : scenes.stop])]

    def scores(self, cells: np.ndarray, scenes: range) -> np.ndarray:
        """As in `race.Oracle`."""
        return self.predicted[np.ix_(cells, self.order[scenes.start : scenes.stop])]


def main(config: Config) -> None:
    """Simulate, print, record."""
    table = pd.read_parquet(config.table)
    rows = []
    for metric in table["metric"].unique():
        for grid in ("cross-attention", "both attentions"):
            some = table[table["metric"] == metric]
            if grid == "cross-attention":
                some = some[some["cell"].str.startswith("cross")]
            rows += list(simulated(some, str(metric), grid, config))
    found = pd.DataFrame(rows)
    record("search_race", config, found, config.out, scenes=int(table["scene"].nunique()))
    if config.write:
        write(found, int(table["scene"].nunique()), config)


def simulated(
    some: pd.DataFrame, metric: str, grid: str, config: Config
) -> Iterator[dict[str, Any]]:
    """One row for each truth and budget."""
    tables = [
        some.pivot_table(values, "cell", "scene", sort=False, dropna=False, observed=True)
        for values in ("effect", "score")
    ]
    effects, predicted = (table.to_numpy(dtype=float) for table in tables)
    scored = not np.isnan(predicted).all()
    prices = prices_of(tables[0].index, scored)
    captions = tables[0].columns.to_numpy() % OTHER_NOISE
    for truth, searches in (("population", config.searches), ("held out", config.held_out)):
        for budget in config.budgets:
            numbers = []
            for seed in range(searches):
                order, judged = drawn(captions, truth, seed)
                oracle = Drawn(effects, predicted, order)
                rules = Rules(K, len(order), budget, sample=20, rng=seed)
                unscored = () if scored else range(len(effects))
                race = run_race(oracle, prices, rules, unscored)
                swept, means = (effects[:, own].mean(axis=1) for own in (order[-SWEPT:], judged))
                bounds = {
                    f"told {n}": share(means, told(oracle, prices, budget, means, n)) for n in TOLD
                }
                numbers.append(numbers_of(race, swept, means) | bounds)
            mean = pd.DataFrame(numbers).mean().to_dict()
            yield {"metric": metric, "grid": grid, "truth": truth, "budget": budget, **mean}


def prices_of(cells: pd.Index, scored: bool) -> Prices:
    """Costs in row-layers, as `dit_lens.sweep.search.prices` counts them."""
    layer, step = cells.astype(str).str.extract(r"L(\d+)H\d+ s(\d+)").astype(int).to_numpy().T
    exact = (LAYERS - layer) + (STEPS - 1.0 - step) * BRANCHES * LAYERS
    return Prices(exact, np.zeros(len(exact)), CHAIN * CLEAN if scored else 0.0, CLEAN)


def drawn(captions: np.ndarray, truth: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes of a search in their order, and those that it is judged by."""
    draw, n = np.random.default_rng(seed), len(captions)
    if truth == "population":
        return draw.integers(n, size=MOST), np.arange(n)
    chosen = draw.permutation(np.unique(captions))
    own = np.isin(captions, chosen[: len(chosen) // 2])
    return draw.permutation(np.flatnonzero(own)), np.flatnonzero(~own)


def told(oracle: Drawn, prices: Prices, budget: float, means: np.ndarray, n: int) -> np.ndarray:
    """The top of a search that runs the `n` truly largest cells alone, on as many scenes as the
    budget pays for.
    """
    cells = np.argsort(-np.abs(means))[:n]
    scenes = int(budget * prices.exhaustive / (prices.exact[cells].sum() + prices.clean))
    found = oracle.exact(cells, range(max(scenes, 1))).mean(axis=1)
    return cells[np.argsort(-np.abs(found))[:K]]


def numbers_of(race: Race, swept: np.ndarray, means: np.ndarray) -> dict[str, float]:
    """Numbers of one simulated search, and of the exhaustive sweep of eight scenes."""
    sweeps = np.argsort(-np.abs(swept))[:K]
    return {
        "share": share(means, race.top),
        "swept share": share(means, sweeps),
        "signed": share(means, race.top, race.estimates.mean),
        "swept signed": share(means, sweeps, swept),
        "spent": race.spent / race.prices.exhaustive,
        "scenes": race.drawn,
        **guarantee(race, means),
    }


def share(means: np.ndarray, found: np.ndarray, signs: np.ndarray | None = None) -> float:
    """Effect of the cells found over that of the largest."""
    own = np.abs(means[found]) if signs is None else np.sign(signs[found]) * means[found]
    return float(own.sum() / np.sort(np.abs(means))[-K:].sum())


def guarantee(race: Race, means: np.ndarray) -> dict[str, float]:
    """Both statements of a search: 1 where one is wrong, and the sizes that it states."""
    size, top = np.abs(means), race.top
    others = np.setdiff1d(race.alive, top)
    beyond = float(np.abs(race.estimates.mean[top]).min())
    most, larger = race.missed(beyond)[2], int((np.delete(size, top) > beyond).sum())
    gap = size[others].max(initial=0.0) - size[top].min() > race.gap
    low, high = race.joint[race.lasted > 0].T
    inside = (means[race.lasted > 0] >= low) & (means[race.lasted > 0] <= high)
    return {
        "covered": float(inside.mean()),
        "all covered": float(inside.all()),
        "gap broken": float(gap),
        "missed broken": float(larger > most),
        "missed at most": float(most),
        "larger": float(larger),
    }


def write(found: pd.DataFrame, scenes: int, config: Config) -> None:
    """Put the table into the page."""
    lines = [
        f"`rte-micro`, {scenes} scenes, {config.searches} simulated searches a row "
        f"({config.held_out} held out) for k = 10; `python -m benchmarks.search_race --write`. *Share*: effect "
        "of the ten found over that of the ten largest, in the truth (*signed*: in the direction "
        "found), of the search / of the exhaustive sweep of 8 scenes. *Told*: of a search that is told the 20 / 40 "
        "largest cells beforehand and runs these alone. *Population*: scenes drawn "
        "with replacement, the truth is the mean over all. *Held out*: the search draws from the "
        "scenes of half the captions, the others are the truth. *Broken*: share of searches whose "
        "statement (gap / missed) was wrong: at most 5 % where it speaks of the truth (population); "
        "held out, the truth is of other captions, and more may be. *Covered*: share of joint "
        "intervals that hold the truth.",
        "",
        "| metric | cells | truth | cost, in sweeps of a scene | share | signed | told | broken "
        "| covered | missed, at most (true) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found.to_dict("records"):
        lines.append(
            f"| {row['metric']} | {row['grid']} | {row['truth']} | {row['spent']:.1f} "
            f"| {row['share']:.2f} / {row['swept share']:.2f} "
            f"| {row['signed']:.2f} / {row['swept signed']:.2f} "
            f"| {row['told 20']:.2f} / {row['told 40']:.2f} "
            f"| {row['gap broken']:.1%} / {row['missed broken']:.1%} | {row['covered']:.3f} "
            f"| {row['missed at most']:.0f} ({row['larger']:.0f}) |"
        )
    page, mark = PAGE.read_text(), "<!-- search_race -->"
    before, _, rest = page.partition(mark)
    after = rest.partition("<!-- /search_race -->")[2]
    body = "\n".join(lines)
    PAGE.write_text(f"{before}{mark}\n{body}\n<!-- /search_race -->{after}")


if __name__ == "__main__":
    main(tyro.cli(Config))
