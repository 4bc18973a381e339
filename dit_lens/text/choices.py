"""Choices of tokens: roles, words, positions and masks, as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias, get_args

import numpy as np
from torch import Tensor

from hooked_models.arguments import integer, shown
from hooked_models.text_encoders.words import split_words

from .roles import (
    Role,
)


@dataclass(frozen=True)
class Word:
    """Word or phrase of a prompt, as a value of `tokens=`; see `word`.

    Example:
        >>> str(Word("cat", nth=2))
        "word('cat', nth=2)"
    """

    text: str
    nth: int | None = None

    def __str__(self) -> str:
        return (
            f"word({self.text!r})" if self.nth is None else f"word({self.text!r}, nth={self.nth})"
        )


TokenChoice: TypeAlias = tuple[str | Word, ...] | tuple[int, ...] | tuple[tuple[bool, ...], ...]
"""`Tokens` in one hashable form: words and roles, positions, or a mask."""


FORMS = (
    "a role, prompts.word('…'), several of these, positions such as [0, 3], or a mask of booleans "
    "[prompt pos]"
)


def word(text: str, nth: SupportsIndex | None = None) -> Word:
    """The tokens of a word or phrase, wherever a prompt has it as whole words.

    Upper and lower case are the same.

    Args:
        text: one word or several in order; punctuation between them is not compared.
        nth: 1 for its first occurrence in a prompt, 2 for the second; None for all of them.

    Raises:
        ValueError: the text contains no word, or `nth` is no positive integer.

    Example:
        >>> from dit_lens.text.prompts import token_mask
        >>> model = HookedTextToImage.from_pretrained("rte-micro", weights=False)
        >>> token_mask(
        ...     model, ["red circle is left of red square"], word("Red", nth=2)
        ... ).int().tolist()
        [[0, 0, 0, 0, 0, 1, 0, 0]]
    """
    if not isinstance(text, str) or not split_words(text):
        raise ValueError(
            f"text={shown(text)} of prompts.word contains no word: give a word or phrase, such as "
            "'left of'."
        )
    return Word(text, None if nth is None else integer("nth", nth, low=1))


def as_choice(tokens: Any) -> TokenChoice:
    """`Tokens` in one hashable form.

    Raises:
        ValueError: it is of none of the forms, or of several at once; the message names the value
            and the fix.

    Example:
        >>> as_choice("relation"), as_choice([0, 3])
        (('relation',), (0, 3))
    """
    tokens = _listed(tokens)
    if not isinstance(tokens, (Sequence, range)):
        raise ValueError(f"tokens={shown(tokens)}: give {FORMS}; a single position is [0].")
    if len(tokens) == 0:
        raise ValueError(
            "tokens is empty, so that nothing is selected: leave it out for all tokens, or name at "
            "least one."
        )
    kinds = {_kind(one) for one in tokens}
    if len(kinds) > 1 or kinds == {None}:
        mixed = (
            "mixes " + " and ".join(sorted(map(str, kinds)))
            if None not in kinds
            else "is none of the known forms"
        )
        raise ValueError(f"tokens={shown(list(tokens))} {mixed}: give {FORMS}.")
    if kinds == {"words"}:
        return tuple(_role_or_word(one) for one in tokens)
    if kinds == {"positions"}:
        return tuple(integer("tokens", one) for one in tokens)
    if kinds == {"booleans"}:
        raise ValueError(
            "tokens is a mask of one row: give a mask [prompt pos], one row for each prompt."
        )
    rows: Any = tokens
    return tuple(tuple(_boolean(one) for one in row) for row in rows)


def _listed(tokens: Any) -> Any:
    if isinstance(tokens, (Tensor, np.ndarray)):
        return tokens.tolist()
    return [tokens] if isinstance(tokens, (str, Word)) else tokens


def _kind(one: Any) -> str | None:
    if isinstance(one, (str, Word)):
        return "words"
    if isinstance(one, (bool, np.bool_)):
        return "booleans"
    if hasattr(one, "__index__") and not isinstance(one, (Tensor, np.ndarray)):
        return "positions"
    return "rows of a mask" if isinstance(one, (Sequence, Tensor, np.ndarray)) else None


def _role_or_word(one: Any) -> str | Word:
    if isinstance(one, Word) or one in get_args(Role):
        return one
    raise ValueError(
        f"{shown(one)} is no role of a token: choose {', '.join(get_args(Role))}; or select the "
        f"word itself by prompts.word({shown(one)})."
    )


def _boolean(value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError(f"A mask of tokens holds {shown(value)}: give booleans [prompt pos].")
    return bool(value)
