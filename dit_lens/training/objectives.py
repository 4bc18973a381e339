"""Prediction targets of the network and their losses.

Each objective matches the scheduler that is saved with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from diffusers import DDPMScheduler
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "batch channel rows columns"]
Predict = Callable[[Latents, Float[Tensor, " batch"]], Latents]


@runtime_checkable
class Objective(Protocol):
    """Loss of a batch, `loss(predict, clean, generator)`.

    Noises the clean latents, lets `predict(noisy, timestep)` answer, and scores it.
    """

    def loss(
        self, predict: Predict, clean: Latents, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Loss of a batch, with gradient; the generator draws times and noise."""
        ...


class CleanImageObjective:
    """x0-prediction on the straight path x_t = (1 − t)·x0 + t·ε, squared error over t².

    It is the velocity's error. t = logistic(0.8 + N(0, 1)) spends most samples where the layout is
    decided; t is clamped at 0.1 in the weight, so that the last, easy stretch does not dominate.
    The network is told 1000·t, as by `DPMSolverMultistepScheduler(use_flow_sigmas=True)`.
    """

    def loss(
        self, predict: Predict, clean: Latents, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Mean weighted squared error."""
        t = self.levels(len(clean), generator, clean.device)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        fraction = t[:, None, None, None]
        error = predict((1 - fraction) * clean + fraction * noise, 1000 * t) - clean
        return (error.square().mean(dim=(1, 2, 3)) / t.clamp(min=0.1).square()).mean()

    def levels(
        self, n: int, generator: torch.Generator, device: torch.device
    ) -> Float[Tensor, " n"]:
        """Noise levels t in (0, 1)."""
        return torch.sigmoid(0.8 + torch.randn(n, generator=generator, device=device))


class NoiseObjective:
    """The paper's ε-prediction on the DDPM path (1,000 steps, linear β).

    No learned variance: no sampler reads it.
    """

    def __init__(self) -> None:
        self.noiser = DDPMScheduler()

    def loss(
        self, predict: Predict, clean: Latents, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Mean squared error."""
        t = torch.randint(1000, (len(clean),), generator=generator, device=clean.device)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        return (predict(self.noiser.add_noise(clean, noise, t), t.float()) - noise).square().mean()


OBJECTIVES: dict[str, type[Objective]] = {"x0": CleanImageObjective, "epsilon": NoiseObjective}
