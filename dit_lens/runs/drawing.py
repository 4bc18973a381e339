"""Arguments that every function which draws images takes, described once."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict


class Drawing(TypedDict, total=False):
    """Keyword arguments of functions that draw images, each with the model's own default.

    Attributes:
        num_steps: denoising steps of each run, as in `HookedTextToImage.forward`; 14 by default.
        guidance: classifier-free guidance; 4.5 by default.
        batch_size: images drawn at once; 32 by default.

    Example:
        >>> Drawing(num_steps=2, guidance=1.0)
        {'num_steps': 2, 'guidance': 1.0}
    """

    num_steps: int
    guidance: float
    batch_size: int


class Planning(TypedDict, total=False):
    """Keyword arguments of sweeps, which choose their batches themselves.

    Attributes:
        num_steps: denoising steps; 14 by default.
        guidance: by default the model's own.
        batch: rows that run together; by default found from free memory.
        rng: seed of "resample"; 0 by default.

    Example:
        >>> Planning(num_steps=2, rng=1)
        {'num_steps': 2, 'rng': 1}
    """

    num_steps: int
    guidance: float | None
    batch: int | None
    rng: int


class Keeping(TypedDict, total=False):
    """Keyword arguments of experiments that a sweep runs: where, and where its results are kept.

    Attributes:
        out: a folder for results, from which a call that was stopped goes on when it is repeated.
        executor: "local" by default, or "ray", as in `sweep.run`.
        workers: of "ray", as in `sweep.run`.

    Example:
        >>> Keeping(out="results/heads")
        {'out': 'results/heads'}
    """

    out: str | Path | None
    executor: str
    workers: int | None


class Experiment(Planning, Keeping, total=False):
    """Keyword arguments of ablations: those of `Planning` and of `Keeping`.

    Example:
        >>> Experiment(num_steps=2, out="results/heads")
        {'num_steps': 2, 'out': 'results/heads'}
    """
