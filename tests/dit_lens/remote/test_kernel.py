"""Hooks of a call as the kernel applies them, without nnsight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dit_lens.remote.kernel import Point, Walk
from dit_lens.remote.pipeline_kernel import CallWalk
from dit_lens.remote.pixart_kernel import PixArtWalk

NAME = "blocks.0.attn"


@pytest.mark.parametrize("kind", [Walk, CallWalk, PixArtWalk])
@pytest.mark.parametrize("edit", [False, True])
def test_the_pattern_is_that_of_torchs_kernel_also_for_a_query_without_a_key(kind, edit):
    drawn = torch.randn(3, 2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    read = dict(zip("qkv", drawn, strict=True))  # [batch pos head d_head]
    mask = torch.tensor([[True, True, False], [False, False, False], [False, True, True]])
    bias = torch.zeros(1, 1, 3, 3).masked_fill(~mask, -torch.inf)
    kept: dict[str, Any] = {}
    action = (lambda tensor, hook: tensor) if edit else None
    point = Point(f"steps.0.cond.{NAME}.hook_pattern", f"{NAME}.hook_pattern", 0, "cond")
    walk = kind(
        {f"{NAME}.hook_pattern": [(point, None), (point, action)]}, {}, kept, {}, {}, True, {}
    )

    edited = walk.edited_pattern(NAME, read, bias, 8**-0.5)

    q, k, v = (x.transpose(1, 2) for x in drawn)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(kept[point.name] @ v, expected)
    assert (kept[point.name][:, :, 1] == 0).all()
    assert (edited is None) != edit
    if edit:
        torch.testing.assert_close(edited @ v, expected)
