"""The tiny pipelines that other tests run: finite, moved by their prompts, and the same after they
were saved and opened.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_models import HookedTextToImage, families

from .pipelines import PROMPTS
from .tiny_pipelines import NO_FOLDER, PIPELINES, tiny_pipeline


def images(pipe: Any, call: dict[str, Any], prompts: tuple[str, ...] = PROMPTS) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    output = pipe(prompt=list(prompts), generator=generators, **call)
    return next(iter(output.values()))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_tiny_pipeline_draws_by_its_prompts_and_survives_its_folder(
    name: str, tmp_path: Path
) -> None:
    pipe, call = tiny_pipeline(name)
    drawn = images(pipe, call)
    assert bool(drawn.isfinite().all())
    assert torch.equal(images(pipe, call), drawn)
    other = images(pipe, call, (PROMPTS[0], PROMPTS[0]))
    if name not in ("Kandinsky 5", "GLM-Image"):  # which see the pads of a shorter prompt
        torch.testing.assert_close(other[0], drawn[0], rtol=0, atol=1e-5)
    assert (other[1] - drawn[1]).abs().max() > 1e-4
    if name in NO_FOLDER:
        return
    pipe.save_pretrained(tmp_path)
    opened = DiffusionPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images(opened, call), drawn, rtol=0, atol=1e-5)


FRAMES = {"Wan": 2, "LTX-Video": 2, "CogVideoX": 3, "HunyuanVideo": 2}
"""Shape of latents."""


# FLUX.3's blocks read in the transformer's own signature which arguments to give it
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "FLUX.3"])
def test_a_hooked_transformer_stands_in_its_pipeline(name: str) -> None:
    """Without hooks and with hooks that only look, images are bitwise the plain pipeline's;
    positions are the latents'.
    """
    pipe, call = tiny_pipeline(name)
    drawn = images(pipe, call)
    pipe.transformer = model = families.hook(pipe.transformer)
    assert torch.equal(images(pipe, call), drawn)
    assert model.layout is None
    fired: dict[str, int] = {}

    def look(tensor: Tensor, hook: Any) -> None:
        fired[hook.name] = fired.get(hook.name, 0) + 1

    fused = model.names(lambda name: not name.endswith(("hook_pattern", "hook_attn_scores")))
    with model.hooks([(one, look) for one in fused]):
        assert torch.equal(images(pipe, call), drawn)
    assert len(set(fired.values())) == 1
    assert set(fired) == set(fused)
    rows, columns, frames = model.layout.grid
    pixels = drawn.shape[-1] * drawn.shape[-2]
    assert pixels % (rows * columns) == 0
    assert rows == columns
    assert frames == FRAMES.get(name, 1)
    with model.hooks([(lambda name: name.endswith("hook_pattern"), look)]):
        assert (images(pipe, call) - drawn).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["FLUX.1", "SD3", "Qwen-Image", "SANA"])
def test_a_folder_of_any_pipeline_opens_by_the_same_call(name: str, tmp_path: Path) -> None:
    pipe, call = tiny_pipeline(name)
    pipe.save_pretrained(tmp_path)
    call.pop("output_type")
    steps = call.pop("num_inference_steps")
    opened, live = (
        HookedTextToImage.from_pretrained(tmp_path),
        HookedTextToImage.from_pipeline(pipe),
    )
    assert opened.source.folder == tmp_path
    assert torch.equal(
        opened(PROMPTS, num_steps=steps, **call), live(PROMPTS, num_steps=steps, **call)
    )
    file = next((tmp_path / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(OSError, match="transformer lacks 1 of its weights"):
        HookedTextToImage.from_pretrained(tmp_path)


def test_no_part_of_a_folder_imports_foreign_code(tmp_path: Path) -> None:
    pipe, _ = tiny_pipeline("FLUX.1")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for part in ("text_encoder_2", "tokenizer_2", "extra"):
        (tmp_path / "model_index.json").write_text(
            json.dumps({**index, part: ["antigravity", "Thing"]})
        )
        for weights in (True, False):
            with pytest.raises(ValueError, match=f"takes its {part} from 'antigravity'"):
                HookedTextToImage.from_pretrained(tmp_path, weights=weights)
    assert "antigravity" not in sys.modules
