"""One path-patching experiment: copies of a batch that go through the model together.

In SENT, senders have their
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
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import Trajectory
from hooked_models.generation.names import BRANCHES, IMAGE_HOOK, Branch
from hooked_models.hooks.module import HookFunction

from ..runs.repeated_runs import CallView, RepeatedCall, RepeatedRun
from .nodes import Index, Node, Nodes, Place, why_no_path

VARIANTS: Mapping[str, frozenset[str]] = {
    "direct": frozenset({"attn", "cross_attn", "mlp", "steps"}),
    "through_mlps": frozenset({"attn", "cross_attn"}),
    "exact": frozenset(),
}
"""Variant → frozen parts."""

Metric = Callable[[Tensor], Tensor]
"""A tensor [batch …] → one number for each row [batch]."""

Run = Trajectory | CallView

REFERENCE, SENT, CARRIED = 0, 1, 2
"""Copies of the batch; the module describes them."""


@dataclass(frozen=True)
class Experiment:
    """Two runs, a metric and the kinds of components that are frozen.

    Frozen are all but senders and receivers.

    Example:
        >>> one, other = (
        ...     model.trajectory(f"red circle is {word} blue square", num_steps=1)
        ...     for word in ("above", "below")
        ... )
        >>> first = lambda images: images[:, 0].mean((1, 2))
        >>> found = Experiment.of(one, other, first, "exact", None)
        >>> sorted(found.baselines), found.metric_on
        (['original', 'source'], 'hook_image')
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
    ) -> Experiment:
        """Check that the runs fit together, and resolve variant and metric.

        Raises:
            ValueError: an unknown variant, or runs of other models, rows or conditions.
        """
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
        """The metric of a tensor [row …]; ValueError unless it is one number a row."""
        values = self.metric(tensor)
        if values.shape != (len(self.original),):
            raise ValueError(
                f"metric gave {tuple(values.shape)} for {len(self.original)} rows: return one "
                "number for each row."
            )
        return values.detach().double().cpu().numpy()

    def places(self, nodes: Nodes, sends: bool) -> list[Place]:
        """The denoiser calls that a checked set means, up to that of the metric."""
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
        """Reason why some sender or receiver has no path; None if all are joined."""
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
        """The last step at which the receivers read."""
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
        """Hooks that hold an MLP which is projected together with its block's attention.

        The projection is linear, so it changes by the change of z alone.
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
        """(hook, part of its tensor) of every input, from step `first` on.

        No path leads into earlier steps.
        """
        run = self.original
        for place, node in product(self.places(receivers, sends=False), receivers.nodes):
            if node.kind != "image" and place.step >= first:
                yield from (
                    (run.name(place, inner), node.index) for inner in node.input_hooks(run.dit.cfg)
                )

    def text_positions(self, node: Node, branch: Branch) -> Bool[Tensor, "batch text_pos"]:
        """Positions of the tokens of a text node, the same in both runs.

        Raises:
            ValueError: the texts differ in length, or one masks a token that is sent.
        """
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
        """Results over `dims`, with the two baselines and the normalised effect."""
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


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return torch.equal(one, other) if one is not None and other is not None else one is other
