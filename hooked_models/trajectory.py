"""A generation that can be gone back to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from .dit import TextState
from .generation_hooks import Hooks
from .names import Branch
from .sampling import Sampler, SamplerState

if TYPE_CHECKING:
    from .text_to_image import HookedTextToImage


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

    def rows(self, branch: Branch) -> slice:
        """The rows of a branch in the denoiser's batch."""
        batch = len(self.tokens)
        return slice(0, batch) if branch == "uncond" or not self.guided else slice(batch, 2 * batch)


@dataclass(frozen=True)
class Trajectory:
    """`states[s]` is the sampler before step s, `states[-1]` after the last."""

    model: HookedTextToImage
    inputs: Inputs
    states: tuple[SamplerState, ...]

    @property
    def images(self) -> Float[Tensor, "batch 3 height width"]:
        """The final images, in [0, 1]."""
        return self.model.decode(self.states[-1].latent)

    def fork(self, step: int, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()) -> Trajectory:
        """Run again from `step` on, with hooks: bitwise what a full run with these hooks gives, at (T − step)/T of its cost.

        Raises:
            ValueError: a hook lies before `step`, on the text encoder, or beyond the last step.
        """
        steps = self.inputs.sampler.num_steps
        if not 0 <= step < steps:
            raise ValueError(f"Cannot fork at step {step}: this trajectory has steps 0 to {steps - 1}.")
        with self.model.hooks(fwd_hooks, bwd_hooks):
            if early := [a.site.name for a in self.model._attached if a.site.part.endswith("text_encoder")]:
                raise ValueError(
                    f"{early[0]} does not fire: a fork keeps the text as it was encoded; run the model again instead."
                )
            self.model._check_hooks(steps, self.inputs.guidance, step)
            later = tuple(self.model._run(self.inputs, self.states[step]))
        return replace(self, states=self.states[:step] + later)
