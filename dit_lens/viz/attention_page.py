"""Self-contained HTML page for a model's cross-attention: word ↔ position, by layer, head and step."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hooked_models.generation.cache import GenerationCache


def attention_page(
    cache: GenerationCache, prompts: list[str], images: Float[Tensor, "prompt 3 height width"], path: str | Path
) -> Path:
    """Write the page. It opens in any browser, fetches nothing, and shows prompts as text, never as
    markup.

    Args:
        cache: of one generation, with `cross_attn.hook_pattern` of the layers, heads and steps to
            show (pads are left out): `model.run_with_cache(prompts, names_filter=lambda name:
            name.endswith("cross_attn.hook_pattern"))`.
        prompts: those of the cache, in its order.
        images: the generated images, of any size; their aspect ratio gives the grid of image
            positions.
        path: the file; weights are stored to ±0.4 % of full attention, one byte each.

    Raises:
        KeyError: no cross-attention pattern is in the cache.
        ValueError: the number of prompts is not the cache's, or its patterns are summaries.

    Example:
        >>> from hooked_models import HookedTextToImage
        >>> model, prompts = HookedTextToImage.from_pretrained("rte-nano"), ["red circle is above square"]
        >>> keep = lambda name: name.endswith("cross_attn.hook_pattern")
        >>> images, cache = model.run_with_cache(prompts, num_steps=2, names_filter=keep)
        >>> attention_page(cache, prompts, images, "page.html").name
        'page.html'
    """
    model = cache.model
    layers = [
        layer
        for layer in range(model.cfg.n_layers)
        if any(f".{layer}.cross_attn.hook_pattern" in name for name in cache.cache_dict)
    ]
    if not layers:
        raise KeyError("The cache has no cross-attention pattern: cache names that end in 'cross_attn.hook_pattern'.")
    # layers may have kept unequal numbers of heads, so their heads stand one after the other
    stacked = torch.cat([cache.stack("pattern", layer, "cross_attn").float().cpu() for layer in layers], dim=2)
    if stacked.ndim != 5:
        raise ValueError("The cache holds summaries of patterns: run_with_cache(…) without patterns= keeps them whole.")
    pattern = stacked.transpose(0, 1)  # [prompt step head place word]
    heads = [list(range(model.cfg.n_heads)) if cache.heads is None else list(cache.heads[layer]) for layer in layers]
    if len(prompts) != len(pattern):
        raise ValueError(f"There are {len(prompts)} prompts and {len(pattern)} rows in the cache: pass those it was made with.")
    entries = []
    for text, rows, image in zip(prompts, pattern, images, strict=True):
        tokens = [token.removeprefix("▁") for token in model.to_str_tokens(text)]
        stored = (255 * rows[..., : len(tokens)].sqrt()).round().to(torch.uint8).contiguous()
        entries.append(
            {"text": text, "tokens": tokens, "pattern": base64.b64encode(stored.numpy().tobytes()).decode(), "image": _png(image)}
        )
    grid = _grid(pattern.shape[-2], images.shape[-2] / images.shape[-1])
    data = {"prompts": entries, "steps": cache.steps, "layers": layers, "heads": heads, "grid": grid}
    here = files(__package__)
    script = (here / "attention_page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        Template((here / "attention_page.html").read_text()).substitute(
            SCRIPT_HASH=f"sha256-{digest}",
            SCRIPT=script,
            DATA=json.dumps(data).replace("<", "\\u003c"),  # nothing in a prompt can end the element
        )
    )
    return path


def _grid(places: int, ratio: float) -> tuple[int, int]:
    """Rows and columns of a number of image positions, nearest to the image's ratio of height to
    width.
    """
    divisors = [rows for rows in range(1, places + 1) if places % rows == 0]
    rows = min(divisors, key=lambda rows: abs(math.log(rows**2 / places / ratio)))
    return rows, places // rows


def _png(image: Float[Tensor, "3 height width"]) -> str:
    buffer = io.BytesIO()
    pixels = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy().astype(np.uint8)
    Image.fromarray(pixels).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
