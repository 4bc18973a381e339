"""The GPU rows of the benchmarks, in one command and less than ten minutes;
results/bench/gpu-*.json.

`python -m benchmarks.gpu` runs each script of `RUNS` in a process of its own. `dry_run` is the same
list on the CPU, at the smallest sizes, in this process: a test calls it, so that no script fails
for the first time where minutes are dear.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

LIMIT = 150  # seconds for one script


@dataclass(frozen=True)
class Row:
    """One script, with its arguments."""

    module: str
    gpu: str
    """On a large GPU."""
    tiny: str
    """On a CPU, in a few seconds."""
    name: str = ""
    """Name of its file; by default the module's."""

    @property
    def out(self) -> str:
        return f"results/bench/gpu-{self.name or self.module}.json"


TINY_WIDE = "--layers 1 --heads 1 --side 8 --text-tokens 16 --steps 2 --cells 2 --repeats 1"
TINY_SWEEP = (
    "--model rte-nano --steps 0 --repeats 1 --search-steps 1 --search-scenes 2 --peer-cells 2 "
    "--top 2 --sample 1 --best 2"
)
TRAIN = "--plain-steps 6 --our-steps 120"
TINY_TRAIN = "--size nano --batch-size 2 --plain-steps 1 --our-steps 25 --warm-steps 0 --no-compile"
RUNS = (
    Row(
        "wide",
        "--dtype bfloat16 --layers 14 --side 64 --text-tokens 300 --steps 14 --cells 16 --repeats "
        "3",
        TINY_WIDE,
    ),
    Row(
        "forward",
        "--dtype bfloat16 --side 64 --text-tokens 300 --repeats 20",
        "--widths 64 --layers 1 --side 8 --text-tokens 8 --repeats 1",
    ),
    Row(
        "generation",
        "--dtype bfloat16 --xl-layers 28 --xl-side 64 --xl-steps 14 --repeats 5",
        "--model rte-nano --batch 1 --steps 1 --xl-layers 0 --repeats 1",
    ),
    Row("caching", "--repeats 5", "--model rte-nano --steps 1 --repeats 1"),
    Row(
        "attribution",
        "--repeats 2 --no-memory",
        "--model rte-nano --steps 1 --sample 2 --repeats 1 --no-memory",
    ),
    Row(
        "synopsis",
        "--repeats 3 --no-memory",
        "--model rte-nano --batch 1 --steps 1 --repeats 1 --no-memory",
    ),
    Row("sweep", "--steps 0 4 9 --repeats 2", TINY_SWEEP),
    Row("scaling", "--workers --repeats 5", "--model rte-nano --rows 1 2 --workers --repeats 1"),
    Row("training", f"--size micro {TRAIN} --batch-size 256", TINY_TRAIN, "training-micro"),
    Row("training", f"--size mini {TRAIN} --batch-size 256", TINY_TRAIN, "training-mini"),
)


@dataclass(frozen=True)
class Config:
    """Settings of the command."""

    only: tuple[str, ...] = ()
    """Scripts by module name; by default all."""


def main(config: Config) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here.")
    failed = []
    for row in RUNS:
        if config.only and row.module not in config.only:
            continue
        command = [
            sys.executable,
            "-m",
            f"benchmarks.{row.module}",
            "--device",
            "cuda",
            "--out",
            row.out,
            *row.gpu.split(),
        ]
        try:
            subprocess.run(command, check=True, timeout=LIMIT)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"{row.name or row.module}: {error}", file=sys.stderr)
            failed.append(row.name or row.module)
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}. The other rows are in results/bench.")


def dry_run(row: Row, out: Path) -> None:
    """Run a row on the CPU at the smallest sizes."""
    module = importlib.import_module(f"benchmarks.{row.module}")
    module.main(
        tyro.cli(module.Config, args=["--device", "cpu", "--out", str(out), *row.tiny.split()])
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
