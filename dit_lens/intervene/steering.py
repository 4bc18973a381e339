"""Embedding arithmetic: add vectors to a prompt's words, and judge the images.

    prompts = ["red circle is left of blue square"]
    images = steering.swap_relation(model, prompts, from_="left", to="right", k=1.0)
    doses = steering.dose_response(model, scenes.sample(32, seed=0), doses=(0, 0.5, 1, 1.5, 2))
    steering.summarise(doses)

Vectors are added in the conditional branch, at every step, before ("text") or after ("caption") the
caption projection. Text is encoded once; hooks on its copies in the denoiser make the projection
run again, so this works with any text encoder. A pipeline of another family has "text" alone, as it
enters its denoiser.

Source: Wang, Fan, Pan (arXiv 2601.06338), section on T5: e − V_from + k·V_to on the second object's
word. Here both vectors are multiplied by k, so k = 0 is no change. The doses and the controls are
additions to the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.arguments import integer, number
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.generation.noise import Seeds, seed_of_each

from ..runs.drawing import Drawing
from ..text.prompts import Tokens, token_mask
from ..text.variance import Space, factors_of
from .doses import BATCH, JUDGED, METRICS, SITES, Swap, dose_response, summarise
from .interventions import Add, Intervention
from .swap_vectors import Target, swap_vectors

__all__ = [
    "JUDGED",
    "METRICS",
    "Swap",
    "dose_response",
    "steer",
    "summarise",
    "swap_relation",
    "swap_vectors",
]

PROGRESS_FROM = 5
"""Smallest number of batches that gets a progress bar."""


@torch.no_grad()
def steer(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    vector: Float[Tensor, " d"] | Float[Tensor, "prompt text_pos d"],
    tokens: Tokens | None = None,
    at: Space = "text",
    k: int | float = 1.0,
    seed: Seeds = 0,
    **drawing: Unpack[Drawing],
) -> Float[Tensor, "prompt 3 height width"]:
    """Images in [0, 1] of prompts with k · vector added to their words.

    Args:
        model: the model that draws.
        prompts: one prompt or several, one image each.
        vector: one for the chosen tokens of all prompts, or one for every text position (token of
            `model.to_tokens(prompts)`).
        tokens: roles, words (`prompts.word`), positions or a mask that the vector is added to; None
            only if every token has its own vector.
        at: the space of the vector: before or after the caption projection.
        k: dose.
        seed: as in the model's own call.
        **drawing: `num_steps`, `guidance` and `batch_size`; see `runs.drawing.Drawing`.

    Raises:
        ValueError: a prompt has no such token, or vector and tokens do not go together.

    Example:
        >>> prompt, vector = "red circle is above blue square", torch.ones(256)
        >>> steer(model, prompt, vector, "relation", k=0.5, num_steps=2).shape
        torch.Size([1, 3, 128, 128])
    """
    k, batch_size = number("k", k), integer("batch_size", drawing.get("batch_size", BATCH), 1)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if vector.ndim == 3:
        if tokens is not None or len(vector) != len(texts):
            raise ValueError(
                "A vector for every token is [prompt text_pos d], with no tokens= beside it."
            )
        added = vector
    elif tokens is None:
        raise ValueError(
            "Say which tokens the vector is added to: a role such as tokens='shape2', or positions."
        )
    else:
        added = token_mask(model, texts, tokens).to(vector)[..., None] * vector
    seeds = seed_of_each(seed, len(texts))
    images, starts = [], range(0, len(texts), batch_size)
    quiet = len(starts) < PROGRESS_FROM
    bar = track(starts, "steering", transient=True, disable=quiet, console=Console(stderr=True))
    for start in bar:
        rows = slice(start, start + batch_size)
        check_places(model, texts, texts[rows])
        images.append(_generate(model, texts[rows], k * added[rows], at, seeds[rows], drawing))
    return torch.cat(images)


def check_places(model: HookedTextToImage, texts: Sequence[str], some: Sequence[str]) -> None:
    """Raise ValueError unless the tokens of `some` prompts stand where they do among all `texts`.

    A pipeline that pads at the left moves them.

    Example:
        >>> check_places(model, ["red circle", "red"], ["red"])
    """
    if model.text_encoder is not None or set(texts) == set(some):
        return
    whole = dict(zip(texts, model.encoded_texts(list(texts)), strict=True))
    for text, here in zip(some, model.encoded_texts(list(some)), strict=True):
        if list(whole[text].spans)[: len(here.spans)] != list(here.spans):
            raise ValueError(
                f"The tokens of {text!r} stand at other positions in a smaller batch: take prompts "
                f"of equally many tokens, or batch_size={len(texts)}."
            )


def _generate(
    model: HookedTextToImage,
    texts: Sequence[str],
    added: Float[Tensor, "prompt text_pos d"],
    at: Space,
    seeds: Sequence[int],
    drawing: Drawing,
) -> Float[Tensor, "prompt 3 height width"]:
    """Images of one batch. `added` may extend beyond the longest of these prompts, with zeros."""
    length = model.layout(list(texts)).text_mask.shape[1]
    num_steps = drawing.get("num_steps", DEFAULT_STEPS)
    change = Intervention(SITES[at], action=Add(added[:, :length]))
    hooks = change.hooks(model, texts, num_steps=num_steps)
    guidance = drawing.get("guidance", model.default_guidance)
    return model.run_with_hooks(
        texts, seed=seeds, num_steps=num_steps, guidance=guidance, fwd_hooks=hooks
    )


# From one relation to another


@torch.no_grad()
def swap_relation(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    from_: str = "left",
    to: str = "above",
    k: int | float = 1.0,
    seed: Seeds = 0,
    tokens: Target = "phrase",
    at: Space = "text",
    **drawing: Unpack[Drawing],
) -> Float[Tensor, "prompt 3 height width"]:
    """Images in [0, 1] of prompts whose relation is moved by k · (V_to − V_from).

    See `swap_vectors`.

    Args:
        model: the model that draws.
        prompts: one prompt or several, one image each.
        from_: relation of the prompts ("upper_left"), or one phrase of it.
        to: relation or phrase to draw instead.
        k: dose.
        seed: as in the model's own call.
        tokens: words that carry the change: see `swap_vectors`.
        at: the space of the change: before or after the caption projection.
        **drawing: `num_steps`, `guidance` and `batch_size`; see `runs.drawing.Drawing`.

    Raises:
        ValueError: a prompt has another relation, or the two cannot be swapped in this way (the
            message has the alternative).

    Example:
        >>> prompt = "red circle is left of blue square"
        >>> swap_relation(model, prompt, "left", "right", num_steps=2).shape
        torch.Size([1, 3, 128, 128])
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for text in texts:
        said = factors_of(model, text)
        if from_ not in (said["relation"], said["phrase"]):
            raise ValueError(
                f"{text!r} says {said['phrase']!r} ({said['relation']}), not {from_!r}."
            )
    vectors = swap_vectors(model, texts, [to] * len(texts), tokens, at)
    return steer(model, texts, vectors, None, at, k, seed, **drawing)


# Dose and response
