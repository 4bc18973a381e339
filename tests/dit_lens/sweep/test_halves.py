"""Split-half stability against rankings that are known."""

from __future__ import annotations

import numpy as np
import pytest

from dit_lens import sweep
from dit_lens.intervene.interventions import Intervention
from dit_lens.sweep.halves import split_half

from ..sweeps import METRICS, PROMPTS, SEEDS, STEPS, tiny

CELLS, K = 200, 10


def test_noise_has_no_stability_and_large_effects_have_all():
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(CELLS, 8, 2))
    of_noise = split_half(noise, K)
    assert of_noise.agreement < 0.15
    assert abs(of_noise.effect) < 0.2
    assert of_noise.chance == pytest.approx(K / CELLS)
    large = np.where(np.arange(CELLS) < K, 30.0, 0.0) * draw.choice([-1, 1], CELLS)
    of_both = split_half(large[:, None, None] + noise, K)
    assert of_both.agreement == 1
    assert of_both.effect == pytest.approx(1)


def test_half_of_the_top_known_is_half_agreement():
    """Five large effects, the rest of the top ten noise among many."""
    draw = np.random.default_rng(1)
    large = np.where(np.arange(CELLS) < K // 2, 30.0, 0.0)
    found = split_half(large[:, None, None] + draw.normal(size=(CELLS, 20, 1)), K)
    assert 0.5 <= found.agreement < 0.58


def test_values_that_are_missing_are_left_out():
    values = np.arange(1.0, 9.0)[:, None, None] * np.ones((8, 6, 2))
    values[3, :4] = np.nan
    assert split_half(values, 3) == (3, 1.0, 1.0, 3 / 8)


def test_a_sweep_carries_it():
    model = tiny()
    cells = sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"), layers=range(2), steps=range(STEPS)
    )
    found = sweep.run(model, PROMPTS, SEEDS, cells, METRICS, num_steps=STEPS)
    carried = found["latent_mean_effect"].attrs
    expected = sweep.stability(found, "latent_mean")._asdict()
    assert carried == {f"split_half_{key}": value for key, value in expected.items()}
    assert 0 <= carried["split_half_agreement"] <= 1
    one = sweep.stability(found.isel(prompt=[0]), "latent_mean")  # over seeds
    assert one.k == 3
    with pytest.raises(ValueError, match="no halves"):
        sweep.stability(found.isel(prompt=[0], seed=[0]), "latent_mean")
    with pytest.raises(ValueError, match="it has image_first"):
        sweep.stability(found, "height")
    assert (
        "split_half_k"
        not in sweep.run(model, PROMPTS[0], SEEDS, cells, METRICS, num_steps=STEPS)[
            "latent_mean_effect"
        ].attrs
    )
