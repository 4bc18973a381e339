"""Helpers of the tests here."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dit_lens import prompts as words

PROMPTS = [
    "red circle is above blue square",
    "circle is left of square",
    "blue square is above red circle",
]


RUN = {"seed": [3, 4, 5], "num_steps": 2}


ROLES = ["color1", "shape1", "relation", "color2", "shape2", "filler", "eos", "pad"]


POSITIONS = 16


GROUPS = {
    "left": torch.arange(POSITIONS) % 4 < 2,
    "own": torch.rand(3, POSITIONS, generator=torch.Generator().manual_seed(1)) < 0.5,
    "all": torch.ones(POSITIONS, dtype=torch.bool),
}


def by_hand(
    model, cache, sublayer: str, branch: str, image: Tensor, keys: Tensor, reduce: str
) -> np.ndarray:
    """Attention between [prompt pos] masks or shares: [prompt layer head step], entry by entry of the whole
    pattern.
    """
    pattern = torch.stack(
        [cache.stack("pattern", layer, sublayer, branch) for layer in range(model.cfg.n_layers)]
    )
    found = np.full((len(image), model.cfg.n_layers, model.cfg.n_heads, pattern.shape[1]), np.nan)
    for b, (rows, columns) in enumerate(zip(image.double(), keys.double(), strict=True)):
        if rows.sum() == 0 or columns.sum() == 0:
            continue
        entries = pattern[:, :, b] * rows[:, None] * columns  # [layer step head query key]
        total = entries.amax(dim=(-2, -1)) if reduce == "max" else entries.sum(dim=(-2, -1))
        divisor = {"mass": rows.sum(), "mean": rows.sum() * columns.sum()}.get(reduce, 1)
        found[b] = (total / divisor).transpose(1, 2)
    return found


def masks(model, texts, length=None) -> dict[str, Tensor]:
    length = length or model.to_tokens(PROMPTS).shape[1]
    roles = [words.token_roles(model, text, length) for text in texts]
    return {
        role: torch.tensor([[found == role for found in row] for row in roles]) for role in ROLES
    }


def planted(n: int = 12, seeds: int = 2) -> xr.DataArray:
    """Mean attention of 2 × 2 heads to 4 words and a pad: L1H0 reads "relation", L0H1 reads the
    first word of each prompt.
    """
    rng = np.random.default_rng(0)
    values = rng.uniform(0.1, 0.2, (n * seeds, 2, 2, 3, 2, 1, 5))
    values[:, 1, 0, :, 0, 0, 2] += 0.5
    values[:, 0, 1, 1, 0, 0, 0] += 0.5
    values[..., 4] = 0  # pads
    values[0, ..., 1] = np.nan
    values[-1, ..., :] = np.nan
    coords = {
        "prompt": [f"prompt {i}" for i in np.repeat(np.arange(n), seeds)],
        "layer": [0, 1],
        "head": [0, 1],
        "step": [0, 1, 2],
        "branch": ["cond", "uncond"],
        "image_group": ["object1"],
        "text_group": ["color1", "shape1", "relation", "eos", "pad"],
    }
    return xr.DataArray(values, dims=tuple(coords), coords=coords)
