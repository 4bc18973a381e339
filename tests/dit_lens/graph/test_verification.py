"""Verified effects are patches made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from dit_lens import attribution, stats

from ..pairs import ORIGINAL, SOURCE, STEPS, edge, flags, metric, views


def test_verification_is_a_patch_by_hand(model, images):
    call = {"num_steps": STEPS, "seed": 3}
    with torch.no_grad():
        base = model(ORIGINAL, **call)
        _, source = model.run_with_cache(SOURCE, **call)
    found = attribution.nodes(images, metric)
    verified = found.verify(k=4, sample=9)
    assert set(verified.table["node"]) >= {"attn", "cross_attn", "mlp", "text"}
    for i, row in verified.table.iterrows():
        name = f"steps.{int(row.step)}.{row.branch}.{attribution.NODES[row.node]}"
        name = name if row.node == "text" else name.format(layer=int(row.layer))

        def patch(tensor: Tensor, hook: Any, row: Any = row) -> Tensor:
            part: Any = ...
            if row.node != "mlp":
                part = (
                    (slice(None), int(row.text_pos))
                    if row.node == "text"
                    else (..., int(row["head"]), slice(None))
                )
            new = tensor.clone()
            new[part] = source[hook.name][part]
            return new

        with torch.no_grad():
            patched = model.run_with_hooks(ORIGINAL, fwd_hooks=[(name, patch)], **call)
        effect = metric(patched) - metric(base)
        assert torch.allclose(verified.result.effect()[i], effect, rtol=0, atol=1e-12)
        assert row.exact == pytest.approx(effect.mean().item(), abs=1e-12)

    every = found.table()
    assert len(every) == STEPS * (4 + 4 + 2 + 8)
    largest = every.iloc[:4]["score"]
    assert (verified.table["score"][:4] == largest).all()
    assert largest.abs().min() >= every["score"].abs()[4:].max()
    sample = verified.table[verified.table["drawn"] == "sample"]
    assert len(sample) == 9
    assert verified.spearman.mean == pytest.approx(spearmanr(sample["score"], sample["exact"])[0])
    assert verified.spearman.low < verified.spearman.mean < verified.spearman.high
    # TransformerLens' statistics are at hand
    assert verified.result.permutation_pvalue().shape == (13,)


def test_edges_are_verified_by_changing_one_receivers_input(dit):
    found = attribution.edges(attribution.pair(*views(dit)), metric)
    verified = found.verify(k=5, sample=25)
    assert verified.spearman.low > 0.5
    first, second = views(dit)
    with flags(dit), torch.no_grad():
        base = first(first.to_tokens())
        original, source = (view.run_with_cache(view.to_tokens())[1] for view in (first, second))
        for i, row in verified.table.iterrows():
            patched = first.run_with_hooks(
                first.to_tokens(), fwd_hooks=[edge(original, source, row.sender, row.receiver)]
            )
            effect = metric(patched) - metric(base)
            assert torch.allclose(verified.result.effect()[i], effect, rtol=0, atol=1e-12)


def test_rank_correlation_has_an_interval_that_covers():
    rng, rho = np.random.default_rng(0), 0.6
    truth = 6 / math.pi * math.asin(rho / 2)  # Spearman's ρ of a bivariate normal
    inside = 0
    for _ in range(300):
        x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=40).T
        interval, p = stats.rank_correlation(x, y)
        inside += interval.low < truth < interval.high
        assert (interval.mean, p) == pytest.approx(tuple(spearmanr(x, y)))
    assert 0.91 < inside / 300 < 0.985
    assert stats.rank_correlation(np.arange(9.0), np.arange(9.0) ** 3)[0].low > 0.99
    assert math.isnan(stats.rank_correlation(np.arange(9.0), np.ones(9))[0].mean)
