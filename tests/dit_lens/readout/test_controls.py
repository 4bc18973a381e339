"""Controls are random places that are there and not taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_lens.readout.controls import random_others


def test_controls_are_other_places_that_are_there() -> None:
    rng = np.random.default_rng(0)
    taken, there = (
        torch.tensor([[0, 3], [1, 2]]),
        torch.tensor([[True] * 6, [False, True, True, True, True, False]]),
    )
    for _ in range(50):
        others = random_others(taken, there, rng)
        assert not set(others[0].tolist()) & {0, 3}
        assert set(others[1].tolist()) == {3, 4}
        assert len(set(others[0].tolist())) == 2
    drawn = torch.stack([random_others(taken, there, rng)[0] for _ in range(400)])
    assert min(drawn.flatten().bincount(minlength=6)[[1, 2, 4, 5]].tolist()) > 150
    with pytest.raises(ValueError, match="take a smaller k"):
        random_others(taken, there[:, :4], rng)
