"""A pipeline's own loop under a visitor, against the pipeline; images of every family are in
tests/conformance.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.generation.loops import Call
from hooked_models.generation.pipeline_loop import PipelineLoop

from ..pipelines import PROMPTS
from ..tiny_pipelines import tiny_pipeline

SEEDS = (0, 1)


class Counting:
    """A visitor that computes every call and keeps its order."""

    def __init__(self, transformer: Any) -> None:
        self.transformer, self.seen = transformer, []

    def latent(self, step: int, latent: Tensor) -> Tensor:
        self.seen.append(("latent", step))
        return latent

    def denoise(self, call: Call, x: Tensor, timestep: Any, text: Any) -> Tensor:
        self.seen.append(("call", call.step, call.branches))
        return text.call(self.transformer, x)

    def out(self, step: int, latent: Tensor, out: Tensor) -> Tensor:
        self.seen.append(("out", step))
        return out

    def after(self, step: int, latent: Tensor) -> None:
        self.seen.append(("after", step))


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("SD3", [("uncond", "cond")]),
        ("FLUX.1 true CFG", [("cond",), ("uncond",)]),
    ],
)
@torch.no_grad()
def test_the_latents_are_the_pipelines_and_every_call_is_visited_in_order(name, calls):
    pipe, how = tiny_pipeline(name)
    how.pop("output_type")
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = pipe(list(PROMPTS), generator=generators, output_type="latent", **how).images
    model = HookedTextToImage.from_pipeline(pipe)
    steps, guidance = how.pop("num_inference_steps"), how.pop("guidance_scale", None)
    inputs = model.trajectory(list(PROMPTS), SEEDS, steps, guidance, **how).inputs
    visitor = Counting(pipe.transformer)
    found = PipelineLoop()(inputs, visitor, steps)
    assert torch.equal(found, expected)
    assert visitor.seen == [("latent", 0)] + [
        event
        for step in range(steps)
        for event in (
            *(("call", step, branches) for branches in calls),
            ("out", step),
            ("after", step),
            *([("latent", step + 1)] if step + 1 < steps else []),
        )
    ]
