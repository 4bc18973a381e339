"""Forks of clean runs as rows of shared batches.

The prefix tree over (prompt, seed, step, layer), walked. A run without intervention (`CleanRuns`)
is sampled once a prompt and seed. A fork stands for one cell, or, where prompts look at each other
("mean", "resample"), for a condition's cells of one seed. It begins at the first step that its
intervention touches and there, in each guidance branch, at the first layer; a branch that is not
touched at this step takes the clean run's output. From then on it is rows of a batch like any
other, with one hook a site for the edits of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedTextToImage, Trajectory
from hooked_models.generation.loops import Call, Text, rows_of
from hooked_models.generation.names import BRANCHES, IMAGE_HOOK, Branch, Site
from hooked_models.pixart.fast.enter_at_layers import denoise_from

from ..intervene.edits import Add, Edit, Replace, RowEdits
from .clean import CleanRuns, Fork, as_index, capturing, metric_input
from .conditions import Condition
from .metrics import FIRST_TOUCHED, Read


@dataclass
class ForkBatch:
    """Forks that run together. A row of the batch is a row of one of them."""

    clean: CleanRuns
    conditions: Sequence[Condition]
    forks: Sequence[Fork]
    hooked: tuple[Any, dict[tuple[str, str, Branch | None], RowEdits]] = ((), {})
    """The edits of the step before, and their sources: steps are often alike."""

    def __post_init__(self) -> None:
        sizes = [len(fork.rows) for fork in self.forks]
        self.offsets = np.cumsum([0, *sizes])
        self.rows = np.concatenate([fork.rows for fork in self.forks])
        self.first = np.repeat([fork.first for fork in self.forks], sizes)
        self.until = np.repeat([fork.until for fork in self.forks], sizes)
        self.starts = {
            branch: np.repeat([dict(fork.starts).get(branch, -1) for fork in self.forks], sizes)
            for branch in BRANCHES
        }
        self.prompts = self.rows % len(self.clean.inputs)

    @property
    def model(self) -> HookedTextToImage:
        """The model of the clean runs."""
        return self.clean.model

    def active(self, step: int) -> np.ndarray:
        """Rows computed at a step: they have left their clean run, and some metric needs them."""
        return np.flatnonzero((self.first <= step) & (self.until > step))

    def run(
        self, reads: Collection[Read], done: Callable[[int], None] = lambda rows: None
    ) -> dict[Read, Float[Tensor, "row ..."]]:
        """The tensors that metrics read, for all rows.

        `done` is called with the number of rows after each denoising step.
        """
        clean, model, last = self.clean, self.model, int(max(self.until))
        clean.prepare(self.forks)
        run = clean.take(self.rows, last)
        found = {read: self.clean_tensor(read) for read in reads}
        kept: dict[tuple[int, str], Tensor] = {}
        hooks: list[tuple[str, Any]] = []
        edits: dict[int, dict[tuple[str, str, Branch | None], RowEdits]] = {}
        for step in range(int(min(self.first)), last):
            edits[step] = self._edits(step, self.active(step))
            hooks += [
                (f"steps.{step}.{inner}", edit)
                for (part, inner, _), edit in edits[step].items()
                if part == "sampler"
            ]
            reading = {(step, hook) for read in self._read_at(step, reads) for hook in read.hooks}
            hooks += capturing(sorted(reading), kept)
        made = run
        if last > min(self.first):
            with model.hooks(hooks):
                made = model.run(
                    self._inputs(run.inputs),
                    run.record,
                    until=last,
                    rows=lambda step: as_index(self.active(step), model),
                    denoise=partial(self._denoise, run, edits),
                    after=lambda step, record, latent: (
                        done(size) if (size := len(self.active(step))) else None
                    ),
                )
        for step in edits:
            for read in self._read_at(step, reads):
                rows, active = self._rows_read(read, step)
                value = metric_input(kept, read.at(step), run.inputs.solver)[as_index(rows, model)]
                found[read] = found[read].index_copy(0, as_index(active, model), value)
        finished = as_index(
            np.flatnonzero((self.until == clean.steps) & (self.first < clean.steps)), model
        )
        latent = (
            run.latent.index_copy(0, finished, made.latent[finished])
            if len(finished)
            else run.latent
        )
        return found | self._read_at_the_end(reads, replace(run, latent=latent))

    def _read_at_the_end(self, reads: Collection[Read], run: Trajectory) -> dict[Read, Tensor]:
        """The tensors after the last step."""
        found: dict[Read, Tensor] = {}
        for read in reads:
            if read.inner == "latent":
                found[read] = run.latent
            if read.inner == IMAGE_HOOK:
                with self._image_hooks():
                    found[read] = self.model.images_of(run)
        return found

    def _rows_read(self, read: Read, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that a metric reads at a step: places among the active ones, and numbers."""
        active = self.active(step)
        rows = (
            np.flatnonzero(self.first[active] == step)
            if read.step == FIRST_TOUCHED
            else np.arange(len(active))
        )
        return rows, active[rows]

    def _read_at(self, step: int, reads: Collection[Read]) -> list[Read]:
        """The reads that rows of this batch have at a step."""
        some = len(self.active(step)) > 0
        own = bool((self.first[self.active(step)] == step).any())
        return [
            read
            for read in reads
            if (read.step == step and some) or (read.step == FIRST_TOUCHED and own)
        ]

    def clean_tensor(self, read: Read) -> Tensor:
        """Metric inputs of the runs without intervention."""
        at = self.clean.index(self.rows)
        if read.step is None or read.step >= 0:
            return self.clean.found[read][at]
        return torch.stack(
            [
                self.clean.found[read.at(int(own))][row]
                for own, row in zip(self.first, at, strict=True)
            ]
        )

    def _inputs(self, inputs: Any) -> Any:
        """Those of all rows, with the text as interventions on its encoder leave it."""
        model = self.model
        touched = [i for i, fork in enumerate(self.forks) if self.conditions[fork.condition].before]
        if not touched:
            return inputs
        some = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in touched])
        place = np.full(len(self.rows), -1)
        place[some] = np.arange(len(some))
        edits: list[tuple[int, Edit, np.ndarray]] = []
        for i in touched:
            own = np.arange(self.offsets[i], self.offsets[i + 1])
            edits += [
                (k, e, place[own])
                for k, e in self._taken(self.conditions[self.forks[i].condition].before, own)
            ]
        with model.hooks([(site.name, hook) for site, hook in _by_site(edits, model).items()]):
            text = model.encode(inputs.tokens[as_index(some, model)], inputs.guidance)
        n, m = len(self.rows), len(some)
        order = np.where(place < 0, np.arange(n), place + (2 * n if inputs.guided else n))
        if inputs.guided:  # rows are [uncond; cond], and so are those that were encoded again
            order = np.concatenate(
                [order, np.where(place < 0, np.arange(n) + n, place + 2 * n + m)]
            )
        return replace(inputs, text=inputs.text.join(text).take(as_index(order, model)))

    def _taken(self, edits: Sequence[Edit], own: np.ndarray) -> Iterator[tuple[int, Edit]]:
        """Edits in rows of the batch, each with the number of edits of its site before it."""
        seen: dict[Site, int] = {}
        for edit in edits:
            k = seen.get(edit.site, 0)
            seen[edit.site] = k + 1
            alone = edit.where.shape[0] == len(own) == len(self.clean.inputs)
            yield k, edit if alone else edit.take(torch.from_numpy(self.prompts[own]))

    def _edits(
        self, step: int, active: np.ndarray
    ) -> dict[tuple[str, str, Branch | None], RowEdits]:
        """(part, name in it, branch) → the edits there at a step, in rows of `active`."""
        place = np.full(len(self.rows), -1)
        place[active] = np.arange(len(active))
        here = [
            (i, edits)
            for i, fork in enumerate(self.forks)
            if place[self.offsets[i]] >= 0
            and (edits := self.conditions[fork.condition].at.get(step))
        ]
        made_from = (
            active.tolist(),
            [
                (i, [(e.site.inner, e.site.branch, id(e.where), id(e.values)) for e in edits])
                for i, edits in here
            ],
        )
        if made_from != self.hooked[0]:
            taken: list[tuple[int, Edit, np.ndarray]] = []
            for i, edits in here:
                own = np.arange(self.offsets[i], self.offsets[i + 1])
                taken += [(k, edit, place[own]) for k, edit in self._taken(edits, own)]
            sites = _by_site(taken, self.model)
            self.hooked = (
                made_from,
                {(site.part, site.inner, site.branch): hook for site, hook in sites.items()},
            )
        return self.hooked[1]

    def _denoise(
        self,
        run: Trajectory,
        edits: Mapping[int, Mapping[tuple[str, str, Branch | None], RowEdits]],
        call: Call,
        rows: Any,
        x: Tensor,
        timestep: Tensor,
        text: Text,
    ) -> Tensor:
        """The denoiser on the active rows of each branch, from where each leaves the clean run."""
        model, step, active = self.model, call.step, self.active(call.step)
        joins = self.first[active] == step
        start = np.concatenate(
            [np.where(joins, self.starts[branch][active], 0) for branch in call.branches]
        )
        order = np.argsort(start, kind="stable")
        order = order[np.count_nonzero(start < 0) :]  # the others take the clean run's output
        place = np.full(len(start), -1)
        place[order] = np.arange(len(order))
        where = {branch: as_index(place[call.part(branch)], model) for branch in call.branches}
        hooks = _hooks_of_call(edits[step], where)
        if not start.any():
            with model.dit.hooks(hooks):
                return model.denoise(x, timestep, text)
        at = as_index(active, model)
        prediction = torch.cat(
            [run.record.prediction(step, branch)[at] for branch in call.branches]
        )
        if len(order) == 0:
            return prediction
        residuals = self._residuals(call, self.rows[active], start)
        some = as_index(order, model)
        if not model.enters_at_layers:
            with model.dit.hooks(hooks):
                out = model.denoise(x[some], rows_of(timestep, some, len(x)), text.take(some))
            return prediction.index_copy(0, some, out)
        first = some[: np.count_nonzero(start == 0)]
        sizes = {
            name: None if size is None else size[some]
            for name, size in model.size_conditions(x).items()
        }
        with model.dit.hooks(hooks):
            out = denoise_from(
                model.dit, x[first], residuals, timestep[some], sizes, text.take(some)
            )
        return prediction.index_copy(0, some, out)

    def _residuals(
        self, call: Call, rows: np.ndarray, start: np.ndarray
    ) -> dict[int, Float[Tensor, "row pos d_model"]]:
        """Layer → the clean residual streams of the rows that start there.

        Rows of each branch in turn.
        """
        residuals = {}
        of_branch = dict(zip(call.branches, np.split(start, len(call.branches)), strict=True))
        for layer in np.unique(start[start > 0]).tolist():
            begun = {branch: rows[starts == layer] for branch, starts in of_branch.items()}
            parts = [
                self.clean.residual(call.step, branch, layer, some)
                for branch, some in begun.items()
                if len(some)
            ]
            residuals[layer] = torch.cat(parts)
        return residuals

    @contextmanager
    def _image_hooks(self) -> Iterator[None]:
        edits: list[tuple[int, Edit, np.ndarray]] = []
        for i, fork in enumerate(self.forks):
            own = np.arange(self.offsets[i], self.offsets[i + 1])
            edits += [
                (k, edit, own)
                for k, edit in self._taken(self.conditions[fork.condition].after, own)
            ]
        with self.model.hooks(
            [(site.name, hook) for site, hook in _by_site(edits, self.model).items()]
        ):
            yield


