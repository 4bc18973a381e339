"""Layouts of calls as families declare them.

Streams concatenated, grids from latents or from position ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from ..hooks.layout import IMAGE, OTHER, TEXT, Layout, LayoutError, ordered, ragged

__all__ = ["IMAGE", "OTHER", "TEXT", "Layout", "LayoutError", "ordered", "ragged"]

Grid = tuple[int, int, int]


def in_order(
    first: str,
    grid: Callable[[Any, Mapping[str, Any]], Grid],
    mask: str = "",
    registers: Callable[[Any], int] = lambda live: 0,
) -> Callable[[Any, Mapping[str, Any]], Layout]:
    """A family's `layout` where streams are concatenated.

    Args:
        first: as in `ordered`.
        grid: rows, columns and frames of a call.
        mask: argument with the text's mask, if there is one.
        registers: positions before the text's own, of a live model.
    """

    def layout(live: Any, given: Mapping[str, Any]) -> Layout:
        found = grid(live, given)
        image = given["hidden_states"]
        references = image.shape[1] - prod(found) if image.ndim == 3 else 0
        return ordered(
            found,
            mask_of(given.get(mask), given["encoder_hidden_states"]),
            first,
            registers(live),
            references,
        )

    return layout


def mask_of(mask: Tensor | None, text: Tensor) -> Bool[Tensor, "batch text_pos"]:
    """A text mask as booleans, all True where there is none."""
    return (
        torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if mask is None
        else mask.bool()
    )


def patches(live: Any, given: Mapping[str, Any]) -> Grid:
    """Grid of latents [batch channel (frame) height width], from the config's patch sizes."""
    sizes = given["hidden_states"].shape[2:]
    patch = live.config.patch_size
    patch = (
        tuple(patch)
        if not isinstance(patch, int)
        else (live.config.get("patch_size_t") or 1, patch, patch)[-len(sizes) :]
    )
    frames, rows, columns = ([1] * (3 - len(sizes))) + [
        n // p for n, p in zip(sizes, patch, strict=True)
    ]
    return rows, columns, frames


def ids(live: Any, given: Mapping[str, Any]) -> Grid:
    """Grid of packed latents, from `img_ids` [pos axis]: rows in axis 1, columns in axis 2.

    Reference images differ in axis 0.
    """
    places = given["img_ids"]
    places = places[0] if places.ndim == 3 else places
    return extent(places[places[:, 0] == places[0, 0]])


def extent(places: Shaped[Tensor, "pos axis"]) -> Grid:
    """Grid of tokens at these places: rows in axis 1, columns in axis 2.

    Example:
        >>> extent(torch.tensor([[0, 4, 4], [0, 4, 5], [0, 4, 6]]))
        (1, 3, 1)
    """
    rows, columns = (int(places[:, axis].max() - places[:, axis].min()) + 1 for axis in (1, 2))
    return rows, columns, 1
