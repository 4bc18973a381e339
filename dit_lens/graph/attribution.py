"""Attribution: the effect of every node or edge, to first order, from two runs and one gradient;
and how far that is true.

    original = model.trajectory("red circle is below blue square", seed=0)
    source = model.trajectory("red circle is above blue square", seed=0)
    pair = attribution.pair(original, source)
    found = attribution.nodes(pair, metric)  # heads, MLPs and words, at every step
    found.scores["cross_attn"].sel(step=3, layer=2, head=1)
    found.verify(k=10, sample=30).spearman  # against exact patching

A node's score is Σ (source − original) · ∂metric/∂activation: the change of the metric if it were
patched from the source run into the original one, to first order (attribution patching: Nanda 2023;
Syed et al., arXiv 2310.10348). An edge's is the sender's difference times the gradient at the
receiver's input alone. TransformerLens' `attribution_patch` has the same convention and graph for a
language model; its graph has no cross-attention. Integrated gradients take the gradient's mean
between the runs instead of its value at the original (EAP-IG: Hanna et al., arXiv 2403.17806).

Output biases, position codes and timestep modulation are the same in both runs, so they carry no
difference and are no nodes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedDiT, UnknownHookError
from hooked_models.hooks.table import IMAGE_POSITIONS, JOINT_POSITIONS, TEXT_POSITIONS

from ..runs.chains import Chain
from ..runs.gradients import Metric, gradients, modulates
from ..runs.pairs import Pair, pair
from .block_edges import BlockEdges
from .edge_graph import all_receivers, all_senders, edge_flags, index_of, input_hook, output_hook
from .nodes import Node
from .verification import Attribution, Patch, Verification, labelled, ranked

__all__ = [
    "NODES",
    "BlockEdges",
    "EdgeAttribution",
    "NodeAttribution",
    "Pair",
    "Verification",
    "edges",
    "nodes",
    "pair",
]

NODES = {
    "attn": "blocks.{layer}.attn.hook_z",
    "cross_attn": "blocks.{layer}.cross_attn.hook_z",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "embed": "hook_embed",
    "text": "hook_text",
}
"""Kinds of nodes and the hook where each is read; `{layer}` stands for all layers."""
DEFAULT = ("attn", "cross_attn", "mlp", "text")
"""Kinds that are attributed by default, where the denoiser has them."""


def _path(pair: Pair, ig_steps: int) -> list[tuple[Chain, float]]:
    """The runs whose gradients are averaged, with their weights."""
    if ig_steps == 1:
        return [(pair.original, 1.0)]
    return [(pair.interpolated(alpha), weight) for alpha, weight in _quadrature(ig_steps)]


def _quadrature(points: int) -> list[tuple[float, float]]:
    """Gauss–Legendre on [0, 1], as in captum: far closer to the integral than EAP-IG's Riemann sum
    of as many points.

    Raises ValueError for less than one point.
    """
    if points < 1:
        raise ValueError(f"ig_steps must be at least 1 (plain attribution), not {points}.")
    places, weights = np.polynomial.legendre.leggauss(points)  # on [-1, 1]
    return [((1 + float(x)) / 2, float(w) / 2) for x, w in zip(places, weights, strict=True)]


# Nodes


@dataclass(frozen=True)
class NodeAttribution(Attribution):
    """Scores of nodes: a Dataset with one variable a kind, dims (step, branch, prompt, layer, head,
    pos or text_pos).

    Example:
        >>> found = nodes(pair(below, above, steps=0), red, ["cross_attn", "mlp"])
        >>> found.table().columns.tolist()  # one row a node, the largest score first
        ['step', 'branch', 'layer', 'head', 'score', 'node']
    """

    def table(self) -> pd.DataFrame:
        """Scores of all kinds, one row a node, the largest |score| first."""
        kinds = [ranked(self.scores[kind]).assign(node=kind) for kind in self.scores]
        return pd.concat(kinds).sort_values("score", key=np.abs, ascending=False, ignore_index=True)

    def _patch(self, row: Any) -> Patch:
        kind = row.node
        label = {
            dim: int(getattr(row, dim))
            for dim in self.scores[kind].dims
            if dim not in ("prompt", "branch")
        }
        name = _names(self.pair.dit, kind)[label.get("layer")]
        index = tuple(label.get(dim, slice(None)) for dim in _dims(self.pair.dit, name))
        return Patch(name, index, name, index)


PRE_GATE = "blocks.{layer}.hook_mlp_out_pre_gate"
"""The MLP's output before the gate, in models whose gate lies in the block's forward."""


def _names(dit: Any, kind: str) -> dict[int | None, str]:
    """Layer → the hook of a kind there; of a kind that is one hook, without layers, None → it.

    Raises:
        UnknownHookError: no layer has it.
        ValueError: it is the same in every run.
    """
    template = NODES.get(kind, kind)
    if "{layer}" not in template:
        return {None: _checked(dit, template)}
    for one in (template, PRE_GATE) if kind == "mlp" else (template,):
        there = [
            layer for layer in range(dit.cfg.n_layers) if one.format(layer=layer) in dit.mod_dict
        ]
        if there:
            return {layer: _checked(dit, one.format(layer=layer)) for layer in there}
    dit.canonical_name(template.format(layer=0))  # raises
    raise AssertionError(template)


def _dims(dit: Any, name: str) -> tuple[str, ...]:
    """The axes of a denoiser's activation, without the last, which scores are summed over."""

    def dim(axis: str) -> str:
        if axis in TEXT_POSITIONS:
            return "text_pos"
        return (
            "pos"
            if axis in IMAGE_POSITIONS + JOINT_POSITIONS
            else "prompt"
            if axis == "batch"
            else axis
        )

    return tuple(map(dim, dit.axes(name)[:-1]))


