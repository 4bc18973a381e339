"""Which token of a prompt plays which part in the sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from jaxtyping import Bool
from torch import Tensor, tensor

from hooked_models import HookedTextToImage

from ..task import COLORS, SHAPES

Role = Literal["color1", "shape1", "relation", "color2", "shape2", "filler", "eos", "pad"]

RELATION_WORDS = frozenset({"above", "below", "left", "right", "upper", "lower", "up", "down", "higher"})
"""Words that carry a direction; everything else that is no shape and no colour is filler."""


def token_roles(model: HookedTextToImage, prompt: str, length: int | None = None) -> list[Role]:
    """The role of every token of a prompt, in order, EOS and pads (up to `length`) included.

    Words are found by the tokenizer's character offsets, so a word of several tokens gives each of them its role. Objects
    are numbered as the prompt names them; a colour belongs to the next shape.
    """
    word_roles = _word_roles(prompt.lower().split())
    return [word_roles[word] if isinstance(word, int) else word for word in _token_words(model, prompt, length)]


def _token_words(model: HookedTextToImage, prompt: str, length: int | None) -> list[int | Literal["eos", "pad"]]:
    """Of every token which word it is part of."""
    text = prompt.lower().strip()
    encoded = model.tokenizer(
        text, return_offsets_mapping=True, padding="longest" if length is None else "max_length", max_length=length
    )
    ends = []  # end offset of each word
    position = 0
    for word in text.split():
        position = text.index(word, position) + len(word)
        ends.append(position)
    words: list[int | Literal["eos", "pad"]] = []
    for token, (_, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        if token == model.tokenizer.pad_token_id:
            words.append("pad")
        elif token == model.tokenizer.eos_token_id:
            words.append("eos")
        else:
            words.append(next(i for i, word_end in enumerate(ends) if end <= word_end))
    return words


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


def role_mask(model: HookedTextToImage, prompts: str | Sequence[str], role: Role) -> Bool[Tensor, "prompt text_pos"]:
    """Which tokens of `model.to_tokens(prompts)` play a role."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    length = model.to_tokens(prompts).shape[1]
    return by_role([token_roles(model, prompt, length) for prompt in prompts])[role]


def by_role(roles: Sequence[Sequence[Role]]) -> dict[Role, Bool[Tensor, "prompt text_pos"]]:
    """Equally long `token_roles` of several prompts as one mask for each role."""
    return {role: tensor([[found == role for found in row] for row in roles]) for role in get_args(Role)}


def phrase_mask(model: HookedTextToImage, prompts: str | Sequence[str], phrase: str) -> Bool[Tensor, "prompt text_pos"]:
    """Which tokens of `model.to_tokens(prompts)` spell a word or phrase, wherever it stands as whole words.

    Raises:
        ValueError: a prompt does not contain it.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    length, wanted, rows = model.to_tokens(prompts).shape[1], phrase.lower().split(), []
    for prompt in prompts:
        words = prompt.lower().split()
        starts = [i for i in range(len(words)) if words[i : i + len(wanted)] == wanted]
        if not starts:
            raise ValueError(f"{prompt!r} does not contain {phrase!r}.")
        inside = {i for start in starts for i in range(start, start + len(wanted))}
        rows.append([i in inside for i in _token_words(model, prompt, length)])
    return tensor(rows)
