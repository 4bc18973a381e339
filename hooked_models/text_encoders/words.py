"""Words of a text, and the tokens that spell them, found by the tokenizer's character offsets.

A word is a run of letters, digits and combining marks; it ends at white space and at punctuation
("red-colored" and "triangle's" are two words each). Characters of scripts without spaces (Chinese,
Japanese) and emoji are words of one character. Words are compared without case and in Unicode's
compatibility form (NFKC).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

TokenKind = Literal["text", "eos", "pad"]


class TextWord(NamedTuple):
    """A word in a text: characters `start` to `end`, and its form for comparison."""

    normal: str
    start: int
    end: int


def normal_form(word: str) -> str:
    r"""A word for comparison: NFKC, without case, NFKC again.

    Example:
        >>> normal_form("Ｃafe\u0301") == normal_form("CAFÉ")
        True
    """
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())


def split_words(text: str) -> list[TextWord]:
    """The words of a text, in order.

    Example:
        >>> [word.normal for word in split_words("A red-colored triangle's edge.")]
        ['a', 'red', 'colored', 'triangle', 's', 'edge']
    """
    spans: list[list[int]] = []
    for position, character in enumerate(text):
        category, alone = unicodedata.category(character)[0], _stands_alone(character)
        joins = bool(spans) and spans[-1][1] == position
        if category == "M" and joins:
            spans[-1][1] += 1
        elif alone or (category in "LNM" and not (joins and not _stands_alone(text[spans[-1][0]]))):
            spans.append([position, position + 1])
        elif category in "LNM":
            spans[-1][1] += 1
    return [TextWord(normal_form(text[start:end]), start, end) for start, end in spans]


def _stands_alone(character: str) -> bool:
    category = unicodedata.category(character)
    return category == "So" or (
        category[0] in "LN" and unicodedata.east_asian_width(character) == "W"
    )


@dataclass(frozen=True)
class EncodedText:
    """One text as a tokenizer reads it.

    Args:
        text: as it was tokenised: lower-cased or cleaned already where the model does that.
        ids: of the tokens, with EOS and pads.
        spans: the characters of each token; equal ends for a token that stands for none.
        kinds: "eos" and "pad" by their ids, else "text".
        special: True for tokens that no text spells, such as EOS.
        unknown: True for tokens that stand for text outside of the vocabulary.
    """

    text: str
    ids: Sequence[int]
    spans: Sequence[tuple[int, int]]
    kinds: Sequence[TokenKind]
    special: Sequence[bool]
    unknown: Sequence[bool]

    @classmethod
    def read(
        cls,
        tokenizer: Any,
        text: str,
        ids: Sequence[int],
        spans: Sequence[Sequence[int]],
        mask: Sequence[int],
    ) -> EncodedText:
        """From a tokenizer's result for one text: ids, offsets and attention mask."""
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id

        def kind(token: int, attended: int) -> TokenKind:
            if not attended or (token == pad and pad != eos):
                return "pad"
            return "eos" if token == eos else "text"

        kinds = [kind(token, attended) for token, attended in zip(ids, mask, strict=True)]
        unknown = [
            token == tokenizer.unk_token_id and kind == "text"
            for token, kind in zip(ids, kinds, strict=True)
        ]
        special = [
            token in tokenizer.all_special_ids and not odd
            for token, odd in zip(ids, unknown, strict=True)
        ]
        return cls(text, ids, [(start, end) for start, end in spans], kinds, special, unknown)

    @cached_property
    def words(self) -> list[TextWord]:
        """The words of the text, in order."""
        return split_words(self.text)

    @cached_property
    def word_of_token(self) -> list[int | None]:
        """For each token the first word that it spells a part of, or None.

        A token that only marks the beginning of a word ("▁", "Ġ") belongs to that word.
        """
        return [next(self._words_at(i), None) for i in range(len(self.ids))]

    def _words_at(self, token: int) -> Iterator[int]:
        start, end = self.spans[token]
        if self.special[token]:
            return
        mark = not self.text[start:end].strip()
        for number, word in enumerate(self.words):
            if word.start == end if mark else (start < word.end and word.start < end):
                yield number

    def tokens_between(self, start: int, end: int) -> list[int]:
        """The tokens that spell characters `start` to `end`, whose first is the first of a word."""
        found = []
        for token, (low, high) in enumerate(self.spans):
            mark = not self.text[low:high].strip()
            if not self.special[token] and (high == start if mark else low < end and start < high):
                found.append(token)
        return found

    def phrases(self, phrase: str) -> list[tuple[int, int]]:
        """The characters (start, end) of each place where the words of `phrase` stand in order.

        Places do not overlap.

        Example:
            >>> tokenizer = HookedTextToImage.from_pretrained("t5-micro", weights=False).tokenizer
            >>> encode_text(tokenizer, "red circle, left of blue square").phrases("Left of")
            [(12, 19)]
        """
        normals = [word.normal for word in split_words(phrase)]
        if not normals:
            raise ValueError(f"{phrase!r} contains no word.")
        found, first = [], 0
        while first + len(normals) <= len(self.words):
            here = self.words[first : first + len(normals)]
            if [word.normal for word in here] == normals:
                found.append((here[0].start, here[-1].end))
                first += len(normals)
            else:
                first += 1
        return found

    @property
    def unknown_words(self) -> list[str]:
        """The words that unknown tokens spell a part of, in order and once.

        For signs, the signs that the tokens stand for.

        Example:
            >>> from hooked_models import word_tokenizer
            >>> encode_text(
            ...     word_tokenizer(["red", "circle"]), "red-hot circle, really"
            ... ).unknown_words
            ['-hot', ',', 'really']
        """
        spans = [span for span, unknown in zip(self.spans, self.unknown, strict=True) if unknown]
        return list(dict.fromkeys(self.text[start:end].strip() for start, end in spans))


def padded(encoded: EncodedText, length: int) -> EncodedText:
    """A text with pads up to `length` tokens.

    Example:
        >>> from hooked_models import word_tokenizer
        >>> padded(encode_text(word_tokenizer(["red"]), "red"), 4).kinds
        ['text', 'eos', 'pad', 'pad']
    """
    more = length - len(encoded.ids)
    if more <= 0:
        return encoded
    return replace(
        encoded,
        ids=[*encoded.ids, *[-1] * more],
        spans=[*encoded.spans, *[(0, 0)] * more],
        kinds=[*encoded.kinds, *["pad"] * more],  # type: ignore[list-item]
        special=[*encoded.special, *[True] * more],
        unknown=[*encoded.unknown, *[False] * more],
    )


def encode_text(tokenizer: Any, text: str, length: int | None = None) -> EncodedText:
    """Tokenise one text, with EOS, padded to `length`.

    Args:
        tokenizer: any fast tokenizer of transformers.
        text: as the model encodes it.
        length: positions of the result; longer texts are not cut. By default, the text's own.

    Raises:
        TypeError: the tokenizer keeps no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} keeps no character offsets, by which words are found: "
            "load its fast version."
        )
    padding = (
        {"padding": "longest"}
        if length is None
        else {"padding": "max_length", "max_length": length}
    )
    encoded = tokenizer(text, return_offsets_mapping=True, return_attention_mask=True, **padding)
    return EncodedText.read(
        tokenizer, text, encoded.input_ids, encoded.offset_mapping, encoded.attention_mask
    )
