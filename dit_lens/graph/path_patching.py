"""Path patching: the effect of senders on a result *by way of* receivers.

Paths lead within a step and across steps.

    original = model.trajectory("red circle is above blue square", seed=0)
    source = model.trajectory("red circle is below blue square", seed=0)
    # at every step
    path_patch(original, source, "cross_attn.L2H1", "cross_attn.L4H0.q", metric)
    words, mlp = Nodes("text[relation]", steps=0), Nodes("mlp.L3", steps=2)
    path_patch(original, source, words, mlp, metric, "exact")

The graph is the whole generation: text, embedding, heads and MLPs of every denoising step and
guidance branch, joined by the residual stream; the sampler joins a step's network output to all
steps after it (latents and multistep history). Let P be the set of paths that start at a sender,
reach a receiver's input by way of components that are not frozen, and go on in any way. The result
is computed with the senders' source values along P, and with original values along all other paths:
path patching on a set of paths as in Goldowsky-Dill et al. (arXiv 2304.05969).

A variant names the frozen components, and so the paths from sender to receiver that count:

- ``direct``: everything. A receiver's input is x_r + Σ_s (source_s − original_s), summed over the
  senders that write to it. Into a later step, only the part of the network output at the sender's
  own step that the solver carries; the steps between add nothing. In one call, for two heads, it is
  TransformerLens' ``get_act_patch_direct_path``.
- ``through_mlps``: heads, but not MLPs. Wang et al. (arXiv 2211.00593), appendix B, where a
  receiver's recorded input replaces its original one, so that P has no paths from one receiver to
  another. Else it is the same.
- ``exact``: nothing. All paths from senders to receivers count.

Or freeze any of ``attn``, ``cross_attn``, ``mlp`` and ``steps`` (no path enters a denoiser call by
its latents and leaves it by its output, unless it passes a receiver there).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.progress import track

from hooked_models import Trajectory

from .nodes import Node, Nodes
from .patch_copies import REFERENCE, VARIANTS, Experiment, Metric, Run

__all__ = ["VARIANTS", "Node", "Nodes", "head_matrix", "path_patch", "path_patch_matrix"]

NodesLike = str | Node | Sequence[str | Node] | Nodes

PROGRESS_FROM = 4
"""Senders from which a progress bar is shown."""


def _nodes(like: NodesLike) -> Nodes:
    return like if isinstance(like, Nodes) else Nodes(like)


@torch.no_grad()
def path_patch(
    original: Run,
    source: Run,
    senders: NodesLike,
    receivers: NodesLike,
    metric: Metric,
    variant: str | Collection[str] = "direct",
    metric_on: str | None = None,
) -> xr.Dataset:
    """The effect of the senders' source values on a metric, along paths through the receivers.

    See the module.

    Args:
        original: `model.trajectory(prompts, seed=0)`, or one call of a denoiser, `dit.bind(latents,
            timestep, text)[0]`. No step before the senders' first is run again.
        source: the same of the counterfactual: another prompt, or noise.
        senders: nodes as text (`Node` lists the forms), or `Nodes`, which give the steps (by
            default all) and the branch (by default the conditional one).
        receivers: nodes whose inputs take what the senders changed, in the same forms.
        metric: a tensor [batch …] → [batch].
        variant: ``direct``, ``through_mlps``, ``exact``, or the kinds of components to freeze.
        metric_on: the hook whose tensor the metric is given, such as "steps.3.hook_x0"; nothing
            after it is run. Unless said, the images, or the output of the denoiser call.

    Returns:
        Over prompt: original, source, patched, and effect = (patched − original) / (source −
        original), NaN where the two runs agree.

    Raises:
        ValueError: no path leads to some receiver, or from some sender; there is no such node; the
            runs do not fit together.

    Example:
        >>> from hooked_models import HookedTextToImage
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> texts = "red circle is below blue square", "red circle is above blue square"
        >>> below, above = (model.trajectory(text, seed=0, num_steps=2) for text in texts)
        >>> red = lambda images: images[:, 0].mean((1, 2))
        >>> found = path_patch(above, below, "cross_attn.L0H1", "cross_attn.L1H0.q", red)
        >>> found["effect"].dims
        ('prompt',)
    """
    senders, receivers = _nodes(senders), _nodes(receivers)
    experiment = Experiment.of(original, source, metric, variant, metric_on)
    if reason := experiment.why_no_path(senders, receivers):
        raise ValueError(reason)
    return experiment.dataset(
        ["prompt"], experiment.patched(senders, {REFERENCE: receivers})[REFERENCE]
    )


@torch.no_grad()
def path_patch_matrix(
    original: Run,
    source: Run,
    senders: Sequence[NodesLike],
    receivers: Sequence[NodesLike],
    metric: Metric,
    variant: str | Collection[str] = "direct",
    metric_on: str | None = None,
    receivers_per_run: int = 16,
) -> xr.Dataset:
    """`path_patch` of every sender (or set) with every receiver (or set).

    Patched and effect over (sender, receiver, prompt). NaN where no path leads. One sender's
    receivers share a run, as further rows of its batch, `receivers_per_run` at a time; a receiver
    of several nodes or calls shares only where nothing is frozen.

    Example:
        >>> from hooked_models import HookedTextToImage
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> texts = "red circle is below blue square", "red circle is above blue square"
        >>> below, above = (model.trajectory(text, seed=0, num_steps=2) for text in texts)
        >>> red = lambda images: images[:, 0].mean((1, 2))
        >>> senders = [Nodes("cross_attn.L1H0", steps=1), Nodes("cross_attn.L2H0", steps=1)]
        >>> found = path_patch_matrix(
        ...     above, below, senders, [Nodes("mlp.L1", 1), Nodes("output", 1)], red
        ... )
        >>> found[
        ...     "effect"
        ... ].isnull().squeeze().values.tolist()  # nothing leads from layer 2 to layer 1
        [[False, False], [True, False]]
    """
    experiment = Experiment.of(original, source, metric, variant, metric_on)
    rows, columns = list(map(_nodes, senders)), list(map(_nodes, receivers))
    patched = np.full((len(rows), len(columns), len(experiment.original)), np.nan)

    def shares(nodes: Nodes) -> bool:
        return (
            not experiment.frozen
            or len(nodes.nodes) == len(experiment.places(nodes, sends=False)) == 1
        )

    quiet = len(rows) < PROGRESS_FROM
    console = Console(stderr=True)
    for i, sender in enumerate(
        track(rows, "senders", transient=True, disable=quiet, console=console)
    ):
        reached = [
            j
            for j, receiver in enumerate(columns)
            if experiment.why_no_path(sender, receiver) is None
        ]
        for j in (j for j in reached if not shares(columns[j])):
            patched[i, j] = experiment.patched(sender, {REFERENCE: columns[j]})[REFERENCE]
        together = [j for j in reached if shares(columns[j])]
        for start in range(0, len(together), receivers_per_run):
            part = dict(
                enumerate(
                    together[start : start + receivers_per_run], start=experiment.n_shared_copies
                )
            )
            for copy, values in experiment.patched(
                sender, {copy: columns[j] for copy, j in part.items()}
            ).items():
                patched[i, part[copy]] = values
    labels = {"sender": list(map(str, rows)), "receiver": list(map(str, columns))}
    return experiment.dataset(["sender", "receiver", "prompt"], patched, **labels)


def head_matrix(
    original: Run,
    source: Run,
    metric: Metric,
    senders: Literal["attn", "cross_attn"] = "cross_attn",
    receivers: Literal["attn", "cross_attn"] = "cross_attn",
    part: Literal["q", "k", "v"] | None = "q",
    sender_steps: int | Sequence[int] | None = None,
    receiver_steps: int | Sequence[int] | None = None,
    **how: Any,
) -> xr.Dataset:
    """`path_patch_matrix` of all heads of a sublayer with all heads of a sublayer.

    Receivers are heads, or their q, k or v.

    Returns:
        patched and effect over (layer, head, receiver_layer, receiver_head, prompt). `how` is
        branch (of `Nodes`), variant, metric_on and receivers_per_run.

    Example:
        >>> from hooked_models import HookedTextToImage
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> texts = "red circle is below blue square", "red circle is above blue square"
        >>> below, above = (model.trajectory(text, seed=0, num_steps=2) for text in texts)
        >>> red = lambda images: images[:, 0].mean((1, 2))
        >>> found = head_matrix(above, below, red, sender_steps=0, receiver_steps=0)
        >>> found["effect"].shape
        (3, 3, 3, 3, 1)
    """
    cfg = (original.model.dit if isinstance(original, Trajectory) else original.dit).cfg
    heads, branch = (
        list(product(range(cfg.n_layers), range(cfg.n_heads))),
        how.pop("branch", "cond"),
    )
    from_ = [Nodes(Node(senders, *head), sender_steps, branch) for head in heads]
    to = [Nodes(Node(receivers, *head, part), receiver_steps, branch) for head in heads]
    table = path_patch_matrix(original, source, from_, to, metric, **how)
    dims = ("layer", "head", "receiver_layer", "receiver_head", "prompt")
    shape = (cfg.n_layers, cfg.n_heads) * 2 + (table.sizes["prompt"],)
    wide = {name: (dims, table[name].values.reshape(shape)) for name in ("patched", "effect")}
    return xr.Dataset({**table[["original", "source"]].data_vars, **wide}, attrs=table.attrs)