def _reduce(
    products: Float[Tensor, " batch *rest"], dims: tuple[str, ...], keep_positions: bool
) -> tuple[tuple[str, ...], np.ndarray]:
    """Difference times gradient, summed over all that is not labelled: dims (prompt, head, pos)."""
    array = xr.DataArray(
        products.sum(-1, dtype=torch.promote_types(products.dtype, torch.float32)).cpu(), dims=dims
    )
    array = array.transpose("prompt", "head", ..., missing_dims="ignore")
    array = array if keep_positions or "pos" not in array.dims else array.sum("pos")
    return tuple(map(str, array.dims)), array.to_numpy()


def nodes(
    pair: Pair,
    metric: Metric,
    kinds: Sequence[str] | None = None,
    *,
    positions: bool = False,
    ig_steps: int = 1,
    ig_over: Literal["inputs", "activations"] = "inputs",
) -> NodeAttribution:
    """Attribution patching of nodes: (source − original) · ∂metric/∂activation, by prompt, step,
    branch, layer and head.

    Gradients go through all later steps and the solver; memory is that of one step's graph.

    Args:
        pair: two trajectories, or two denoiser calls.
        metric: differentiable; the tensor that the pair returns [batch …] → [batch].
        kinds: of `NODES`, or any hook of the denoiser ("blocks.1.attn.hook_v",
            "blocks.{layer}.attn.hook_v"); by default heads, MLPs and words, where the denoiser has
            them. Layers without a kind are NaN.
        positions: keep image positions apart. Words are always kept apart.
        ig_steps: 1 is plain attribution patching; m > 1 averages gradients over m points between
            the runs.
        ig_over: the interpolated tensors. "inputs" is EAP-IG: the text features (and latents, where
            they differ), for all nodes at once; m times the cost. Scores of "text" (and "embed")
            then add up to metric(source) − metric(original). "activations" goes, for one hook after
            another, from the original activation to the source's while the rest of the run stays
            original; scores add up to the exact effect of patching that hook. It costs m runs a
            hook.

    Raises:
        TypeError, ValueError: the metric is not differentiable, or does not give one number for
            each prompt; the inputs cannot be interpolated; or a node is the same in every run.
        UnknownHookError: a kind is neither of `NODES` nor a hook.

    Example:
        >>> found = nodes(pair(below, above), red, ["cross_attn"])
        >>> dict(found.scores["cross_attn"].sizes)
        {'step': 2, 'branch': 1, 'prompt': 1, 'layer': 3, 'head': 3}
    """
    kinds = [kind for kind in DEFAULT if _has(pair.dit, kind)] if kinds is None else kinds
    where = {kind: _names(pair.dit, kind) for kind in kinds}
    flat = list(dict.fromkeys(name for names in where.values() for name in names.values()))
    if ig_over == "inputs" or ig_steps == 1:
        found = _node_products(pair, flat, _path(pair, ig_steps), metric)
    else:
        found = _along_activations(pair, flat, ig_steps, metric)
    reduced = {
        (i, name): _reduce(product, _dims(pair.dit, name), positions) for i, name, product in found
    }

    scores = {}
    for kind in kinds:
        of_kind = {
            i: [reduced[i, name] for name in where[kind].values()]
            for i in range(len(pair.contexts))
        }
        stacked = {
            i: _by_layer(of_names, None not in where[kind]) for i, of_names in of_kind.items()
        }
        scores[kind] = labelled(pair, stacked, {"layer": list(where[kind])})
    return NodeAttribution(xr.Dataset(scores), pair, metric)


