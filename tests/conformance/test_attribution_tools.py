"""Attribution patching and faithfulness: `transformer_lens.tools.analysis.attribution_patching`."""

from __future__ import annotations

import random
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.tools.analysis import (
    EdgeAttributionConfig,
    FaithfulnessConfig,
    Node,
    attribution_patch,
    faithfulness,
)
from transformer_lens.tools.analysis.attribution_patching import (
    cache_activation_and_gradient,
    capture_writer_outputs,
)

from hooked_models import HookedTextToImage

from .oracles import ROWS, Bound, equal, metric, nudged, tool

GRADIENTS = (
    "hook_embed", "hook_pos_embed", "hook_t_emb", "hook_t_mod", "hook_text", "hook_caption",
    "blocks.0.adaln.hook_gate_msa", "blocks.1.adaln.hook_scale_mlp", "blocks.0.ln1.hook_scale",
    "blocks.0.attn.hook_pattern", "blocks.1.cross_attn.hook_pattern", "blocks.0.cross_attn.hook_z",
    "blocks.1.cross_attn.hook_v", "blocks.1.cross_attn.hook_q", "blocks.0.hook_cross_attn_out", "blocks.1.hook_mlp_out",
    "ln_final.hook_normalized",
)  # fmt: skip
MISSES = (
    "the graph has no cross-attention: edges out of it and into it, and text, are missing; use "
    "`dit_lens.attribution.edges`"
)
EDGES = EdgeAttributionConfig(granularity="edge")
FIRST = 2, ROWS + 2
"""A clean row and a corrupted one."""


def pair(bound: Bound) -> tuple[Tensor, Tensor]:
    return tuple(bound.tokens[row : row + 1] for row in FIRST)  # type: ignore[return-value]


@tool(
    "attribution_patching.cache_activation_and_gradient", "bind", check="autograd by something added at the hook",
    note="every hook: cross-attention, gates, text",
)  # fmt: skip
def test_gradients_at_any_hook(bound: Bound) -> None:
    found = cache_activation_and_gradient(bound.view, bound.corrupted, metric, list(GRADIENTS))
    assert set(found.gradients) == set(GRADIENTS)
    for name in GRADIENTS:
        equal(found.activations[name], bound.corrupted_cache[name])
        expected = nudged(lambda hooks: bound.plain(hooks=hooks), name, found.activations[name])
        assert expected.abs().max() > 1e-9, name
        equal(found.gradients[name], expected)
    assert all(parameter.grad is None for parameter in bound.dit.parameters())


@tool(
    "attribution_patching.attribution_patch, nodes",
    "bind",
    check="autograd by hand",
    note="cross-attention is no node of its graph; use `dit_lens.attribution.nodes`",
)
def test_node_scores(bound: Bound) -> None:
    scores = attribution_patch(bound.view, bound.clean, bound.corrupted, metric).node_scores
    assert len(scores) == 4 * (1 + 2 * (2 + 1))  # position × (embedding, layer × (heads, MLP))
    totals = dict.fromkeys(scores, 0.0)
    for row in range(ROWS):
        rows = slice(ROWS + row, ROWS + row + 1)
        for name in {node.hook_name for node in scores}:
            was, corrupted = bound.clean_cache[name][row], bound.corrupted_cache[name][row]
            slope = nudged(lambda hooks: bound.plain(rows, hooks), name, corrupted[None])[0]  # noqa: B023
            for node in scores:
                if node.hook_name == name:
                    at = (node.position,) if node.head is None else (node.position, node.head)
                    totals[node] += float(((was - corrupted) * slope)[at].sum()) / ROWS
    assert max(map(abs, totals.values())) > 1e-3
    assert scores == pytest.approx(totals, abs=1e-12)


@tool(
    "attribution_patching.attribution_patch, nodes",
    "at",
    check="autograd by hand, whole generation",
    note="cross-attention is no node of its graph; use `dit_lens.attribution.nodes`",
)
@tool(
    "attribution_patching.cache_activation_and_gradient",
    "at",
    check="autograd by hand, whole generation",
)
@pytest.mark.parametrize(("returns", "branch"), [("images", "cond"), ("x0", "uncond")])
def test_node_scores_at_one_step_of_a_generation(
    generation: HookedTextToImage, returns: Any, branch: Any
) -> None:
    prompts = ("red circle", "blue square")
    view, tokens = generation.at(1, prompts, seed=3, num_steps=3, returns=returns, branch=branch)
    scores = attribution_patch(view, tokens[:1], tokens[1:], metric).node_scores
    with torch.no_grad():
        _, cache = generation.run_with_cache(prompts, seed=3, num_steps=3, branch=branch)

    def run(row: slice, hooks: list[Any]) -> Tensor:
        found: list[Tensor] = []
        read = (
            []
            if returns == "images"
            else [("steps.1.hook_x0", lambda tensor, hook: found.append(tensor))]
        )
        images = generation.run_with_hooks(
            prompts[row], fwd_hooks=[*hooks, *read], seed=3, num_steps=3
        )
        return found[0] if found else images

    chosen = random.Random(0).sample(sorted({node.hook_name for node in scores}), 3)
    for name in chosen:
        clean, corrupted = cache[f"steps.1.{branch}.{name}"]
        slope = nudged(partial(run, slice(1, 2)), f"steps.1.{branch}.{name}", corrupted[None])[0]
        for node in scores:
            if node.hook_name == name:
                at = (node.position,) if node.head is None else (node.position, node.head)
                assert scores[node] == pytest.approx(
                    float(((clean - corrupted) * slope)[at].sum()), abs=1e-12
                )
    assert max(abs(score) for node, score in scores.items() if node.hook_name in chosen) > 1e-6


