"""Biases and patterns against torch's own attention, with a query that attends to no key."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hooked_models.hooks.masks import as_bias, finite_bias, pattern_of

MASK = torch.tensor([[True, True, False], [False, False, False], [False, True, True]])


@pytest.mark.parametrize("mask", [MASK, MASK.float() * 3, None])
@pytest.mark.parametrize("causal", [False, True])
def test_a_pattern_under_a_bias_is_torchs_attention(mask, causal):
    if mask is not None and causal:
        pytest.skip("torch takes one of the two")
    q, k, v = torch.randn(3, 2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = q @ k.mT * 8**-0.5
    bias = as_bias(mask, causal, q, keys=3)
    assert (bias is None) == (mask is None and not causal)
    found = pattern_of(scores if bias is None else scores + bias) @ v
    torch.testing.assert_close(found, expected)
    if mask is MASK:
        assert (found[:, :, 1] == 0).all()
        assert not found.isnan().any()


def test_a_finite_bias_changes_queries_without_keys_alone():
    bias = as_bias(MASK, False, torch.zeros(1, 1, 3, 8), keys=3)
    expected = bias.clone()
    expected[:, :, 1] = 0
    assert torch.equal(finite_bias(bias), expected)
    assert finite_bias(None) is None
