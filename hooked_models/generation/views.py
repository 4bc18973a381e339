"""The view of a whole generation, hooked at one step and branch, for TransformerLens' tools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..hooks.module import HookFunction
from ..lazy_imports import renamed
from ..pixart.views import (
    HookList,
    Positions,
    Tokens,
    View,
    number_of_positions,
    text_places,
    with_gradient,
)
from .loops import Call
from .names import Branch
from .trajectory import Run

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

__getattr__ = renamed(
    __name__,
    {
        "DenoiserView": "hooked_models.pixart.views:DenoiserView",
    },
)


class StepView(View):
    """A whole generation, hooked at one step and branch; made by `HookedTextToImage.at`.

    The table is a trajectory: the steps before this one are computed once, for all rows.
    """

    def __init__(
        self,
        run: Run,
        step: int,
        branch: Branch,
        pos: Literal["image", "text", "joint"],
        returns: Literal["images", "x0", "out"],
    ) -> None:
        dit, layout = run.model.dit, run.model.layout(run.inputs, branch)
        positions = number_of_positions(dit, layout, pos)
        kind: Positions = "text" if pos == "text" else "image"
        super().__init__(dit, len(run.inputs), positions, kind, text_places(dit, layout, pos))
        self.run, self.step, self.branch, self.returns = run, step, branch, returns

    @property
    def owner(self) -> nn.Module:
        """The whole generation."""
        return self.run.model

    @property
    def prefix(self) -> str:
        """Prefix of canonical names in the generation's own names."""
        return f"steps.{self.step}.{self.branch}."

    def forward(self, tokens: Tokens) -> Tensor:
        """Images [batch 3 height width], or x0 or guided output [batch channel rows columns].

        The latter are the step's.
        """
        part = self.run.take(self.rows(tokens))
        if self.returns == "images":
            return part.fork(self.step, denoise=self._denoise).images
        found: list[Tensor] = []

        def read(tensor: Tensor, hook: HookPoint) -> None:
            found.append(tensor)

        # a step ends with the next latents; the prediction is read by a hook, gradient and all
        part.fork(
            self.step,
            [(f"steps.{self.step}.hook_{self.returns}", read)],
            until=self.step + 1,
            denoise=self._denoise,
        )
        return found[0]

    def _denoise(self, call: Call, rows: Any, x: Tensor, timestep: Tensor, text: Any) -> Tensor:
        """The denoiser; with gradients, the view's step begins a graph of its own.

        Whatever requires gradients.
        """
        if torch.is_grad_enabled() and call.step == self.step:
            x, text = with_gradient(x), self.run.model.opened(text)
        return self.run.model.denoise(x, timestep, text)

    @contextmanager
    def hooks(
        self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), **kwargs: Any
    ) -> Iterator[View]:
        """Attach hooks at the view's step and branch; they see the canonical names."""

        def here(hooks: HookList) -> list[tuple[str, HookFunction]]:
            return [
                (self.prefix + name, _as_canonical(function, self.dit.hook_dict[name]))
                for name, function in self.placed(hooks)
            ]

        with self.run.model.hooks(here(fwd_hooks), here(bwd_hooks), **kwargs):
            yield self


def _as_canonical(function: HookFunction, point: HookPoint) -> HookFunction:
    return lambda tensor, hook: function(tensor, hook=point)
