"""One pass of a run's rows through a loop.

Those that have left their record are computed, the others are read from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..hooks.module import has_hooks
from .attached import AttachedHook, Buckets, attach
from .loops import Call, RunInputs, Text, rows_of
from .names import Branch
from .trajectory import Record

if TYPE_CHECKING:
    from .model import HookedTextToImage

Rows = Int[Tensor, " row"] | None
"""Ascending indices of rows; None for all."""
Denoise = Callable[[Call, Rows, Tensor, Tensor, Text], Tensor]
"""(call of these rows alone, their numbers in the run, latents, timestep, text) → prediction; hooks
are in place.
"""


def from_step(leave: int) -> Callable[[int], Rows]:
    """The rows of a run that leave their record together, before step `leave`."""
    none = torch.arange(0)
    return lambda step: None if step >= leave else none


class Pass:
    """A visitor of a loop (`loops.Visitor`) that fires hooks and keeps a record.

    It takes rows from an earlier one.

    Args:
        hooks: resolved or predicates, in the order in which they act.
        rows: step → the rows that are computed there; the others take latents and predictions from
            `record`.
        denoise: in place of the model's own denoiser.
        after: called with (step, record so far, latents after it).
    """

    def __init__(
        self,
        model: HookedTextToImage,
        inputs: RunInputs,
        hooks: Sequence[AttachedHook],
        record: Record | None = None,
        rows: Callable[[int], Rows] = lambda step: None,
        denoise: Denoise | None = None,
        after: Callable[[int, Record, Tensor], None] | None = None,
    ) -> None:
        self.model, self.inputs, self.hooks = model, inputs, Buckets(hooks)
        self.old, self.rows, self.compute, self.on_step = (
            record,
            rows,
            denoise or _plain(model),
            after,
        )
        self.latents: list[Tensor] = []
        self.predictions: dict[tuple[int, tuple[Branch, ...]], Tensor] = {}
        self.outs: list[Tensor] = []
        self._here: tuple[int, list[AttachedHook]] = -1, []

    @property
    def record(self) -> Record:
        """Record of all steps so far."""
        return Record(tuple(self.latents), dict(self.predictions), tuple(self.outs))

    # Called by a loop

    def latent(self, step: int, latent: Tensor) -> Tensor:
        """As `hook_latent` leaves it."""
        rows = self._rows(step, latent)
        found = self._merged(
            rows, self._at(step, "hook_latent", _some(latent, rows)), self._old("latents", step)
        )
        self.latents.append(found.clone())  # a scheduler may write in place
        return found

    def denoise(self, call: Call, x: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """As `hook_out_uncond` and `hook_out_cond` leave it."""
        rows, key = self._rows(call.step, x), (call.step, call.branches)
        old = None if self.old is None else self.old.predictions.get(key)
        if rows is not None and len(rows) == 0:
            self.predictions[key] = self._merged(rows, x[:0], old)
            return self.predictions[key]
        whole = None if rows is None else call.index(rows)
        if whole is not None:
            x, timestep, text = x[whole], rows_of(timestep, whole, len(x)), text.take(whole)
        part = Call(call.step, call.branches, len(x) // len(call.branches))
        new = self.call(part, rows, x, timestep, text)
        self.predictions[key] = self._merged(whole, new, old).clone()  # hooks may write in place
        names = [f"hook_out_{branch}" for branch in call.branches]
        if any(self._watched(call.step, name) for name in names):
            new = torch.cat(
                [
                    self._at(call.step, n, new[part.part(b)])
                    for n, b in zip(names, call.branches, strict=True)
                ]
            )
        return self._merged(whole, new, old)

    def call(self, call: Call, rows: Rows, x: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The denoiser's prediction for some of the run's rows, with the hooks inside it."""
        inside = [
            hook for hook in self._firing(call.step, "dit") if hook.site.branch in call.branches
        ]
        with attach(inside, self.model.names.module, call.part, self.model.contexts()):
            return self.compute(call, rows, x, timestep, text)

    def out(self, step: int, latent: Tensor, out: Tensor) -> Tensor:
        """As `hook_out` and `hook_x0` leave it."""
        rows, old = self._rows(step, out), self._old("outs", step)
        if rows is None or len(rows):
            some = self._at(step, "hook_out", _some(out, rows))
            if self.inputs.solver.forms_x0 and self._watched(step, "hook_x0"):
                some = self._through_x0(step, _some(latent, rows), some)
        else:
            some = out[:0]
        found = self._merged(rows, some, old)
        self.outs.append(found.clone())
        return found

    def after(self, step: int, latent: Tensor) -> None:
        """Passed on."""
        if self.on_step is not None:
            self.on_step(step, self.record, latent)

    # Rows

    def _rows(self, step: int, like: Tensor) -> Rows:
        rows = self.rows(step)
        return None if rows is None else rows.to(like.device)

    def _old(self, kind: str, step: int) -> Any:
        """A recorded tensor; None if every row of the step is computed."""
        return None if self.old is None or step >= len(self.old) else getattr(self.old, kind)[step]

    def _merged(self, rows: Rows, new: Tensor, old: Tensor | None) -> Tensor:
        if rows is None:
            return new
        if old is None:
            raise ValueError("Rows cannot be taken from a record that ends before this step.")
        if len(rows) == 0:
            return old
        dtype = torch.promote_types(old.dtype, new.dtype)
        return old.to(dtype).index_copy(0, rows, new.to(dtype))

    # Hooks

    def _firing(self, step: int, part: str) -> list[AttachedHook]:
        if self._here[0] != step:
            self._here = step, self.hooks.at(step, self.model.names, self.inputs.extent)
        return [hook for hook in self._here[1] if hook.site.part == part]

    def _watched(self, step: int, inner: str) -> bool:
        point = self.model.sampler_hooks.hook_dict[inner]
        return has_hooks(point) or any(
            hook.site.inner == inner for hook in self._firing(step, "sampler")
        )

    def _at(self, step: int, inner: str, tensor: Tensor) -> Tensor:
        """A tensor between calls as its hooks leave it."""
        if len(tensor) == 0 or not self._watched(step, inner):
            return tensor
        hooks = [hook for hook in self._firing(step, "sampler") if hook.site.inner == inner]
        with attach(hooks, self.model.names.module, contexts=self.model.contexts()):
            return self.model.sampler_hooks.hook_dict[inner](tensor)

    def _through_x0(self, step: int, latent: Tensor, out: Tensor) -> Tensor:
        """The prediction that implies the clean image as `hook_x0` leaves it.

        `out` itself where nothing writes to that.
        """
        solver = self.inputs.solver
        x0 = solver.x0(step, latent, out)
        version = x0._version
        edited = self._at(step, "hook_x0", x0)
        if edited is x0 and x0._version == version and not x0.requires_grad:
            return out
        return solver.out(step, latent, edited)


def _some(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _plain(model: HookedTextToImage) -> Denoise:
    def denoise(call: Call, rows: Rows, x: Tensor, timestep: Tensor, text: Text) -> Tensor:
        return model.denoise(x, timestep, text)

    return denoise
