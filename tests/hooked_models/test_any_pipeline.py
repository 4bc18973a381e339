"""`HookedTextToImage.from_pipeline` of any diffusers pipeline: its own loop, hooked by step and branch, forked exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedTextToImage

from .pipelines import PROMPTS
from .tiny_pipelines import tiny_pipeline

SEEDS = [3, 4]
FAMILIES = ["FLUX.1", "FLUX.1 true CFG", "SD3", "SANA DPM++", "Qwen-Image"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def zero(tensor: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(tensor)


@pytest.fixture(params=FAMILIES)
def case(request: Any) -> tuple[Any, dict[str, Any], int, Any]:
    pipe, call = tiny_pipeline(request.param)
    options = {key: value for key, value in call.items() if key not in ("num_inference_steps", "output_type")}
    model: Any = HookedTextToImage.from_pipeline(pipe)
    if model.guide in options:
        options["guidance"] = options.pop(model.guide)
    return pipe, options, call["num_inference_steps"], model


def plain(pipe: Any, options: dict[str, Any], steps: int) -> Tensor:
    options = dict(options)
    if "guidance" in options:
        options[
            "guidance_scale"
            if "true_cfg_scale" in options
            or not hasattr(pipe.transformer.config, "guidance_embeds")
            or pipe.transformer.config.guidance_embeds
            else "true_cfg_scale"
        ] = options.pop("guidance")
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(prompt=list(PROMPTS), generator=generators, num_inference_steps=steps, output_type="pt", **options).images


def test_images_are_bitwise_the_pipelines_with_and_without_inert_hooks(case):
    pipe, options, steps, model = case
    reference = plain(pipe, options, steps)
    assert torch.equal(model(PROMPTS, SEEDS, steps, **options), reference)
    seen = []

    def look(tensor: Tensor, hook: Any) -> None:
        seen.append(hook.name)

    hooks = [(lambda name: name.endswith(("hook_resid_post", "hook_latent", "hook_x0", "hook_out")), look)]
    images = model.run_with_hooks(PROMPTS, SEEDS, steps, fwd_hooks=hooks, **options)
    assert torch.equal(images, reference)
    assert {f"steps.{step}.hook_latent" for step in range(steps)} <= set(seen)
    assert torch.equal(plain(pipe, options, steps), reference)  # the pipeline itself is as it was


def test_a_cache_has_what_modules_compute(case):
    pipe, options, steps, model = case
    images, cache = model.run_with_cache(PROMPTS, SEEDS, steps, branch="both", **options)
    assert torch.allclose(images, plain(pipe, options, steps), atol=1e-4)  # patterns are computed explicitly
    recorded: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: recorded.append(output[0]))
    plain(pipe, options, steps)
    handle.remove()
    branches = ("uncond", "cond") if "steps.0.hook_out_uncond" in cache else ("cond",)
    if len(recorded) == steps:  # one call a step
        said = [torch.cat([cache[f"steps.{step}.hook_out_{branch}"] for branch in branches]) for step in range(steps)]
    else:
        said = [cache[f"steps.{step}.hook_out_{branch}"] for step in range(steps) for branch in ("cond", "uncond")]
    assert len(recorded) == len(said)
    for output, ours in zip(recorded, said, strict=True):
        assert torch.allclose(ours, output, atol=1e-4 * float(output.abs().max()))
    pattern = next(name for name in cache if name.endswith("hook_pattern"))
    assert cache[pattern].shape[0] == len(PROMPTS)
    assert cache.steps == list(range(steps))


def test_forks_are_bitwise_full_runs(case):
    _, options, steps, model = case
    run = model.trajectory(PROMPTS, SEEDS, steps, **options)
    assert len(run) == steps
    for step in range(steps):
        assert torch.equal(run.fork(step).images, run.images)
    z = next(name for name in model.dit.hook_dict if name.endswith("hook_z"))
    names = [f"cond.{z}", "hook_latent", "hook_out", "hook_x0", "hook_out_cond"]
    for name in names:
        hook = (f"steps.{steps - 1}.{name}", lambda tensor, hook: tensor / 2)
        fork = run.fork(steps - 1, [hook]).images
        assert torch.equal(fork, model.run_with_hooks(PROMPTS, SEEDS, steps, fwd_hooks=[hook], **options))
        assert not torch.equal(fork, run.images)
    alone = run.take(torch.tensor([1])).fork(1).images
    assert (alone[0] - run.images[1]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="does not fire"):
        run.fork(1, [("steps.0.hook_out", zero)])


def test_hooks_act_on_their_rows_and_branch(case):
    _, options, steps, model = case
    name = f"steps.{steps - 1}.cond.blocks.0.hook_resid_post"

    def first_row(tensor: Tensor, hook: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[0] = 0
        return tensor

    images = model(PROMPTS, SEEDS, steps, **options)
    changed = model.run_with_hooks(PROMPTS, SEEDS, steps, fwd_hooks=[(name, first_row)], **options)
    assert not torch.allclose(changed[0], images[0], atol=1e-4)
    assert torch.allclose(changed[1], images[1], atol=1e-5)
