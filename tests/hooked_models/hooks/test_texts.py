"""Texts of several encoders as one tensor, and back."""

from __future__ import annotations

import pytest
import torch

from hooked_models.hooks.texts import joined_text, parted_text, text_parts, text_size

GENERATOR = torch.Generator().manual_seed(0)
PLAIN = {"text": torch.randn(2, 3, 4, generator=GENERATOR)}
SHARED = {"text": torch.randn(1, 3, 4, generator=GENERATOR)}
LAYERS = {"text": torch.randn(2, 3, 2, 5, generator=GENERATOR)}
LISTED = {"text": [torch.randn(n, 4, generator=GENERATOR) for n in (5, 2)]}
TWO = {**PLAIN, "text_t5": LISTED["text"], "text_mask": torch.ones(2, 3), "scale": 2.0}


@pytest.mark.parametrize("given", [PLAIN, SHARED, LAYERS, LISTED, TWO])
def test_texts_come_back_as_they_were_and_their_size_is_known_beforehand(given):
    whole = joined_text(given, "text", 2)
    assert whole.shape == (2, *text_size(given, "text"))
    back = parted_text(given, "text", whole)
    assert set(back) == set(text_parts(given, "text")) == set(given) - {"text_mask", "scale"}
    for name, value in back.items():
        if isinstance(value, list):
            assert all(torch.equal(a, b) for a, b in zip(value, given[name], strict=True))
        else:
            assert torch.equal(value, given[name].expand_as(value))


def test_an_edit_of_a_position_reaches_its_encoder_alone():
    whole = joined_text(TWO, "text", 2)
    whole[:, 3] = 7  # the first position of the second encoder
    back = parted_text(TWO, "text", whole)
    assert torch.equal(back["text"], TWO["text"])
    assert all((row[0] == 7).all() for row in back["text_t5"])
    assert torch.equal(back["text_t5"][0][1:], TWO["text_t5"][0][1:])
