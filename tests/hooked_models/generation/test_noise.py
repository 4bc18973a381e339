"""Seeds are integers of any kind, and equal ones give equal noise."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from hooked_models.generation.noise import seed_of_each, seeded_noise

from ..pipelines import PROMPTS


@pytest.mark.parametrize(
    "seed", [np.int64(3), torch.tensor(3), np.array([3, 3]), torch.tensor([3, 3]), (3, 3)]
)
def test_any_integers_are_seeds(model, seed):
    assert torch.equal(model(PROMPTS, seed=seed, num_steps=1), model(PROMPTS, seed=3, num_steps=1))


def test_what_is_no_seed():
    for seed in (1.5, [0.5, 1.0]):
        with pytest.raises(ValueError, match="give an integer"):
            inspect.unwrap(seed_of_each)(seed, 2)  # past the type checker, as a user calls it
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        seed_of_each([0, 1, 2], 2)


def test_a_rows_noise_does_not_depend_on_the_others():
    together = seeded_noise([7, 8], (4, 2, 2))
    assert torch.equal(together[1:], seeded_noise([8], (4, 2, 2)))
    assert not torch.equal(together[0], together[1])
