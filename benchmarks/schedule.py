"""How well a sweep of PixArt-Σ-XL would keep 8, 64 and 512 workers busy: its schedule, simulated.

`python -m benchmarks.schedule` prints the second table of docs/scaling.md, `--write` puts it there.
It follows `executor="ray"`: workers sample equal shares of the runs without intervention; then each
takes the next batch of forks when it is free. A search scores scenes and runs cells in rounds, with
random effects in the place of a model's; all workers wait for the end of a round. A fork's cost is its row-layers
(`benchmarks.xl_cost`), plus its image; `Config` holds all other assumptions.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import tyro
from jaxtyping import Float

from dit_lens.sweep.cluster import BATCHES, shares
from dit_lens.sweep.numbers import CHAIN
from dit_lens.sweep.race import Prices, Rules, run_race

from . import xl_cost

START, END = "<!-- simulated: benchmarks.schedule -->", "<!-- end of simulated -->"


@dataclass(frozen=True)
class Config:
    """The sweep, and assumptions beside those of `xl_cost`."""

    xl: xl_cost.Config = field(default_factory=xl_cost.Config)
    workers: tuple[int, ...] = (8, 64, 512)
    batch: int = 64
    """Rows that run together."""
    rate: float = 2e9
    """Assumed: bytes a second into or out of a machine. Runs without intervention come in before the
    forks begin, and go out while forks are run; a machine fetches them from any that has them, so
    that their copies double in the time of one.
    """
    per_machine: int = 8
    """Assumed: workers of a machine, which share its copy of the runs without intervention."""
    seconds_of_table: float = 0.001
    """Assumed: for the calling process to take a batch's rows and write them (.3 ms were measured
    for the table alone).
    """
    k: int = 10
    """Size of a search's top, …"""
    budget: float = 8.0
    """… and its cost, in exhaustive sweeps of a prompt."""
    write: bool = False


def row_layer(c: xl_cost.Config) -> float:
    """Seconds of a row-layer."""
    flops = xl_cost.block_flops(c.width, c.image_tokens, c.text_tokens, c.mlp_ratio)
    return flops / (c.peak * c.reached)


def decoding(c: xl_cost.Config) -> float:
    """Seconds of a decoded image."""
    return c.decode / (c.peak * c.reached)


def cells(c: xl_cost.Config, image: bool) -> Float[np.ndarray, "step cell"]:
    """Row-layers of one scene's forks, a head at a step of one branch each, without decoding."""
    first = np.repeat(c.layers - np.arange(c.layers), c.heads).astype(float)
    later = 2 * c.layers * (c.steps - 1 - np.arange(c.steps)) if image else np.zeros(c.steps)
    return first + later[:, None]


def batches(
    config: Config, forks: Float[np.ndarray, " fork"], size: int, scenes: int
) -> Float[np.ndarray, " batch"]:
    """Seconds of each batch of forks, given those of the forks; and of the residual streams of
    `scenes` that the forks of a batch begin with.
    """
    begun = config.xl.layers * row_layer(config.xl) * scenes
    return np.add.reduceat(forks, np.arange(0, len(forks), size)) + begun


