"""A generation as a loop over denoiser calls: PixArt's.

    latents = loop(inputs, visitor, until)

A loop takes latents from noise to image by its scheduler, and leaves to a visitor the work at
each step: `visitor.latent`, `visitor.denoise` and `visitor.out` are given tensors and return those
to go on with. Hooks, records and gradients are visitors; no loop knows of them. Source:
`PixArtSigmaPipeline.__call__` (diffusers 0.42), to which latents are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .names import Branch


@dataclass(frozen=True)
class Call:
    """One evaluation of the denoiser: its step, and the guidance branches of its batch.

    Branches stand one after the other.
    """

    step: int
    branches: tuple[Branch, ...]
    rows: int
    """Rows of each branch."""

    def index(self, rows: Int[Tensor, " row"]) -> Int[Tensor, " branch_row"]:
        """The rows of the call's batch that belong to some rows of the run."""
        return torch.cat([rows + i * self.rows for i in range(len(self.branches))])

    def part(self, branch: Branch) -> slice:
        """The rows of the call's batch that belong to a branch."""
        start = self.branches.index(branch) * self.rows
        return slice(start, start + self.rows)


@runtime_checkable
class Text(Protocol):
    """Text of a denoiser call.

    PixArt's `TextState`, or the arguments of another pipeline's transformer
    (`pipeline_inputs.Bound`).
    """

    def take(self, rows: Int[Tensor, " row"], /) -> Any:
        """The text of some rows; rows may repeat."""


@runtime_checkable
class RunInputs(Protocol):
    """Everything that a generation is computed from.

    PixArt's `trajectory.Inputs`, or the `PipelineInputs` of another pipeline.
    """

    @property
    def solver(self) -> Any:
        """The scheduler's steps, a `sampling.Solver`."""

    @property
    def extent(self) -> Any:
        """Tensors that the run computes, a `hooks.Extent`."""

    @property
    def num_steps(self) -> int:
        """As requested of the scheduler."""

    @property
    def guidance(self) -> float:
        """Classifier-free guidance, or the number that a distilled model is given."""

    @property
    def guided(self) -> bool:
        """True if some step has an unconditional branch."""

    @property
    def weights(self) -> Any:
        """Stamp of the denoiser's weights."""

    def same_noise(self, other: Any) -> bool:
        """True if both runs have the same noise, that of the steps included."""

    def rows(self, branch: Branch) -> slice:
        """The rows of a branch in the denoiser's batch."""

    def __len__(self) -> int:
        """Rows."""

    def take(self, rows: Int[Tensor, " row"], /) -> Any:
        """The inputs of some rows; rows may repeat."""


@runtime_checkable
class Visitor(Protocol):
    """Everything that can happen at a step of a loop.

    Each function returns the tensor to go on with.
    """

    def latent(self, step: int, latent: Float[Tensor, "batch ..."]) -> Tensor:
        """The latents before a step."""

    def denoise(
        self, call: Call, x: Tensor, timestep: Shaped[Tensor, " row"], text: Text
    ) -> Tensor:
        """The denoiser's prediction for the latents `x` of the call's batch."""

    def out(self, step: int, latent: Tensor, out: Tensor) -> Tensor:
        """The guided prediction, without a learned variance, as the scheduler reads it."""

    def after(self, step: int, latent: Tensor) -> None:
        """Called with the latents after a step."""


class PixArtLoop:
    """PixArt's sampling loop.

    Both branches of a step are one call, and the text is encoded once for all steps.
    """

    def __init__(self, channels: int) -> None:
        """Take the `channels` of the latents.

        A prediction has as many, or twice as many with a learned variance, which nothing reads.
        """
        self.channels = channels

    def __call__(
        self, inputs: Any, visitor: Visitor, until: int
    ) -> Float[Tensor, "batch channel rows columns"]:
        """The latents before step `until`; `inputs`: a `trajectory.Inputs`."""
        solver = inputs.solver
        scheduler, generators = solver.fresh(), inputs.generators()
        latent = inputs.latents * solver.initial_scale
        for step in range(until):
            latent = visitor.latent(step, latent)
            call = Call(step, inputs.branches, len(latent))
            x = solver.network_input(scheduler, step, torch.cat([latent] * len(call.branches)))
            timestep = solver.timestep(step).expand(len(x)).to(x.device)
            prediction = visitor.denoise(call, x, timestep, inputs.text)
            out = guided(prediction, inputs.guidance) if len(call.branches) == 2 else prediction
            latent = solver.advance(
                scheduler,
                step,
                latent,
                visitor.out(step, latent, out[:, : self.channels]),
                generators,
            )
            visitor.after(step, latent)
        return latent


def guided(prediction: Float[Tensor, "two_batch channel rows columns"], guidance: float) -> Tensor:
    """Classifier-free guidance of rows [uncond; cond]."""
    uncond, cond = prediction.chunk(2)
    return uncond + guidance * (cond - uncond)


def branches_of(guidance: float) -> tuple[Branch, ...]:
    """The branches of a call, in the order of its rows."""
    return ("uncond", "cond") if guidance > 1 else ("cond",)


def rows_of(value: Any, index: Int[Tensor, " row"], of: int) -> Any:
    """Some rows of a tensor or list of `of` rows; anything else as it is.

    Position ids [pos axis], equal for all rows, have three axes and no row; a tuple of tensors
    (rotary codes) has none either.

    Example:
        >>> rows_of({"text": torch.arange(2), "ids": torch.zeros(2, 3)}, torch.tensor([1]), 2)
        {'text': tensor([1]), 'ids': tensor([[0., 0., 0.],
                [0., 0., 0.]])}
    """
    if isinstance(value, Tensor):
        ids = value.ndim == 2 and value.shape[1] == 3
        return (
            value[index.to(value.device)] if value.ndim and len(value) == of and not ids else value
        )
    if (
        isinstance(value, list)
        and len(value) == of
        and all(isinstance(each, (Tensor, str)) for each in value)
    ):
        return [value[i] for i in index.tolist()]
    if isinstance(value, dict):
        return {key: rows_of(each, index, of) for key, each in value.items()}
    return value
