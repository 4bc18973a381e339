"""Receivers as copies of a batch: the same alone and beside others."""

from __future__ import annotations

import numpy as np
import torch

from dit_lens.graph.nodes import Nodes
from dit_lens.graph.patch_copies import REFERENCE, Experiment

from ..pairs import generations, metric


@torch.no_grad()
def test_receivers_of_fresh_copies_are_independent(tiny_model):
    """Nothing is frozen, so that copies may share the run of the senders."""
    found = Experiment.of(*generations(tiny_model, num_steps=2), metric, "exact", None)
    sender = Nodes("cross_attn.L0H1", steps=0)
    receivers = [Nodes("mlp.L1", steps=0), Nodes("output", steps=0)]
    copies = dict(enumerate(receivers, start=found.n_shared_copies))
    together = found.patched(sender, copies)
    for copy, nodes in copies.items():
        alone = found.patched(sender, {REFERENCE: nodes})[REFERENCE]
        np.testing.assert_allclose(together[copy], alone, rtol=1e-5, atol=1e-7)
        assert (abs(alone - found.baselines["original"]) > 1e-7).all()
    assert (abs(together[copy] - together[copy - 1]) > 1e-7).all()