def _by_layer(
    of_names: Sequence[tuple[tuple[str, ...], np.ndarray]], layered: bool
) -> tuple[tuple[str, ...], np.ndarray]:
    """(dims, values) of a kind: its layers stacked, or the one hook that it is."""
    (prompt, *dims), first = of_names[0]
    if not layered:
        return (prompt, *dims), first
    return (prompt, "layer", *dims), np.stack([values for _, values in of_names], axis=1)


def _has(dit: Any, kind: str) -> bool:
    try:
        return bool(_names(dit, kind))
    except UnknownHookError:
        return False


def _checked(dit: Any, name: str) -> str:
    canonical = dit.canonical_name(name)
    if modulates(canonical):
        raise ValueError(
            f"{name} does not depend on the prompt: it is the same in both runs, and its score "
            "would be 0."
        )
    return canonical


def _node_products(
    pair: Pair, names: Sequence[str], path: list[tuple[Chain, float]], metric: Metric
) -> Iterator[tuple[int, str, Tensor]]:
    """(context, name, difference · gradient)."""
    hooks = pair.in_contexts(names)
    for step, found, differences in _gradients(pair, path, (hooks, hooks), metric):
        for i, prefix in pair.contexts_of(step):
            yield from (
                (i, name, differences[prefix + name] * found[prefix + name]) for name in names
            )


