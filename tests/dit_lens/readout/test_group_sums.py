"""Attentions that are added up together, against each alone."""

import pytest
import torch
from torch import nn

from dit_lens.intervene.portable_ops import sums_of_pattern
from dit_lens.readout import group_sums
from dit_lens.readout.group_sums import CallSums, Groups


class Attention(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("most", [0, 200, 2**17])
def test_attentions_of_all_kinds_are_each_their_patterns_sum(reduce, most, monkeypatch) -> None:
    monkeypatch.setattr(group_sums, "MOST_WAITING", most)
    queries, keys = torch.rand(3, 5, 2).round(), torch.rand(3, 7, 4).round()
    kinds = [(1.0, 3, True), (1.0, 3, True), (0.5, 3, True), (0.5, 2, True), (0.5, 2, False)] * 2
    attentions = [Attention(scale) for scale, _, _ in kinds]
    sums = CallSums(Groups(queries, keys, reduce), attentions, n_heads=2)
    expected = torch.zeros_like(sums.sums)
    for i, (scale, rows, biased) in enumerate(kinds):
        q, k = torch.randn(rows, 5, 2, 8), torch.randn(rows, 7, 2, 8)
        bias = torch.randn(1 if i < 5 else rows, 1, 1, 7) if biased else None
        sums.readers[attentions[i]].read(q, k, bias)
        pattern = torch.zeros(3, 2, 5, 7)
        pattern[..., 0] = 1  # a row with an empty prompt attends to its first key
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale + (0 if bias is None else bias)
        pattern[3 - rows :] = scores.softmax(-1)
        expected[i] = sums_of_pattern(pattern, queries, keys, reduce)
    torch.testing.assert_close(sums.taken(), expected)
