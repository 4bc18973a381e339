"""Two runs that differ in their text, and the denoiser calls that a question is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_models import Trajectory
from hooked_models.generation.names import IMAGE_HOOK

from .chains import CallChain, Chain, chain
from .repeated_runs import CallView


@dataclass(frozen=True)
class Context:
    """One denoiser call of a run: where its hooks are, and its labels."""

    step: int
    prefix: str
    """Prefix of hook names, such as "steps.3.cond."."""
    coords: Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """An original run and a source run, and the denoiser calls that a question is about.

    Example:
        >>> below, above = (
        ...     model.trajectory(f"red circle is {word} blue square", num_steps=2)
        ...     for word in ("below", "above")
        ... )
        >>> pair(below, above).differences(0, ["steps.0.cond.hook_text"])[
        ...     "steps.0.cond.hook_text"
        ... ].shape
        torch.Size([1, 7, 256])
    """

    dit: Any = field(repr=False)
    original: Any = field(repr=False)
    """A `Chain`, as is the source."""
    source: Any = field(repr=False)
    contexts: tuple[Context, ...]

    def interpolated(self, alpha: float) -> Chain:
        """The run whose inputs lie at original + α·(source − original).

        The text, and the latents where they differ.

        Raises:
            ValueError: the two texts differ in length, so that no run lies between them.
        """
        if self.original.lengths != self.source.lengths:
            raise ValueError(
                "Nothing lies between these runs: original and source text have different numbers "
                "of tokens."
            )
        return self.original.between(self.source, alpha)

    def contexts_of(self, step: int) -> list[tuple[int, str]]:
        """Number and prefix of each context of a step."""
        return [(i, each.prefix) for i, each in enumerate(self.contexts) if each.step == step]

    def in_contexts(self, names: Sequence[str]) -> dict[int, list[str]]:
        """Step → full names of the denoiser's hooks in its contexts."""
        found: dict[int, list[str]] = {}
        for context in self.contexts:
            found.setdefault(context.step, []).extend(context.prefix + name for name in names)
        return found

    def differences(
        self, step: int, names: Sequence[str], original: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Source minus original at the hooks `names` of one step.

        Args:
            step: denoising step, from 0.
            names: hooks within the denoiser.
            original: the tensors of the original run, if they are known.
        """
        original = self.original.activations(step, names) if original is None else original
        return {
            name: value.sub_(original[name])
            for name, value in self.source.activations(step, names).items()
        }


def pair(
    original: Trajectory | CallView,
    source: Trajectory | CallView,
    *,
    steps: int | Sequence[int] | None = None,
    branch: Literal["cond", "uncond", "both"] = "cond",
    returns: Literal["images", "x0", "out"] = "images",
) -> Pair:
    """Two runs of one model, row by row.

    `model.trajectory(prompts, seed=0)` or the view of `dit.bind(…)`, for one call. They differ in
    their text; the noise of two trajectories is the same. A metric is given the tensor that the
    view returns, or that `returns` names.

    Args:
        original: the run that scores are gradients of.
        source: the run that it is compared with; as many rows.
        steps: denoising steps to attribute to; all of them by default.
        branch: and guidance branches.
        returns: the final "images" [batch 3 height width] in [0, 1] (clamped: a saturated pixel has
            no gradient), or of a single step the "x0" it predicts or the (guided) "out"; then
            gradients go through that step only, from where each of the runs stands before it.

    Raises:
        TypeError: the runs are not of one kind.
        ValueError: the runs do not fit together, or have no such step, branch or prediction.

    Example:
        >>> below, above = (
        ...     model.trajectory(f"red circle is {word} blue square", num_steps=2)
        ...     for word in ("below", "above")
        ... )
        >>> [context.prefix for context in pair(below, above).contexts]
        ['steps.0.cond.', 'steps.1.cond.']
    """
    if isinstance(original, CallView) and isinstance(source, CallView):
        return _of_calls(original, source)
    if not (isinstance(original, Trajectory) and isinstance(source, Trajectory)):
        raise TypeError(
            "Pair two trajectories (model.trajectory), or two views of denoiser calls (dit.bind)."
        )
    _check_comparable(original, source)
    first, end, chosen = _span(original, source, steps, branch, returns)
    read = IMAGE_HOOK if returns == "images" else f"hook_{returns}"
    inputs = original.model.same_length(original.inputs, source.inputs)
    runs = (replace(run, inputs=own) for run, own in zip((original, source), inputs, strict=True))
    one, other = (chain(run, first, end, [read], itemgetter(read)) for run in runs)
    branches = ("cond", "uncond") if branch == "both" else (branch,)
    contexts = tuple(
        Context(s, f"steps.{s}.{b}.", {"step": s, "branch": b}) for s in chosen for b in branches
    )
    return Pair(original.model.dit, one, other, contexts)


def _of_calls(original: CallView, source: CallView) -> Pair:
    _check(original.dit is source.dit, "model")
    _check(same(original.conditions, source.conditions), "timesteps and sizes")
    one, other = CallChain.of(original), CallChain.of(source)
    alike = original.text_mask.shape == source.text_mask.shape
    _check(alike and one.output.shape == other.output.shape, "shapes")
    return Pair(original.dit, one, other, (Context(0, "", {}),))


def _check_comparable(original: Trajectory, source: Trajectory) -> None:
    inputs, others = original.inputs, source.inputs
    _check(original.model is source.model, "model")
    _check(original.latent.shape == source.latent.shape, "number of prompts and size")
    _check(inputs.guidance == others.guidance, "guidance")
    _check(
        torch.equal(inputs.solver.scheduler.timesteps, others.solver.scheduler.timesteps),
        "timesteps",
    )
    if not inputs.same_noise(others):
        raise ValueError(
            "The two runs must have the same noise, or its effects would pass for those of the "
            "words: give both one seed."
        )


def _span(
    original: Trajectory,
    source: Trajectory,
    steps: int | Sequence[int] | None,
    branch: str,
    returns: str,
) -> tuple[int, int, list[int]]:
    """(first step of the chain, its last, steps to attribute to)."""
    solver = original.inputs.solver
    if not original.inputs.guided and branch != "cond":
        raise ValueError(
            f"There is no unconditional branch at guidance {original.inputs.guidance:g}."
        )
    chosen = (
        list(range(len(solver)))
        if steps is None
        else [steps]
        if isinstance(steps, int)
        else list(steps)
    )
    last = min(len(solver) - 1, len(original.record), len(source.record))
    if outside := [step for step in chosen if not 0 <= step <= last]:
        raise ValueError(
            f"steps={outside} lie outside of these runs, which have steps 0 to {last}."
        )
    if returns == "images":
        if min(len(original.record), len(source.record)) < len(solver):
            raise ValueError(f"There are no images: a trajectory was stopped before step {last}.")
        return 0, len(solver), chosen
    if len(chosen) != 1:
        raise ValueError(
            f"returns={returns!r}: a single step predicts it; name one, steps=0 to {last}."
        )
    if returns == "x0" and not solver.forms_x0:
        raise ValueError(
            f"{solver.name} forms no clean-image prediction that is known here: use returns='out'."
        )
    return chosen[0], chosen[0], chosen


def _check(alike: bool, what: str) -> None:
    if not alike:
        raise ValueError(f"The two runs must have the same {what}.")


def same(a: Any, b: Any) -> bool:
    """Equality of tensors, of mappings of them, and of anything else."""
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
