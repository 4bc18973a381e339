"""Seeds, and the noise that they give: the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import integers, is_several

Seeds = SupportsIndex | Iterable[SupportsIndex]
"""Seeds of noise: one integer for every prompt, or one for each."""


def seed_of_each(seed: Seeds, batch: int) -> list[int]:
    """One seed for each of `batch` prompts, from one for all or a sequence.

    Numpy's and torch's integers are integers, too.

    Raises:
        ValueError: another number of seeds, or something that is no integer from -2**63 to 2**64 -
            1.

    Example:
        >>> seed_of_each(3, 2), seed_of_each([0, 1], 2)
        ([3, 3], [0, 1])
    """
    seeds = list(integers("seed", seed, -(2**63), 2**64 - 1))
    if not is_several(seed):
        return seeds * batch
    if len(seeds) != batch:
        raise ValueError(
            f"seed holds {len(seeds)} seeds for {batch} prompts: give one each, or a single one "
            "for all."
        )
    return seeds


def seeded_noise(
    seeds: Sequence[int], shape: tuple[int, ...]
) -> Float[Tensor, "batch channel rows columns"]:
    """Standard normal float32, one fresh CPU generator a row.

    Equal seeds give equal noise on every machine.
    """
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
