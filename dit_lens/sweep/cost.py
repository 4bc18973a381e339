"""The cost of a sweep: work is counted, its speed measured on a few steps of random latents.

The unit is a *row-layer*: one block of the denoiser for one row of a batch. A fork that begins at
layer 4 of 6 costs 2 of them at its first step, and all of them in both guidance branches at every
later one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch.utils.flop_counter import FlopCounterMode

from hooked_models.generation.cache_estimate import free_bytes, human
from hooked_models.generation.names import IMAGE_HOOK, Branch, Site
from hooked_models.generation.trajectory import Record, Run

from .clean import Fork, inputs_of

if TYPE_CHECKING:
    from .plan import Plan

LARGEST_BATCH = {"cpu": 32}
"""Rows beyond which a batch gains nothing: a CPU's caches are full (`benchmarks.scaling`: 32 rows
11.5 ms each, 64 13.4).
"""
OTHERWISE_LARGEST = 512
REPEATS = 3
LATENT = Site("sampler", "hook_latent", 0)


@dataclass(frozen=True)
class Cost:
    """Cost of a sweep, with and without sharing."""

    cells: int
    forks: int
    batch: int
    clean_layers: int
    """Row-layers of the runs without intervention, and of the states that forks begin with."""
    fork_layers: int
    """Row-layers of the forks."""
    naive_layers: int
    """Row-layers if every cell were a whole generation."""
    images: int
    """Images that are decoded."""
    flops: float
    bytes: int
    """Bytes of one batch's activations, and of the runs without intervention that are kept."""
    seconds: float

    @property
    def row_layers(self) -> int:
        """All that will be computed."""
        return self.clean_layers + self.fork_layers

    def __str__(self) -> str:
        """For people."""
        saved = self.naive_layers / max(self.row_layers, 1)
        return "\n".join(
            [
                f"{self.cells:,} cells in {self.forks:,} forks, {self.batch} rows at a time",
                f"shared work: {self.row_layers:,} row-layers ({self.clean_layers:,} of them for "
                "the runs without intervention) "
                f"instead of {self.naive_layers:,}, {saved:.1f} times fewer",
                f"{self.images:,} images are decoded",
                f"{self.flops / 1e12:,.2f} TFLOP, {human(self.bytes)} of memory, about "
                f"{_duration(self.seconds)}",
            ]
        )


