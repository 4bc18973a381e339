"""Circuits read off weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dit_lens import circuits
from hooked_models import HookedDiT, NotFoldedError

from ..hooked_models.tiny import tiny_transformer


@pytest.mark.parametrize(
    ("kind", "sender", "receiver"),
    [("Q", "cross_attn", "cross_attn"), ("Q", "attn", "cross_attn"), ("K", "cross_attn", "attn"), ("V", "attn", "attn")],
)
@torch.no_grad()
def test_composition_scores_are_norms_of_the_written_out_products(kind: str, sender: str, receiver: str) -> None:
    dit = HookedDiT(tiny_transformer().double()).fold_timestep(300.0)
    scores = circuits.composition_scores(dit, kind, sender, receiver)  # type: ignore[arg-type]
    for layer_s, head_s, layer_r, head_r in itertools.product(range(2), range(3), range(2), range(3)):
        first = layer_s < layer_r or (layer_s == layer_r and (sender, receiver) == ("attn", "cross_attn"))
        found = float(scores[layer_s, head_s, layer_r, head_r])
        assert np.isnan(found) == (not first)
        if first:
            s, r = getattr(dit.blocks[layer_s], sender), getattr(dit.blocks[layer_r], receiver)
            writes = s.W_V[head_s] @ s.W_O[head_s]
            reads = {
                "Q": r.W_Q[head_r] @ r.W_K[head_r].T,
                "K": r.W_K[head_r] @ r.W_Q[head_r].T,
                "V": r.W_V[head_r] @ r.W_O[head_r],
            }[kind]
            assert found == pytest.approx(float((writes @ reads).norm() / writes.norm() / reads.norm()), abs=1e-12)


def test_composition_that_does_not_exist_or_would_be_wrong_is_refused() -> None:
    dit = HookedDiT(tiny_transformer())
    with pytest.raises(ValueError, match="come from the text alone"):
        circuits.composition_scores(dit, "K", receiver="cross_attn")
    with pytest.raises(NotFoldedError, match="fold_timestep"):
        circuits.composition_scores(dit, "Q", sender="attn")
    assert circuits.composition_scores(dit).notnull().sum() == 9  # cross → cross needs no folding
