"""One self-contained HTML page to walk through a model's cross-attention: word ↔ place, by layer, head and step."""

from __future__ import annotations

import base64
import hashlib
import io
import json
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
    """Write the page: any browser opens it, nothing is fetched, prompts are text and never markup.

    Args:
        cache: of one generation, with `cross_attn.hook_pattern` of the layers and steps to show (pads are left out):
            `model.run_with_cache(prompts, names_filter=lambda name: name.endswith("cross_attn.hook_pattern"))`.
        prompts, images: what was generated, in the cache's order.
        path: the file; weights are stored to ±0.4 % of full attention, one byte each.

    Raises:
        KeyError: no cross-attention pattern is in the cache.
        ValueError: the number of prompts is not the cache's.
    """
    model = cache.model
    layers = [
        layer
        for layer in range(model.cfg.n_layers)
        if any(f".{layer}.cross_attn.hook_pattern" in name for name in cache.cache_dict)
    ]
    if not layers:
        raise KeyError("The cache has no cross-attention pattern: cache names that end in 'cross_attn.hook_pattern'.")
    stacked = torch.stack([cache.stack("pattern", layer, "cross_attn") for layer in layers], dim=2)
    pattern = stacked.transpose(0, 1).float().cpu()  # [prompt step layer head place word]
    if len(prompts) != len(pattern):
        raise ValueError(f"There are {len(prompts)} prompts and {len(pattern)} rows in the cache: pass those it was made with.")
    side = model.cfg.sample_size // model.cfg.patch_size
    grid = (side, side) if side**2 == pattern.shape[-2] else (1, pattern.shape[-2])
    entries = []
    for text, rows, image in zip(prompts, pattern, images, strict=True):
        tokens = [token.removeprefix("▁") for token in model.to_str_tokens(text)]
        stored = (255 * rows[..., : len(tokens)].sqrt()).round().to(torch.uint8).contiguous()
        entries.append(
            {"text": text, "tokens": tokens, "pattern": base64.b64encode(stored.numpy().tobytes()).decode(), "image": _png(image)}
        )
    data = {"prompts": entries, "steps": cache.steps, "layers": layers, "heads": pattern.shape[3], "grid": grid}
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


def _png(image: Float[Tensor, "3 height width"]) -> str:
    buffer = io.BytesIO()
    pixels = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy().astype(np.uint8)
    Image.fromarray(pixels).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
