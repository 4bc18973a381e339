"""One self-contained HTML page of a run's attention: word ↔ place, by head and step."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlencode

import numpy as np
import torch
import xarray as xr
from einops import reduce
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from hooked_models.generation.cache import GenerationCache
from hooked_models.generation.names import parse_head
from hooked_models.generation.pipeline import HookedPipeline

Run = tuple[GenerationCache, Float[Tensor, "prompt 3 height width"]]
PATTERN = re.compile(r"steps\.\d+\.cond\.blocks\.(\d+)\.(attn|cross_attn)\.hook_pattern")
LARGEST = 25_000_000
"""Bytes of a prompt's maps in the file; larger ones are averaged over squares of places."""


def attention_page(
    cache: GenerationCache,
    prompts: Sequence[str],
    images: Float[Tensor, "prompt 3 height width"],
    path: str | Path,
    *,
    others: Mapping[str, Run] | None = None,
    start: Mapping[str, Any] | None = None,
    largest: int = LARGEST,
    effects: xr.DataArray | None = None,
) -> Path:
    """Write a page to explore: heads, steps and words, two prompts or runs side by side, a ranking
    of heads, PNG and CSV.

    It opens in any browser since 2023, fetches nothing, and shows prompts as text, never as markup.
    Its address keeps the view.

    Args:
        cache: of one generation, with `hook_pattern` of the attention that reads the text
            (cross-attention, or the joint attention of FLUX, SD3 and others), of any layers, heads
            and steps: `model.run_with_cache(prompts, names_filter=lambda name:
            name.endswith("cross_attn.hook_pattern"))`. Pads are left out.
        prompts: those of the cache, in its order.
        images: the generated images; their aspect ratio gives the grid of places.
        path: the file.
        others: name → (cache, images) of other runs of the same prompts, steps and heads, such as
            {"patched": …}.
        start: the view at the beginning, any of prompt (its number), beside (likewise), head
            ("L2H1"), step, word (a token, or its number) and opacity (0 … 100); by default, the
            head and the word whose attention differs most between places.
        largest: bytes of a prompt's maps in the file. Weights take a byte each, to ±0.4 % of full
            attention, compressed; maps above this size are averaged over squares of 2 × 2 places,
            or 4 × 4, ….
        effects: of each head at each step, dims (layer, head, step), such as those of a sweep: a
            map whose cells open the head at the step. Heads and steps that it lacks stay empty.

    Raises:
        KeyError: the cache has no pattern of an attention that reads the text.
        ValueError: the number of prompts is not the cache's, its patterns are summaries, runs
            differ in steps or heads, `start` names something that the page lacks, or `effects` has
            other dims.

    Example:
        >>> model, prompts = (
        ...     HookedTextToImage.from_pretrained("rte-nano"),
        ...     ["red circle is above square"],
        ... )
        >>> keep = lambda name: name.endswith("cross_attn.hook_pattern")
        >>> images, cache = model.run_with_cache(prompts, num_steps=2, names_filter=keep)
        >>> attention_page(cache, prompts, images, "page.html", start={"word": "above"}).name
        'page.html'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        page_text(
            cache, prompts, images, others=others, start=start, largest=largest, effects=effects
        )
    )
    return path


@dataclass(frozen=True)
class Shown:
    """A page as the output of a notebook's cell. GitHub and trusted-only viewers show nothing."""

    page: str
    height: int

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.page)}" sandbox="allow-scripts allow-downloads" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )


