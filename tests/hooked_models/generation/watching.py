"""Short generations and the tensors that are cached of them."""

from __future__ import annotations

from typing import Any

from hooked_models import GenerationCache, HookedTextToImage

from ..pipelines import PROMPTS

STEPS = 2
WATCHED = (
    *(f"attn.hook_{name}" for name in ("k", "v", "z", "attn_scores", "pattern")),
    *("resid_post", "hook_latent", "hook_x0", "text_encoder.hook_out"),
)


def is_watched(name: str) -> bool:
    """One or two names of each kind, so that the tests stay quick."""
    return name.endswith(WATCHED)


def is_pattern(name: str) -> bool:
    return name.startswith("steps.") and name.endswith("hook_pattern")


def run(model: HookedTextToImage, **settings: Any) -> GenerationCache:
    return model.run_with_cache(PROMPTS, num_steps=STEPS, **settings)[1]
