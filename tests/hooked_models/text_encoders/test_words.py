"""Words and their tokens against a brute-force alignment: the tokens' own pieces, joined one by
one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from hooked_models import HookedTextToImage, word_tokenizer
from hooked_models.text_encoders.words import EncodedText, encode_text, normal_form, split_words

WORDS = [
    "red",
    "circle",
    "triangle's",
    "red-colored",
    "left",
    "of",
    "café",
    "cafe\u0301",
    "红色的圆",
    "🐱",
    "“blue”",
    "naïve",
    "3.5",
]
WORDS += ["UPPER", "x", "(square)", "—", ",", "ﬁsh", "Ж", "don't", "a/b", "日本", "!?"]
CORPUS = [
    " ".join(WORDS),
    "red circle is above blue square",
    "the red-colored triangle's edge, left of the square.",
] * 3
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


def byte_level(trim: bool, prefix_space: bool) -> PreTrainedTokenizerFast:
    """As Qwen2's (no trimming), RoBERTa's or GPT-2's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = ByteLevel(add_prefix_space=prefix_space)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=["<pad>", "</s>"],
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def clip() -> PreTrainedTokenizerFast:
    """As CLIP's: lower case, words end in "</w>", BOS and EOS around, pads are EOS."""
    inner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<eos>"))
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=["<bos>", "<eos>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.post_processor = processors.RobertaProcessing(
        ("<eos>", 1), ("<bos>", 0), trim_offsets=False, add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<eos>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<eos>",
    )


def metaspace() -> PreTrainedTokenizerFast:
    """As T5's and Gemma's: pieces with "▁" for a space, EOS behind."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": lambda: byte_level(False, False),
    "byte level, trimmed": lambda: byte_level(True, False),
    "byte level, space before": lambda: byte_level(True, True),
    "clip": clip,
    "metaspace": metaspace,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


BYTE_OF = {character: byte for byte, character in enumerate("")}  # filled below


def bytes_of_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte, as GPT-2 defines it."""
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


BYTE_OF = bytes_of_alphabet()


def by_pieces(
    tokenizer: PreTrainedTokenizerFast, text: str, encoded: EncodedText
) -> list[set[int]]:
    """For each token the characters of `text` without white space that its own piece spells,
    without offsets.

    Pieces spell the text from left to right and leave out white space alone.
    """
    characters = [(i, character) for i, character in enumerate(text) if not character.isspace()]
    stream: list[tuple[int, object]] = []
    byte_pieces = isinstance(tokenizer.backend_tokenizer.model, models.BPE)
    for i, character in characters:
        shown = (
            unicodedata.normalize("NFC", character.lower())
            if "</w>" in tokenizer.get_vocab() or is_clip(tokenizer)
            else character
        )
        stream += (
            [(i, byte) for byte in shown.encode()] if byte_pieces else [(i, one) for one in shown]
        )
    found, position = [], 0
    for piece, special in zip(
        tokenizer.convert_ids_to_tokens(list(encoded.ids)), encoded.special, strict=True
    ):
        if special:
            found.append(set())
            continue
        piece = piece.removesuffix("</w>") if is_clip(tokenizer) else piece.replace("▁", " ")
        units = [BYTE_OF[one] for one in piece] if byte_pieces else list(piece)
        units = [unit for unit in units if unit not in (ord(" "), " ")]
        assert [unit for _, unit in stream[position : position + len(units)]] == units
        found.append({i for i, _ in stream[position : position + len(units)]})
        position += len(units)
    assert position == len(stream)
    return found


def is_clip(tokenizer: PreTrainedTokenizerFast) -> bool:
    return tokenizer.bos_token == "<bos>"


