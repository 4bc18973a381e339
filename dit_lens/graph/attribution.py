"""Attribution: the effect of every node or edge, to first order, and how far that is true.

From two runs and one gradient.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_models import UnknownHookError
from hooked_models.hooks.table import IMAGE_POSITIONS, JOINT_POSITIONS, TEXT_POSITIONS

from ..runs.chains import Chain
from ..runs.gradients import Metric, gradients, modulates
from ..runs.pairs import Pair, pair
from .block_edges import BlockEdges
from .edge_attribution import EdgeAttribution, edges
from .integration import gradients_along, quadrature, runs_between
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


@dataclass(frozen=True)
class NodeAttribution(Attribution):
    """Scores of nodes, a Dataset with one variable a kind.

    Dims (step, branch, prompt, layer, head, pos or text_pos).

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
    """Attribution patching of nodes: (source − original) · ∂metric/∂activation.

    Scores are by prompt, step, branch, layer and head. Gradients go through all later steps and the
    solver; memory is that of one step's graph.

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
        found = _node_products(pair, flat, runs_between(pair, ig_steps), metric)
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
    for step, found, differences in gradients_along(pair, path, (hooks, hooks), metric):
        for i, prefix in pair.contexts_of(step):
            yield from (
                (i, name, differences[prefix + name] * found[prefix + name]) for name in names
            )


def _along_activations(
    pair: Pair, names: Sequence[str], points: int, metric: Metric
) -> Iterator[tuple[int, str, Tensor]]:
    for i, context in enumerate(pair.contexts):
        for name in names:
            full, step = context.prefix + name, context.step
            difference = pair.differences(step, [full])[full]
            total = torch.zeros_like(difference)
            for alpha, weight in quadrature(points):

                def move(tensor: Tensor, hook: Any, by: Tensor = alpha * difference) -> Tensor:
                    return tensor + by

                with pair.original.model.hooks([(full, move)]):
                    moved = pair.original.replay(step)
                    *_, (_, found) = gradients([(moved, weight)], {step: [full]}, metric)
                total += found.gradients[full]
            yield i, name, difference * total


# Edges
