"""Edits and sums of patterns against loops over their entries."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_lens.intervene.portable_ops import MASKED, edited, sums_of_attention, sums_of_pattern

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 4, 2, generator=GENERATOR)
WHERE = torch.rand(3, 4, 1, generator=GENERATOR) < 0.5
VALUES = torch.randn(3, 4, 2, generator=GENERATOR)


@pytest.mark.parametrize(
    ("kind", "how", "new"),
    [
        ("zero", {}, torch.zeros_like(X)),
        ("knockout", {}, torch.full_like(X, MASKED)),
        ("mean", {}, X.mean(0).expand_as(X)),
        ("scale", {"factor": 3.0}, 3 * X),
        ("replace", {"values": VALUES}, VALUES),
        ("add", {"values": VALUES}, X + VALUES),
        ("resample", {"donors": (torch.tensor([1, 2, 0]), None)}, X[[1, 2, 0]]),
    ],
)
def test_chosen_entries_alone_are_changed(kind, how, new):
    found = edited(X, kind=kind, where=WHERE, **how)
    for row, pos in itertools.product(range(3), range(4)):
        expected = new if WHERE[row, pos] else X
        assert torch.equal(found[row, pos], expected[row, pos])


def test_there_is_no_other_edit():
    with pytest.raises(ValueError, match="no edit 'square'"):
        edited(X, kind="square", where=WHERE)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("n_keys", [5, 40])  # fewer and more keys than channels
@pytest.mark.parametrize("biased", [False, True])
def test_sums_between_groups_are_those_of_the_whole_pattern(reduce, n_keys, biased):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, 3, 8, generator=generator)
    k = torch.randn(2, n_keys, 3, 8, generator=generator)
    bias = torch.randn(2, 1, 1, n_keys, generator=generator) if biased else None
    queries = (torch.rand(2, 6, 2, generator=generator) < 0.5).float()
    keys = (torch.rand(2, n_keys, 3, generator=generator) < 0.5).float()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    pattern = (scores if bias is None else scores + bias).softmax(-1)
    expected = torch.zeros(2, 3, 2, 3)
    for b, h, i, j in itertools.product(range(2), range(3), range(2), range(3)):
        part = pattern[b, h] * queries[b, :, i, None] * keys[b, None, :, j]
        expected[b, h, i, j] = part.sum() if reduce == "sum" else part.max()
    torch.testing.assert_close(sums_of_pattern(pattern, queries, keys, reduce), expected)
    found = sums_of_attention(q, k, bias, 8**-0.5, queries, keys, reduce)
    torch.testing.assert_close(found, expected)
