"""Training objectives against their definitions, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from dit_lens.training.objectives import OBJECTIVES, CleanImageObjective, NoiseObjective

CLEAN = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class FixedLevels(CleanImageObjective):
    """The objective at given noise levels."""

    def __init__(self, levels: list[float]) -> None:
        self.fixed = torch.tensor(levels, dtype=torch.float64)

    def levels(self, n: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        return self.fixed


@pytest.mark.parametrize("level", [0.01, 0.05, 0.0999, 0.1, 0.11, 0.2, 0.25, 0.31, 0.9])
def test_the_weight_of_a_level_is_that_of_the_velocity_down_to_a_tenth(level: float) -> None:
    """An error of 1 in every number costs 1 / max(t, .1)²."""
    objective = FixedLevels([level] * 6)
    loss = objective.loss(lambda noisy, t: CLEAN + 1, CLEAN, torch.Generator())
    assert loss.item() == pytest.approx(1 / max(level, 0.1) ** 2, rel=1e-6)


def test_the_network_gets_the_straight_path_and_a_time_of_a_thousand() -> None:
    levels, seen = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], {}

    def predict(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.update(noisy=noisy, time=time)
        return CLEAN

    assert FixedLevels(levels).loss(predict, CLEAN, torch.Generator().manual_seed(3)) == 0
    assert torch.allclose(seen["time"], 1000 * torch.tensor(levels, dtype=torch.float64))
    assert torch.allclose(seen["noisy"][0], CLEAN[0])
    noise = torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(3))
    for row, level in enumerate(levels):
        assert torch.allclose(
            seen["noisy"][row], (1 - level) * CLEAN[row] + level * noise[row], atol=1e-6
        )


def test_levels_are_logistic_around_eight_tenths() -> None:
    levels = CleanImageObjective().levels(
        200_000, torch.Generator().manual_seed(0), torch.device("cpu")
    )
    normal = torch.logit(levels.double()) - 0.8
    assert ((levels > 0) & (levels < 1)).all()
    assert normal.mean().abs() < 0.01
    assert normal.std().item() == pytest.approx(1, abs=0.01)


def test_a_mean_over_rows_weights_each_row_by_its_own_level() -> None:
    levels = [0.05, 0.1, 0.2, 0.5, 0.7, 1.0]
    errors = torch.arange(1.0, 7.0, dtype=torch.float64)
    loss = FixedLevels(levels).loss(
        lambda noisy, t: CLEAN + errors[:, None, None, None], CLEAN, torch.Generator()
    )
    expected = np.mean(
        [
            error**2 / max(level, 0.1) ** 2
            for error, level in zip(errors.tolist(), levels, strict=True)
        ]
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_noise_objective_is_ddpms() -> None:
    """Its noisy latents are DDPM's at the drawn times; a network that answers with the noise loses
    nothing.
    """
    noiser, seen = DDPMScheduler(), {}

    def answer(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha = noiser.alphas_cumprod[time.long()][:, None, None, None]
        seen.update(time=time)
        return (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()

    clean = CLEAN.float().repeat(4000, 1, 1, 1)  # every one of the thousand times is drawn
    objective = NoiseObjective()
    assert objective.loss(answer, clean, torch.Generator().manual_seed(0)) < 1e-6
    assert seen["time"].unique().tolist() == list(range(1000))
    off_by_one = objective.loss(
        lambda x, t: answer(x, t) + 2, clean, torch.Generator().manual_seed(0)
    )
    assert off_by_one.item() == pytest.approx(4, rel=1e-3)


def test_objectives_have_their_names() -> None:
    assert {"x0": CleanImageObjective, "epsilon": NoiseObjective} == OBJECTIVES
