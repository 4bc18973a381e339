"""Streams joined and parted, by the inverse of each other and by plain indexing."""

from __future__ import annotations

import pytest
import torch

from hooked_models.hooks.streams import batch_first, joined, parted, permute

SHAPES = {"batch pos d": (2, 6, 4), "pos batch d": (6, 2, 4), "batch d row column": (2, 4, 2, 3)}


@pytest.mark.parametrize("axes", SHAPES)
def test_a_stream_has_its_positions_second_whatever_its_axes(axes):
    x = torch.randn(SHAPES[axes], generator=torch.Generator().manual_seed(0))
    ours = batch_first(x, axes)
    assert ours.shape == (2, 6, 4)
    assert torch.equal(batch_first(ours, axes, like=x), x)
    row, column = divmod(4, 3)
    places = {
        "batch pos d": (1, 4),
        "pos batch d": (4, 1),
        "batch d row column": (1, ..., row, column),
    }
    assert torch.equal(ours[1, 4], x[places[axes]])


@pytest.mark.parametrize("rows", [1, 2])
def test_parts_are_those_that_were_joined(rows):
    generator = torch.Generator().manual_seed(1)
    image, text = (
        torch.randn(2, 5, 3, generator=generator),
        torch.randn(2, 2, 3, generator=generator),
    )
    there = torch.stack([torch.randperm(7, generator=generator) for _ in range(rows)])
    whole = joined([image, text], "batch pos d", there)
    plain = torch.cat([image, text], dim=1)
    for row in range(2):
        assert torch.equal(whole[row], plain[row][there[min(row, rows - 1)]])
    back = parted(whole, [image, text], "batch pos d", there.argsort(dim=1))
    assert torch.equal(back[0], image)
    assert torch.equal(back[1], text)


def test_a_mask_that_rows_share_is_ordered_row_by_row():
    mask = torch.arange(3.0).view(1, 1, 1, 3)
    order = torch.tensor([[2, 1, 0], [0, 2, 1]])
    assert permute(mask, order, 3)[:, 0, 0].tolist() == [[2, 1, 0], [0, 2, 1]]
    assert permute(mask, None, 3) is mask
