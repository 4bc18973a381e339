"""A generation's cache on disk: cost of writing beside plain sampling, and of reading
one tensor.

`python -m benchmarks.disk` keeps z and the patterns of every attention at every step, of the
conditional branch, in memory and in a folder, and compares both. A thread writes a step while the
next one runs, so a second core hides most of the writing; seconds are those of the clock, so run it
on an idle machine. The processor's seconds, of both threads, stand beside them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor

from hooked_models import GenerationCache, HookedTextToImage

from .measuring import Times, agree, ratio, record, turns

PROMPT = "red circle is above blue square"


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "rte-micro"
    steps: int = 14
    batch: int = 8
    repeats: int = 5
    reads: int = 50
    threads: int = 1
    device: str = "cpu"
    folder: Path | None = None
    """Where caches are written; by default, a temporary folder."""
    out: Path | None = None


@torch.no_grad()
def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    model = HookedTextToImage.from_pretrained(config.model).to(config.device)
    prompts, options = [PROMPT] * config.batch, {"seed": 0, "num_steps": config.steps}
    with tempfile.TemporaryDirectory(dir=config.folder) as temporary:
        folders: list[Path] = []

        def keep(name: str) -> bool:
            return name.endswith(("hook_z", "hook_pattern"))

        def on_disk() -> Tensor:
            folders.append(Path(temporary) / f"cache-{len(folders)}")
            return model.run_with_cache(prompts, names_filter=keep, out=folders[-1], **options)[0]

        sides = {
            "plain sampling": lambda: model(prompts, **options),
            "in memory": lambda: model.run_with_cache(prompts, names_filter=keep, **options)[0],
            "on disk": on_disk,
        }
        worked: Times = {side: [] for side in sides}
        sides = {side: _counted(run, worked[side]) for side, run in sides.items()}
        times, values = turns(sides, config.repeats, config.device, wall=True)
        worked = {side: spent[1:] for side, spent in worked.items()}
        rows = [
            {
                "side": side,
                "seconds": statistics.median(spent),
                "ratio to plain": ratio(times, side, "plain sampling"),
                "of the processor": ratio(worked, side, "plain sampling"),
                "difference": agree(side, values[side], values["plain sampling"]),
            }
            for side, spent in times.items()
        ]
        size = sum(path.stat().st_size for path in folders[-1].iterdir())
        rows[-1] |= {
            "GB": size / 1e9,
            "ms a read": 1e3 * read_time(model, folders[-1], config.reads),
        }
    record("disk", config, pd.DataFrame(rows), config.out)


def _counted(run: Callable[[], Tensor], spent: list[float]) -> Callable[[], Tensor]:
    """A call that appends the processor's seconds of all threads."""

    def call() -> Tensor:
        start = time.process_time()
        value = run()
        spent.append(time.process_time() - start)
        return value

    return call


def read_time(model: HookedTextToImage, folder: Path, reads: int) -> float:
    """Median seconds of reading one tensor of a cache that is open, the first of each file left
    out: its bytes are compared with the digest.
    """
    cache = GenerationCache.load(folder, model)
    names = [name for name in cache if name.endswith("hook_pattern")]
    for name in names:
        cache[name]
    spent = []
    for name in (names * (reads // len(names) + 1))[:reads]:
        start = time.perf_counter()
        cache[name].sum()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


if __name__ == "__main__":
    main(tyro.cli(Config))
