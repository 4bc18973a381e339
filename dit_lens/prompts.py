"""Which token of a prompt plays which part in the sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Bool
from torch import Tensor, tensor

from hooked_models import HookedTextToImage

from .scenes import COLORS, SHAPES

Role = Literal["color1", "shape1", "relation", "color2", "shape2", "filler", "eos", "pad"]

RELATION_WORDS = frozenset({"above", "below", "left", "right", "upper", "lower", "up", "down", "higher"})
"""Words that carry a direction; everything else that is no shape and no colour is filler."""


def token_roles(model: HookedTextToImage, prompt: str, length: int | None = None) -> list[Role]:
    """The role of every token of a prompt, in order, EOS and pads (up to `length`) included.

    Words are found by the tokenizer's character offsets, so a word of several tokens gives each of them its role. Objects
    are numbered as the prompt names them; a colour belongs to the next shape.
    """
    text = prompt.lower().strip()
    encoded = model.tokenizer(
        text, return_offsets_mapping=True, padding="longest" if length is None else "max_length", max_length=length
    )
    word_roles = _word_roles(text.split())
    ends = []  # end offset of each word
    position = 0
    for word in text.split():
        position = text.index(word, position) + len(word)
        ends.append(position)
    roles: list[Role] = []
    for token, (_, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        if token == model.tokenizer.pad_token_id:
            roles.append("pad")
        elif token == model.tokenizer.eos_token_id:
            roles.append("eos")
        else:
            roles.append(word_roles[next(i for i, word_end in enumerate(ends) if end <= word_end)])
    return roles


def _word_roles(words: Sequence[str]) -> list[Role]:
    roles: list[Role] = []
    shapes_seen = 0
    for word in words:
        if word in SHAPES:
            shapes_seen += 1
            roles.append("shape1" if shapes_seen == 1 else "shape2")
        elif word in COLORS:
            roles.append("color1" if shapes_seen == 0 else "color2")
        else:
            roles.append("relation" if word in RELATION_WORDS else "filler")
    return roles


def role_mask(model: HookedTextToImage, prompts: Sequence[str], role: Role) -> Bool[Tensor, "prompt text_pos"]:
    """Which tokens of `model.to_tokens(prompts)` play a role."""
    length = model.to_tokens(prompts).shape[1]
    return tensor([[found == role for found in token_roles(model, prompt, length)] for prompt in prompts])