def _hooks_of_call(
    edits: Mapping[tuple[str, str, Branch | None], RowEdits], where: Mapping[Branch, Tensor]
) -> list[tuple[str, RowEdits]]:
    """Hooks inside one denoiser call; `where`: branch → place of each of its rows in the call."""
    per_name: dict[str, list[tuple[Edit, Tensor]]] = {}
    for (part, inner, branch), edit in edits.items():
        if part == "dit" and branch is not None and branch in where:
            per_name.setdefault(inner, []).extend(
                (each, where[branch][own]) for each, own in edit.parts
            )
    return [(inner, RowEdits(parts)) for inner, parts in per_name.items()]


def _by_site(
    edits: Sequence[tuple[int, Edit, np.ndarray]], model: HookedTextToImage
) -> dict[Site, RowEdits]:
    """One hook a site, for (place among the edits of its row there, edit, rows).

    Equal actions of different rows are one edit.
    """
    groups: dict[Site, dict[Any, list[tuple[Edit, np.ndarray]]]] = {}
    for k, edit, rows in sorted(edits, key=lambda each: each[0]):
        action = edit.action
        kind: Any = type(action) if isinstance(action, (Replace, Add)) else action
        key = (k, len(groups.get(edit.site, ())) if edit.depends_on_batch else kind)
        groups.setdefault(edit.site, {}).setdefault(key, []).append((edit, rows))
    return {
        site: RowEdits(
            [
                (
                    Edit.join([edit for edit, _ in parts]),
                    as_index(np.concatenate([rows for _, rows in parts]), model),
                )
                for parts in by_action.values()
            ]
        )
        for site, by_action in groups.items()
    }