@settings(max_examples=80)
@given(text=TEXTS)
def test_tokens_of_words_are_those_that_spell_them(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    text = unicodedata.normalize("NFC", text) if is_clip(tokenizer) else text
    encoded = encode_text(tokenizer, text)
    if any(encoded.unknown):
        return
    spelled = by_pieces(tokenizer, text, encoded)
    assert encoded.words == split_words(text)
    for number, (_, start, end) in enumerate(encoded.words):
        hand = [token for token, there in enumerate(spelled) if there & set(range(start, end))]
        ours = encoded.tokens_between(start, end)
        assert [token for token in ours if spelled[token]] == hand, (text, number)
        # a mark, before what it marks
        assert all(token + 1 in ours for token in ours if not spelled[token])
        assert hand
    for token, there in enumerate(spelled):
        words = [
            n for n, (_, start, end) in enumerate(encoded.words) if there & set(range(start, end))
        ]
        if there:
            assert encoded.word_of_token[token] == (words[0] if words else None)


@settings(max_examples=80)
@given(text=TEXTS, length=st.integers(30, 40))
def test_words_do_not_depend_on_padding(
    tokenizer: PreTrainedTokenizerFast, text: str, length: int
) -> None:
    short = encode_text(tokenizer, text)
    if len(short.ids) > length:
        return
    long = encode_text(tokenizer, text, length)
    n = len(short.ids)
    assert (list(long.ids[:n]), long.spans[:n], long.kinds[:n]) == (
        list(short.ids),
        short.spans,
        short.kinds,
    )
    assert set(long.kinds[n:]) <= {"pad"}
    assert set(long.word_of_token[n:]) <= {None}
    assert "pad" not in short.kinds
    assert short.kinds.count("eos") == (
        0 if tokenizer.backend_tokenizer.post_processor.__class__.__name__ == "ByteLevel" else 1
    )


def naive_words(text: str) -> list[str]:
    """Maximal runs, by scanning: a second definition, for texts of letters, marks and
    punctuation.
    """
    for sign in text:
        if unicodedata.category(sign)[0] in "PZC":
            text = text.replace(sign, " ")
    return [normal_form(word) for word in text.split()]


ALPHABET = "abcXYZéßЖ1 2-'.,“”\u0301\t"


@settings(max_examples=300)
@given(text=st.text(ALPHABET, max_size=20))
def test_words_are_runs_between_white_space_and_punctuation(text: str) -> None:
    assert [word.normal for word in split_words(text)] == naive_words(text)
    for normal, start, end in split_words(text):
        assert normal_form(text[start:end]) == normal


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red-colored triangle's edge", ["a", "red", "colored", "triangle", "s", "edge"]),
        ("红色的圆 x圆y", ["红", "色", "的", "圆", "x", "圆", "y"]),
        ("🐱‍👤 🙂🙂", ["🐱", "👤", "🙂", "🙂"]),
        ("ｒｅｄ CAFE\u0301 ﬁsh Straße", ["red", "café", "fish", "strasse"]),
        ("", []),
        ("—!?", []),
    ],
)
def test_words_of_every_script(text: str, words: list[str]) -> None:
    assert [word.normal for word in split_words(text)] == words


def test_phrases_are_found_as_whole_words_and_without_overlap() -> None:
    encoded = encode_text(word_tokenizer(["cat", "cats", "a"]), "cat cats CAT-cat a cat, a cat")
    spelled = [encoded.text[start:end] for start, end in encoded.phrases("Cat")]
    assert spelled == ["cat", "CAT", "cat", "cat", "cat"]
    assert [encoded.text[start:end] for start, end in encoded.phrases("cat cat")] == ["CAT-cat"]
    assert len(encoded.phrases("a cat")) == 2
    assert encoded.phrases("dog") == []
    assert len(encode_text(word_tokenizer(["cat"]), "cat cat cat").phrases("cat cat")) == 1
    with pytest.raises(ValueError, match="contains no word"):
        encoded.phrases("!")


@pytest.mark.parametrize("name", ["t5-micro", "rte-micro"])
def test_bundled_tokenizers(name: str) -> None:
    tokenizer = HookedTextToImage.from_pretrained(name, weights=False).tokenizer
    encoded = encode_text(tokenizer, "red circle</s> above blue square", 10)
    assert [encoded.kinds.count(kind) for kind in ("eos", "pad")] == [2, 3]
    # "s" of the sign is a word of the text
    assert [encoded.word_of_token[i] for i in (0, 1, 3, 4, 5)] == [0, 1, 3, 4, 5]
    assert encode_text(tokenizer, "red “blue” dragon's circle").unknown_words == [
        "“blue”",
        "dragon's",
    ]
    assert encode_text(tokenizer, "<unk>").unknown_words == ["<unk>"]
    assert encode_text(tokenizer, "").words == []


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(TypeError, match="load its fast version"):
        encode_text(object(), "red")