def batch_size(plan: Plan) -> int:
    """Rows that run together.

    As many as fit into half of the free memory, and no more than a device gains from.
    """
    device = plan.model.device
    most = LARGEST_BATCH.get(device.type, OTHERWISE_LARGEST)
    return int(np.clip(free_bytes(device) // 2 // _bytes_of_row(plan), 1, most))


def cost_of(plan: Plan) -> Cost:
    """Count the work, and time a step of one row and of a full batch.

    Sizes between are interpolated.
    """
    branches: list[Branch] = ["cond", "uncond"] if plan.extent.guided else ["cond"]
    layers, steps = plan.model.cfg.n_layers, plan.steps
    batches = list(plan.batches(plan.forks, plan.batch))
    forked = np.array(
        [rows for forks in batches for rows in _rows_at(forks, branches, layers)]
    ).reshape(-1, len(branches))
    begun = _begun(plan.forks)
    clean = plan.runs * steps * len(branches)
    rows_of_all = plan.runs + sum(len(fork.rows) for fork in plan.forks)
    images = rows_of_all if any(read.inner == IMAGE_HOOK for read in plan.reads.values()) else 0

    most = min(
        plan.batch, max([plan.runs, *(sum(len(fork.rows) for fork in forks) for forks in batches)])
    )
    calls = [
        *_full_batches(plan.runs, plan.batch) * steps,
        *_full_batches(len(begun) // len(branches), plan.batch),
    ]
    seconds = _seconds_of_calls(plan, [*calls, *forked.sum(axis=1) / len(branches)], most)
    begun_in = [sum(branch == own for _, branch, _ in begun) for own in branches]
    rows = plan.runs * steps + np.array(begun_in) + forked.sum(axis=0)
    decoding, decoded = _decoding(plan, min(plan.batch, images)) if images else (0.0, 0.0)
    return Cost(
        cells=plan.cells,
        forks=len(plan.forks),
        batch=plan.batch,
        clean_layers=(clean + len(begun)) * layers,
        fork_layers=round(forked.sum() * layers),
        naive_layers=plan.cells * steps * len(branches) * layers,
        images=images,
        flops=float(_flops_of_rows(plan) @ rows) + images * decoded,
        bytes=plan.batch * _bytes_of_row(plan) + plan.runs * _bytes_of_run(plan),
        seconds=seconds + images * decoding,
    )


def _begun(forks: Sequence[Fork]) -> set[tuple[int, Branch, int]]:
    """(step, branch, row) of the clean calls that forks enter at a layer above the first."""
    return {
        (fork.first, branch, row)
        for fork in forks
        for branch, start in fork.starts
        if start > 0
        for row in fork.rows.tolist()
    }


def _seconds_of_calls(plan: Plan, rows: Sequence[int | float], most: int) -> float:
    """Seconds of denoising steps of these rows (of both branches), from one row and from `most`."""
    timed = [seconds_of_step(plan, size) for size in sorted({1, most})]
    slope = (timed[-1] - timed[0]) / max(most - 1, 1)
    return float((timed[0] + slope * (np.array(rows) - 1).clip(min=0)).sum())


def _full_batches(rows: int, batch: int) -> list[int]:
    """The sizes of as few batches as hold so many rows."""
    return [batch] * (rows // batch) + [rows % batch] * (rows % batch > 0)


def _rows_at(
    forks: Sequence[Fork], branches: Sequence[Branch], layers: int
) -> list[Float[np.ndarray, " branch"]]:
    """Rows of the denoiser in each step of a batch of forks.

    One that begins in the middle counts in part.
    """
    found = []
    for step in range(min(fork.first for fork in forks), max(fork.until for fork in forks)):
        rows = np.zeros(len(branches))
        for fork in forks:
            if fork.first == step:
                starts = dict(fork.starts)
                rows += len(fork.rows) * np.array(
                    [(layers - starts.get(branch, layers)) / layers for branch in branches]
                )
            elif fork.first < step < fork.until:
                rows += len(fork.rows)
        found.append(rows)
    return found


@torch.no_grad()
def seconds_of_step(plan: Plan, rows: int) -> float:
    """Seconds of one denoising step of n rows, sampler and guidance included.

    The median of several, after a warm-up.
    """
    model, inputs = plan.model, plan.inputs()
    some = inputs_of(model, inputs, [0], np.zeros(rows, dtype=np.int64))
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        model.run(some, until=1)
        _wait(model.device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


@torch.no_grad()
def _decoding(plan: Plan, rows: int) -> tuple[float, float]:
    """Seconds and operations of one image."""
    model, inputs = plan.model, plan.inputs()
    some = inputs_of(model, inputs, [0], np.zeros(rows, dtype=np.int64))
    run = Run(
        model,
        some,
        Record(),
        torch.zeros(model.shape(some, LATENT), device=model.device, dtype=model.dit.dtype),
    )
    model.images_of(run)
    start = time.perf_counter()
    model.images_of(run)
    _wait(model.device)
    seconds = (time.perf_counter() - start) / rows
    with FlopCounterMode(display=False) as counter:
        model.images_of(run.take(torch.tensor([0])))
    return seconds, float(counter.get_total_flops())


@torch.no_grad()
def _flops_of_rows(plan: Plan) -> Float[np.ndarray, " branch"]:
    """Operations of one row's denoiser call in "cond", and in "uncond" if there is guidance.

    An empty text is less work. Counted by torch, which on a CPU does not see into fused attention.
    """
    model, counted = plan.model, []
    for guidance in (1.0, plan.guidance) if plan.extent.guided else (plan.guidance,):
        one = model.prepare(plan.prompts[:1], 0, plan.num_steps, guidance)
        with FlopCounterMode(display=False) as counter:
            model.run(one, until=1)
        counted.append(counter.get_total_flops())
    return np.diff(np.array(counted, dtype=np.float64), prepend=0.0)


def _bytes_of_row(plan: Plan) -> int:
    """Peak bytes of one row's activations, in all its guidance branches, and of its image."""
    model, branches = plan.model, 1 + plan.extent.guided
    one, cfg, size = plan.draft(), model.cfg, model.dit.dtype.itemsize
    pos = model.layout(one).length(
        "joint" if model.dit.axes("blocks.0.hook_resid_post")[1] == "joint_pos" else "image"
    )
    d_mlp = cfg.d_mlp if (cfg.d_mlp or 0) > 0 else 4 * cfg.d_model
    hidden = pos * (2 * d_mlp + 12 * cfg.d_model)
    scores = 3 * cfg.n_heads * pos * pos  # a hooked pattern is explicit
    image = prod(model.shape(one, Site("sampler", IMAGE_HOOK))[1:])
    return branches * (hidden + scores) * size + 3 * image * 4


def _bytes_of_run(plan: Plan) -> int:
    """Bytes of one run without intervention: latents and outputs of all steps, in all branches."""
    model, one = plan.model, plan.inputs()
    latent, out = (
        prod(model.shape(one, site)[1:]) for site in (LATENT, Site("sampler", "hook_out_cond", 0))
    )
    return (
        (2 * latent + (1 + plan.extent.guided) * out) * (plan.steps + 1) * model.dit.dtype.itemsize
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
