"""Arguments that every function which draws images takes, described once."""

from __future__ import annotations

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
    """Keyword arguments of sweeps and ablations, which choose their batches themselves.

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
