"""Pairs of runs with frozen weights and texts of different lengths."""

from __future__ import annotations

import torch

from dit_lens import attribution
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline
from ..pairs import close, metric


def test_frozen_weights_no_grad_and_texts_of_different_lengths():
    model = HookedTextToImage.from_pipeline(tiny_pipeline(dtype=torch.float64))
    shorter, longer = "red circle is above blue square", "red circle is left of blue square"
    with torch.no_grad():
        runs = [model.trajectory(prompt, num_steps=2) for prompt in (shorter, longer)]
        tokens = [model.to_tokens(prompt, length=8) for prompt in (shorter, longer)]
        padded = [model.trajectory(tokens_, num_steps=2) for tokens_ in tokens]
    expected = attribution.nodes(attribution.pair(*padded), metric).scores
    model.requires_grad_(False)
    with torch.no_grad():
        # one prompt: a scalar will do
        found = attribution.nodes(attribution.pair(*runs), lambda out: metric(out)[0]).scores
    for kind in found:
        assert close(found[kind], expected[kind])
