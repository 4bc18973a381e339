"""The two clauses' words, exchanges that keep a sentence's length, and shares of a change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_lens import scenes
from dit_lens.sweep import ShareOf
from hooked_models import HookedTextToImage
from recipes.three_objects import agreement, clause_masks, exchanged

TRIOS = scenes.sample_trios(64, seed=0)


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pretrained("rte-nano")


def test_each_clause_has_its_own_words(model):
    texts = [
        "red circle is above blue square and to the upper left of red triangle",
        "blue square is to the lower right of red circle and higher than blue triangle",
    ]
    words = {
        clause: [
            [w for w, on in zip(model.to_str_tokens(text), row, strict=False) if on]
            for text, row in zip(texts, mask, strict=True)
        ]
        for clause, mask in clause_masks(model, texts).items()
    }
    assert words == {
        "relation1": [["▁above"], ["▁lower", "▁right"]],
        "relation2": [["▁upper", "▁left"], ["▁higher"]],
    }


def test_an_exchange_says_one_thing_otherwise_in_as_many_words():
    for trio in TRIOS:
        said = scenes.caption(trio).split()
        for what, other in exchanged(trio).items():
            words = scenes.caption(other).split()
            assert len(words) == len(said)
            places = [i for i, (a, b) in enumerate(zip(said, words, strict=True)) if a != b]
            joint = said.index("and")
            assert places
            assert all(i < joint for i in places) == (what == "relation1")
            if what == "color3":
                assert places == [len(said) - 2]


def test_a_share_is_a_projection_in_units_of_the_whole():
    whole = torch.randn(2, 3, 4, 4)
    share, prompt = ShareOf(whole), np.array([1, 0, 1])
    baseline = torch.randn(3, 3, 4, 4)
    aside = torch.randn(3, 3, 4, 4)
    of_row = whole[prompt]
    aside = (
        aside
        - of_row
        * ((aside * of_row).sum((1, 2, 3)) / of_row.square().sum((1, 2, 3)))[:, None, None, None]
    )
    assert share(baseline + 0.3 * of_row + aside, baseline, prompt) == pytest.approx(
        torch.full((3,), 0.3), abs=1e-5
    )


def test_agreement_is_one_for_proportional_profiles_and_zero_for_disjoint_ones():
    rng = np.random.default_rng(0)
    one = np.array([1.0, 2.0, 0.0, 0.0]) + 0.01 * rng.normal(size=(30, 4))
    assert agreement(one, 3 * one).mean == pytest.approx(1)
    other = agreement(one, one[:, ::-1])
    assert abs(other.mean) < 0.05
    assert other.low <= other.mean <= other.high
