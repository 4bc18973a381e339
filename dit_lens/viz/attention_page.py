"""One self-contained HTML page of a run's attention: word ↔ place, by head and step."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlencode

import numpy as np
import xarray as xr
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hooked_models.generation.cache import GenerationCache
from hooked_models.generation.names import parse_head

from .attention_maps import Maps, pooled, side_of_squares

Run = tuple[GenerationCache, Float[Tensor, "prompt 3 height width"]]
Patched = Mapping[tuple[str, int], Float[Tensor, "prompt 3 height width"]]
ALL = -2
"""Value of `beside` in the page's address: every other entry."""
THUMBNAIL = 256
"""Pixels of the longer side of a patched image."""
LARGEST = 25_000_000
"""Bytes of a prompt's maps in the file; larger ones are averaged over squares of places."""


@dataclass(frozen=True)
class Effects:
    """Effects of heads at steps, and images of some of them.

    Args:
        values: dims (layer, head, step), such as those of a sweep.
        images: (head, step) → the images with that edit, of all prompts; at most 256 pixels of
            their longer side are kept.

    Example:
        >>> values = xr.DataArray(np.zeros((3, 3, 1)), dims=("layer", "head", "step"))
        >>> Effects(values, {("L2H1", 0): torch.zeros(1, 3, 64, 64)}).images.keys()
        dict_keys([('L2H1', 0)])
    """

    values: xr.DataArray
    images: Patched = field(default_factory=dict)


def attention_page(
    cache: GenerationCache,
    prompts: Sequence[str],
    images: Float[Tensor, "prompt 3 height width"],
    path: str | Path,
    *,
    others: Mapping[str, Run] | None = None,
    start: Mapping[str, Any] | None = None,
    largest: int = LARGEST,
    effects: xr.DataArray | Effects | None = None,
) -> Path:
    """Write a page to explore attention.

    Heads, steps and words, prompts and runs side by side, a ranking of heads, PNG and CSV. It opens
    in any browser since 2023, fetches nothing, and shows prompts as text, never as markup. Its
    address keeps the view.

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
        start: the view at the beginning, any of prompt (its number), beside (likewise, or "all"),
            head ("L2H1"), step, word (a token, or its number) and opacity (0 … 100); by default,
            the head and the word whose attention differs most between places.
        largest: bytes of a prompt's maps in the file. Weights take a byte each, to ±0.4 % of full
            attention, compressed; maps above this size are averaged over squares of 2 × 2 places,
            or 4 × 4, ….
        effects: of each head at each step, dims (layer, head, step), such as those of a sweep: a
            map whose cells open the head at the step. Heads and steps that it lacks stay empty. As
            `Effects`, with images: a cell opens its image, too.

    Raises:
        KeyError: the cache has no pattern of an attention that reads the text.
        ValueError: the number of prompts is not the cache's, its patterns are summaries, runs
            differ in steps or heads, `start` or an image of `effects` names something that the
            page lacks, or `effects` has other dims.

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
    effects: xr.DataArray | Effects | None = None,
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
    effects: xr.DataArray | Effects | None = None,
) -> str:
    """The page as a text; see `attention_page`."""
    runs: dict[str, Run] = {"": (cache, images), **(others or {})}
    effects = Effects(effects) if isinstance(effects, xr.DataArray) else effects
    read = {name: Maps.read(run, prompts) for name, (run, _) in runs.items()}
    first = read[""]
    for name, maps in read.items():
        if (maps.heads, maps.steps) != (first.heads, first.steps):
            raise ValueError(
                f"{name!r} has other heads or steps than the first run: cache the same of each run."
            )
    rows, columns = first.grid((images.shape[-2], images.shape[-1]))
    factor = max(
        side_of_squares(maps, row, (rows, columns), largest)
        for maps in read.values()
        for row in range(len(prompts))
    )
    entries = [
        _entry(name, text, read[name], row, drawn[row], (rows, columns), factor)
        for name, (_, drawn) in runs.items()
        for row, text in enumerate(prompts)
    ]
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
        "effects": None if effects is None else _effects(effects.values, first),
        "patched": {} if effects is None else _patched(effects.images, first, len(prompts)),
        "rows": len(prompts),
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


def _entry(
    name: str,
    text: str,
    maps: Maps,
    row: int,
    image: Float[Tensor, "3 height width"],
    grid: tuple[int, int],
    factor: int,
) -> dict[str, Any]:
    """One prompt of one run: its words, image and maps."""
    stored = gzip.compress(pooled(maps, row, grid, factor).tobytes(), 6, mtime=0)
    return {
        "text": text,
        "label": f"{name}: {text}" if name else text,
        "tokens": maps.tokens[row],
        "image": _png(image),
        "pattern": base64.b64encode(stored).decode(),
    }


def _begin(
    maps: Maps, entries: Sequence[Mapping[str, Any]], start: Mapping[str, Any]
) -> dict[str, Any]:
    """The view at the beginning, as the page's address says it."""
    _check_start(maps, entries, start)
    row, word = start.get("prompt", 0), start.get("word")
    tokens = entries[row]["tokens"]
    # by default, the largest difference between places, at the first step
    step = start.get("step", maps.steps[0])
    spread = maps.pattern[row % len(maps.pattern), maps.steps.index(step)].std(dim=1)
    spread = spread[:, : len(tokens)].clone()
    if "head" in start:
        spread = spread[[maps.heads.index(start["head"])]]
    if word is not None:
        word = tokens.index(word) if isinstance(word, str) else word
        spread = spread[:, [word]]
    head, best = divmod(int(spread.argmax()), spread.shape[1])
    found = {"head": maps.heads[head], "step": maps.steps[0], **start}
    if start.get("beside") == "all":
        found["beside"] = ALL
    return found | {"word": best if word is None else word}


def _check_start(
    maps: Maps, entries: Sequence[Mapping[str, Any]], start: Mapping[str, Any]
) -> None:
    """Raise ValueError for a view that is not on the page."""
    known = {"prompt", "beside", "head", "step", "word", "opacity"}
    if unknown := set(start) - known:
        raise ValueError(f"start has no {unknown.pop()!r}: choose {', '.join(sorted(known))}.")
    row = start.get("prompt", 0)
    beside = ALL if start.get("beside") == "all" else start.get("beside", 0)
    if row not in range(len(entries)) or beside not in (*range(len(entries)), ALL):
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


def _effects(effects: xr.DataArray, maps: Maps) -> dict[str, Any]:
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


def _patched(patched: Patched, maps: Maps, prompts: int) -> dict[str, list[str]]:
    """Head and step → pictures of all prompts."""
    for (head, step), images in patched.items():
        if head not in maps.heads or step not in maps.steps:
            raise ValueError(f"effects has an image of {head} at step {step}: not on the page.")
        if len(images) != prompts:
            raise ValueError(
                f"effects has {len(images)} images of {head} at step {step}: give one of each of "
                f"the {prompts} prompts."
            )
    return {
        f"{head} {step}": [_png(image, THUMBNAIL) for image in images]
        for (head, step), images in patched.items()
    }


def _png(image: Float[Tensor, "3 height width"], largest: int = 100_000) -> str:
    """A data URL; larger images are made smaller."""
    buffer = io.BytesIO()
    pixels = (
        (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy().astype(np.uint8)
    )
    drawn = Image.fromarray(pixels)
    drawn.thumbnail((largest, largest))
    drawn.save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
