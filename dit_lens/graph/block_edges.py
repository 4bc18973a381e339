"""Edges between the blocks of any denoiser whose residual stream has names.

An edge is what one block adds to the stream, as another reads it. A block's contribution is the
stream that leaves it minus the stream that enters it, and its reading the gradient at its input
minus the gradient at its output: the rest passes by. So no copy of the stream is needed, and blocks
run as diffusers wrote them. Heads and MLPs have no such edges there, for the gate between them and
the stream is the block's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ..runs.chains import Chain
from ..runs.gradients import Metric, gradients
from ..runs.pairs import Pair
from .verification import Attribution, Patch, fitted, labelled, ranked

ROUNDING = 1e-3
"""Relative difference of gradients that are the same tensor's."""


@dataclass(frozen=True)
class BlockEdges(Attribution):
    """Scores of edges between blocks.

    A DataArray with dims (step, branch, prompt, sender, receiver), NaN where no edge can be.
    "embed", the stream that enters the first block, and "block.L0" … send; "block.L0" … and
    "output", the stream that leaves the last block, receive. A column of "output" adds up to the
    score of that stream as a node, a row to that of the sender's contribution.

    Example:
        >>> from hooked_models import families
        >>> family = families.SUPPORTED["FluxTransformer2DModel"]
        >>> dit = families.hook(family.small().eval())
        >>> given = family.inputs(dit.wrapped)
        >>> latents, time, text = (
        ...     given.pop(name) for name in ("hidden_states", "timestep", "encoder_hidden_states")
        ... )
        >>> below, above = (dit.bind(latents, time, x, **given)[0] for x in (text, text.flip(0)))
        >>> found = attribution.edges(attribution.pair(below, above), lambda out: out.mean((1, 2)))
        >>> found.scores["sender"].values.tolist(), found.scores["receiver"].values.tolist()[-1]
        (['embed', 'block.L0', 'block.L1', 'block.L2'], 'output')
    """

    @classmethod
    def of(cls, pair: Pair, path: Sequence[tuple[Chain, float]], metric: Metric) -> BlockEdges:
        """(Source − original) of each sender's contribution · ∂metric/∂(each receiver's reading).

        Args:
            pair: two trajectories, or two denoiser calls.
            path: the runs whose gradients are averaged, with their weights.
            metric: differentiable; the tensor that the pair returns [batch …] → [batch].

        Raises:
            TypeError, ValueError: as in `attribution.nodes`; or the stream is changed between
                blocks, or read elsewhere, so that contributions do not add up to it.
        """
        found, names = {}, pair.in_contexts([*chain.from_iterable(_streams(pair.dit))])
        for step, along in gradients(list(path), names, metric):
            change = pair.differences(step, names[step])
            for i, prefix in pair.contexts_of(step):
                groups = [
                    {name.removeprefix(prefix): x for name, x in group.items()}
                    for group in (change, along.gradients)
                ]
                scores = _scores(pair.dit, *groups)
                found[i] = ("prompt", "sender", "receiver"), scores.double().cpu().numpy()
        scores_: xr.DataArray = labelled(pair, found, _labels(pair.dit))
        return cls(scores_, pair, metric)

    def table(self) -> pd.DataFrame:
        """Scores, one row an edge, the largest |score| first."""
        return ranked(self.scores)

    def _patch(self, row: Any) -> Patch:
        pre, post = _streams(self.pair.dit)
        names = _labels(self.pair.dit)
        s, r = names["sender"].index(row.sender) - 1, names["receiver"].index(row.receiver)
        sent = (pre[0], None) if s < 0 else (post[s], pre[s])
        read = (post[-1], None) if r == len(pre) else (pre[r], post[r])
        return Patch(read[0], (slice(None),), sent[0], (slice(None),), sent[1], read[1])


def _streams(dit: Any) -> tuple[list[str], list[str]]:
    """Hooks of the stream that enters and that leaves each block."""
    layers = range(dit.cfg.n_layers)
    pre, post = (
        [f"blocks.{layer}.hook_resid_{side}" for layer in layers] for side in ("pre", "post")
    )
    return pre, post


def _labels(dit: Any) -> dict[str, list[str]]:
    blocks = [f"block.L{layer}" for layer in range(dit.cfg.n_layers)]
    return {"sender": ["embed", *blocks], "receiver": [*blocks, "output"]}


def _scores(
    dit: Any, change: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
) -> Float[Tensor, "batch sender receiver"]:
    pre, post = _streams(dit)
    _check_stream(dit, change, gradient)
    sent = [change[pre[0]], *(_minus(change[b], change[a]) for a, b in zip(pre, post, strict=True))]
    read = [_minus(gradient[a], gradient[b]) for a, b in zip(pre, post, strict=True)]
    read.append(gradient[post[-1]])
    table = sent[0].new_full((len(sent[0]), len(sent), len(read)), torch.nan)
    for r, slope in enumerate(read):
        for s in range(r + 1):
            table[:, s, r] = (fitted(sent[s], slope) * slope).flatten(1).sum(1)
    return table


def _check_stream(dit: Any, change: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless what leaves a block enters the next one, and nothing else."""
    pre, post = _streams(dit)
    for a, b in zip(post, pre[1:], strict=False):
        if change[a].shape != change[b].shape or not torch.equal(change[a], change[b]):
            raise ValueError(
                f"{dit.family.name} has no edges: its stream is changed between {a} and {b}; take "
                "attribution.nodes."
            )
        size = float(gradient[b].abs().max())
        if float((gradient[a] - gradient[b]).abs().max()) > ROUNDING * size:
            raise ValueError(
                f"{dit.family.name} has no edges: {a} is also read past {b}, by a long skip; take "
                "attribution.nodes."
            )


def _minus(a: Tensor, b: Tensor) -> Tensor:
    return a - fitted(b, a)