def show(
    cache: GenerationCache,
    prompts: Sequence[str],
    images: Float[Tensor, "prompt 3 height width"],
    *,
    others: Mapping[str, Run] | None = None,
    start: Mapping[str, Any] | None = None,
    effects: xr.DataArray | None = None,
    height: int = 760,
) -> Shown:
    """Display `attention_page` inside a notebook: no server, no file.

    Arguments and errors as there; `height` in pixels.

    Example:
        >>> model, prompts = (
        ...     HookedTextToImage.from_pretrained("rte-nano"),
        ...     ["red circle is above square"],
        ... )
        >>> images, cache = model.run_with_cache(
        ...     prompts, num_steps=1, names_filter="blocks.1.cross_attn.hook_pattern"
        ... )
        >>> show(cache, prompts, images)._repr_html_()[:16]
        '<iframe srcdoc="'
    """
    return Shown(
        page_text(cache, prompts, images, others=others, start=start, effects=effects), height
    )


def page_text(
    cache: GenerationCache,
    prompts: Sequence[str],
    images: Float[Tensor, "prompt 3 height width"],
    *,
    others: Mapping[str, Run] | None = None,
    start: Mapping[str, Any] | None = None,
    largest: int = LARGEST,
    effects: xr.DataArray | None = None,
) -> str:
    """The page as a text; see `attention_page`."""
    runs: dict[str, Run] = {"": (cache, images), **(others or {})}
    read = {name: _Maps.read(run, prompts) for name, (run, _) in runs.items()}
    first = read[""]
    for name, maps in read.items():
        if (maps.heads, maps.steps) != (first.heads, first.steps):
            raise ValueError(
                f"{name!r} has other heads or steps than the first run: cache the same of each run."
            )
    rows, columns = first.grid((images.shape[-2], images.shape[-1]))
    entries: list[dict[str, Any]] = []
    factor = max(
        _factor(maps, row, (rows, columns), largest)
        for maps in read.values()
        for row in range(len(prompts))
    )
    for name, (_, drawn) in runs.items():
        for row, text in enumerate(prompts):
            maps = read[name]
            stored = gzip.compress(
                _pooled(maps, row, (rows, columns), factor).tobytes(), 6, mtime=0
            )
            label = f"{name}: {text}" if name else text
            entry = {
                "text": text,
                "label": label,
                "tokens": maps.tokens[row],
                "image": _png(drawn[row]),
            }
            entries.append(entry | {"pattern": base64.b64encode(stored).decode()})
    about = (
        f"{len(first.heads)} heads, {len(first.steps)} denoising steps, {rows} × {columns} places"
    )
    if factor > 1:
        about += f", shown as averages over squares of {factor} × {factor}"
    data = {
        "entries": entries,
        "heads": first.heads,
        "steps": first.steps,
        "grid": (rows // factor, columns // factor),
        "about": about + ".",
        "effects": None if effects is None else _effects(effects, first),
        "start": urlencode(_begin(first, entries, start or {})),
    }
    here = files(__package__)
    script = (here / "attention_page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((here / "attention_page.html").read_text()).substitute(
        SCRIPT_HASH=f"sha256-{digest}",
        SCRIPT=script,
        DATA=json.dumps(data).replace("<", "\\u003c"),  # nothing in a prompt can end the element
    )


@dataclass(frozen=True)
class _Maps:
    """Attention of each place to each token."""

    pattern: Float[Tensor, "prompt step head place word"]
    heads: list[str]
    steps: list[int]
    tokens: list[list[str]]
    known_grid: tuple[int, int] | None

    @classmethod
    def read(cls, cache: GenerationCache, prompts: Sequence[str]) -> _Maps:
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


def _pooled(
    maps: _Maps, row: int, grid: tuple[int, int], factor: int
) -> UInt8[np.ndarray, "step head place word"]:
    """255·√p of one prompt, averaged over squares of places; pads left out."""
    pattern = maps.pattern[row, ..., : len(maps.tokens[row])]
    if factor > 1:
        size = {"r": grid[0] // factor, "c": grid[1] // factor, "a": factor, "b": factor}
        pattern = reduce(pattern, "s h (r a c b) w -> s h (r c) w", "mean", **size)
    return (255 * pattern.sqrt()).round().to(torch.uint8).contiguous().numpy()


def _factor(maps: _Maps, row: int, grid: tuple[int, int], largest: int) -> int:
    """Side of the squares to average over, the smallest with which a prompt fits.

    Raises:
        ValueError: it does not fit with any that divides the grid.
    """
    for factor in (1, 2, 4, 8, 16, 32):
        if grid[0] % factor or grid[1] % factor:
            break
        stored = _pooled(maps, row, grid, factor)
        if (
            stored.nbytes * 4 // 3 <= largest
            or len(gzip.compress(stored.tobytes(), 6)) * 4 // 3 <= largest
        ):
            return factor
    raise ValueError(
        f"The maps of a prompt take more than largest={largest} bytes: cache fewer heads= or "
        "steps=, or give more bytes."
    )


def _begin(
    maps: _Maps, entries: Sequence[Mapping[str, Any]], start: Mapping[str, Any]
) -> dict[str, Any]:
    """The view at the beginning, as the page's address says it."""
    known = {"prompt", "beside", "head", "step", "word", "opacity"}
    if unknown := set(start) - known:
        raise ValueError(f"start has no {unknown.pop()!r}: choose {', '.join(sorted(known))}.")
    row = start.get("prompt", 0)
    if row not in range(len(entries)) or start.get("beside", 0) not in range(len(entries)):
        raise ValueError(
            f"start names a prompt that is not there: there are {len(entries)}, counted from 0."
        )
    if start.get("head", maps.heads[0]) not in maps.heads:
        raise ValueError(
            f"start: head {start['head']!r} is not on the page, which has "
            f"{', '.join(maps.heads[:8])}, …."
        )
    if start.get("step", maps.steps[0]) not in maps.steps:
        raise ValueError(
            f"start: step {start['step']!r} is not on the page, which has {maps.steps}."
        )
    tokens = entries[row]["tokens"]
    word = start.get("word")
    if word is not None and word not in tokens and word not in range(len(tokens)):
        raise ValueError(
            f"start: {word!r} is no token of the prompt, which has {', '.join(tokens)}."
        )
    # where nothing is said: the largest difference between places, at the first step
    spread = maps.pattern[
        row % len(maps.pattern), maps.steps.index(start.get("step", maps.steps[0]))
    ].std(dim=1)
    spread = spread[:, : len(tokens)].clone()
    if "head" in start:
        spread = spread[[maps.heads.index(start["head"])]]
    if word is not None:
        word = tokens.index(word) if isinstance(word, str) else word
        spread = spread[:, [word]]
    head, best = divmod(int(spread.argmax()), spread.shape[1])
    return {
        "head": maps.heads[head],
        "step": maps.steps[0],
        **start,
        "word": best if word is None else word,
    }


def _effects(effects: xr.DataArray, maps: _Maps) -> dict[str, Any]:
    """Name of the effects, and rows of heads, columns of steps; None where there is none."""
    if set(effects.dims) != {"layer", "head", "step"}:
        raise ValueError(
            f"effects needs dims layer, head and step, not {', '.join(map(str, effects.dims))}."
        )
    known = effects.transpose("layer", "head", "step").to_series()
    rows = [
        [known.get((*parse_head(head), step), float("nan")) for step in maps.steps]
        for head in maps.heads
    ]
    values = [
        [None if math.isnan(value) else round(float(value), 6) for value in row] for row in rows
    ]
    return {"name": str(effects.name or "effect"), "values": values}


def _grid(places: int, ratio: float) -> tuple[int, int]:
    """Rows and columns of image positions, nearest to the image's ratio of sides."""
    divisors = [rows for rows in range(1, places + 1) if places % rows == 0]
    rows = min(divisors, key=lambda rows: abs(math.log(rows**2 / places / ratio)))
    return rows, places // rows


def _png(image: Float[Tensor, "3 height width"]) -> str:
    buffer = io.BytesIO()
    pixels = (
        (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy().astype(np.uint8)
    )
    Image.fromarray(pixels).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
