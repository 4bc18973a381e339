"""The tiny pipelines that other tests run: finite, moved by their prompts, and the same after they were saved and opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .pipelines import PROMPTS
from .tiny_pipelines import NO_FOLDER, PIPELINES, tiny_pipeline


def images(pipe: Any, call: dict[str, Any], prompts: tuple[str, ...] = PROMPTS) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    output = pipe(prompt=list(prompts), generator=generators, **call)
    return output.images if hasattr(output, "images") else output.frames


@pytest.mark.parametrize("name", PIPELINES)
def test_a_tiny_pipeline_draws_by_its_prompts_and_survives_its_folder(name: str, tmp_path: Path) -> None:
    pipe, call = tiny_pipeline(name)
    drawn = images(pipe, call)
    assert bool(drawn.isfinite().all())
    assert torch.equal(images(pipe, call), drawn)
    other = images(pipe, call, (PROMPTS[0], PROMPTS[0]))
    assert torch.equal(other[0], drawn[0])
    assert (other[1] - drawn[1]).abs().max() > 1e-4
    if name in NO_FOLDER:
        return
    pipe.save_pretrained(tmp_path)
    opened = DiffusionPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert torch.equal(images(opened, call), drawn)
