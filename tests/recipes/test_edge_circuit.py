"""Pairs word for word, the read-out against the detector's centres, the smallest size, and one
small run.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from dit_lens import scenes
from dit_lens.task import DIRECTIONS
from dit_lens.text.prompts import token_roles
from hooked_models import HookedTextToImage
from recipes.edge_circuit import enough, layout_readout, pairs, smallest_size


def test_pairs_have_their_relation_words_in_the_same_places():
    of = pairs(2, seed=0)
    assert [scene.relation for scene in of.clean] == [
        relation for relation in scenes.RELATIONS for _ in range(2)
    ]
    assert len(set(of.seeds)) == len(of.seeds)
    model = HookedTextToImage.from_pretrained("rte-nano")
    for text, other in zip(*of.texts, strict=True):
        assert text != other
        assert token_roles(model, text) == token_roles(model, other)
    moved = [
        clean.relation != corrupt.relation
        for clean, corrupt in zip(of.clean, of.corrupt, strict=True)
    ]
    assert any(moved)
    assert pairs(2, seed=0) == of


def test_the_readout_is_how_far_objects_stand_along_the_relation():
    """Two squares: their moment over a square's area is exactly the offset of their centres."""
    apart = [
        s
        for s in scenes.sample(64, seed=0, split="all")
        if abs(s.x1 - s.x2) > 34 or abs(s.y1 - s.y2) > 34
    ]
    made = [s for s in apart if s.relation in ("above", "lower_right")][:8]
    squares = [
        scenes.Scene(
            "square", s.color1, s.x1, s.y1, "square", s.color2, s.x2, s.y2, s.relation, s.phrase
        )
        for s in made
    ]
    found = layout_readout(squares)(scenes.render(squares))
    offset = np.array([[s.x1 - s.x2, s.y1 - s.y2] for s in squares], float)
    direction = np.array([DIRECTIONS[s.relation] for s in squares], float)
    expected = (offset * direction).sum(axis=1) / np.linalg.norm(direction, axis=1)
    ratio = found.numpy() / expected
    assert np.ptp(ratio) < 0.01  # one scale, the drawn square's area over the nominal one
    assert ratio == pytest.approx(1, abs=0.07)
    images = scenes.render(squares).requires_grad_()
    layout_readout(squares)(images).sum().backward()
    assert bool(torch.isfinite(images.grad).all())


def test_the_smallest_size_keeps_enough_at_every_larger_size():
    sizes = np.array([1, 2, 3, 4])
    # a smaller one that does by chance does not count
    assert enough(sizes, np.array([0.95, 0.5, 0.9, 1.0])) == 3
    assert enough(sizes, np.array([0.1, 0.2, 0.3, 0.4])) == 4
    assert enough(sizes, np.array([0.1, 0.2, 0.3, 0.4]), otherwise=9) == 9
    table = pd.DataFrame(
        {"edges": [4, 2, 2, 4], "prompt": [0, 0, 1, 1], "value": [9.5, 9, 4, 9.5]}
    ).assign(clean=10.0, corrupt=0.0)
    assert smallest_size(table) == 4
