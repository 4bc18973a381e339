"""Loops of denoiser calls against the pipeline's own."""

from __future__ import annotations

import pytest
import torch

from hooked_models import HookedTextToImage
from hooked_models.generation.loops import Call, branches_of, guided, rows_of

from ..pipelines import CALL, PROMPTS, SCHEDULERS, noise, tiny_pipeline


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_deterministic_scheduler_gives_the_pipelines_images_and_forks_exactly(name, steps):
    pipe = tiny_pipeline(dtype=torch.float64, scheduler=SCHEDULERS[name])
    reference = pipe(
        list(PROMPTS), latents=noise().double(), num_inference_steps=steps, **CALL
    ).images
    model = HookedTextToImage.from_pipeline(pipe)
    run = model.trajectory(PROMPTS, latents=noise(), num_steps=steps)
    assert (run.images - reference).abs().max() < 1e-9
    for step in {0, steps // 2, steps - 1}:
        assert torch.equal(run.fork(step).images, run.images)


def test_runs_are_bitwise_repeatable_and_seeds_are_paired(model):
    assert torch.equal(model(PROMPTS, seed=5), model(PROMPTS, seed=5))
    assert not torch.equal(model(PROMPTS, seed=5), model(PROMPTS, seed=6))
    same = model.trajectory(PROMPTS, seed=5).latents[0]
    assert torch.equal(same[0], same[1])
    each = model.trajectory(PROMPTS, seed=[5, 6]).latents[0]
    assert torch.equal(each[0], same[0])
    assert not torch.equal(each[1], same[1])
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        model(PROMPTS, seed=[1, 2, 3])


def test_guidance_is_that_of_the_paper():
    uncond, cond = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = (1 - 4.5) * uncond + 4.5 * cond  # Ho & Salimans, equation 6, w = 3.5
    torch.testing.assert_close(guided(torch.cat([uncond, cond]), 4.5), expected)
    assert branches_of(1.0) == ("cond",)
    assert branches_of(1.5) == ("uncond", "cond")


def test_rows_are_taken_from_all_that_has_rows():
    values = {
        "tensor": torch.arange(6).view(3, 2),
        "list": ["a", "b", "c"],
        "ids": torch.arange(9).view(3, 3),
        "codes": (torch.zeros(3), torch.ones(3)),
        "scale": 2.0,
        "none": None,
    }
    found = rows_of(values, torch.tensor([2, 0, 2]), 3)
    assert found["tensor"].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert found["list"] == ["c", "a", "c"]
    assert all(found[name] is values[name] for name in ("ids", "codes", "scale", "none"))


def test_a_call_knows_its_branches_rows():
    call = Call(step=1, branches=("uncond", "cond"), rows=3)
    batch = torch.arange(6)
    assert batch[call.part("cond")].tolist() == [3, 4, 5]
    assert batch[call.index(torch.tensor([2, 0]))].tolist() == [2, 0, 5, 3]