def _gradients(
    pair: Pair,
    path: list[tuple[Chain, float]],
    names: tuple[Mapping[int, list[str]], Mapping[int, list[str]]],
    metric: Metric,
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
    """(step, gradients along the path at the first of `names`, source − original at the second).

    Tensors of a path that is the original run alone are those of the backward pass.
    """
    at, changing = names
    alone = path[0][0] is pair.original
    for step, found in gradients(path, at, metric, changing if alone else None):
        original = found.values if alone else None
        yield step, found.gradients, pair.differences(step, changing[step], original)


def _along_activations(
    pair: Pair, names: Sequence[str], points: int, metric: Metric
) -> Iterator[tuple[int, str, Tensor]]:
    for i, context in enumerate(pair.contexts):
        for name in names:
            full, step = context.prefix + name, context.step
            difference = pair.differences(step, [full])[full]
            total = torch.zeros_like(difference)
            for alpha, weight in _quadrature(points):

                def move(tensor: Tensor, hook: Any, by: Tensor = alpha * difference) -> Tensor:
                    return tensor + by

                with pair.original.model.hooks([(full, move)]):
                    moved = pair.original.replay(step)
                    *_, (_, found) = gradients([(moved, weight)], {step: [full]}, metric)
                total += found.gradients[full]
            yield i, name, difference * total


# Edges


@dataclass(frozen=True)
class EdgeAttribution(Attribution):
    """Scores of edges: a DataArray with dims (step, branch, prompt, sender, receiver), NaN where no
    edge can be.

    Senders and receivers are named as in `dit_lens.patching`: "embed", "attn.L0H1",
    "cross_attn.L0H1", "mlp.L0", "text[0]" send; "attn.L1H0.q" (k, v), "cross_attn.L1H0.q" (k, v),
    "mlp.L1" and "output", the final residual stream, receive. Cross-attention
    reads the words as k and v, and nothing else.

    A receiver's column adds up to (source − original) · gradient of its whole input, a sender's row
    to its score as a node.

    Example:
        >>> found = edges(pair(below, above, steps=0), red)
        >>> (
        ...     "text[3]" in found.scores["sender"],
        ...     bool(found.scores.sel(sender="embed", receiver="mlp.L1").notnull()),
        ... )
        (True, True)
    """

    def table(self) -> pd.DataFrame:
        """Scores, one row an edge, the largest |score| first."""
        return ranked(self.scores)

    def _patch(self, row: Any) -> Patch:
        sender, receiver, dit = Node.parse(row.sender), Node.parse(row.receiver), self.pair.dit
        return Patch(
            input_hook(dit, receiver),
            index_of(receiver, sender.tokens),
            output_hook(dit, sender),
            index_of(sender, sender.tokens),
        )

    def _flags(self) -> AbstractContextManager[None]:
        return edge_flags(self.pair.dit)


def edges(pair: Pair, metric: Metric, *, ig_steps: int = 1) -> EdgeAttribution | BlockEdges:
    """Edge attribution patching (EAP): (source − original) of the sender's output · ∂metric/∂(the
    receiver's input).

    An edge leads from one denoiser call to the same call; its effect on later steps is in the
    gradient. In models other than PixArt, blocks are the nodes (`BlockEdges`).

    Args:
        pair: two trajectories, or two denoiser calls.
        metric: differentiable; the tensor that the pair returns [batch …] → [batch].
        ig_steps: 1 is EAP; m > 1 is EAP-IG, as `nodes(ig_over="inputs")`.

    Raises:
        TypeError, ValueError: as in `nodes`; or cfg.use_attn_in is on, which excludes separate q, k
            and v inputs; or another model's stream is changed between its blocks.

    Example:
        >>> edges(pair(below, above, steps=0), red).table().columns.tolist()
        ['step', 'branch', 'sender', 'receiver', 'score']
    """
    dit, path, found = pair.dit, _path(pair, ig_steps), {}
    if not isinstance(dit, HookedDiT):
        return BlockEdges.of(pair, path, metric)
    senders, receivers = all_senders(dit, pair.original.n_text), all_receivers(dit)
    columns: dict[str, list[int]] = {}
    for j, node in enumerate(receivers):
        columns.setdefault(input_hook(dit, node), []).append(j)
    written = list(dict.fromkeys(output_hook(dit, node) for node in senders))

    with edge_flags(dit):
        at, changing = pair.in_contexts(list(columns)), pair.in_contexts(written)
        for step, gradient, change in _gradients(pair, path, (at, changing), metric):
            for i, prefix in pair.contexts_of(step):
                here = [
                    {name.removeprefix(prefix): t for name, t in group.items()}
                    for group in (change, gradient)
                ]
                scores = _edge_scores(dit, (senders, receivers), columns, *here)
                found[i] = ("prompt", "sender", "receiver"), scores.double().cpu().numpy()
    labels = {"sender": list(map(str, senders)), "receiver": list(map(str, receivers))}
    return EdgeAttribution(labelled(pair, found, labels), pair, metric)


def _edge_scores(
    dit: HookedDiT,
    ends: tuple[Sequence[Node], Sequence[Node]],
    columns: Mapping[str, list[int]],
    change: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
) -> Float[Tensor, "batch sender receiver"]:
    """Change of each sender's output times gradient of each receiver's input, in one call; NaN
    without an edge.

    Args:
        dit: denoiser of both runs.
        ends: senders and receivers.
        columns: input hook → the receivers that it belongs to.
        change: sender's hook → source − original [batch pos …].
        gradient: input hook → gradient of the metric, of its shape.
    """
    senders, receivers = ends
    residual = [node for node in senders if node.kind != "text"]
    sent = torch.stack([change[output_hook(dit, node)][index_of(node)] for node in residual], dim=1)
    depths = [node.depth(dit.cfg) for node in residual]  # ascending
    table = sent.new_full((len(sent), len(senders), len(receivers)), torch.nan)
    for name, where in columns.items():
        # [batch pos head d_model]
        at = gradient[name] if gradient[name].ndim == 4 else gradient[name][:, :, None]
        if name.endswith(("cross_attn.hook_k_input", "cross_attn.hook_v_input")):
            table[:, len(depths) :, where] = torch.einsum(
                "bwd,bwhd->bwh", change["hook_caption"], at
            )
        else:
            earlier = bisect_left(depths, receivers[where[0]].depth(dit.cfg))
            table[:, :earlier, where] = torch.einsum("bspd,bphd->bsh", sent[:, :earlier], at)
    return table
