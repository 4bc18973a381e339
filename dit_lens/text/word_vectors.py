"""Text-encoder vectors of a prompt's words, and the factors that the prompt is made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.text_encoders.random_tokens import PAD_ID

from ..task import COLORS, PHRASES, SHAPES, Scene, caption
from ..task.scene import other_color
from .prompts import Role, token_roles

Space = Literal["text", "caption"]
"""Before or after the caption projection."""

RELATION_OF = {phrase: str(relation) for relation, phrases in PHRASES.items() for phrase in phrases}


def factorial_prompts(phrases: Sequence[str] | None = None) -> list[str]:
    """All ordered pairs of shapes × both orders of colors × `phrases`.

    By default all 22 phrases, which gives the paper's 264 prompts.

    Example:
        >>> len(factorial_prompts()), factorial_prompts(["above"])[0]
        (264, 'red triangle is above blue circle')
    """
    phrases = (
        [phrase for of_relation in PHRASES.values() for phrase in of_relation]
        if phrases is None
        else phrases
    )
    orders = itertools.product(itertools.permutations(SHAPES, 2), COLORS, phrases)
    return [
        f"{color} {first} is {phrase} {other_color(color)} {second}"
        for (first, second), color, phrase in orders
    ]


@torch.no_grad()
def word_vectors(
    model: HookedTextToImage,
    prompts: str | Sequence[str | Scene],
    role: Role,
    at: Space = "text",
    pool: Literal["last", "mean"] = "last",
) -> tuple[Float[Tensor, "prompt d"], pd.DataFrame]:
    """Text-encoder vectors at a role's tokens in each prompt, and the factors of the prompts.

    Args:
        prompts: prompts of the two-object task, or scenes, whose captions are used.
        at: "text" for the encoder's output, "caption" for the input of cross-attention (after the
            caption projection).
        pool: "last" or "mean" over the role's tokens, if it has several in a prompt.

    Returns:
        Vectors [prompt d], d = d_text or d_model, and factors, one row a prompt: color1 shape1
        relation phrase color2 shape2 as worded in the prompt ("" for a missing color; a phrase of
        `PHRASES` counts as its relation), and `position`, the token's index. The colors of the two
        objects are each other's opposites, so one of them is enough.

    Raises:
        ValueError: a prompt has no such token.

    Example:
        >>> vectors, factors = word_vectors(model, "red circle is above blue square", "relation")
        >>> vectors.shape, factors["phrase"][0], int(factors["position"][0])
        (torch.Size([1, 256]), 'above', 3)
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    texts = [caption(prompt) if isinstance(prompt, Scene) else prompt for prompt in prompts]
    tokens = model.to_tokens(texts)
    vectors, rows = [], []
    for text, encoded in zip(texts, encode(model, tokens, at), strict=True):
        sentence = _Sentence(model, text)
        roles = sentence.roles
        positions = [position for position, found in enumerate(roles) if found == role]
        if not positions:
            raise ValueError(
                f"{text!r} has no {role} token: leave the prompt out, or choose among "
                f"{', '.join(roles)}."
            )
        vectors.append(encoded[positions[-1]] if pool == "last" else encoded[positions].mean(dim=0))
        rows.append(sentence.factors() | {"position": positions[-1]})
    return torch.stack(vectors), pd.DataFrame(rows)


def encode(
    model: HookedTextToImage, tokens: Tensor, at: Space, batch_size: int = 64
) -> Float[Tensor, "prompt text_pos d"]:
    """Text-encoder output for token ids [prompt text_pos], before ("text") or after ("caption") the
    caption projection.

    Raises:
        ValueError: a space other than "text" and "caption".

    Example:
        >>> encode(model, model.to_tokens(["red circle is above blue square"]), "caption").shape
        torch.Size([1, 7, 192])
    """
    if at not in get_args(Space):
        raise ValueError(
            f"at={at!r}: choose 'text' (before the caption projection) or 'caption' (after it)."
        )
    parts = [
        model.text_encoder(part, attention_mask=(part != PAD_ID).long())[0]
        for part in tokens.split(batch_size)
    ]
    text = torch.cat(parts).to(model.dit.dtype)
    return text if at == "text" else model.dit.project_caption(text)


def phrase_span(model: HookedTextToImage, prompt: str) -> slice:
    """Tokens of a prompt's relation phrase: all between the first object (and "is") and the second.

    Raises:
        ValueError: the prompt does not name two objects.

    Example:
        >>> phrase_span(model, "red circle is to the left of blue square")
        slice(3, 7, None)
    """
    return _Sentence(model, prompt).phrase_span()


def factors_of(model: HookedTextToImage, prompt: str) -> dict[str, str]:
    """Factors of one prompt: a row of `word_vectors`' factors, without the position.

    Raises:
        ValueError: the prompt does not name two objects.

    Example:
        >>> found = factors_of(model, "red circle is left of square")
        >>> found["color1"], found["color2"], found["relation"], found["phrase"]
        ('red', '', 'left', 'left of')
    """
    return _Sentence(model, prompt).factors()


class _Sentence:
    """Tokens of a prompt and their roles."""

    def __init__(self, model: HookedTextToImage, prompt: str) -> None:
        self.prompt = prompt
        self.strings, self.roles = model.to_str_tokens(prompt), token_roles(model, prompt)

    def phrase_span(self) -> slice:
        roles = self.roles
        if "shape1" not in roles or "shape2" not in roles:
            raise ValueError(
                f"{self.prompt!r} does not name two objects, as 'red circle is above blue square' "
                "does."
            )
        start = len(roles) - roles[::-1].index("shape1")
        start += self.strings[start] == "▁is"
        stop = next(
            position
            for position in range(start, len(roles))
            if roles[position] in ("color2", "shape2")
        )
        return slice(start, stop)

    def factors(self) -> dict[str, str]:
        parts: tuple[Role, ...] = ("color1", "shape1", "relation", "color2", "shape2")
        tokens = list(zip(self.strings, self.roles, strict=True))
        said = {
            str(part): _words([string for string, role in tokens if role == part]) for part in parts
        }
        phrase = _words(self.strings[self.phrase_span()])
        return said | {
            "relation": RELATION_OF.get(phrase, said["relation"].replace(" ", "_")),
            "phrase": phrase,
        }


def _words(strings: Sequence[str]) -> str:
    return "".join(strings).replace("▁", " ").strip()
