"""Edge attribution patching: the effect of every edge of a denoiser call, to first order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedDiT

from ..runs.gradients import Metric
from ..runs.pairs import Pair
from .block_edges import BlockEdges
from .edge_graph import all_receivers, all_senders, edge_flags, index_of, input_hook, output_hook
from .integration import gradients_along, runs_between
from .nodes import Node
from .verification import Attribution, Patch, labelled, ranked


@dataclass(frozen=True)
class EdgeAttribution(Attribution):
    """Scores of edges, a DataArray, NaN where no edge can be.

    Dims (step, branch, prompt, sender, receiver). Senders and receivers are named as in
    `dit_lens.patching`: "embed", "attn.L0H1", "cross_attn.L0H1", "mlp.L0", "text[0]" send;
    "attn.L1H0.q" (k, v), "cross_attn.L1H0.q" (k, v), "mlp.L1" and "output", the final residual
    stream, receive. Cross-attention reads the words as k and v, and nothing else.

    A receiver's column adds up to (source − original) · gradient of its whole input, a sender's row
    to its score as a node.

    Example:
        >>> from dit_lens.graph.attribution import pair
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
    """Edge attribution patching (EAP).

    Scores are (source − original) of the sender's output · ∂metric/∂(the receiver's input). An edge
    leads from one denoiser call to the same call; its effect on later steps is in the gradient. In
    models other than PixArt, blocks are the nodes (`BlockEdges`).

    Args:
        pair: two trajectories, or two denoiser calls.
        metric: differentiable; the tensor that the pair returns [batch …] → [batch].
        ig_steps: 1 is EAP; m > 1 is EAP-IG, as `nodes(ig_over="inputs")`.

    Raises:
        TypeError, ValueError: as in `nodes`; or cfg.use_attn_in is on, which excludes separate q, k
            and v inputs; or another model's stream is changed between its blocks.

    Example:
        >>> from dit_lens.graph.attribution import pair
        >>> edges(pair(below, above, steps=0), red).table().columns.tolist()
        ['step', 'branch', 'sender', 'receiver', 'score']
    """
    dit, path, found = pair.dit, runs_between(pair, ig_steps), {}
    if not isinstance(dit, HookedDiT):
        return BlockEdges.of(pair, path, metric)
    senders, receivers = all_senders(dit, pair.original.n_text), all_receivers(dit)
    columns: dict[str, list[int]] = {}
    for j, node in enumerate(receivers):
        columns.setdefault(input_hook(dit, node), []).append(j)
    written = list(dict.fromkeys(output_hook(dit, node) for node in senders))

    with edge_flags(dit):
        at, changing = pair.in_contexts(list(columns)), pair.in_contexts(written)
        for step, gradient, change in gradients_along(pair, path, (at, changing), metric):
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
    """Change of each sender's output times gradient of each receiver's input, in one call.

    NaN without an edge.

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
