"""Roles of a prompt's tokens: which object, color or relation they name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.text_encoders.words import EncodedText, TextWord

from ..task import COLORS, SHAPES

Role = Literal["color1", "shape1", "relation", "color2", "shape2", "filler", "eos", "pad"]

RELATION_WORDS = frozenset(
    {
        # the task's own
        *("above", "below", "left", "right", "upper", "lower", "up", "down", "higher"),
        *(
            "under",
            "over",
            "beneath",
            "underneath",
            "beside",
            "behind",
            "between",
            "near",
            "next",
            "on",
            "in",
            "inside",
        ),
        *("outside", "atop", "top", "bottom", "front", "against", "around"),
    }
)
"""Words of place; everything else that is no shape and no color is filler."""


def token_roles(model: HookedTextToImage, prompt: str, length: int | None = None) -> list[Role]:
    """The role of every token of a prompt, in order, EOS and pads (up to `length`) included.

    A word of several tokens gives each of them its role. Objects are numbered as the prompt names
    them; a color belongs to the next shape.

    Example:
        >>> model = HookedTextToImage.from_pretrained("t5-micro", weights=False)
        >>> token_roles(model, "red circle, above a square")
        ['color1', 'shape1', 'filler', 'relation', 'filler', 'shape2', 'eos']
    """
    return roles_of(model.encoded_texts(prompt, length))[0]


def roles_of(texts: Sequence[EncodedText]) -> list[list[Role]]:
    """Roles of the tokens of encoded texts.

    Example:
        >>> model = HookedTextToImage.from_pretrained("t5-micro", weights=False)
        >>> roles_of(model.encoded_texts("red circle"))
        [['color1', 'shape1', 'eos']]
    """
    return [roles_of_text(text) for text in texts]


def roles_of_text(encoded: EncodedText) -> list[Role]:
    """Role of each token.

    Example:
        >>> model = HookedTextToImage.from_pretrained("t5-micro", weights=False)
        >>> roles_of_text(model.encoded_texts("red circle")[0])
        ['color1', 'shape1', 'eos']
    """
    of_words = roles_of_words(encoded.words)
    return [
        kind if kind != "text" else "filler" if number is None else of_words[number]
        for kind, number in zip(encoded.kinds, encoded.word_of_token, strict=True)
    ]


def roles_of_words(words: Sequence[TextWord]) -> list[Role]:
    """Role of each word.

    Example:
        >>> from hooked_models.text_encoders.words import split_words
        >>> roles_of_words(split_words("a red circle above a square"))
        ['filler', 'color1', 'shape1', 'relation', 'filler', 'shape2']
    """
    roles: list[Role] = []
    shapes_seen = 0
    for found in words:
        if found.normal in SHAPES:
            shapes_seen += 1
            roles.append("shape1" if shapes_seen == 1 else "shape2")
        elif found.normal in COLORS:
            roles.append("color1" if shapes_seen == 0 else "color2")
        else:
            roles.append("relation" if found.normal in RELATION_WORDS else "filler")
    return roles


def by_role(roles: Sequence[Sequence[Role]]) -> dict[Role, Bool[Tensor, "prompt text_pos"]]:
    """Masks by role from equally long `token_roles` of several prompts.

    Example:
        >>> by_role([["relation", "eos"], ["shape1", "eos"]])["eos"].tolist()
        [[False, True], [False, True]]
    """
    return {
        role: torch.tensor([[found == role for found in row] for row in roles])
        for role in get_args(Role)
    }


# Masks