def write_of(cache: Any, node: Node) -> Tensor:
    """The tensor that a writer adds to the residual stream at its position."""
    name = {"embed": "hook_embed", "mlp_out": f"blocks.{node.layer}.hook_mlp_out"}.get(
        node.kind, f"blocks.{node.layer}.attn.hook_result"
    )
    at = (0, node.position) if node.head is None else (0, node.position, node.head)
    return cache[name][at]


@pytest.fixture
def flags(bound: Bound) -> Any:
    """Switch on the flags of TransformerLens' edge tools, to look at the same tensors."""
    switches = (
        bound.dit.set_use_attn_result,
        bound.dit.set_use_split_qkv_input,
        bound.dit.set_use_hook_mlp_in,
    )
    for switch in switches:
        switch(True)
    yield
    for switch in switches:
        switch(False)


@tool(
    "attribution_patching.attribution_patch, edges",
    "bind at",
    "self-attention only",
    check="derivative along each edge by autograd; the missing part by hand",
    note=MISSES,
)
def test_edge_scores_and_what_the_graph_misses(bound: Bound, flags: None) -> None:
    clean, corrupted = pair(bound)
    found = attribution_patch(bound.view, clean, corrupted, metric, EDGES)
    nodes = attribution_patch(bound.view, clean, corrupted, metric).node_scores
    with torch.no_grad():
        caches = [bound.view.run_with_cache(tokens)[1] for tokens in (clean, corrupted)]
    rows = slice(FIRST[1], FIRST[1] + 1)
    slopes = {
        name: nudged(lambda hooks: bound.plain(rows, hooks), name, caches[1][name])
        for name in bound.dit.names(None)
        if name.endswith(("_input", "hook_mlp_in", "1.hook_resid_post"))
        and "cross_attn.hook_k" not in name
    }

    def edge(writer: Node, name: str, head: int | None) -> float:
        at = (0, writer.position) if head is None else (0, writer.position, head)
        return float((write_of(caches[0], writer) - write_of(caches[1], writer)) @ slopes[name][at])

    # positions × (heads' inputs, MLPs', the output's)
    assert len(found.edge_scores) == 4 * (3 * 2 * (1 + 4) + (3 + 6) + 7)
    expected = {(u, v): edge(u, v.hook_name, v.head) for u, v in found.edge_scores}
    assert found.edge_scores == pytest.approx(expected, abs=1e-12)
    for writer, score in nodes.items():
        first = (writer.layer or 0) + (writer.kind == "mlp_out")
        into_text_attention = sum(
            edge(writer, f"blocks.{layer}.cross_attn.hook_q_input", head)
            for layer, head in product(range(first, 2), range(2))
        )
        assert found.node_scores[writer] + into_text_attention == pytest.approx(score, abs=1e-12)
    assert max(abs(found.node_scores[node] - score) for node, score in nodes.items()) > 1e-4


@tool(
    "attribution_patching.attribution_patch, edges",
    "at",
    "self-attention only",
    check="its nodes: aggregate + edges into cross-attention",
    note=MISSES,
)
@pytest.mark.parametrize("flag", [False, True])
def test_edges_at_one_step_leave_the_flags_as_they_were(
    generation: HookedTextToImage, flag: bool
) -> None:
    view, tokens = generation.at(
        1, ("red circle", "blue square"), seed=3, num_steps=2, returns="out"
    )
    view.set_use_attn_in(flag)
    found = attribution_patch(view, tokens[:1], tokens[1:], metric, EDGES)
    nodes = attribution_patch(view, tokens[:1], tokens[1:], metric).node_scores
    cfg = generation.cfg
    assert (cfg.use_attn_in, cfg.use_attn_result, cfg.use_split_qkv_input, cfg.use_hook_mlp_in) == (
        flag,
        False,
        False,
        False,
    )
    view.set_use_attn_in(False)
    # nothing reads it but the output
    last = [node for node in nodes if node.kind == "mlp_out" and node.layer == 1]
    assert {node: found.node_scores[node] for node in last} == pytest.approx(
        {node: nodes[node] for node in last}, abs=1e-12
    )
    assert max(abs(nodes[node]) for node in last) > 1e-6


