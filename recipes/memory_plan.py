"""Size of a cache of PixArt-Σ-XL/2, by the tensors kept: arithmetic without weights, written
into docs/pretrained.md.

`python -m recipes.memory_plan`
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import init_empty_weights
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from hooked_models import HookedTextToImage, PatchCodec, word_tokenizer
from hooked_models.generation.cache_estimate import estimate, human

PAGE = Path(__file__).parents[1] / "docs/pretrained.md"
BLOCK = re.compile(r"(<!-- memory: recipes.memory_plan -->\n).*?(<!-- end -->)", flags=re.S)
PIXELS = (512, 1024)
WORDS, PADDED, STEPS = 20, 300, 14


def main() -> None:
    """Print the table and put it into the page."""
    found = plan()
    lines = [found.columns, ["---"] * len(found.columns), *found.values]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    page = PAGE.read_text()
    if not BLOCK.search(page):
        raise ValueError(f"{PAGE} has lost the comments between which the table stands.")
    PAGE.write_text(BLOCK.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page))
    print(table)


def xl(pixels: int) -> HookedTextToImage:
    """PixArt-Σ-XL/2 with T5-XXL in float16, on the meta device."""
    with init_empty_weights(include_buffers=True):
        transformer = PixArtTransformer2DModel(
            num_layers=28,
            num_attention_heads=16,
            attention_head_dim=72,
            cross_attention_dim=1152,
            caption_channels=4096,
            in_channels=4,
            out_channels=8,
            sample_size=pixels // 8,
            interpolation_scale=pixels / 512,
            use_additional_conditions=False,
        )
        sizes = {
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "vocab_size": 32128,
        }
        encoder = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))
        codec = PatchCodec(latent_channels=4, patch_size=8)
    parts = (
        transformer.half(),
        encoder.bfloat16(),
        word_tokenizer(["a"]),
        codec.half(),
        DPMSolverMultistepScheduler(),
    )
    return HookedTextToImage(*parts)


def ending(*leaves: str) -> Callable[[str], bool]:
    """Names in the denoiser that end so."""
    return lambda name: name.startswith("steps.") and name.endswith(leaves)


def plan() -> pd.DataFrame:
    """One row for each thing that may be kept; one prompt, conditional branch, all layers, 14
    steps.
    """
    some = {"heads": ["L2H13", "L6H1"]}
    image, text = (
        {"names_filter": ending(".attn.hook_pattern")},
        {"names_filter": ending("cross_attn.hook_pattern")},
    )
    kept: dict[str, tuple[int, dict[str, Any]]] = {
        "self-attention patterns": (WORDS, image),
        "self-attention patterns, two heads": (WORDS, image | some),
        "self-attention patterns, two heads, step 0": (WORDS, image | some | {"steps": 0}),
        'self-attention patterns, `patterns="entropy"`': (
            WORDS,
            image | {"patterns": "entropy"},
        ),
        "self-attention q and k": (WORDS, {"names_filter": ending(".attn.hook_q", ".attn.hook_k")}),
        f"cross-attention patterns, {PADDED} tokens": (PADDED, text),
        f"cross-attention patterns, {WORDS} tokens": (WORDS, text),
        f"cross-attention patterns, {WORDS} tokens, two heads": (
            WORDS,
            text | some,
        ),
        "the text's keys and values": (
            WORDS,
            {"names_filter": ending("cross_attn.hook_k", "cross_attn.hook_v")},
        ),
        "z of both attentions": (WORDS, {"names_filter": ending("attn.hook_z")}),
        "residual stream after each layer": (WORDS, {"names_filter": ending("hook_resid_post")}),
        "MLP activations": (WORDS, {"names_filter": ending("mlp.hook_post")}),
        "everything": (WORDS, {}),
    }
    rows = []
    models = {pixels: xl(pixels) for pixels in PIXELS}
    for what, (tokens, settings) in kept.items():
        row: dict[str, str] = {"kept": what}
        for pixels, model in models.items():
            size = estimate(model, (1, tokens), STEPS, **settings)
            row[f"{pixels} px"] = human(size.nbytes)
            row[f"{pixels} px, largest step"] = human(size.largest_step)
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
