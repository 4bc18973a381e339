"""Estimated effects of all conditions of a plan at once: the scores by which `search` chooses.

Both methods take the metric's gradients at the runs without intervention, and multiply them with a
condition's changes:

- `"step"`: every touched step is run exactly, up to the guided output of the network. Change there
  · ∂metric/∂output: no approximation within a step (saturated attention, masked keys, several
  layers), first order from it to the metric.
- `"attribution"`: change of the tensors that the edits touch · ∂metric/∂activation. First order
  throughout, and no run for any condition: the cost does not grow with their number. This is
  attribution patching (see `dit_lens.attribution`) with the sweep's own edits in the place of a
  second run. A knocked-out key is scored by the change of the pattern, for a masked score is no
  small change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models.generation.names import IMAGE_HOOK
from hooked_models.generation.sampling import Solver

from ..intervene.edits import Edit
from ..runs.chains import LATENT, chain
from ..runs.gradients import gradients, modulates
from .clean import CleanRuns, Rows, as_index, metric_input
from .conditions import Condition
from .forks import ForkBatch
from .metrics import FIRST_TOUCHED, Metric, Read

if TYPE_CHECKING:
    from .plan import Plan

Method = Literal["step", "attribution", "none"]
OUT = Read("hook_out", FIRST_TOUCHED)


@dataclass(frozen=True)
class Question:
    """Effect that a search scores."""

    name: str
    """Metric of the plan, whose tensor `metric` is given."""
    metric: Metric
    column: str
    """Name of one value, for a metric with several."""
    by: Method
    conditions: tuple[int, ...] = ()
    """Places of those that are scored."""


def scores_of_rows(
    plan: Plan, inputs: Any, question: Question, rows: Rows
) -> tuple[Float[np.ndarray, "condition row"], CleanRuns]:
    """Score the question's conditions on some rows, NaN for conditions that have no score.

    Also returns the runs that they were scored at, with all that the plan's metrics read.

    Args:
        plan: plan of the sweep that is searched.
        inputs: of the plan's prompts, `plan.inputs()`.
        question: conditions and how they are scored.
        rows: ascending; of conditions that mix prompts, all of each seed.
    """
    read = plan.reads[question.name]
    places = np.array(question.conditions, dtype=np.int64)
    methods = [_method(plan.conditions[place], read, question.by) for place in places]
    scored = np.array([one is not None for one in methods])
    found = np.where(scored[:, None], np.zeros((len(methods), len(rows))), np.nan)
    reads = plan.reads_at_steps
    reads |= {OUT.at(step) for step in range(plan.steps)} if "step" in methods else set()
    clean = CleanRuns.sample(plan.model, inputs, plan.noise, rows, reads, plan.batch)
    for first, some in _by_first_step(plan, read, places[scored]):
        here = np.flatnonzero(np.isin(places, some))
        chosen = [methods[place] for place in here.tolist()]
        found[here] = _ScoringPass(
            plan, read, question.metric, question.column, clean, first, places[here], chosen
        ).scores()
    return found, clean


def has_score(condition: Condition, read: Read, by: Method) -> bool:
    """True if a condition can be scored on the tensor that a metric reads."""
    return _method(condition, read, by) is not None


def _method(condition: Condition, read: Read, by: Method) -> Method | None:
    """Scoring method; None if the touched tensors lie not between the inputs and the result."""
    if by == "none":
        return None
    sites = [edit.site for edit in condition.edits]
    own = read.at(condition.first).step
    # these lie before the guided output
    past = read.inner in ("hook_out_cond", "hook_out_uncond") and own in condition.at
    if by == "step" and not past and all(site.part == "dit" for site in sites):
        return "step"
    # made of the latent twice, once beside the network
    twice = own if read.inner == "eps" else None
    differentiable = all(
        site.step is not None
        and not modulates(site.inner)
        and (site.inner, site.step) != ("hook_latent", twice)
        for site in sites
    )
    return "attribution" if differentiable else None


def _by_first_step(
    plan: Plan, read: Read, which: Int[np.ndarray, " _"]
) -> Iterator[tuple[int, Int[np.ndarray, " _"]]]:
    """(first step of a chain, conditions that it is about).

    One each where a metric is taken at the first touched step.
    """
    firsts = np.array([plan.conditions[i].first for i in which.tolist()], dtype=np.int64)
    if read.step == FIRST_TOUCHED:
        for first in np.unique(firsts):
            yield int(first), which[firsts == first]
    else:
        seen = which[firsts <= plan.steps if read.step is None else firsts <= read.step]
        if len(seen):
            yield int(firsts.min()), seen


@dataclass(frozen=True)
class _ScoringPass:
    """Conditions scored with one chain's gradients, from before step `first` to the metric."""

    plan: Plan
    read: Read
    metric: Metric
    column: str
    clean: CleanRuns
    first: int
    conditions: Int[np.ndarray, " condition"]
    methods: Sequence[Method | None]

    @cached_property
    def last(self) -> int:
        """The step (or the codec, after all of them) whose tensor the metric is given."""
        at = self.read.at(self.first).step
        return self.plan.steps - (self.read.inner == LATENT) if at is None else at

    def scores(self) -> Float[np.ndarray, "condition prompt"]:
        """Σ over steps of change · gradient."""
        clean, read = self.clean, self.read
        run = clean.take(clean.rows)
        between = (LATENT,) if read.inner == LATENT else read.hooks
        one = chain(
            run,
            self.first,
            self.last,
            between,
            partial(_read, read.at(self.first), run.inputs.solver),
        )
        edits, stepped = self._edits(), self._stepped()
        edited = {
            step: list(dict.fromkeys(name for _, name, _ in parts)) for step, parts in edits.items()
        }
        names = {step: list(several) for step, several in edited.items()}
        for step in stepped:
            names.setdefault(step, []).append(_out(step))
        found = np.zeros((len(self.conditions), len(clean.rows)))
        for step, (gradient, here) in gradients([(one, 1.0)], names, self._measured, edited):
            if step in stepped:
                for place, rows, changes in self._changes(step, stepped[step]):
                    found[place, rows] += _product(
                        changes, gradient[_out(step)][as_index(rows, clean.model)]
                    )
            if step in edits:
                for place, name, several in edits[step]:
                    found[place] += _product(
                        self._edited(several, here[name]) - here[name], gradient[name]
                    )
        return found

    def _measured(self, tensor: Tensor) -> Tensor:
        offered: dict[str, Any] = {
            "baseline": tensor.detach(),
            "prompt": self.clean.rows % len(self.plan.prompts),
        }
        found = self.metric.function(
            tensor, **{key: value for key, value in offered.items() if key in self.metric.given}
        )
        return found[self.column] if isinstance(found, Mapping) else found  # type: ignore[return-value]

    # "step"

    def _stepped(self) -> dict[int, list[int]]:
        """Step → places among the conditions that touch it."""
        found: dict[int, list[int]] = {}
        for place, condition in enumerate(self.conditions.tolist()):
            if self.methods[place] == "step":
                for step in self.plan.conditions[condition].at:
                    if step <= self.last:
                        found.setdefault(step, []).append(place)
        return found

    def _changes(
        self, step: int, places: Sequence[int]
    ) -> Iterator[tuple[int, Int[np.ndarray, " row"], Tensor]]:
        """(place, rows of the clean run, change of the guided output there).

        The change is by its edits at this step alone.
        """
        plan, clean = self.plan, self.clean
        place_of = {int(self.conditions[place]): place for place in places}
        seeds = np.unique(clean.rows // len(plan.prompts)).tolist()
        forks = [
            fork
            for condition in place_of
            for fork in plan.forks_of(condition, step, step + 1, seeds)
            if np.isin(fork.rows, clean.rows).all()
        ]
        forks.sort(key=lambda fork: min(layer for _, layer in fork.starts))
        clean.expect(forks)
        for some in plan.batches(forks, plan.batch):
            batch = ForkBatch(clean, plan.conditions, some)
            changes = batch.run({OUT})[OUT] - batch.clean_tensor(OUT)
            for fork, start in zip(some, batch.offsets, strict=False):
                rows = np.searchsorted(clean.rows, fork.rows)
                yield place_of[fork.condition], rows, changes[start : start + len(rows)]

    # "attribution"

    def _edits(self) -> dict[int, list[tuple[int, str, list[Edit]]]]:
        """Step → (place among the conditions, hook, edits there in turn)."""
        found: dict[int, list[tuple[int, str, list[Edit]]]] = {}
        for place, condition in enumerate(self.conditions.tolist()):
            if self.methods[place] == "step":
                continue
            for step, here in self.plan.conditions[condition].at.items():
                if step > self.last:
                    continue
                by_hook: dict[str, list[Edit]] = {}
                for edit in here:
                    by_hook.setdefault(_hook(edit), []).append(edit)
                found.setdefault(step, []).extend(
                    (place, name, several) for name, several in by_hook.items()
                )
        return found

    def _edited(self, edits: Sequence[Edit], clean: Tensor) -> Tensor:
        prompts = self.clean.rows % len(self.plan.prompts)
        for edit in edits:
            edit = (
                edit
                if np.array_equal(prompts, np.arange(len(self.plan.prompts)))
                else edit.take(torch.from_numpy(prompts))
            )
            if edit.action == "knockout":
                kept = clean.masked_fill(edit.where, 0.0)
                clean = kept / kept.sum(dim=-1, keepdim=True)
            else:
                clean = edit(clean)
        return clean


def _product(changes: Tensor, gradient: Tensor) -> Float[np.ndarray, " row"]:
    return (changes * gradient).flatten(1).sum(dim=1, dtype=torch.float64).cpu().numpy()


def _read(read: Read, solver: Solver, kept: Mapping[str, Tensor]) -> Tensor:
    if read.inner in (IMAGE_HOOK, LATENT):
        return kept[read.inner]
    assert read.step is not None
    return metric_input({(read.step, name): tensor for name, tensor in kept.items()}, read, solver)


def _out(step: int) -> str:
    return f"steps.{step}.{OUT.inner}"


def _hook(edit: Edit) -> str:
    """Where an edit is scored: a masked attention score by the pattern that comes of it."""
    return (
        edit.site.name.replace("hook_attn_scores", "hook_pattern")
        if edit.action == "knockout"
        else edit.site.name
    )
