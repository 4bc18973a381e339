"""Attention of places to tokens, read from a cache and made small for a page."""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, UInt8
from torch import Tensor

from hooked_models.generation.cache import GenerationCache
from hooked_models.generation.pipeline import HookedPipeline

PATTERN = re.compile(r"steps\.\d+\.cond\.blocks\.(\d+)\.(attn|cross_attn)\.hook_pattern")


@dataclass(frozen=True)
class Maps:
    """Attention of each place to each token."""

    pattern: Float[Tensor, "prompt step head place word"]
    heads: list[str]
    steps: list[int]
    tokens: list[list[str]]
    known_grid: tuple[int, int] | None

    @classmethod
    def read(cls, cache: GenerationCache, prompts: Sequence[str]) -> Maps:
        """Attention of the image to the text, conditional branch, from a cache with its patterns.

        Raises:
            ValueError: the prompts are not as many as the rows of the cache.
        """
        model: Any = cache.model
        joint = isinstance(model, HookedPipeline)
        sublayer, layers = _attention_to_text(cache, joint)
        pattern, heads = _patterns(cache, sublayer, layers)
        if len(prompts) != len(pattern):
            raise ValueError(
                f"There are {len(prompts)} prompts and {len(pattern)} rows in the cache: pass "
                "those it was made with."
            )
        if not joint:
            tokens = [
                [token.removeprefix("▁") for token in model.to_str_tokens(text)] for text in prompts
            ]
            return cls(pattern, heads, cache.steps, tokens, None)
        layout = model.dit.layout
        grid = layout.grid[:2]
        if sublayer == "attn":  # positions are [image, text]
            pattern = pattern[..., : layout.n_image, layout.n_image :]
        tokens = [_spelt(encoded) for encoded in model.encoded_texts(list(prompts))]
        return cls(pattern, heads, cache.steps, tokens, grid)

    def grid(self, image: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of places."""
        return self.known_grid or _grid(self.pattern.shape[-2], image[0] / image[1])


def _attention_to_text(cache: GenerationCache, joint: bool) -> tuple[str, list[int]]:
    """The sublayer that reads the text, and its cached layers.

    Raises KeyError if there are none.
    """
    found = {
        (match[2], int(match[1])) for name in cache.cache_dict if (match := PATTERN.fullmatch(name))
    }
    layers = sorted(layer for sublayer, layer in found if sublayer == "cross_attn")
    if layers:
        return "cross_attn", layers
    if not joint or not found:
        raise KeyError(
            "The cache has no attention to the text: cache names that end in "
            "'cross_attn.hook_pattern'."
        )
    return "attn", sorted(layer for _, layer in found)


def _patterns(
    cache: GenerationCache, sublayer: str, layers: Sequence[int]
) -> tuple[Float[Tensor, "prompt step head place word"], list[str]]:
    """Patterns of all heads, layer after layer, and the heads' names."""
    parts, heads = [], []
    for layer in layers:
        names = [
            f"steps.{step}.cond.blocks.{layer}.{sublayer}.hook_pattern" for step in cache.steps
        ]
        parts.append(torch.stack([cache[name].float().cpu() for name in names], dim=1))
        kept = range(parts[-1].shape[2]) if cache.heads is None else cache.heads[layer]
        heads += [f"L{layer}H{head}" for head in kept]
    if parts[0].ndim != 5:
        raise ValueError(
            "The cache holds summaries of patterns: run_with_cache(…) without patterns= keeps them "
            "whole."
        )
    return torch.cat(parts, dim=2).detach(), heads


def _spelt(encoded: Any) -> list[str]:
    """Tokens of an encoded text as they are spelt, pads left out; special ones by their kind."""
    tokens = zip(encoded.spans, encoded.kinds, strict=True)
    return [encoded.text[low:high].strip() or kind for (low, high), kind in tokens if kind != "pad"]


def pooled(
    maps: Maps, row: int, grid: tuple[int, int], factor: int
) -> UInt8[np.ndarray, "step head place word"]:
    """255·√p of one prompt, averaged over squares of places; pads left out."""
    pattern = maps.pattern[row, ..., : len(maps.tokens[row])]
    if factor > 1:
        size = {"r": grid[0] // factor, "c": grid[1] // factor, "a": factor, "b": factor}
        pattern = reduce(pattern, "s h (r a c b) w -> s h (r c) w", "mean", **size)
    return (255 * pattern.sqrt()).round().to(torch.uint8).contiguous().numpy()


def side_of_squares(maps: Maps, row: int, grid: tuple[int, int], largest: int) -> int:
    """Side of the squares to average over, the smallest with which a prompt fits.

    Raises:
        ValueError: it does not fit with any that divides the grid.
    """
    for factor in (1, 2, 4, 8, 16, 32):
        if grid[0] % factor or grid[1] % factor:
            break
        stored = pooled(maps, row, grid, factor)
        if (
            stored.nbytes * 4 // 3 <= largest
            or len(gzip.compress(stored.tobytes(), 6)) * 4 // 3 <= largest
        ):
            return factor
    raise ValueError(
        f"The maps of a prompt take more than largest={largest} bytes: cache fewer heads= or "
        "steps=, or give more bytes."
    )


def _grid(places: int, ratio: float) -> tuple[int, int]:
    """Rows and columns of image positions, nearest to the image's ratio of sides."""
    divisors = [rows for rows in range(1, places + 1) if places % rows == 0]
    rows = min(divisors, key=lambda rows: abs(math.log(rows**2 / places / ratio)))
    return rows, places // rows
