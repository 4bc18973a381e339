"""Prompts as tokens: lengths, unknown words, and diffusers' cleaning."""

from __future__ import annotations

import pytest

from ..pipelines import PROMPTS


def test_tokens(model):
    assert model.to_str_tokens(PROMPTS[0]) == [
        "▁red",
        "▁circle",
        "▁is",
        "▁above",
        "▁blue",
        "▁square",
        "</s>",
    ]
    assert model.to_tokens(PROMPTS).shape == (2, 8)
    assert model.to_tokens(PROMPTS, length=12).shape == (2, 12)
    images = model(PROMPTS, seed=0)
    assert (model(model.to_tokens(PROMPTS, length=20), seed=0) - images).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"'yellow', 'star'. It knows: red, blue"):
        model("yellow circle above star")
    with pytest.raises(ValueError, match="longest that this model reads"):
        model.to_tokens("red " * 30)
