"""Chains of denoiser calls from a text to the tensors that a metric reads.

One call, or a run from some step on, without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import Trajectory
from hooked_models.generation.names import IMAGE_HOOK, Branch
from hooked_models.generation.trajectory import Record

from .repeated_runs import CallView

Hooks = Sequence[tuple[str, Callable[..., Any]]]
LATENT = "latent"
"""The latents that a denoising step ends with, in `chain`; no hook has them."""


@dataclass(frozen=True)
class CallChain:
    """One denoiser call for each row: a chain of a single step."""

    view: CallView
    output: Float[Tensor, "batch ..."]
    last = 0

    @classmethod
    def of(cls, view: CallView, fwd_hooks: Hooks = ()) -> CallChain:
        """The call without a graph."""
        with torch.no_grad(), view.dit.hooks(fwd_hooks):
            return cls(view, view(view.to_tokens()))

    @property
    def model(self) -> Any:
        """The model that hooks are attached to."""
        return self.view.dit

    @property
    def n_text(self) -> int:
        """Number of text positions."""
        return int(self.view.text_mask.shape[1])

    @property
    def lengths(self) -> list[list[bool]]:
        """Mask of the tokens of each row."""
        return self.view.text_mask.tolist()

    def replay(self, step: int = 0, fwd_hooks: Hooks = ()) -> CallChain:
        """The same call with hooks."""
        return CallChain.of(self.view, fwd_hooks)

    def activations(self, step: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Copies of the tensors at hooks."""
        kept: dict[str, Tensor] = {}
        CallChain.of(
            self.view, [(name, partial(keep_copy, kept=kept, name=name)) for name in names]
        )
        return kept

    def between(self, other: CallChain, alpha: float) -> CallChain:
        """The call whose text and latents lie at self + α·(other − self)."""
        return CallChain.of(self.view.between(other.view, alpha))  # type: ignore[arg-type]

    @property
    def last_call(self) -> int:
        """The last step with a denoiser call."""
        return 0


@dataclass(frozen=True)
class RunChain:
    """A generation from step `first` on, up to the tensors that a metric reads."""

    run: Trajectory
    first: int
    last: int
    """The step whose tensors a metric reads; the number of steps for the image."""
    read: tuple[str, ...]
    """Hooks between denoiser calls at step `last` ("hook_x0"); "latent", the latents it ends with;
    or "hook_image".
    """
    combine: Callable[[Mapping[str, Tensor]], Tensor]
    """From these tensors to the one that a metric is given."""
    output: Float[Tensor, "batch ..."] = field(repr=False)

    @property
    def model(self) -> Any:
        """The model that hooks are attached to."""
        return self.run.model

    @property
    def n_text(self) -> int:
        """Number of text positions."""
        return int(self.run.model.layout(self.run.inputs).text_mask.shape[1])

    @property
    def lengths(self) -> list[list[int]]:
        """Number of tokens in each row, branch by branch."""
        inputs = self.run.inputs
        branches: tuple[Branch, ...] = ("cond", "uncond") if inputs.guided else ("cond",)
        return [self.run.model.layout(inputs, branch).n_text for branch in branches]

    @property
    def until(self) -> int:
        """The step that the run stops before."""
        return min(self.last + 1, len(self.run))

    def replay(self, step: int | None = None, fwd_hooks: Hooks = ()) -> RunChain:
        """Run again without a graph from `step` on, with hooks; the steps before are shared."""
        return chain(self.run, self.first, self.last, self.read, self.combine, fwd_hooks, step)

    def activations(self, step: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Copies of the tensors at hooks of one step."""
        kept: dict[str, Tensor] = {}
        with torch.no_grad():
            self.run.fork(
                step,
                [(name, partial(keep_copy, kept=kept, name=name)) for name in names],
                until=step + 1,
            )
        return kept

    def between(self, other: RunChain, alpha: float) -> RunChain:
        """The run whose text, latents and record before `first` lie at self + α·(other − self)."""
        ours, theirs = self.run, other.run
        with torch.no_grad():
            inputs = ours.model.between(ours.inputs, theirs.inputs, alpha)
            record = _lerp(ours.record, theirs.record, alpha, self.first)
        return chain(
            replace(ours, inputs=inputs, record=record),
            self.first,
            self.last,
            self.read,
            self.combine,
        )

    @property
    def last_call(self) -> int:
        """The last step with a denoiser call."""
        return min(self.last, self.until - 1)


def chain(
    run: Trajectory,
    first: int,
    last: int,
    read: Sequence[str],
    combine: Callable[[Mapping[str, Tensor]], Tensor],
    fwd_hooks: Hooks = (),
    step: int | None = None,
) -> RunChain:
    """A generation from the latents before step `first` on, without a graph.

    Arguments as the fields of `RunChain`.
    """
    seen: dict[str, Tensor] = {}
    start, until = first if step is None else step, min(last + 1, len(run))
    made, reading = run, hooks_between(last, read, seen, keep_copy)
    with torch.no_grad():
        if start < until and (fwd_hooks or not _repeats(run, until)):
            made = run.fork(start, [*fwd_hooks, *reading], until=until)
        elif start < until:
            run.check_fork(start, until)
            if reading:
                run.fork(last, reading, until=until)
        if IMAGE_HOOK in read:
            seen[IMAGE_HOOK] = made.images
        output = combine({**seen, LATENT: made.latents[until]})
    return RunChain(made, first, last, tuple(read), combine, output)


def _repeats(run: Trajectory, until: int) -> bool:
    """True if a run made now, with the hooks that are attached, would be the record."""
    hooked = run.model.attached or run.model.has_hooks_inside
    return run.record.clean and len(run.record) >= until and not hooked


def hooks_between(
    last: int,
    read: Sequence[str],
    seen: dict[str, Tensor],
    keep: Callable[..., Any],
) -> Hooks:
    """Hooks that leave the tensors of `read` at step `last`, those between calls, in `seen`.

    Example:
        >>> [name for name, _ in hooks_between(2, ("hook_x0", LATENT), {}, keep_copy)]
        ['steps.2.hook_x0']
    """
    return [
        (f"steps.{last}.{n}", partial(keep, kept=seen, name=n))
        for n in read
        if n not in (LATENT, IMAGE_HOOK)
    ]


Chain = CallChain | RunChain


def keep_copy(tensor: Tensor, hook: HookPoint | None, kept: dict[str, Tensor], name: str) -> None:
    """Hook that leaves a copy of its tensor in `kept`.

    Example:
        >>> kept: dict[str, torch.Tensor] = {}
        >>> keep_copy(torch.ones(1), None, kept, "x")
        >>> kept
        {'x': tensor([1.])}
    """
    kept[name] = tensor.detach().clone()


def _lerp(a: Record, b: Record, alpha: float, steps: int) -> Record:
    calls = {
        key: torch.lerp(each, b.predictions[key], alpha)
        for key, each in a.predictions.items()
        if key[0] < steps
    }
    latents = [
        torch.lerp(one, other, alpha)
        for one, other in zip(a.latents[:steps], b.latents, strict=False)
    ]
    outs = [
        torch.lerp(one, other, alpha) for one, other in zip(a.outs[:steps], b.outs, strict=False)
    ]
    return Record(tuple(latents), calls, tuple(outs))
