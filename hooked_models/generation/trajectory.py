"""A generation that can be gone back to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..pixart.text_state import TextState
from .hooks import Hooks
from .names import Branch
from .sampling import Sampler, SamplerState

if TYPE_CHECKING:
    from .model import HookedTextToImage


@dataclass(frozen=True)
class Inputs:
    """What a generation is computed from, apart from its noise."""

    tokens: Int[Tensor, "batch text_pos"]
    guidance: float
    sampler: Sampler
    text: TextState
    """Rows [uncond; cond] with guidance, else cond alone."""

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    def take(self, rows: Int[Tensor, " row"]) -> Inputs:
        """The inputs of some rows."""
        both = torch.cat([rows, rows + len(self.tokens)]) if self.guided else rows
        return replace(self, tokens=self.tokens[rows], text=self.text.take(both))

    def rows(self, branch: Branch) -> slice:
        """The rows of a branch in the denoiser's batch."""
        batch = len(self.tokens)
        return slice(0, batch) if branch == "uncond" or not self.guided else slice(batch, 2 * batch)


@dataclass(frozen=True, repr=False)
class Trajectory:
    """`states[s]` is the sampler before step s, `states[-1]` after the last."""

    model: HookedTextToImage
    inputs: Inputs
    states: tuple[SamplerState, ...]

    def __repr__(self) -> str:
        steps = self.inputs.sampler.num_steps
        return f"Trajectory({len(self.inputs.tokens)} prompts, before steps 0 to {len(self.states) - 1} of {steps})"

    def take(self, rows: Int[Tensor, " row"]) -> Trajectory:
        """The same generation for some rows of its batch; rows may repeat."""
        rows = rows.to(self.inputs.tokens.device)
        return replace(self, inputs=self.inputs.take(rows), states=tuple(state.take(rows) for state in self.states))

    @property
    def images(self) -> Float[Tensor, "batch 3 height width"]:
        """The final images, in [0, 1]. Raises ValueError for a trajectory that was stopped before its last step."""
        if (step := self.states[-1].step) < self.inputs.sampler.num_steps:
            raise ValueError(f"There are no images: this trajectory was stopped before step {step}.")
        return self.model.decode(self.states[-1].latent)

    def repeat(self, times: int) -> Trajectory:
        """The whole batch `times` times over, one copy after the other, so that a fork can treat the copies differently."""
        return self.take(torch.arange(len(self.inputs.tokens)).repeat(times))

    def fork(self, step: int, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), until: int | None = None) -> Trajectory:
        """Run again from `step` on, with hooks: bitwise what a full run with these hooks gives, at (T − step)/T of its cost.

        `until` stops before that step, as in `HookedTextToImage.trajectory`.

        Raises:
            ValueError: a hook lies before `step`, on the text encoder, or beyond the last step.
        """
        until = self.inputs.sampler.num_steps if until is None else until
        with self.model.hooks(fwd_hooks, bwd_hooks):
            self.check_fork(step, until)
            later = tuple(islice(self.model._run(self.inputs, self.states[step]), until - step + 1))
        return replace(self, states=self.states[:step] + later)

    def check_fork(self, step: int, until: int) -> None:
        """Refuse a fork from `step` on that the hooks attached to the model would not all be reached by (raises as `fork`)."""
        steps = self.inputs.sampler.num_steps
        if not 0 <= step < steps:
            raise ValueError(f"Cannot fork at step {step}: this trajectory has steps 0 to {steps - 1}.")
        self.model._check_hooks(steps, self.inputs.guidance, range(step, until))
