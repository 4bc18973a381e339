"""Path patching: the effect of senders on a result *by way of* receivers, within a step and across
steps.

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

How it is computed: copies of the batch go through the model together. In SENT, senders have their
source values and frozen components have their values of REFERENCE. In REFERENCE, receivers' inputs
are those of SENT; its result counts. This is exact for any set of receivers: a path that has passed
a receiver is in REFERENCE, on which frozen components depend like all others. While steps are
frozen, CARRIED is SENT with the latents of REFERENCE; it gives the output that SENT passes on to
later steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import Trajectory
from hooked_models.generation.names import BRANCHES, IMAGE_HOOK, Branch
from hooked_models.hooks.module import HookFunction

from ..runs.repeated_runs import CallView, RepeatedCall, RepeatedRun
from .nodes import Index, Node, Nodes, Place, why_no_path

__all__ = ["VARIANTS", "Node", "Nodes", "head_matrix", "path_patch", "path_patch_matrix"]

VARIANTS: Mapping[str, frozenset[str]] = {
    "direct": frozenset({"attn", "cross_attn", "mlp", "steps"}),
    "through_mlps": frozenset({"attn", "cross_attn"}),
    "exact": frozenset(),
}
"""Variant → frozen parts."""

Metric = Callable[[Tensor], Tensor]
"""A tensor [batch …] → one number for each row [batch]."""

Run = Trajectory | CallView


NodesLike = str | Node | Sequence[str | Node] | Nodes

PROGRESS_FROM = 4
"""Senders from which a progress bar is shown."""

REFERENCE, SENT, CARRIED = 0, 1, 2
"""Copies of the batch; the module describes them."""


@dataclass(frozen=True)
class _Experiment:
    """Two runs, a metric and the kinds of components that are frozen (all but senders and
    receivers).
    """

    original: RepeatedCall | RepeatedRun
    source: RepeatedCall | RepeatedRun
    metric: Metric
    metric_on: str
    frozen: frozenset[str]

    @classmethod
    def of(
        cls,
        original: Run,
        source: Run,
        metric: Metric,
        variant: str | Collection[str],
        metric_on: str | None,
    ) -> _Experiment:
        kinds = sorted(VARIANTS["direct"])
        known = variant in VARIANTS if isinstance(variant, str) else set(kinds).issuperset(variant)
        if not known:
            raise ValueError(
                f"variant={variant!r} is unknown: choose {', '.join(VARIANTS)}, or some of "
                f"{', '.join(kinds)} to freeze."
            )
        frozen = VARIANTS[variant] if isinstance(variant, str) else frozenset(variant)
        one, other = (
            RepeatedRun(run) if isinstance(run, Trajectory) else RepeatedCall(run)
            for run in (original, source)
        )
        if type(one) is not type(other) or one.dit is not other.dit:
            raise ValueError(
                "original and source must be of one model, and either both trajectories or both "
                "denoiser calls."
            )
        if len(one) != len(other):
            raise ValueError(
                f"original has {len(one)} rows and source {len(other)}: pair each prompt with its "
                "counterfactual."
            )
        for name, value in one.conditions.items():
            if not _equal(value, other.conditions.get(name)):
                raise ValueError(
                    f"original and source differ in {name}, so that the contributions of one mean "
                    "nothing in the other."
                )
        return cls(one, other, metric, one.result if metric_on is None else metric_on, frozen)

    @cached_property
    def baselines(self) -> dict[str, Float[np.ndarray, " prompt"]]:
        """The metric of the two runs as they are."""
        runs = {"original": self.original, "source": self.source}
        return {
            name: self.measure(run.run([self.metric_on])[self.metric_on])
            for name, run in runs.items()
        }

    def measure(self, tensor: Tensor) -> Float[np.ndarray, " prompt"]:
        values = self.metric(tensor)
        if values.shape != (len(self.original),):
            raise ValueError(
                f"metric gave {tuple(values.shape)} for {len(self.original)} rows: return one "
                "number for each row."
            )
        return values.detach().double().cpu().numpy()

    def places(self, nodes: Nodes, sends: bool) -> list[Place]:
        """The denoiser calls that a set means, up to the one that the metric is taken at; checks
        the set on the way.
        """
        for node in nodes.nodes:
            node.check(self.original.dit.cfg, sends)
            if sends:
                for hook in node.output_hooks(self.original.dit):
                    self.original.name(Place(0, "cond"), hook)  # raises where there is none
            if node.kind == "image" and self.metric_on != IMAGE_HOOK:
                raise ValueError(
                    "image receives after the last step, but the metric is taken on "
                    f"{self.metric_on}."
                )
        return [
            Place(step, branch) for step in self._steps(nodes) for branch in self._branches(nodes)
        ]

    def _steps(self, nodes: Nodes) -> Sequence[int]:
        last = self.original.step_of(self.metric_on)
        steps = (
            range(last + 1)
            if nodes.steps is None
            else [nodes.steps]
            if isinstance(nodes.steps, int)
            else nodes.steps
        )
        if outside := [step for step in steps if not 0 <= step <= last]:
            raise ValueError(
                f"{nodes}: step {outside[0]} is not among the steps 0 to {last} on which "
                f"{self.metric_on} depends."
            )
        return steps

    def _branches(self, nodes: Nodes) -> tuple[Branch, ...]:
        branches = BRANCHES if nodes.branch == "both" else (nodes.branch,)
        if missing := [branch for branch in branches if branch not in self.original.branches]:
            raise ValueError(f"{nodes}: this run has no {missing[0]} branch.")
        return branches

    def why_no_path(self, senders: Nodes, receivers: Nodes) -> str | None:
        """Why some sender reaches no receiver, or some receiver is not reached; None if all is
        joined.
        """
        dit = self.original.dit
        sent = list(product(senders.nodes, self.places(senders, sends=True)))
        received = list(product(receivers.nodes, self.places(receivers, sends=False)))

        def first_reason(senders: Any, receivers: Any) -> str | None:
            reasons = (why_no_path(s, r, self.frozen, dit) for s, r in product(senders, receivers))
            first = next(reasons)
            return None if first is None or None in reasons else first

        for node in senders.nodes:
            if reason := first_reason([pair for pair in sent if pair[0] == node], received):
                return reason
        for node in receivers.nodes:
            if reason := first_reason(sent, [pair for pair in received if pair[0] == node]):
                return reason
        return None

    @property
    def n_shared_copies(self) -> int:
        """The first copy that has no part in the computation."""
        return (
            CARRIED + 1
            if "steps" in self.frozen and isinstance(self.original, RepeatedRun)
            else SENT + 1
        )

    def patched(
        self, senders: Nodes, receivers: Mapping[int, Nodes]
    ) -> dict[int, Float[np.ndarray, " prompt"]]:
        """Copy → metric of that copy, in which its receivers' inputs are those of SENT.

        Receivers of fresh copies are independent experiments. In those, frozen components are
        frozen at the original run: a set of receivers that paths join belongs into REFERENCE,
        alone.
        """
        copies = max(self.n_shared_copies - 1, *receivers) + 1
        sent_from = self.places(senders, sends=True)
        first, last = (
            min(place.step for place in sent_from),
            max(self.last_step(nodes) for nodes in receivers.values()),
        )
        transfer = partial(_copy_rows, copies=copies)
        hooks: list[tuple[str, HookFunction]] = [
            (name, partial(transfer, source=a, target=b))
            for name, a, b in self.freeze(range(first, last + 1))
        ]
        for name, index, value in self.send(senders, sent_from):
            hooks += [
                (name, partial(_set_rows, copies=copies, index=index, value=value, target=b))
                for b in range(SENT, self.n_shared_copies)
            ]
        hooks += self.hold_parallel_mlps(range(first, last + 1), copies)
        for copy, nodes in receivers.items():
            targets = (
                (copy, *range(CARRIED, self.n_shared_copies)) if copy == REFERENCE else (copy,)
            )
            for name, index in self.receive(nodes, first):
                hooks += [
                    (name, partial(transfer, source=SENT, index=index, target=target))
                    for target in targets
                ]
        result = self.original.run([self.metric_on], hooks, copies, first)[
            self.metric_on
        ].unflatten(0, (copies, -1))
        # Whoever receives the final latents of SENT has its image.
        shown = {
            copy: SENT if any(n.kind == "image" for n in nodes.nodes) else copy
            for copy, nodes in receivers.items()
        }
        return {copy: self.measure(result[row]) for copy, row in shown.items()}

    def last_step(self, receivers: Nodes) -> int:
        if any(node.kind == "image" for node in receivers.nodes):
            return self.original.num_steps - 1
        return max(place.step for place in self.places(receivers, sends=False))

    def freeze(self, steps: Iterable[int]) -> Iterator[tuple[str, int, int]]:
        """(hook, copy to take from, copy to hold)."""
        run, cfg = self.original, self.original.dit.cfg
        for step in steps:
            for kind, layer, branch in product(
                self.frozen - {"steps"}, range(cfg.n_layers), run.branches
            ):
                for inner in Node.parse(f"{kind}.L{layer}").frozen_hooks(run.dit):
                    name = run.name(Place(step, branch), inner)
                    yield from (
                        (name, REFERENCE, copy) for copy in range(SENT, self.n_shared_copies)
                    )
            if self.n_shared_copies > CARRIED:
                yield f"steps.{step}.hook_latent", REFERENCE, CARRIED
                yield f"steps.{step}.hook_out", CARRIED, SENT

    def hold_parallel_mlps(
        self, steps: Iterable[int], copies: int
    ) -> Iterator[tuple[str, HookFunction]]:
        """Hooks that hold an MLP which is projected together with its block's attention: the
        projection is linear, so it changes by the change of z alone.
        """
        run, dit = self.original, self.original.dit
        joined = "blocks.{}.hook_attn_mlp_out_pre_gate"
        layers = [n for n in range(dit.cfg.n_layers) if joined.format(n) in dit.mod_dict]
        if "mlp" not in self.frozen:
            return
        for step, layer, branch in product(steps, layers, run.branches):
            z = run.name(Place(step, branch), f"blocks.{layer}.attn.hook_z")
            out = run.name(Place(step, branch), joined.format(layer))
            seen: dict[str, Tensor] = {}
            yield z, partial(_keep_rows, copies=copies, seen=seen)
            yield (
                out,
                partial(
                    _project_change,
                    copies=copies,
                    targets=range(SENT, self.n_shared_copies),
                    seen=seen,
                    weight=dit.blocks[layer].attn.W_O,
                ),
            )

    def send(self, senders: Nodes, places: Sequence[Place]) -> Iterator[tuple[str, Index, Tensor]]:
        """(hook, part of its tensor, value in the source run)."""
        dit = self.original.dit
        sites = [
            (self.source.name(place, hook), node, place)
            for place in places
            for node in senders.nodes
            for hook in node.output_hooks(dit)
        ]
        values = self.source.run({name for name, *_ in sites})
        for name, node, place in sites:
            index = self.text_positions(node, place.branch) if node.kind == "text" else node.index
            yield name, index, values[name][index]

    def receive(self, receivers: Nodes, first: int) -> Iterator[tuple[str, Index]]:
        """(hook, part of its tensor) of every input, from step `first` on; no path leads into
        earlier steps.
        """
        run = self.original
        for place, node in product(self.places(receivers, sends=False), receivers.nodes):
            if node.kind != "image" and place.step >= first:
                yield from (
                    (run.name(place, inner), node.index) for inner in node.input_hooks(run.dit.cfg)
                )

    def text_positions(self, node: Node, branch: Branch) -> Bool[Tensor, "batch text_pos"]:
        ours, theirs = self.original.text_bias(branch), self.source.text_bias(branch)
        if ours.shape != theirs.shape:
            lengths = f"{ours.shape[1]} and {theirs.shape[1]}"
            raise ValueError(
                f"The texts have {lengths} tokens: tokenise both to one length, "
                "model.to_tokens(prompts, length=…)."
            )
        chosen = torch.ones_like(ours, dtype=torch.bool)
        if node.tokens is not None:
            chosen = self.original.tokens(node.tokens, ours.shape[1]).to(ours.device)
        if (wrong := chosen & (ours != theirs)).any():
            row, position = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"Token {position} of row {row} is masked in one of the two runs: choose prompts "
                "of equal length."
            )
        return chosen

    def dataset(
        self, dims: Sequence[str], patched: Float[np.ndarray, "*dims"], **coords: Any
    ) -> xr.Dataset:
        original, source = self.baselines["original"], self.baselines["source"]
        total = np.broadcast_to(source - original, patched.shape)
        effect = np.divide(
            patched - original, total, out=np.full(patched.shape, np.nan), where=total != 0
        )
        variables = {"original": ("prompt", original), "source": ("prompt", source)}
        attrs = {"frozen": sorted(self.frozen), "metric_on": self.metric_on}
        return xr.Dataset(
            {**variables, "patched": (dims, patched), "effect": (dims, effect)}, coords, attrs
        )


# The hooks. Each edits rows [copy · batch, …] in place.


def _copy_rows(
    rows: Tensor, hook: HookPoint, *, copies: int, source: int, target: int, index: Index = ...
) -> None:
    rows = rows.unflatten(0, (copies, -1))
    rows[target][index] = rows[source][index]


def _set_rows(
    rows: Tensor, hook: HookPoint, *, copies: int, target: int, index: Index, value: Tensor
) -> None:
    rows.unflatten(0, (copies, -1))[target][index] = value


def _keep_rows(rows: Tensor, hook: HookPoint, *, copies: int, seen: dict[str, Tensor]) -> None:
    seen["z"] = rows.unflatten(0, (copies, -1))


def _project_change(
    rows: Tensor,
    hook: HookPoint,
    *,
    copies: int,
    targets: Iterable[int],
    seen: Mapping[str, Tensor],
    weight: Float[Tensor, "head d_head d_model"],
) -> None:
    rows, z = rows.unflatten(0, (copies, -1)), seen["z"]
    for target in targets:
        change = (z[target] - z[REFERENCE]).flatten(-2) @ weight.flatten(0, 1)
        rows[target] = rows[REFERENCE] + change


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
    """The effect of the senders' source values on a metric, along the paths through the receivers
    (see the module).

    Args:
        original, source: `model.trajectory(prompts, seed=0)` and the same of the counterfactual
            (another prompt, or noise), or two calls of one denoiser, `dit.bind(latents, timestep,
            text)[0]`. No step before the senders' first is run again.
        senders, receivers: nodes as text (`Node` lists the forms), or `Nodes`, which says the steps
            (all of them unless said) and the branch (the conditional one).
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
    experiment = _Experiment.of(original, source, metric, variant, metric_on)
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
    """`path_patch` of every sender (or set) with every receiver (or set): patched and effect over
    (sender, receiver, prompt).

    NaN where no path leads. One sender's receivers share a run, as further rows of its batch,
    `receivers_per_run` at a time; a receiver of several nodes or calls shares only where nothing is
    frozen.

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
    experiment = _Experiment.of(original, source, metric, variant, metric_on)
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
    """`path_patch_matrix` of all heads of a sublayer with (the q, k or v of) all heads of a
    sublayer.

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


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return torch.equal(one, other) if one is not None and other is not None else one is other
