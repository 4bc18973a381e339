"""Fused token embeddings carry a share of the relation in the second shape's word."""

from __future__ import annotations

import pytest
import torch

from dit_lens.training import PRESETS, build_pipeline
from dit_lens.training.data import encode_captions
from dit_lens.training.pipelines import Size, build_text_encoder


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", Size(layers=1, width=32, heads=2))
    monkeypatch.setattr("dit_lens.training.pipelines.CODEC_SCENES", 100)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_fused_encoder_moves_a_share_of_the_relation_words_into_the_second_shape(share):
    captions = ["red circle is to the left of square", "circle is above blue square"]
    moved, plain = (
        encode_captions(build_pipeline(PRESETS["nano"], encoder, moved_share=share), captions)[0]
        for encoder in ("fused", "rte")
    )
    change = moved - plain
    bare = build_text_encoder("rte")[0]
    ids = build_text_encoder("rte")[1](captions, padding=True, return_tensors="pt").input_ids
    for row, (relation, last) in enumerate(((slice(3, 7), 7), (slice(2, 3), 4))):
        words = bare.embed_tokens(ids[row, relation])
        expected = torch.zeros_like(change[row])
        expected[relation] = -share * words
        expected[last] = share * words.sum(0)
        torch.testing.assert_close(change[row], expected, rtol=0, atol=1e-4)
