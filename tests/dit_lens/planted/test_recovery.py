"""The proof of the methods: each recovers a circuit that was planted, and finds none where there is
none.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from dit_lens.planted import Kind, recovery

POSITIVE: tuple[Kind, ...] = ("two-stage", "fused", "rotated")
MORE_SEEDS = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5)]


def test_auroc_of_a_perfect_a_reversed_and_an_empty_answer() -> None:
    scores = pd.Series([3.0, 2.0, 1.0], index=pd.MultiIndex.from_tuples([(0, 0), (0, 1), (1, 0)]))
    assert recovery.auroc(scores, {(0, 0), (0, 1)}) == 1
    assert recovery.auroc(scores, {(1, 0)}) == 0
    assert recovery.auroc(-scores, {(1, 0), (0, 0)}) == 0.5
    assert np.isnan(recovery.auroc(scores, set()))


@pytest.mark.parametrize("seed", [0, *MORE_SEEDS])
@pytest.mark.parametrize("kind", POSITIVE)
@pytest.mark.parametrize("method", ["screening by axis", "screening", "synopsis"])
def test_weights_and_patterns_name_the_ramp_heads(
    planted_model, method: str, kind: Kind, seed: int
) -> None:
    find, positive = recovery.HEAD_METHODS[method]
    model, truth = planted_model(kind, seed)
    assert recovery.auroc(find(model, truth)["score"], positive(truth)) >= (
        0.95 if kind == "rotated" else 1
    )


@pytest.mark.parametrize("kind", POSITIVE)
def test_a_method_that_is_blind_to_an_axis_fails(planted_model, kind: Kind) -> None:
    """Vertical heads are steeper; each axis alone names its own heads, and no others."""
    model, truth = planted_model(kind, 0)
    found = recovery.by_axes(model, truth)
    for axis, other in (("vertical", "horizontal"), ("horizontal", "vertical")):
        one = recovery.by_axes(model, truth, (axis,))
        ramps = {
            (h.layer, h.head)
            for h in truth.heads
            if (h.role == "relation" or "ramp" in h.what) and axis in h.what
        }
        missed = {
            (h.layer, h.head)
            for h in truth.heads
            if (h.role == "relation" or "ramp" in h.what) and other in h.what
        }
        assert recovery.auroc(one["score"], ramps) >= (0.95 if kind == "rotated" else 1)
        assert recovery.auroc(one["score"], recovery.ramp_heads(truth)) < 0.95
        assert set(one.index[one["p"] <= 0.05]) == ramps
        assert one["score"][list(missed)].max() < 0.01
    assert set(found.index[found["p"] <= 0.05]) == recovery.ramp_heads(truth)


@pytest.mark.parametrize(("kind", "seed", "every_head"), [
    ("two-stage", 0, False), pytest.param("fused", 0, False, marks=pytest.mark.slow),
    *[pytest.param(kind, seed, True, marks=pytest.mark.slow) for kind in POSITIVE for seed in range(5)],
])  # fmt: skip
@pytest.mark.parametrize("method", ["knock-out", "path patching"])
def test_interventions_name_the_relation_heads_and_no_decoy(
    planted_model, method: str, kind: Kind, seed: int, every_head: bool
) -> None:
    """Among all heads, or among relation heads and the decoys of the first layers alone."""
    find, positive = recovery.HEAD_METHODS[method]
    model, truth = planted_model(kind, seed)
    decoys = {
        (head.layer, head.head) for head in truth.decoy_heads if head.sublayer == "cross_attn"
    }
    some = sorted(positive(truth) | {place for place in decoys if place[0] < 3})
    scores = find(model, truth, heads=None if every_head else some)["score"]
    assert recovery.auroc(scores, positive(truth)) >= (0.95 if kind == "rotated" else 1)
    if kind != "rotated":
        assert scores[[place in decoys for place in scores.index]].abs().max() < 0.02


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 15), marks=pytest.mark.slow)])
def test_false_positives_without_a_relation_head(planted_model, seeds: range) -> None:
    """Heads without a ramp: p ≤ 0.05 in no more than one of twenty.

    No method's name for a head that is an idle one comes up.
    """
    screened, seen = [], []
    for seed in seeds:
        model, truth = planted_model("no-relation", seed)
        others = [place for place in np.ndindex(6, 8) if place not in recovery.ramp_heads(truth)]
        screened += recovery.by_screening(model, truth)["p"].loc[others].tolist()
        seen += recovery.by_synopsis(model, truth)["p"].loc[others].tolist()
    assert len(screened) == 44 * len(seeds)
    for found in (screened, seen):
        hits = int((np.array(found) <= 0.05).sum())
        assert binomtest(hits, len(found), 0.05, alternative="greater").pvalue > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_interventions_find_nothing_without_a_relation_head(planted_model, seed: int) -> None:
    """Where no head reads the word, rounding alone moves the objects: five orders of magnitude
    below a relation head's share.
    """
    model, truth = planted_model("no-relation", seed)
    assert recovery.by_path_patching(model, truth)["score"].max() < 1e-3
    assert recovery.by_knockout(model, truth)["score"].abs().max() <= 0.25  # one image of four


@pytest.mark.parametrize(
    ("kind", "there", "not_there"),
    [("two-stage", "relation", "shape2"), ("fused", "shape2", "color2")],
)
def test_variance_and_arithmetic_find_the_word_that_carries_the_relation(
    planted_model, kind: Kind, there: str, not_there: str
) -> None:
    model, _ = planted_model(kind, 0)
    shares = recovery.by_variance(model)
    assert shares.loc[there, "p"] <= 0.01
    assert shares.loc[there, "r2_partial"] > 0.1
    assert shares.loc[not_there, "r2_partial"] < 1e-6 or np.isnan(
        shares.loc[not_there, "r2_partial"]
    )
    moved = recovery.by_arithmetic(model, there)
    assert moved["steered"] >= 0.75
    assert moved.drop("steered").max() <= 0.25
    assert recovery.by_arithmetic(model, not_there)["steered"] <= 0.25
