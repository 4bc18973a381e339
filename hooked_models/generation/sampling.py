"""Sampling as a function of an explicit state, so that a generation can be forked at any step, exactly.

A multistep solver keeps a history inside the scheduler object, and resuming with the latents alone silently loses it
(diffusers' `pipe(latents=…, timesteps=…)` is off by 4 % at step 1). Here the history travels with the latents. The scheduler's
arithmetic stays diffusers' own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

Latents = Float[Tensor, "batch channel rows columns"]
Seeds = SupportsIndex | Iterable[SupportsIndex]
"""Of noise: one integer for every prompt, or one for each."""


@dataclass(frozen=True)
class SamplerState:
    """Where a generation stands before denoising step `step`: its latents and the solver's memory of earlier steps."""

    step: int
    latent: Float[Tensor, "batch channel rows columns"]
    memory: Mapping[str, Any]

    def take(self, rows: Int[Tensor, " row"]) -> SamplerState:
        """Some rows of the batch, in the order given; rows may repeat."""

        def part(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(part, value))
            # what a solver remembers of earlier steps has the latents' shape; timesteps and noise levels have one axis
            return value[rows] if isinstance(value, Tensor) and value.shape == self.latent.shape else value

        return SamplerState(self.step, self.latent[rows], {name: part(value) for name, value in self.memory.items()})

    @staticmethod
    def join(states: Sequence[SamplerState]) -> SamplerState:
        """The rows of several states of one sampler before the same step, one batch after the other."""
        first = states[0]

        def whole(*values: Any) -> Any:
            value = values[0]
            if isinstance(value, (list, tuple)):
                return type(value)(whole(*parts) for parts in zip(*values, strict=True))
            of_rows = isinstance(value, Tensor) and value.shape == first.latent.shape
            return torch.cat(values) if of_rows else value

        memory = {name: whole(*(state.memory[name] for state in states)) for name in first.memory}
        return SamplerState(first.step, torch.cat([state.latent for state in states]), memory)


class Sampler:
    """A diffusers scheduler as a pure function of `SamplerState`; the scheduler passed in is copied and stays untouched."""

    def __init__(self, scheduler: Any, num_steps: int, device: torch.device) -> None:
        """Raises ValueError for a scheduler that draws noise at every step: its runs could not be forked exactly."""
        if str(scheduler.config.get("algorithm_type", "")).startswith("sde"):
            raise ValueError(
                f"{type(scheduler).__name__} with algorithm_type={scheduler.config.algorithm_type!r} draws fresh noise at every "
                "step; load the pipeline with a deterministic one, such as DPMSolverMultistepScheduler's 'dpmsolver++'."
            )
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(num_steps, device=device)
        self.num_steps = len(self.scheduler.timesteps)
        self._fresh = self._memory()

    @property
    def predicts_x0(self) -> bool:
        """Whether the solver works on a clean-image prediction that can be read and replaced (`advance(through=…)`)."""
        algorithm = self.scheduler.config.get("algorithm_type", "dpmsolver++")
        return hasattr(self.scheduler, "convert_model_output") and algorithm == "dpmsolver++"

    def start(self, noise: Latents) -> SamplerState:
        """The state before step 0."""
        return SamplerState(0, noise * self.scheduler.init_noise_sigma, self._fresh)

    def timestep(self, step: int) -> Tensor:
        """What the network is told at a step: a scalar, in the scheduler's own units and dtype."""
        return self.scheduler.timesteps[step]

    def network_input(self, state: SamplerState, latent: Latents) -> Latents:
        """`latent` as the network sees it at the state's step (some schedulers scale it)."""
        self._resume(state)
        return self.scheduler.scale_model_input(latent, self.timestep(state.step))

    def noise_level(self, step: int) -> tuple[float, float]:
        """(α, σ) of a step, where latent = α·x0 + σ·ε."""
        alpha, sigma = self.scheduler._sigma_to_alpha_sigma_t(self.scheduler.sigmas[step])
        return float(alpha), float(sigma)

    @property
    def noise_levels(self) -> list[tuple[float, float]]:
        """(α, σ) of every step."""
        return [self.noise_level(step) for step in range(self.num_steps)]

    def advance(
        self, state: SamplerState, latent: Latents, out: Latents, through: Callable[[Latents], Latents] | None = None
    ) -> SamplerState:
        """One solver step from `latent`, given the (guided) network output. `state` is not changed.

        `latent` stands apart from `state.latent` because a hook may have replaced it. `through` sees, and may replace, the
        clean-image prediction that the solver continues from and remembers.
        """
        self._resume(state)
        if through is not None:
            convert = type(self.scheduler).convert_model_output
            self.scheduler.convert_model_output = lambda *args, **kwargs: through(convert(self.scheduler, *args, **kwargs))
        try:
            latent = self.scheduler.step(out, self.timestep(state.step), latent, return_dict=False)[0]
        finally:
            vars(self.scheduler).pop("convert_model_output", None)
        return SamplerState(state.step + 1, latent, self._memory())

    def _resume(self, state: SamplerState) -> None:
        vars(self.scheduler).update({name: _own(value) for name, value in state.memory.items()})

    def _memory(self) -> dict[str, Any]:
        return {name: _own(value) for name, value in vars(self.scheduler).items() if name != "_internal_dict"}


def _own(value: Any) -> Any:
    """Of what a solver writes to itself, lists are edited in place and so copied; all else is only ever replaced."""
    return copy.copy(value) if isinstance(value, (list, dict)) else value


def seed_of_each(seed: Seeds, batch: int) -> list[int]:
    """One seed for each of `batch` prompts, from one for all or a sequence; numpy's and torch's integers are integers, too.

    Raises:
        ValueError: another number of seeds, or something that is no integer.
    """
    try:
        try:
            seeds = [index(seed)] * batch  # type: ignore[arg-type]
        except TypeError:
            seeds = [index(one) for one in seed]  # type: ignore[union-attr]
    except TypeError:
        raise ValueError(f"seed={seed!r}: give an integer for all prompts, or one for each.") from None
    if len(seeds) != batch:
        raise ValueError(f"There are {len(seeds)} seeds for {batch} prompts: give one each, or a single one for all.")
    return seeds


def seeded_noise(seeds: list[int], shape: tuple[int, ...]) -> Float[Tensor, "batch channel rows columns"]:
    """Standard normal float32, one fresh CPU generator a row: equal seeds give equal noise on every machine."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
