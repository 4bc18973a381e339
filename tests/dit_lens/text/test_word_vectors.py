"""Word vectors are the text encoder's outputs at the word."""

from __future__ import annotations

import warnings

import pytest
import torch

from dit_lens import scenes, variance
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline

DIRECTION_WORDS = ("above", "below", "left", "right", "upper", "lower", "up", "down", "higher")


PROMPTS = [
    "red circle is above blue square",
    "blue square is left of red circle",
    "circle is above square",
    "red square is left of circle",
]


def test_factorial_prompts_are_the_papers_264():
    prompts = variance.factorial_prompts()
    assert len(set(prompts)) == len(prompts) == 6 * 2 * 22
    assert prompts[0] == "red triangle is above blue circle"
    assert len(variance.factorial_prompts(["above", "left of"])) == 24


@pytest.mark.parametrize("kind", ["rte", "t5"])
@torch.no_grad()
def test_word_vectors_are_the_encoders_output_at_the_word(kind):
    model = HookedTextToImage.from_pipeline(tiny_pipeline(kind))
    for role, positions in (
        ("shape2", [5, 6, 3, 5]),
        ("relation", [3, 3, 2, 3]),
        ("eos", [6, 7, 4, 6]),
    ):
        vectors, factors = variance.word_vectors(model, PROMPTS, role)
        projected, _ = variance.word_vectors(model, PROMPTS, role, at="caption")
        for i, (prompt, position) in enumerate(zip(PROMPTS, positions, strict=True)):
            tokens = model.to_tokens(prompt)
            expected = model.text_encoder(tokens)[0][0, position]
            # T5 pads the batch
            torch.testing.assert_close(vectors[i], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                projected[i], model.dit.caption_projection(expected), atol=1e-5, rtol=1e-5
            )
        assert list(factors["position"]) == positions
    assert factors.drop(columns="position").to_dict("list") == {
        "color1": ["red", "blue", "", "red"],
        "shape1": ["circle", "square", "circle", "square"],
        "relation": ["above", "left", "above", "left"],
        "color2": ["blue", "red", "", ""],
        "shape2": ["square", "circle", "square", "circle"],
        "phrase": ["above", "left of", "above", "left of"],
    }


def test_pooling_and_scenes_and_phrases_of_the_bundled_model():
    model = HookedTextToImage.from_pretrained("rte-micro")
    wanted = scenes.sample(20, seed=0)
    mean, factors = variance.word_vectors(model, wanted, "relation", pool="mean")
    for column in ("shape1", "relation", "phrase", "shape2"):
        assert list(factors[column]) == [getattr(scene, column) for scene in wanted]
    encoder = model.text_encoder.wrapped
    for i, scene in enumerate(wanted):
        text = scenes.caption(scene)
        directions = [p for p, word in enumerate(text.split()) if word in DIRECTION_WORDS]
        tokens = model.to_tokens(text)[0]
        expected = (encoder.embed_tokens(tokens) + encoder.position_code(len(tokens)))[
            directions
        ].mean(dim=0)
        torch.testing.assert_close(mean[i], expected)


def test_random_token_vectors_carry_their_own_word_and_nothing_else():
    model = HookedTextToImage.from_pretrained("rte-micro")
    prompts = variance.factorial_prompts(["above", "below"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors, factors = variance.word_vectors(model, prompts, "shape2", at="caption")
        table = variance.partition(
            vectors, factors[["shape2", "shape1", "color1", "relation"]], permutations=9
        )
    # equal lengths: not even the position varies
    assert table.r2_marginal["shape2"] == pytest.approx(1)
    assert table.r2_partial[["shape1", "color1", "relation"]].tolist() == pytest.approx(
        [0, 0, 0], abs=1e-9
    )
    assert table.p[["shape1", "color1", "relation"]].tolist() == [1, 1, 1]
    # nothing was left for them to explain
    assert table.partial_eta2[["shape1", "relation"]].isna().all()


def test_prompts_without_the_role_or_a_second_object_are_refused():
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    with pytest.raises(ValueError, match="no color1 token"):
        variance.word_vectors(model, ["circle is above square"], "color1")
    with pytest.raises(ValueError, match="two objects"):
        variance.phrase_span(model, "circle is above")
