"""Vectors that turn a prompt's relation into another, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedTextToImage

from ..task import PHRASES
from ..text.prompts import RELATION_WORDS, Role, token_mask
from ..text.variance import (
    Space,
    effect_vectors,
    encode_prompts,
    factorial_prompts,
    factors_of,
    phrase_of,
    word_vectors,
)

Target = Literal["phrase"] | Role


@torch.no_grad()
def swap_vectors(
    model: HookedTextToImage,
    prompts: Sequence[str],
    to: Sequence[str],
    tokens: Target = "phrase",
    at: Space = "text",
) -> Float[Tensor, "prompt text_pos d"]:
    """V_to − V_from for every token of `model.to_tokens(prompts)`; zero where none changes.

    In a pipeline, for every text position of its denoiser.

    Args:
        model: the model whose text encoder gives the words' vectors.
        prompts: prompts of the two-object task.
        to: relation or phrase to go to, for each prompt.
        tokens: words that carry the change:

            - "phrase": every word of the relation phrase, token by token. The phrase of `to` is the
              one with equally many tokens that keeps most of the prompt's (above ↔ below, left ↔
              right, diagonals among themselves, "left of" → "directly above").
            - "relation": only the words that have a direction; the rest of the phrase stays ("to
              the left of" → "to the above of").
            - another role, such as "shape2": effect vectors of the relation at that word
              (`variance.effect_vectors` over the 264 prompts, with shapes and colors as the other
              factors). This is the paper's method, for encoders that mix words.

        The first two are means of the words' differences over the 12 pairs of objects, so they are
        the difference of two sum-to-zero effects, with equal position codes.
        at: "text", the encoder's output (d = d_text), or "caption", after the caption projection (d
            = d_model).

    Raises:
        ValueError: there is no such phrase, or nothing to change.

    Example:
        >>> vectors = swap_vectors(model, ["red circle is left of blue square"], ["right"])
        >>> vectors.shape, vectors[0].norm(dim=-1).bool().int().tolist()
        (torch.Size([1, 8, 256]), [0, 0, 0, 1, 0, 0, 0, 0])
    """
    said = [factors_of(model, prompt) for prompt in prompts]
    places = len(prompts), model.layout(list(prompts)).text_mask.shape[1]
    width = encode_prompts(model, list(prompts)[:1], at).shape[-1]
    vectors = torch.zeros(*places, width, device=model.device, dtype=model.dit.dtype)
    if tokens != "phrase" and tokens != "relation":
        samples, factors = word_vectors(model, factorial_prompts(), tokens, at)
        effects = effect_vectors(samples, factors[["shape1", "color1", "shape2", "relation"]])[
            "relation"
        ]
        for row, mask, own, target in zip(
            vectors, token_mask(model, prompts, tokens), said, to, strict=True
        ):
            if unknown := [name for name in (own["relation"], target) if name not in PHRASES]:
                raise ValueError(
                    f"{unknown[0]!r} has no effect vector: choose a relation of "
                    f"{', '.join(PHRASES)}."
                )
            difference = effects.sel(relation=target) - effects.sel(relation=own["relation"])
            row[mask.to(row.device)] = torch.from_numpy(difference.values).to(row)
        return vectors

    @cache
    def word_difference(phrase: str, target: str) -> Float[Tensor, "phrase_pos d"]:
        return _word_difference(
            model, phrase, _counterpart(model, phrase, target, tokens == "phrase"), at
        )

    texts = model.encoded_texts(list(prompts))  # of this batch: some pipelines pad at the left
    for row, encoded, own, target in zip(vectors, texts, said, to, strict=True):
        row[phrase_of(encoded)] = word_difference(own["phrase"], target)
    return vectors


def _counterpart(model: HookedTextToImage, phrase: str, to: str, whole: bool) -> str:
    """Phrase of `to` that replaces `phrase` token by token: the one with most tokens in common."""

    def pieces(wording: str) -> list[int]:
        """Tokens of a phrase, in a sentence."""
        encoded = model.encoded_texts(factorial_prompts([wording])[0])[0]
        return [encoded.ids[position] for position in phrase_of(encoded)]

    def common(other: str) -> int:
        return sum(a == b for a, b in zip(pieces(phrase), pieces(other), strict=False))

    others = sorted(PHRASES.get(to, (to,)), key=common, reverse=True)  # type: ignore[call-overload]
    for wording in others if whole else [_substituted(phrase, other) for other in others]:
        if wording is not None and len(pieces(wording)) == len(pieces(phrase)):
            return wording
    if whole:
        raise ValueError(
            f"No phrase for {to!r} has as many tokens as {phrase!r} ({len(pieces(phrase))}): take "
            "prompts with another phrase, "
            "or tokens='relation', which changes the direction words only."
        )
    raise ValueError(
        f"{phrase!r} and {to!r} have different numbers of direction words, so that none can take "
        "another's place."
    )


def _substituted(phrase: str, other: str) -> str | None:
    """`phrase` with the direction words of `other` in place of its own."""
    words, new = phrase.split(), [word for word in other.split() if word in RELATION_WORDS]
    places = [place for place, word in enumerate(words) if word in RELATION_WORDS]
    if not places or len(places) != len(new):
        return None
    for place, word in zip(places, new, strict=True):
        words[place] = word
    return " ".join(words)


def _word_difference(
    model: HookedTextToImage, phrase: str, target: str, at: Space
) -> Float[Tensor, "phrase_pos d"]:
    """Mean change of the phrase's tokens over pairs of objects if `target` replaces it."""
    means = []
    for wording in (phrase, target):
        sentences = factorial_prompts([wording])
        encoded = encode_prompts(model, sentences, at)
        places = [phrase_of(one) for one in model.encoded_texts(sentences)]
        if len({len(own) for own in places}) > 1:
            raise ValueError(
                f"{wording!r} has other numbers of tokens in other sentences: some are cut off; "
                "raise max_sequence_length in model.options."
            )
        means.append(
            torch.stack([row[own] for row, own in zip(encoded, places, strict=True)]).mean(dim=0)
        )
    return means[1] - means[0]
