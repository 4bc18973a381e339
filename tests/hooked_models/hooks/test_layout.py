"""Layouts against positions written down by hand."""

from __future__ import annotations

import pytest
import torch

from hooked_models.hooks.layout import IMAGE, OTHER, TEXT, LayoutError, ordered, ragged

GRID = (1, 2, 1)
MASK = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(
    ("first", "names"),
    [
        ("text", ["r", "t0", "t1", "t2", "i0", "i1", "x"]),
        ("image", ["i0", "i1", "x", "r", "t0", "t1", "t2"]),
    ],
)
def test_hooks_see_the_image_then_the_text_then_the_rest(first, names):
    layout = ordered(GRID, MASK, first, registers=1, references=1)
    tensor = torch.arange(7).expand(2, 7)
    ours = layout.image_first(tensor, ("joint",))
    rest = [name for name in names if name in "rx"]
    assert [names[i] for i in ours[0].tolist()] == ["i0", "i1", "t0", "t1", "t2", *rest]
    assert torch.equal(layout.as_model(ours, ("joint",)), tensor)
    assert (layout.n_image, layout.n_text) == (2, [2, 3])
    assert (layout.length("image"), layout.length("text", "image")) == (3, 7)


def test_rows_may_differ():
    rows = [[(TEXT, 1), (IMAGE, 2)], [(IMAGE, 2), (TEXT, 3), (OTHER, 1)]]
    layout = ragged(GRID, MASK, rows)
    tensor = torch.arange(6).expand(2, 6)
    ours = layout.image_first(tensor, ("joint",))
    assert ours.tolist() == [[1, 2, 0, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert torch.equal(layout.as_model(ours, ("joint",)), tensor)
    other = layout.take(torch.tensor([1, 0]))
    assert torch.equal(other.image_first(tensor, ("joint",)), ours.flip(0))
    assert torch.equal(other.text_mask, MASK.flip(0))


def test_a_tensor_of_another_length_is_refused():
    layout = ordered(GRID, MASK, "image")
    layout.check("blocks.0.attn.hook_q", 5, ("joint",))
    with pytest.raises(LayoutError, match="has 4 positions where its family declares 5"):
        layout.check("blocks.0.attn.hook_q", 4, ("joint",))
