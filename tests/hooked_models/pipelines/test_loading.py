"""Loading PixArt pipelines as they come: against diffusers' own pipelines, and every way in which
it can go wrong.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from transformers import T5Config

from hooked_models import HookedDiT, HookedTextToImage
from hooked_models.pipelines.checks import check_denoiser

from ..folders import XL, edit_json, write_folder
from ..tiny import tiny_transformer
from . import PROMPTS
from .opened import SHARDS, diffusers_pipeline

F16, BF16 = torch.float16, torch.bfloat16


CASES: dict[str, dict[str, Any]] = {
    "Σ 256": {"sample_size": 32, "interpolation_scale": 0.5, "patch_size": 8},
    "Σ 512": {"sample_size": 64, "interpolation_scale": 1, "patch_size": 16},
    "Σ 1024": {"sample_size": 128, "interpolation_scale": 2, "patch_size": 32},
    "Σ 2K": {"sample_size": 256, "interpolation_scale": 4, "patch_size": 64},
    "α 256": {"pipeline": "alpha", "sample_size": 32, "patch_size": 8},
    "α 1024, told the size": {
        "pipeline": "alpha",
        "sample_size": 128,
        "use_additional_conditions": None,
        "attention_head_dim": 12,
        "patch_size": 32,
    },
    "α, class of 2024": {"pipeline": "alpha", "legacy": True},
    "Σ-XL but for width and depth": {"legacy": True, **XL},
    "text not projected": {"caption_channels": None, "cross_attention_dim": 10},
    "no bias, no learned variance": {"attention_bias": False, "out_channels": 4},
    "in shards": {"saved": SHARDS},
    "variant": {"saved": {"variant": "fp16"}, "load": {"variant": "fp16"}},
    "variant in shards": {"saved": {"variant": "fp16", **SHARDS}, "load": {"variant": "fp16"}},
    "bfloat16": {"load": {"dtype": BF16}, "tolerance": 0.05},
    "onto a device": {"load": {"device_map": "cpu"}},
}


SLOW = ("Σ 1024", "α 256")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES]
)
def test_trajectories_are_those_of_diffusers(case: str, tmp_path: Path) -> None:
    settings = {"load": {}, "tolerance": 1e-4, **CASES[case]}
    load, tolerance = settings.pop("load"), settings.pop("tolerance")
    write_folder(tmp_path / "model", **settings)
    side = settings.get("sample_size", 16)
    latents = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(3))
    model = HookedTextToImage.from_pretrained(tmp_path / "model", **load)
    ours = model.trajectory(PROMPTS, latents=latents, num_steps=2).latents[-1]
    pipe = diffusers_pipeline(tmp_path / "model", **load)
    # as long as its default text
    call = {"use_resolution_binning": False, "clean_caption": False, "output_type": "latent"}
    theirs = pipe(
        list(PROMPTS), latents=latents.to(pipe.dtype), num_inference_steps=2, **call
    ).images
    assert isinstance(model.as_diffusers(), type(pipe))
    assert ours.dtype == load.get("dtype", torch.float32)
    assert model.max_sequence_length == (120 if settings.get("pipeline") == "alpha" else 300)
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()
    assert (theirs - latents).abs().max() > 0.1  # the network has said something


def test_float16_spares_what_overflows_in_it(folder: Path) -> None:
    model = HookedTextToImage.from_pretrained(folder, dtype=F16)
    assert (model.dit.dtype, model.text_encoder.dtype, model.codec.dtype) == (
        F16,
        BF16,
        torch.float32,
    )
    full = HookedTextToImage.from_pretrained(folder)
    ours, exact = (m.trajectory(PROMPTS, num_steps=2).latents[-1] for m in (model, full))
    assert (ours - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_legacy_class_that_is_live_already() -> None:
    from diffusers import Transformer2DModel

    settings = {k: v for k, v in XL.items() if k != "use_additional_conditions"} | {
        "caption_channels": 10,
        "sample_size": 16,
    }
    live = Transformer2DModel(
        num_attention_heads=1, num_layers=1, cross_attention_dim=72, **settings
    ).eval()
    torch.nn.init.normal_(live.proj_out.weight)
    assert check_denoiser(HookedDiT(live)) == []


def test_text_may_be_as_long_as_it_was_in_training(folder: Path, tmp_path: Path) -> None:
    sigma = HookedTextToImage.from_pretrained(folder, check=False)
    alpha = HookedTextToImage.from_pretrained(
        write_folder(tmp_path / "alpha", "alpha"), check=False
    )
    assert sigma.to_tokens("red " * 150).shape == (1, 151)
    with pytest.raises(ValueError, match="151 tokens, but 120"):
        alpha.to_tokens("red " * 150)
    with pytest.raises(ValueError, match="301 tokens, but 300"):
        sigma.to_tokens("red " * 300)


def test_captions_are_cleaned_on_request(folder: Path) -> None:
    model = HookedTextToImage.from_pretrained(folder, check=False, clean_caption=True)
    prompt = "Red circle is <b>above</b> blue square http://example.com/page"
    if not (is_bs4_available() and is_ftfy_available()):
        with pytest.raises(ImportError, match="pip install beautifulsoup4 ftfy"):
            model.to_tokens(prompt)
        return
    assert torch.equal(model.to_tokens(prompt), model.to_tokens("red circle is above blue square"))
    pipe = diffusers_pipeline(folder)
    text = pipe._text_preprocessing(prompt, clean_caption=True)
    assert torch.equal(model.to_tokens(prompt), pipe.tokenizer(text, return_tensors="pt").input_ids)


def test_parts_are_on_the_device_only_while_they_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HookedTextToImage.from_pretrained(folder, check=False)
    images, names = (
        model(PROMPTS, num_steps=2),
        {id(model.text_encoder): "text", id(model.dit): "dit", id(model.codec): "codec"},
    )
    moves = []
    move = torch.nn.Module.to

    def spy(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if id(module) in names:
            moves.append((names[id(module)], str(args[0])))
        return move(module, *args, **kwargs)

    device = torch.device("cpu", 0)
    model.enable_cpu_offload(device)
    monkeypatch.setattr(torch.nn.Module, "to", spy)
    assert torch.equal(model(PROMPTS, num_steps=2), images)
    assert moves == [
        ("text", "cpu:0"),
        ("text", "cpu"),
        ("dit", "cpu:0"),
        ("dit", "cpu"),
        ("codec", "cpu:0"),
    ]


@pytest.mark.gpu
def test_on_a_gpu_the_images_are_the_same_with_and_without_offloading(folder: Path) -> None:
    exact = HookedTextToImage.from_pretrained(folder)(PROMPTS, num_steps=2)
    whole = HookedTextToImage.from_pretrained(folder, device_map="cuda")(PROMPTS, num_steps=2)
    model = HookedTextToImage.from_pretrained(folder)
    model.enable_cpu_offload("cuda")
    parts = model(PROMPTS, num_steps=2)
    assert (whole.cpu() - exact).abs().max() < 1e-3
    assert torch.equal(parts, whole)
    assert model.dit.device.type == "cpu"


@pytest.mark.parametrize("how", ["not named", "not there"])
def test_a_missing_component_can_be_passed(copy: Path, folder: Path, how: str) -> None:
    if how == "not named":
        edit_json(copy / "model_index.json", text_encoder=[None, None])
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(
        FileNotFoundError,
        match=r"has no text_encoder: pass one \(from_pretrained\(…, text_encoder=…\)\)",
    ):
        HookedTextToImage.from_pretrained(copy)
    encoder = diffusers_pipeline(folder).text_encoder
    whole, mended = (
        HookedTextToImage.from_pretrained(folder),
        HookedTextToImage.from_pretrained(copy, text_encoder=encoder),
    )
    assert torch.equal(whole(PROMPTS, num_steps=1), mended(PROMPTS, num_steps=1))
    with pytest.raises(TypeError, match="no argument 'torch_dtype': choose dtype"):
        HookedTextToImage.from_pretrained(copy, torch_dtype=F16)


def test_a_transformer_of_another_folder(folder: Path, tmp_path: Path) -> None:
    tiny_transformer(7, num_attention_heads=2, use_additional_conditions=False).save_pretrained(
        tmp_path / "other/transformer"
    )
    model = HookedTextToImage.from_pretrained(folder, transformer=str(tmp_path / "other"))
    assert model.cfg.patch_size == 2


def test_a_pipeline_that_is_spread_out_is_refused(folder: Path) -> None:
    pipe = diffusers_pipeline(folder)
    pipe.transformer.transformer_blocks[1].to("meta")
    with pytest.raises(ValueError, match="transformer is spread over cpu, meta"):
        HookedTextToImage.from_pipeline(pipe)


def test_xl_without_weights(copy: Path) -> None:
    """28 layers × 16 heads × 72 with T5-XXL: names and sizes, without a weight file and within 5 s
    of a processor and 300 MB.
    """
    size = {
        "num_attention_heads": 16,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
    }
    (copy / "transformer/config.json").write_text(
        json.dumps({"_class_name": "Transformer2DModel", **XL, **size})
    )
    xxl = T5Config(d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, vocab_size=32128)
    xxl.feed_forward_proj = "gated-gelu"
    xxl.save_pretrained(copy / "text_encoder")
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    memory, start = psutil.Process().memory_info().rss, time.process_time()
    model = HookedTextToImage.from_pretrained(copy, weights=False)
    names = list(model.hook_dict)
    seconds, used = time.process_time() - start, psutil.Process().memory_info().rss - memory
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model) == (28, 16, 1152)
    assert sum(p.numel() for p in model.dit.parameters()) == pytest.approx(610.9e6, rel=1e-3)
    assert "steps.13.cond.blocks.27.cross_attn.hook_pattern" in names
    assert len(names) == len(model.hook_dict) > 14 * 2 * 28 * 30
    assert seconds < 5
    assert used < 300e6
