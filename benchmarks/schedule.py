"""How well a sweep of PixArt-Σ-XL would keep 8, 64 and 512 workers busy: its schedule, simulated.

`python -m benchmarks.schedule` prints the second table of docs/scaling.md, `--write` puts it there.
It follows `executor="ray"`: workers sample equal shares of the runs without intervention; then each
takes the next batch of forks when it is free. A fork's cost is its row-layers
(`benchmarks.xl_cost`), plus its image; `Config` holds all other assumptions.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass, field

import numpy as np
import tyro
from jaxtyping import Float

from dit_lens.sweep.cluster import BATCHES, shares

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
    """Assumed: bytes a second between the calling process and each machine, one machine after the
    other.
    """
    per_machine: int = 8
    """Assumed: workers of a machine, which share its copy of the runs without intervention."""
    seconds_of_table: float = 0.001
    """Assumed: for the calling process to take a batch's rows and write them (.3 ms were measured
    for the table alone).
    """
    write: bool = False


def jobs(config: Config, image: bool, workers: int) -> Float[np.ndarray, " job"]:
    """Seconds of each batch of forks, in the order in which the workers take them."""
    c = config.xl
    row_layer = xl_cost.block_flops(c.width, c.image_tokens, c.text_tokens, c.mlp_ratio) / (
        c.peak * c.reached
    )
    forks = c.layers * c.heads * c.steps * c.prompts
    batch = min(config.batch, max(1, forks // (BATCHES * workers)))
    # of one prompt and step, one branch
    first = np.repeat(c.layers - np.arange(c.layers), c.heads).astype(float)
    found = []
    for step in range(c.steps):
        later = 2 * c.layers * (c.steps - 1 - step) if image else 0
        cost = (first + later) * row_layer + image * c.decode / (c.peak * c.reached)
        cost = np.tile(cost, c.prompts)
        starts = np.arange(0, len(cost), batch)
        # residual streams that the forks of a batch begin with
        begun = c.layers * row_layer * np.ceil(batch / len(first))
        found.append(np.add.reduceat(cost, starts) + begun)
    return np.concatenate(found)


def makespan(config: Config, image: bool, workers: int) -> float:
    """Seconds from the start to the last result; loading the model apart."""
    c = config.xl
    row_layer = xl_cost.block_flops(c.width, c.image_tokens, c.text_tokens, c.mlp_ratio) / (
        c.peak * c.reached
    )
    largest = max(len(part) for part in shares(np.arange(c.prompts), workers, config.batch))
    turns = -(-len(shares(np.arange(c.prompts), workers, config.batch)) // workers)
    sampling = turns * largest * 2 * c.layers * c.steps * row_layer
    # float32: latent, two branches' outputs and the guided one
    moved = c.prompts * (c.steps + 1) * 4 * 64 * 64 * 4 * 4
    machines = -(-workers // config.per_machine)
    transport = moved * (1 + machines) / config.rate
    free = [sampling + transport] * workers
    heapq.heapify(free)
    writer = end = 0.0
    for seconds in jobs(config, image, workers).tolist():
        done = heapq.heappop(free) + seconds
        heapq.heappush(free, done)
        writer += config.seconds_of_table
        end = max(end, done)
    return max(end, sampling + transport + writer)


def table(config: Config) -> str:
    """The simulated part of docs/scaling.md."""
    lines = [
        "| sweep | "
        + " | ".join(f"hours on {n} workers | efficiency" for n in config.workers)
        + " |",
        "|---" * (1 + 2 * len(config.workers)) + "|",
    ]
    for name, image in (
        ("one-step effect (x0, ε), every cell exactly", False),
        ("image at the end, every cell exactly", True),
    ):
        alone = makespan(config, image, 1)
        cells = []
        for n in config.workers:
            seconds = makespan(config, image, n)
            cells += [f"{seconds / 3600:.2f}", f"{alone / n / seconds:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
