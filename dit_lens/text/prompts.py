"""The tokens of a prompt: by their role in the sentence, by word, by position or by mask.

    second_cat = prompts.word("cat", nth=2)
    Intervention("blocks.2.cross_attn.hook_pattern", tokens=second_cat, action="knockout")

`tokens=` of interventions, ablations, steering and synopses is one of these:

- a role, or several ("relation", ["shape1", "shape2"]): each prompt's own tokens that play it
  (`Role`);
- a word, or several (`word("cat")`, `word("left of", nth=2)`): a word or phrase, wherever it stands
  as whole words;
- positions ([0, 3]): the same tokens of every prompt;
- a mask: booleans [prompt text_pos].

Words are found by the tokenizer's character offsets in the text that is encoded
(`hooked_models.text_encoders.words`): a word of several tokens selects each of them, and
punctuation, quotes and hyphens end a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Integer, Shaped
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.text_encoders.words import EncodedText, split_words

from .choices import TokenChoice, Word, as_choice, word
from .roles import (
    RELATION_WORDS,
    Role,
    by_role,
    roles_of,
    roles_of_text,
    roles_of_words,
    token_roles,
)

__all__ = [
    "RELATION_WORDS",
    "Role",
    "Tokens",
    "Word",
    "as_choice",
    "by_role",
    "phrase_mask",
    "role_groups",
    "role_mask",
    "roles_of",
    "token_mask",
    "token_roles",
    "word",
]


Tokens: TypeAlias = (
    str
    | Word
    | Sequence[str | Word]
    | Iterable[SupportsIndex]
    | Sequence[Sequence[SupportsIndex]]
    | Integer[Tensor, " position"]
    | Bool[Tensor, "prompt pos"]
    | Integer[Tensor, "prompt pos"]
    | Shaped[np.ndarray, "*prompt pos"]
)
"""Accepted values of `tokens=`; the module docstring describes the forms."""


# Roles


def token_mask(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    tokens: Tokens,
    *,
    length: int | None = None,
    missing: Literal["error", "ignore"] = "error",
    **options: Any,
) -> Bool[Tensor, "prompt text_pos"]:
    """The selected tokens of `model.to_tokens(prompts)`.

    In a pipeline, the selected text positions of its denoiser. Where several text encoders of a
    pipeline give tokens, a word is all that spell it.

    Args:
        model: the model whose tokenizer splits the prompts.
        prompts: one prompt or several.
        tokens: one of the forms of the module.
        length: of the tokens, by default that of the longest prompt.
        missing: "ignore" lets a prompt have none of them; by default that is an error.
        options: of a pipeline's call, such as `max_sequence_length`, which its text positions
            depend on.

    Raises:
        ValueError: a prompt has none of the tokens (the message lists its words), a position lies
            outside of the text, or a mask has another shape.

    Example:
        >>> model = HookedTextToImage.from_pretrained("rte-micro", weights=False)
        >>> token_mask(
        ...     model,
        ...     ["red circle above square", "square"],
        ...     ["shape1", word("red")],
        ...     missing="ignore",
        ... ).int().tolist()
        [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    """
    texts, choice = [prompts] if isinstance(prompts, str) else list(prompts), as_choice(tokens)
    encoded = model.encoded_texts(texts, length, **options)
    mask = position_mask(choice, len(texts), len(encoded[0].ids), "the text")
    if mask is None:
        mask = torch.stack([_spelled(text, choice).any(dim=0) for text in encoded])
    if missing == "error":
        check_found(model, texts, choice, mask)
    return mask


def position_mask(
    choice: TokenChoice, n: int, length: int, where: str
) -> Bool[Tensor, "prompt pos"] | None:
    """Mask of positions, or a mask after a check of its shape; None for words and roles.

    Args:
        choice: from `as_choice`.
        n: number of prompts.
        length: number of positions.
        where: name of the sequence in messages.

    Raises:
        ValueError: a position lies outside, or a mask has another shape.

    Example:
        >>> position_mask(as_choice([0, 3]), 1, 5, "the text").int().tolist()
        [[1, 0, 0, 1, 0]]
    """
    first = choice[0]
    if isinstance(first, tuple):
        widths = {len(row) for row in choice if isinstance(row, tuple)}
        if len(choice) != n or widths != {length}:
            shape = [len(choice), *sorted(widths)]
            raise ValueError(
                f"tokens is a mask {shape}; {where} takes [prompt pos] = {[n, length]}."
            )
        return torch.tensor(choice)
    if isinstance(first, (str, Word)):
        return None
    if outside := [position for position in choice if position not in range(length)]:
        raise ValueError(
            f"There is no position {outside[0]} in {where}: it has positions 0 to {length - 1}."
        )
    return torch.isin(torch.arange(length), torch.tensor(choice)).repeat(n, 1)


def token_counts(
    model: HookedTextToImage, texts: Sequence[str], choice: TokenChoice, length: int
) -> list[tuple[int, ...]]:
    """Number of tokens of each role or word of `choice`, for each prompt.

    Example:
        >>> token_counts(model, ["red circle above square"], as_choice(["shape1", "filler"]), 5)
        [(1, 0)]
    """
    return [
        tuple(_spelled(text, choice).sum(dim=1).tolist())
        for text in model.encoded_texts(texts, length)
    ]


def _spelled(encoded: EncodedText, choice: TokenChoice) -> Bool[Tensor, "role_or_word text_pos"]:
    """Tokens of each role and word of `choice` in one prompt."""
    roles, mask = (
        roles_of_text(encoded),
        torch.zeros(len(choice), len(encoded.ids), dtype=torch.bool),
    )
    for row, one in zip(mask, choice, strict=True):
        if isinstance(one, Word):
            places = encoded.phrases(one.text)
            places = places if one.nth is None else places[one.nth - 1 : one.nth]
            row[
                [token for start, end in places for token in encoded.tokens_between(start, end)]
            ] = True
        else:
            row[:] = torch.tensor([role == one for role in roles])
    return mask


def check_found(
    model: HookedTextToImage,
    texts: Sequence[str],
    choice: TokenChoice,
    mask: Bool[Tensor, "prompt pos"],
    fix: str = "",
) -> None:
    """Raise ValueError for the first prompt whose row of `mask` is empty.

    The message lists its words and their roles.

    Args:
        model: the model whose tokens the message lists.
        texts: prompts, one row of `mask` each.
        choice: tokens that were looked for, for the message.
        mask: tokens that were found.
        fix: end of the message: another remedy.

    Example:
        >>> model, texts = HookedTextToImage.from_pretrained("rte-nano"), ["circle"]
        >>> check_found(model, texts, as_choice("relation"), torch.zeros(1, 2, dtype=torch.bool))
        Traceback (most recent call last):
            ...
        ValueError: 'circle' has no relation token. Its words are circle (shape1): ...
    """
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if not empty:
        return
    text, first = texts[empty[0]], choice[0]
    if isinstance(first, tuple):
        raise ValueError(
            f"tokens is a mask whose row {empty[0]}, of {text!r}, selects nothing: fill it{fix}."
        )
    found = split_words(text)
    words = [
        f"{text[word.start : word.end]} ({role})"
        for word, role in zip(found, roles_of_words(found), strict=True)
    ]
    named = " or ".join(
        _occurrence(one) if isinstance(one, Word) else f"{one} token" for one in choice
    )
    raise ValueError(
        f"{text!r} has no {named}. Its words are {', '.join(words) or 'none'}: select by another "
        f"role or by prompts.word('…'){fix}."
    )


def _occurrence(found: Word) -> str:
    return repr(found.text) if found.nth is None else f"{found.text!r} number {found.nth}"


def role_mask(
    model: HookedTextToImage, prompts: str | Sequence[str], role: Role
) -> Bool[Tensor, "prompt text_pos"]:
    """Tokens of `model.to_tokens(prompts)` with a role; a prompt may have none.

    Example:
        >>> role_mask(model, "red circle is above blue square", "relation").int().tolist()
        [[0, 0, 0, 1, 0, 0, 0]]
    """
    return token_mask(model, prompts, role, missing="ignore")


def phrase_mask(
    model: HookedTextToImage, prompts: str | Sequence[str], phrase: str
) -> Bool[Tensor, "prompt text_pos"]:
    """Mark the tokens of prompts that spell a word or phrase: `token_mask` of `word(phrase)`.

    Raises:
        ValueError: a prompt does not contain it.

    Example:
        >>> phrase_mask(model, "red circle is left of square", "left of").int().tolist()
        [[0, 0, 0, 1, 1, 0, 0]]
    """
    return token_mask(model, prompts, word(phrase))


def role_groups(
    model: HookedTextToImage, prompts: Sequence[str], roles: Sequence[Mapping[str, str]]
) -> dict[str, Bool[Tensor, "prompt text_pos"]]:
    """Tokens by role, where each prompt has its own words for a role.

    Text groups of a synopsis, or `tokens` of an edit.

    Args:
        model: the model whose tokenizer splits the prompts.
        prompts: texts of a batch.
        roles: of each prompt, role → words of it; a task's `roles`.

    Raises:
        ValueError: prompts differ in their roles, or a prompt does not contain its words.

    Example:
        >>> role_groups(model, ["red circle is above square"], [{"relation": "above"}])[
        ...     "relation"
        ... ].int().tolist()
        [[0, 0, 0, 1, 0, 0]]
    """
    if len(roles) != len(prompts) or any(set(one) != set(roles[0]) for one in roles):
        raise ValueError(
            "Give one mapping of roles to words for each prompt, with the same roles in all of "
            "them."
        )
    length = model.to_tokens(list(prompts)).shape[1]
    return {
        role: torch.cat(
            [
                token_mask(model, text, word(one[role]), length=length)
                for text, one in zip(prompts, roles, strict=True)
            ]
        )
        for role in roles[0]
    }