@tool(
    "attribution_patching.faithfulness",
    "bind",
    "self-attention only",
    check="every kept or cut edge rewritten by hand",
    note="cross-attention is never ablated, so an empty circuit does not recover 0",
)
def test_faithfulness_of_circuits(bound: Bound, flags: None) -> None:
    clean, corrupted = pair(bound)
    ranked = attribution_patch(bound.view, clean, corrupted, metric, EDGES)
    edges = list(ranked.edge_scores)
    whole = faithfulness(bound.view, clean, corrupted, metric, edges)
    assert whole.recovered == pytest.approx(1, abs=1e-12)
    assert whole.total_edges == len(edges)
    with torch.no_grad():
        replacement = bound.view.run_with_cache(corrupted)[1]
    for circuit in ([], ranked.top_edges(40)):
        kept = {(u, v) for u, v, *_ in circuit}
        found = faithfulness(bound.view, clean, corrupted, metric, circuit)
        expected = ablated(bound, [edge for edge in edges if edge not in kept], replacement)
        gap = found.full_metric - found.corrupt_metric
        assert found.recovered == pytest.approx((expected - found.corrupt_metric) / gap, abs=1e-10)
        # of the empty circuit too: what cross-attention wrote is still the clean run's
        assert abs(found.recovered) > 1e-3
    calibration = bound.tokens[[0, 1, 3]]
    mean = faithfulness(
        bound.view,
        clean,
        corrupted,
        metric,
        ranked.top_edges(40),
        FaithfulnessConfig("mean"),
        mean_tokens=calibration,
    )
    writers = {}
    for name in (
        "hook_embed",
        *(f"blocks.{i}.{x}" for i in range(2) for x in ("attn.hook_result", "hook_mlp_out")),
    ):
        tensors = [
            capture_writer_outputs(bound.view, calibration[i : i + 1])[name] for i in range(3)
        ]
        writers[name] = torch.stack(tensors).mean(0)
    kept = {(u, v) for u, v, _ in ranked.top_edges(40)}
    expected = ablated(bound, [edge for edge in edges if edge not in kept], writers)
    assert mean.recovered == pytest.approx(
        (expected - mean.corrupt_metric) / (mean.full_metric - mean.corrupt_metric), abs=1e-10
    )


@torch.no_grad()
def ablated(bound: Bound, cut: list[tuple[Node, Node]], replacement: Any) -> float:
    """The clean run's metric with what the cut edges carry replaced, reader by reader."""
    live: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        live[hook.name] = tensor.clone()

    def rebuild(tensor: Tensor, hook: Any) -> Tensor:
        changed = tensor.clone()
        for writer, reader in cut:
            if reader.hook_name == hook.name:
                at = (
                    (0, reader.position)
                    if reader.head is None
                    else (0, reader.position, reader.head)
                )
                changed[at] += write_of(replacement, writer) - write_of(live, writer)
        return changed

    readers = {reader.hook_name for _, reader in cut}
    hooks = [
        (name, keep)
        for name in bound.dit.names(
            lambda name: name.endswith(("hook_embed", "attn.hook_result", "hook_mlp_out"))
        )
    ]
    return float(
        metric(
            bound.plain(
                slice(FIRST[0], FIRST[0] + 1), [*hooks, *((name, rebuild) for name in readers)]
            )
        )
    )


@tool("attribution_patching.capture_writer_outputs", "bind", check="the view's cache")
def test_writers(bound: Bound, flags: None) -> None:
    found = capture_writer_outputs(bound.view, bound.corrupted)
    with torch.no_grad():
        cache = bound.view.run_with_cache(bound.corrupted, list(found))[1]
    assert set(found) == {"hook_embed"} | {
        f"blocks.{i}.{x}" for i in range(2) for x in ("attn.hook_result", "hook_mlp_out")
    }
    for name, tensor in found.items():
        equal(tensor, cache[name])


def test_a_view_can_be_differentiated_again_and_again(
    bound: Bound, generation: HookedTextToImage
) -> None:
    """Text and earlier steps are computed once for a view, but never as part of one graph that the
    first backward frees.
    """
    step_view, step_tokens = generation.at(1, ("red circle", "blue square"), num_steps=2)
    for view, tokens, model in (
        (bound.view, bound.tokens, bound.dit),
        (step_view, step_tokens, generation),
    ):
        gradients = []
        model.requires_grad_(True)
        for _ in range(2):
            metric(view(tokens)).backward()
            gradients.append(
                [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            )
            model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        assert gradients[0][0] is not None
        equal(
            [g for g in gradients[0] if g is not None], [g for g in gradients[1] if g is not None]
        )
