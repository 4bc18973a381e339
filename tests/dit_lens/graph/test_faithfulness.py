"""Circuits of edges against the runs that they are made of, hand-made edits and a planted circuit;
areas of known curves.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from dit_lens import attribution
from dit_lens.graph.faithfulness import (
    Areas,
    areas,
    candidate_edges,
    cut_edges,
    faithfulness,
    random_circuits,
    resampled,
    run_circuits,
)
from hooked_models import HookedTextToImage

CLEAN = ["red circle is above blue square", "blue triangle is to the left of red circle"]
CORRUPT = ["red circle is below blue square", "blue triangle is to the right of red circle"]
SEEDS, STEPS = [0, 1], 2


@pytest.fixture(scope="module")
def model(trained_nano) -> HookedTextToImage:
    return trained_nano


@pytest.fixture(scope="module")
def runs(model):
    with torch.no_grad():
        return [model.trajectory(texts, SEEDS, num_steps=STEPS) for texts in (CLEAN, CORRUPT)]


@pytest.fixture(scope="module")
def edges(model, runs) -> pd.DataFrame:
    scores = attribution.edges(
        attribution.pair(*runs), lambda images: images.square().mean(dim=(1, 2, 3))
    ).scores
    table = candidate_edges(model, CLEAN, scores)
    by_position = scores.sel(branch="cond", step=0, receiver="cross_attn.L1H0.k").mean("prompt")
    of_word = table[
        (table["sender"] == "text[relation]")
        & (table["receiver"] == "cross_attn.L1H0.k")
        & (table["step"] == 0)
    ]
    words = [name for name in scores["sender"].values if name.startswith("text[")]
    # all other words are alike
    assert of_word["score"].item() == pytest.approx(float(by_position.sel(sender=words).sum()))
    return table


def test_only_edges_that_differ_are_candidates(edges):
    assert set(edges["sender"][edges["sender"].str.startswith("text")]) == {"text[relation]"}
    at_first = edges[edges["step"] == 0]
    # the same noise, which no word has reached yet
    assert not at_first["sender"].isin(["embed", "attn.L0H0"]).any()
    assert "embed" in set(edges[edges["step"] == 1]["sender"])


def test_all_edges_are_the_clean_run_and_none_the_corrupt_one(model, runs, edges):
    kept = np.stack([np.ones(len(edges), bool), np.zeros(len(edges), bool)])
    for images, run in zip(
        run_circuits(model, CLEAN, CORRUPT, SEEDS, edges, kept, STEPS), runs, strict=True
    ):
        torch.testing.assert_close(images, run.images, atol=1e-4, rtol=0)


def test_words_alone_are_an_edit_of_the_captions_that_a_head_reads(model, edges):
    """Without the edges from the relation word to one head's values, that head's values are the
    corrupt prompt's.
    """
    receiver = "cross_attn.L1H2.v"
    kept = ~((edges["sender"] == "text[relation]") & (edges["receiver"] == receiver)).to_numpy()
    images = run_circuits(model, CLEAN, CORRUPT, SEEDS, edges, kept[None], STEPS)[0]
    name = "blocks.1.cross_attn.hook_v"
    _, corrupt = model.run_with_cache(CORRUPT, SEEDS, STEPS, names_filter=name)

    def swap(v, hook):
        v[:, :, 2] = corrupt[hook.name][:, :, 2]

    hooks = [(f"steps.{step}.cond.{name}", swap) for step in range(STEPS)]
    torch.testing.assert_close(
        images,
        model.run_with_hooks(CLEAN, SEEDS, STEPS, fwd_hooks=hooks).detach(),
        atol=1e-4,
        rtol=0,
    )


def test_circuits_do_not_disturb_each_other(model, edges):
    kept = np.stack([np.arange(len(edges)) < size for size in (50, 300)])
    together = run_circuits(model, CLEAN, CORRUPT, SEEDS, edges, kept, STEPS)
    alone = run_circuits(model, CLEAN, CORRUPT, SEEDS, edges, kept[1:], STEPS)
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_planted_circuits_doors_suffice_and_are_necessary(planted_model):
    """Among all edges from the relation word, those that were planted keep the whole relation, and
    nothing is left without them.
    """
    model, truth = planted_model("two-stage", 0)
    clean, corrupt = (
        f"red circle is {phrase} blue square" for phrase in ("directly above", "directly below")
    )
    heads = [
        f"cross_attn.L{layer}H{head}"
        for layer in range(model.cfg.n_layers)
        for head in range(model.cfg.n_heads)
    ]
    rows = [
        (step, "text[relation]", f"{head}.{part}")
        for step in range(14)
        for head in heads
        for part in "kv"
    ]
    edges = pd.DataFrame(rows, columns=["step", "sender", "receiver"])
    relation = {str(head) for head in truth.relation_heads}
    doors = {
        (step, edge.receiver)
        for edge in truth.edges
        for step in edge.steps
        if edge.sender == "text[relation]" and edge.receiver[:-2] in relation
    }
    true = np.array([(step, receiver) in doors for step, _, receiver in rows])
    random = random_circuits(edges, [int(true.sum())], np.random.default_rng(0))[0]
    images = run_circuits(model, [clean], [corrupt], [0], edges, np.stack([true, ~true, random]))[
        :, 0
    ]
    with torch.no_grad():
        whole, opposite = model([clean, corrupt], 0)
    assert 0 < true.sum() < len(edges) / 5
    # planted steps are steep, not infinitely; those of the horizontal heads are the less steep ones
    torch.testing.assert_close(images[0], whole, atol=0.02, rtol=0)
    torch.testing.assert_close(images[1], opposite, atol=0.02, rtol=0)
    assert float((images[2] - whole).abs().max()) > 0.5


def test_prompts_of_unequal_length_are_refused(model, edges):
    with pytest.raises(ValueError, match="as many tokens"):
        run_circuits(
            model, CLEAN[:1], CORRUPT[1:], [0], edges, np.ones((1, len(edges)), bool), STEPS
        )


def test_only_what_a_circuit_lacks_is_cut(model, edges):
    kept = np.arange(len(edges)) < 10
    assert cut_edges(model, edges, kept[None], STEPS).sum() == len(edges) - 10


def test_areas_of_known_curves():
    half = np.array([0.5])
    assert areas(half, np.array([0.5])) == pytest.approx(Areas(0.5, 0.5))  # the diagonal
    assert areas(half, np.array([1.0])) == pytest.approx(Areas(0.75, 0.25))
    # too much is as far from 1 as too little
    assert areas(half, np.array([2.0])) == pytest.approx(Areas(1.25, 0.75))
    several = areas(half, np.array([[0.5, 1.0, 2.0]]))
    assert several.cpr.tolist() == pytest.approx([0.5, 0.75, 1.25])
    assert several.cmd.tolist() == pytest.approx([0.5, 0.25, 0.75])


def test_faithfulness_is_a_ratio_of_means():
    clean, corrupt = np.array([2.0, 4.0]), np.array([0.0, -2.0])
    assert faithfulness(
        np.stack([clean, corrupt, np.array([1.0, 1.0])]), clean, corrupt
    ).tolist() == [1, 0, 0.5]
    interval = resampled(lambda rows: clean[rows].mean(axis=-1), 2)
    assert interval == (3, 2, 4)


def test_random_circuits_have_the_sizes_asked_for():
    edges = pd.DataFrame({"step": np.repeat([0, 1], 50)})
    like = np.stack([np.arange(100) < size for size in (20, 60)])
    plain, alike = (
        random_circuits(edges, [20, 60], np.random.default_rng(0), like=of) for of in (None, like)
    )
    assert plain.sum(axis=1).tolist() == alike.sum(axis=1).tolist() == [20, 60]
    assert (plain[0] <= plain[1]).all()
    assert alike[:, :50].sum(axis=1).tolist() == [20, 50]
    assert not (alike[0] == like[0]).all()
