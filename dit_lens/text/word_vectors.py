"""Text-encoder vectors of a prompt's words, and the factors that the prompt is made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.text_encoders.random_tokens import PAD_ID
from hooked_models.text_encoders.words import EncodedText

from ..task import COLORS, PHRASES, SHAPES, Scene, caption
from ..task.scene import other_color
from .roles import Role, roles_of_text, roles_of_words

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
        model: the model whose text encoder reads the prompts.
        prompts: prompts of the two-object task, or scenes, whose captions are used.
        role: one of `ROLES`, such as "relation" or "shape2".
        at: "text" for the encoder's output, "caption" for the input of cross-attention (after the
            caption projection).
        pool: "last" or "mean" over the role's tokens, if it has several in a prompt (or in several
            text encoders of a pipeline).

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
    vectors, rows = [], []
    read = model.encoded_texts(texts)
    for text, one, encoded in zip(texts, read, encode_prompts(model, texts, at), strict=True):
        sentence = _Sentence(one)
        roles = roles_of_text(sentence.encoded)
        positions = [position for position, found in enumerate(roles) if found == role]
        if not positions:
            named = ", ".join(dict.fromkeys(roles))
            raise ValueError(
                f"{text!r} has no {role} token: leave the prompt out, or choose among {named}."
            )
        vectors.append(encoded[positions[-1]] if pool == "last" else encoded[positions].mean(dim=0))
        rows.append(sentence.factors() | {"position": positions[-1]})
    return torch.stack(vectors), pd.DataFrame(rows)


def encode(
    model: HookedTextToImage, tokens: Tensor, at: Space, batch_size: int = 64
) -> Float[Tensor, "prompt text_pos d"]:
    """Text-encoder output for token ids [prompt text_pos].

    Before ("text") or after ("caption") the caption projection.

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


def encode_prompts(
    model: HookedTextToImage, prompts: Sequence[str], at: Space = "text"
) -> Float[Tensor, "prompt text_pos d"]:
    """Text vectors of prompts at the denoiser's text positions, as `encode` gives them.

    In a pipeline, those that enter its denoiser.

    Raises:
        ValueError: "caption" of a pipeline, whose denoiser has no projection of that name.

    Example:
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> encode_prompts(model, ["red circle is above blue square"]).shape
        torch.Size([1, 7, 256])
    """
    if model.text_encoder is not None:
        return encode(model, model.to_tokens(list(prompts)), at)
    if at != "text":
        raise ValueError(f"at={at!r}: of this pipeline there is only 'text', as it enters.")
    entering: Any = model
    return entering.text_entering(prompts)


def phrase_of(encoded: EncodedText) -> list[int]:
    """Text positions that spell a text's relation phrase.

    All words between the first object (and "is") and the second, in the tokens of each text
    encoder.

    Raises:
        ValueError: the prompt does not name two objects.

    Example:
        >>> phrase_of(model.encoded_texts("red circle is to the left of blue square")[0])
        [3, 4, 5, 6]
    """
    return encoded.tokens_between(*_Sentence(encoded).phrase())


def phrase_span(model: HookedTextToImage, prompt: str) -> slice:
    """`phrase_of` a prompt, as a slice.

    Raises:
        ValueError: the prompt does not name two objects, or several text encoders spell the phrase.

    Example:
        >>> phrase_span(model, "red circle is to the left of blue square")
        slice(3, 7, None)
    """
    found = phrase_of(model.encoded_texts(prompt)[0])
    if found != list(range(found[0], found[0] + len(found))):
        raise ValueError(
            f"The relation of {prompt!r} stands in several text encoders: take phrase_of."
        )
    return slice(found[0], found[-1] + 1)


def factors_of(model: HookedTextToImage, prompt: str) -> dict[str, str]:
    """Factors of one prompt: a row of `word_vectors`' factors, without the position.

    Raises:
        ValueError: the prompt does not name two objects.

    Example:
        >>> found = factors_of(model, "red circle is left of square")
        >>> found["color1"], found["color2"], found["relation"], found["phrase"]
        ('red', '', 'left', 'left of')
    """
    return _Sentence(model.encoded_texts(prompt)[0]).factors()


class _Sentence:
    """Tokens of a prompt, and the roles of its words."""

    def __init__(self, encoded: EncodedText) -> None:
        self.encoded = encoded
        self.roles = roles_of_words(self.encoded.words)

    def phrase(self) -> tuple[int, int]:
        """Characters (start, end) of the relation phrase."""
        words, roles = self.encoded.words, self.roles
        if "shape1" not in roles or "shape2" not in roles:
            raise ValueError(
                f"{self.encoded.text!r} does not name two objects, as 'red circle is above blue "
                "square' does."
            )
        start = roles.index("shape1") + 1
        start += words[start].normal == "is"
        stop = next(n for n in range(start, len(roles)) if roles[n] in ("color2", "shape2"))
        return words[start].start, words[max(start, stop - 1)].end

    def factors(self) -> dict[str, str]:
        parts: tuple[Role, ...] = ("color1", "shape1", "relation", "color2", "shape2")
        text, words = self.encoded.text, list(zip(self.encoded.words, self.roles, strict=True))
        said = {
            str(part): " ".join(text[word.start : word.end] for word, role in words if role == part)
            for part in parts
        }
        start, end = self.phrase()
        phrase = text[start:end]
        return said | {
            "relation": RELATION_OF.get(phrase, said["relation"].replace(" ", "_")),
            "phrase": phrase,
        }
