"""Processor time until a name can be used: `import hooked_models`, its main class, and `dit-lens`,
each in a process of its own.

`python -m benchmarks.imports` prints processor seconds beside those of importing the packages'
dependencies, taking turns.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

from .measuring import ratio, record

SIDES = {
    "torch, diffusers, transformer_lens": "import torch, diffusers, transformer_lens",
    "the same, with the pipeline's classes": (
        "import torch, transformer_lens; from diffusers import PixArtSigmaPipeline"
    ),
    "hooked_models": "import hooked_models",
    "HookedTextToImage": "from hooked_models import HookedTextToImage",
    "dit-lens models": (
        "import sys; sys.argv = ['dit-lens', 'models']\nfrom dit_lens.cli import main\nmain()"
    ),
    "dit-lens --help": "import sys; sys.argv = ['dit-lens', '--help']\nfrom dit_lens.cli import main\n"
    "try: main()\nexcept SystemExit: pass",
}
HEAVY = ("torch", "diffusers", "transformers", "transformer_lens", "pandas")


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    repeats: int = 5
    out: Path | None = None


def spent(code: str) -> float:
    """Processor seconds of a new interpreter that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(config: Config) -> None:
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(config.repeats + 1):
        for side, code in SIDES.items():
            seconds = spent(code)
            if turn:
                times[side].append(seconds)
    probe = (
        SIDES["dit-lens --help"]
        + f"\nloaded = sorted(set({HEAVY!r}) & set(sys.modules))\nsys.exit(', '.join(loaded))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True
    ).stderr.strip()
    bases = list(SIDES)[:2]
    rows = [
        {
            "process": side,
            "seconds": statistics.median(times[side]),
            **{f"× {base}": ratio(times, side, base) for base in bases},
        }
        for side in SIDES
    ]
    record("imports", config, pd.DataFrame(rows), config.out, help_loads=loaded or "nothing heavy")


if __name__ == "__main__":
    main(tyro.cli(Config))
