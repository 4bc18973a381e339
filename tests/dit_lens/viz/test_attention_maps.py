"""Maps of a page fit into its bytes: they are averaged over squares of places, in order."""

from __future__ import annotations

import base64
import gzip

import numpy as np
import pytest
import torch

from dit_lens.viz.attention_maps import Maps, pooled, side_of_squares
from dit_lens.viz.attention_page import LARGEST


def test_squares_of_places_are_averaged_row_by_row() -> None:
    pattern = torch.rand(1, 2, 3, 4 * 6, 5, generator=torch.Generator().manual_seed(0))
    maps = Maps(pattern, ["L0H0", "L0H1", "L1H0"], [0, 1], [["word"] * 4], (4, 6))  # one pad
    found = (pooled(maps, 0, (4, 6), 2) / 255.0) ** 2
    places = pattern[0, ..., :4].reshape(2, 3, 4, 6, 4).numpy()
    for row, column in np.ndindex(2, 3):
        square = places[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((2, 3))
        np.testing.assert_allclose(found[:, :, 3 * row + column], square, atol=0.004)
    assert side_of_squares(maps, 0, (4, 6), 10_000) == 1
    assert side_of_squares(maps, 0, (4, 6), 200) == 2


@pytest.mark.slow
def test_a_prompt_of_pixart_sigma_at_512_pixels() -> None:
    """Patterns without any order, which compress least: 28 layers × 16 heads, 20 steps, 32 × 32
    places, 20 words.
    """
    generator = torch.Generator().manual_seed(0)
    maps = Maps(
        torch.rand(1, 20, 28 * 16, 32 * 32, 20, generator=generator).div_(10),
        [f"L{layer}H{head}" for layer in range(28) for head in range(16)],
        list(range(20)),
        [["word"] * 20],
        (32, 32),
    )
    factor = side_of_squares(maps, 0, (32, 32), LARGEST)
    stored = gzip.compress(pooled(maps, 0, (32, 32), factor).tobytes(), 6)
    assert len(base64.b64encode(stored)) <= 25_000_000
    assert factor == 4