def size_of_batch(config: Config, forks: int, workers: int) -> int:
    """Rows that run together, as `Cluster.batch` has it."""
    return min(config.batch, max(1, forks // (BATCHES * workers)))


def jobs(config: Config, image: bool, workers: int) -> Float[np.ndarray, " batch"]:
    """Seconds of each batch of an exhaustive sweep, in the order in which the workers take them."""
    c, costs = config.xl, cells(config.xl, image)
    size = size_of_batch(config, costs.size * c.prompts, workers)
    scenes = int(np.ceil(size / (c.layers * c.heads)))
    seconds = costs * row_layer(c) + image * decoding(c)
    return np.concatenate(
        [batches(config, np.tile(step, c.prompts), size, scenes) for step in seconds]
    )


def last_done(
    config: Config, jobs: Float[np.ndarray, " batch"], workers: int, start: float, sent: float = 0.0
) -> float:
    """Seconds at which the last of the jobs is done and written, if all workers are free at
    `start`; `sent`: seconds of sending, meanwhile.
    """
    free = [start] * workers
    heapq.heapify(free)
    end = start
    for seconds in jobs.tolist():
        done = heapq.heappop(free) + seconds
        heapq.heappush(free, done)
        end = max(end, done)
    return max(end, start + sent, start + config.seconds_of_table * len(jobs))


def moved(config: Config, scenes: int) -> float:
    """Seconds to move scenes' runs without intervention: latent, two branches' outputs and the
    guided one, in float32.
    """
    return scenes * (config.xl.steps + 1) * 4 * 64 * 64 * 4 * 4 / config.rate


def sweeping(config: Config, image: bool, workers: int) -> float:
    """Seconds of an exhaustive sweep from the start to the last result; loading the model apart."""
    c = config.xl
    parts = shares(np.arange(c.prompts), workers, config.batch)
    sampling = -(-len(parts) // workers) * max(map(len, parts)) * 2 * c.layers * c.steps
    start = sampling * row_layer(c) + moved(config, c.prompts)
    sent = sending(config, c.prompts, workers)
    return last_done(config, jobs(config, image, workers), workers, start, sent)


def sending(config: Config, scenes: int, workers: int) -> float:
    """Seconds until every machine has the scenes' runs."""
    return moved(config, scenes) * np.log2(1 + -(-workers // config.per_machine))


class Watched:
    """Oracle of a search with random effects, which keeps what it is asked."""

    def __init__(self, n: int) -> None:
        self.draw = np.random.default_rng(0)
        self.means = self.draw.standard_t(3, size=n)
        self.scored: list[int] = []
        """Scenes that are scored before each round, …"""
        self.run: list[tuple[np.ndarray, int]] = []
        """… and its cells and scenes."""

    def scores(self, cells: np.ndarray, scenes: range) -> np.ndarray:
        """As in `race.Oracle`."""
        self.scored.append(len(scenes))
        return self.means[cells][:, None] + self.draw.normal(size=(len(cells), len(scenes)))

    def exact(self, cells: np.ndarray, scenes: range) -> np.ndarray:
        """As in `race.Oracle`."""
        self.scored += [0] * (len(self.run) + 1 - len(self.scored))
        self.run.append((cells, len(scenes)))
        return self.means[cells][:, None] + self.draw.normal(size=(len(cells), len(scenes)))


def searching(config: Config, workers: int) -> float:
    """Seconds of a search of the image at the end; workers wait for each other after every round."""
    c, costs = config.xl, cells(config.xl, True).ravel()
    clean = 2.0 * c.layers * c.steps
    rules = Rules(config.k, c.prompts, config.budget, sample=20)
    oracle = Watched(len(costs))
    run_race(oracle, Prices(costs, np.zeros_like(costs), CHAIN * clean, clean), rules)
    now = 0.0
    for scored, (chosen, scenes) in zip(oracle.scored, oracle.run, strict=True):
        if scored:
            parts = np.array_split(np.arange(scored), min(scored, workers))
            seconds = np.array([len(part) for part in parts]) * CHAIN * clean * row_layer(c)
            now = last_done(config, seconds, workers, now) + moved(config, scored)
        forks = np.repeat(costs[chosen] * row_layer(c) + decoding(c), scenes)
        size = size_of_batch(config, len(forks), workers)
        taken = batches(config, forks, size, scenes=min(size, scenes))
        now = last_done(config, taken, workers, now, sending(config, scenes, workers))
    return now


def table(config: Config) -> str:
    """The simulated part of docs/scaling.md."""
    lines = [
        "| sweep | "
        + " | ".join(f"hours on {n} workers | efficiency" for n in config.workers)
        + " |",
        "|---" * (1 + 2 * len(config.workers)) + "|",
    ]
    for name, seconds in (
        ("one-step effect (x0, ε), every cell exactly", partial(sweeping, config, False)),
        ("image at the end, every cell exactly", partial(sweeping, config, True)),
        (
            f"image at the end, searched at the cost of {config.budget:g} prompts",
            partial(searching, config),
        ),
    ):
        alone = seconds(1)
        found = [seconds(n) for n in config.workers]
        numbers = [
            f"{one / 3600:.2g} | {alone / n / one:.2f}"
            for n, one in zip(config.workers, found, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    found = table(config)
    print(found)
    if config.write:
        text = xl_cost.DOCUMENT.read_text()
        xl_cost.DOCUMENT.write_text(
            re.sub(f"{START}.*{END}", lambda _: f"{START}\n{found}\n{END}", text, flags=re.DOTALL)
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
