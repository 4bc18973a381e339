"""Roles and words of prompts: what each token plays, whatever stands around the words."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dit_lens import prompts, scenes
from dit_lens.intervene.ablation import knockout_role
from dit_lens.intervene.steering import steer
from dit_lens.readout.synopsis import attention_synopsis
from dit_lens.text.prompts import RELATION_WORDS, token_mask, token_roles
from hooked_models import HookedTextToImage

PLACE_WORDS = (
    "under",
    "over",
    "beneath",
    "beside",
    "behind",
    "between",
    "near",
    "next",
    "inside",
    "on",
    "top",
    "front",
)


@pytest.fixture(scope="module")
def t5() -> HookedTextToImage:
    model = HookedTextToImage.from_pretrained("t5-micro", check=False)
    model.allow_unknown_words = True
    return model


@pytest.fixture(scope="module")
def rte() -> HookedTextToImage:
    return HookedTextToImage.from_pretrained("rte-micro", check=False)


def spelled(model: HookedTextToImage, prompt: str) -> dict[str, list[str]]:
    """Role → the tokens that play it."""
    found: dict[str, list[str]] = {}
    for token, role in zip(model.to_str_tokens(prompt), token_roles(model, prompt), strict=True):
        found.setdefault(role, []).append(token.removeprefix("▁"))
    return found


@pytest.mark.parametrize(
    ("prompt", "roles"),
    [
        (
            "red circle, above blue square.",
            {"color1": ["red"], "shape1": ["circle"], "color2": ["blue"], "shape2": ["square"]},
        ),
        ("a red circle above a blue square!", {"shape1": ["circle"], "color2": ["blue"]}),
        (
            "RED circle: left of (blue square)",
            {"color1": ["red"], "shape1": ["circle"], "relation": ["left"]},
        ),
        (
            "red circle</s> above blue square",
            {"shape1": ["circle"], "relation": ["above"], "shape2": ["square"]},
        ),
        (
            "red-colored circle's above square",
            {"color1": ["red"], "shape1": ["circle"], "shape2": ["square"]},
        ),
        ("ｒｅｄ ＣＩＲＣＬＥ above", {"relation": ["above"]}),
    ],
)
def test_words_end_at_punctuation(
    t5: HookedTextToImage, prompt: str, roles: dict[str, list[str]]
) -> None:
    found = spelled(t5, prompt)
    assert {role: found[role] for role in roles} == roles
    assert found["eos"][-1] == "</s>"


@pytest.mark.parametrize("word", PLACE_WORDS)
def test_words_of_place_are_no_filler(t5: HookedTextToImage, word: str) -> None:
    assert word in RELATION_WORDS
    roles = token_roles(t5, f"red circle {word} blue square")
    assert roles[:3] == ["color1", "shape1", "relation"]
    assert roles[-3:] == ["color2", "shape2", "eos"]


@settings(max_examples=60)
@given(
    scene=st.sampled_from(scenes.sample(60, seed=3, color_words="optional")),
    sign=st.sampled_from([",", ".", "", " ,", "!"]),
)
def test_roles_of_captions_do_not_depend_on_signs(
    t5: HookedTextToImage, scene: scenes.Scene, sign: str
) -> None:
    """Against the scene itself: its colors, shapes and the direction words of its phrase, each with
    a sign behind it.
    """
    prompt = " ".join(word + sign for word in scenes.caption(scene).split())
    assume(len(t5.tokenizer(prompt).input_ids) <= t5.max_sequence_length)
    found = spelled(t5, prompt)
    assert found["shape1"] == [scene.shape1]
    assert found["shape2"] == [scene.shape2]
    assert found.get("color1", []) == ([scene.color1] if scene.names_color1 else [])
    assert found.get("color2", []) == ([scene.color2] if scene.names_color2 else [])
    assert found["relation"] == [word for word in scene.phrase.split() if word in RELATION_WORDS]


def test_the_cleaned_text_is_what_roles_are_found_in(t5: HookedTextToImage) -> None:
    pytest.importorskip("ftfy")
    if importlib.util.find_spec("bs4") is None:
        pytest.skip("needs beautifulsoup4")
    prompt = "https://x.org/a/b red circle #12 above <b>blue</b> square"
    t5.clean_caption = True
    try:
        found = spelled(t5, prompt)
        (word,) = token_mask(t5, prompt, prompts.word("circle")).nonzero()[:, 1].tolist()
        assert t5.to_str_tokens(prompt)[word] == "▁circle"
    finally:
        t5.clean_caption = False
    assert {role: found[role] for role in ("color1", "shape1", "relation", "color2", "shape2")} == {
        **{"color1": ["red"], "shape1": ["circle"], "relation": ["above"]},
        **{"color2": ["blue"], "shape2": ["square"]},
    }


def test_unknown_words_are_named_unless_allowed(
    t5: HookedTextToImage, rte: HookedTextToImage
) -> None:
    t5.allow_unknown_words = False
    try:
        with pytest.raises(
            ValueError,
            match=r"does not know 'dragon', '~' in 'red dragon ~' .*allow_unknown_words = True",
        ):
            t5(["red circle above blue square", "Red dragon ~"], num_steps=1)
    finally:
        t5.allow_unknown_words = True
    assert t5("red dragon", num_steps=1, guidance=1.0).shape[0] == 1
    rte.allow_unknown_words = True  # its table has no vector that any training saw
    with pytest.raises(ValueError, match=r"no vector for 'dragon'\. It knows: above"):
        rte.to_tokens("red dragon")
    rte.allow_unknown_words = False


def test_masks_of_every_form(rte: HookedTextToImage) -> None:
    texts = ["red circle is left of red square", "circle is above red square"]

    def rows(tokens, **options) -> list[list[int]]:
        return [
            row.nonzero().flatten().tolist() for row in token_mask(rte, texts, tokens, **options)
        ]

    assert rows(prompts.word("red")) == [[0, 5], [3]]
    assert rows(prompts.word("red", nth=2), missing="ignore") == [[5], []]
    assert rows([prompts.word("is"), "shape2"]) == [[2, 6], [1, 4]]
    assert rows(prompts.word("red square")) == [[5, 6], [3, 4]]
    assert rows("eos") == [[7], [5]]
    assert rows(np.array([0, 7])) == [[0, 7], [0, 7]]
    assert rows(torch.eye(2, 8).bool()) == [[0], [1]]
    assert rows("pad", missing="ignore") == [[], [6, 7]]
    with pytest.raises(ValueError, match="'red circle is left of red square' has no pad token"):
        rows("pad")
    with pytest.raises(ValueError, match=r"has no 'red' number 2\. Its words are circle"):
        rows(prompts.word("red", nth=2))
    with pytest.raises(
        ValueError, match="There is no position 8 in the text: it has positions 0 to 7"
    ):
        rows([8])


def test_words_are_tokens_wherever_roles_are(rte: HookedTextToImage) -> None:
    """The same images and sums as by the positions of the word."""
    texts = ["red circle is above blue square", "blue circle is left of red square"]
    positions = token_mask(rte, texts, prompts.word("red"))
    for words, mask in ((prompts.word("red"), positions),):
        ours, hand = (
            knockout_role(tokens, layers=2)[0].resolve(rte, texts) for tokens in (words, mask)
        )
        assert all(
            torch.equal(one.where, other.where) for one, other in zip(ours, hand, strict=True)
        )
        vector = torch.randn(rte.cfg.d_text, generator=torch.Generator().manual_seed(0))
        ours, hand = (
            steer(rte, texts, vector, tokens, num_steps=1, guidance=1.0) for tokens in (words, mask)
        )
        assert torch.equal(ours, hand)
        ours, hand = (
            attention_synopsis(rte, texts, text_groups={"red": tokens}, num_steps=1, guidance=1.0)
            for tokens in (words, mask)
        )
        assert np.array_equal(ours, hand)
        assert ours.std() > 0
