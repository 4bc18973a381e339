"""Parts of all benchmarks: sides that take turns, ratios within a turn, and a record that names the
machine.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

Times = dict[Any, list[float]]


def seconds(run: Callable[[], Any], device: str = "cpu", wall: bool = False) -> tuple[float, Any]:
    """Seconds of a call, and its value: on a CPU the processor's, which other programs disturb
    least, or with `wall` those of the clock.
    """
    if wall and device == "cpu":
        start = time.perf_counter()
        value = run()
        return time.perf_counter() - start, value
    if device == "cpu":
        start = time.process_time()
        value = run()
        return time.process_time() - start, value
    torch.cuda.synchronize()
    start = time.perf_counter()
    value = run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, value


def turns(
    sides: Mapping[Any, Callable[[], Any]], repeats: int, device: str = "cpu", wall: bool = False
) -> tuple[Times, dict[Any, Any]]:
    """Seconds of every side in each of `repeats` turns, after one that warms up, and what each
    returned.
    """
    times: Times = {side: [] for side in sides}
    values = {}
    for turn in range(repeats + 1):
        for side, run in sides.items():
            spent, values[side] = seconds(run, device, wall)
            if turn:
                times[side].append(spent)
    return times, values


def ratio(times: Times, side: Any, other: Any) -> float:
    """The median, over turns, of one side's seconds over the other's."""
    return statistics.median(a / b for a, b in zip(times[side], times[other], strict=True))


def agree(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> float:
    """The largest difference, relative to the largest value.

    Ends the benchmark if it is above `tolerance`.
    """
    worst = float(
        (ours.double().cpu() - theirs.double().cpu()).abs().max()
        / theirs.double().abs().max().cpu()
    )
    if not worst <= tolerance:
        raise SystemExit(f"The sides do not agree on {what}: they differ by {worst:.2g}.")
    return worst


def record(name: str, config: Any, table: pd.DataFrame, out: Path | None, **facts: Any) -> None:
    """Print the table, and write it with its settings and the machine to `out`
    (results/bench/{name}.json).
    """
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }
    print(f"\n{name}: {', '.join(f'{key} {value}' for key, value in {**machine, **facts}.items())}")
    print(table.round(4).to_string(index=False))
    out = out or Path("results/bench") / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in asdict(config).items()}
    content = {"config": settings, "machine": machine, **facts, "rows": table.to_dict("records")}
    out.write_text(json.dumps(content, indent=1, default=str))


def _processor() -> str:
    """As Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
