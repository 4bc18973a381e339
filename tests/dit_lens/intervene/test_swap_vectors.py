"""Vectors that swap a relation give the other sentence's text."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from dit_lens import scenes, steering, variance
from dit_lens.task import DIRECTIONS
from hooked_models import HookedTextToImage, word_tokenizer

from ...hooked_models.pipelines import tiny_pipeline

FAST = {"num_steps": 2}


@pytest.mark.parametrize(
    ("at", "tokens", "from_", "to", "phrase", "becomes"),
    [
        ("text", "phrase", "above", "below", "higher than", "lower than"),
        ("caption", "phrase", "left", "right", "to the left of", "to the right of"),
        ("text", "phrase", "left", "higher than", "left of", "higher than"),
        ("text", "phrase", "left", "above", "left of", "directly above"),
        (
            "text",
            "phrase",
            "upper_left",
            "lower_right",
            "above and to the left of",
            "below and to the right of",
        ),
        ("text", "relation", "left", "above", "to the left of", "to the above of"),
        ("text", "relation", "above", "below", "higher than", "lower than"),
        (
            "caption",
            "relation",
            "upper_right",
            "lower_left",
            "diagonally up and right from",
            "diagonally down and left from",
        ),
    ],
)
@torch.no_grad()
def test_a_dose_of_one_is_the_other_sentence_for_an_encoder_without_context(
    micro, at, tokens, from_, to, phrase, becomes
):
    prompt = "blue circle is {} red triangle"
    found = steering.swap_relation(
        micro, prompt.format(phrase), from_, to, tokens=tokens, at=at, seed=1, **FAST
    )
    torch.testing.assert_close(
        found, micro(prompt.format(becomes), seed=1, **FAST), atol=1e-3, rtol=0
    )
    assert (found - micro(prompt.format(phrase), seed=1, **FAST)).abs().max() > 0.05


@torch.no_grad()
def test_only_words_that_differ_are_changed_wherever_they_stand(micro):
    prompts = [
        "circle is to the left of red square",
        "red circle is above and to the left of square",
    ]
    vectors = steering.swap_vectors(micro, prompts, ["right", "lower_left"])
    table = micro.text_encoder.W_E
    word = {
        name: table[micro.to_tokens(name)[0, 0]] for name in ("left", "right", "above", "below")
    }
    expected = torch.zeros_like(vectors)
    expected[0, 4], expected[1, 3] = word["right"] - word["left"], word["below"] - word["above"]
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_at_another_role_the_relations_mean_vectors_are_exchanged(micro):
    prompts = ["circle is left of square", "red circle is directly above blue square"]
    found = steering.swap_vectors(micro, prompts, ["above", "upper_right"], "shape2", "caption")
    vectors, factors = variance.word_vectors(
        micro, variance.factorial_prompts(), "shape2", "caption"
    )
    # the set is balanced
    mean = {
        r: vectors[torch.tensor(list(factors["relation"] == r))].mean(dim=0) for r in DIRECTIONS
    }
    expected = torch.zeros_like(found)
    expected[0, 4], expected[1, 6] = (
        mean["above"] - mean["left"],
        mean["upper_right"] - mean["above"],
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_encoder_that_mixes_words_gets_the_mean_difference_over_all_pairs_of_objects():
    pipe = tiny_pipeline("t5")
    pipe.tokenizer = word_tokenizer(scenes.WORDS)
    pipe.text_encoder = T5EncoderModel(
        replaced_config(pipe.text_encoder.config, vocab_size=len(pipe.tokenizer))
    ).eval()
    model = HookedTextToImage.from_pipeline(pipe)
    found = steering.swap_vectors(model, ["triangle is higher than blue circle"], ["below"])[0]
    expected = torch.zeros_like(found)
    for first, second in itertools.permutations(scenes.SHAPES, 2):
        for color, other in (("red", "blue"), ("blue", "red")):
            higher, lower = (
                model.text_encoder(
                    model.to_tokens(f"{color} {first} is {phrase} {other} {second}")
                )[0][0, 3:5]
                for phrase in ("higher than", "lower than")
            )
            expected[2:4] += (lower - higher) / 12
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found[3] != 0).all()  # "than" has seen the other word


def replaced_config(config: T5Config, **changes: int) -> T5Config:
    return T5Config(**{**config.to_dict(), **changes})


def test_what_cannot_be_swapped_says_so(micro):
    with pytest.raises(
        ValueError,
        match=r"No phrase for 'above' has as many tokens as 'to the left of' \(4\).*tokens='relation'",
    ):
        steering.swap_relation(micro, "circle is to the left of square", "left", "above")
    with pytest.raises(ValueError, match="different numbers of direction words"):
        steering.swap_relation(
            micro, "circle is left of square", "left", "upper_left", tokens="relation"
        )
    with pytest.raises(ValueError, match=r"says 'above' \(above\), not 'left'"):
        steering.swap_relation(micro, "circle is above square", "left", "right")
    with pytest.raises(ValueError, match="no effect vector"):
        steering.swap_relation(micro, "circle is above square", "above", "lower than", tokens="eos")
