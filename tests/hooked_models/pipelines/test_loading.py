"""Loading PixArt pipelines as they come: against diffusers' own pipelines, and every way in which
it can go wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from diffusers.utils import is_bs4_available, is_ftfy_available
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import T5Config

from hooked_models import HookedDiT, HookedTextToImage, ModelCheckError
from hooked_models.pipelines.checks import check_denoiser, check_model
from hooked_models.pipelines.resolution import resize_and_crop
from hooked_models.pixart.attention import Attention
from hooked_models.pixart.block import MLP

from ..folders import XL, edit_json, write_folder
from ..tiny import tiny_transformer
from . import PROMPTS

F16, BF16 = torch.float16, torch.bfloat16
SHARDS = {"max_shard_size": "8KB"}
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
SLOW = ("Σ 1024", "α 256", "variant in shards")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def diffusers_pipeline(folder: Path, **load: Any) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, **{"dtype": torch.float32, **load})
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


@pytest.mark.parametrize("size", [(200, 330), pytest.param((400, 100), marks=pytest.mark.slow)])
def test_images_of_other_sizes_are_those_of_diffusers(
    size: tuple[int, int], tmp_path: Path
) -> None:
    write_folder(tmp_path / "model", vae_levels=4, sample_size=32, patch_size=8)
    model = HookedTextToImage.from_pretrained(tmp_path / "model")
    height, width = size
    latents = model.noise([1, 2], 2, height=height, width=width)
    assert abs(latents.shape[2] / latents.shape[3] - height / width) < 0.1 * height / width
    ours = resize_and_crop(model(PROMPTS, latents=latents, num_steps=1), height, width)
    call = {
        "use_resolution_binning": True,
        "clean_caption": False,
        "output_type": "pt",
        "num_inference_steps": 1,
    }
    theirs = diffusers_pipeline(tmp_path / "model")(
        list(PROMPTS), latents=latents, height=height, width=width, **call
    ).images
    assert theirs.std() > 0.01
    assert 0 < theirs.min() < theirs.max() < 1  # they clamp after resizing, hook_image before
    assert (ours - theirs).abs().max() < 1e-4


def test_other_sizes_without_a_table(folder: Path) -> None:
    model = HookedTextToImage.from_pretrained(folder, check=False)
    assert model.noise(height=24, width=40, binning=False).shape == (1, 4, 12, 20)
    with pytest.raises(ValueError, match="height=20, width=40: give multiples of 8 pixels"):
        model.noise(height=20, width=40, binning=False)
    with pytest.raises(ValueError, match="sample_size=16 has no table"):
        model.noise(height=20, width=40)


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


# The hub


def hub_cache(folder: Path, cache: Path, commits: dict[str, float]) -> str:
    """A cache as huggingface_hub leaves it, with the model at several commits, the last of which is
    `main`.
    """
    repository = cache / "models--somebody--tiny"
    for commit, bias in commits.items():
        snapshot = repository / "snapshots" / commit
        shutil.copytree(folder, snapshot)
        network = PixArtTransformer2DModel.from_pretrained(snapshot, subfolder="transformer")
        network.proj_out.bias.fill_(bias)
        network.save_pretrained(snapshot / "transformer")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
    return "somebody/tiny"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_a_revision_is_a_commit_and_is_recorded(folder: Path, tmp_path: Path) -> None:
    old, new = "a" * 40, "b" * 40
    name = hub_cache(folder, tmp_path, {old: 1.0, new: 2.0})
    latest = HookedTextToImage.from_pretrained(name, cache_dir=tmp_path)
    pinned = HookedTextToImage.from_pretrained(name, cache_dir=tmp_path, revision=old)
    assert (latest.source.commit, latest.dit.proj_out.bias[0]) == (new, 2)
    assert (pinned.source.commit, pinned.dit.proj_out.bias[0]) == (old, 1)
    empty = HookedTextToImage.from_pretrained(name, cache_dir=tmp_path, revision=old, weights=False)
    assert (empty.source, empty.dit.device.type) == (pinned.source, "meta")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("weights", [True, False])
def test_offline_the_error_says_how_to_fetch(tmp_path: Path, weights: bool) -> None:
    with pytest.raises(FileNotFoundError, match=r"hf download somebody/absent --revision abc"):
        HookedTextToImage.from_pretrained(
            "somebody/absent", cache_dir=tmp_path, revision="abc", weights=weights
        )


@pytest.mark.parametrize(
    ("cause", "error", "message"),
    [
        (
            GatedRepoError,
            PermissionError,
            r"gated: accept its terms at https://huggingface.co/some/model",
        ),
        (RepositoryNotFoundError, FileNotFoundError, "has no model 'some/model'"),
        (RevisionNotFoundError, FileNotFoundError, r"has no revision 'v9'.*commits/main"),
    ],
)
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, cause: type[Exception], error: type[Exception], message: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        response = httpx.Response(
            403, request=httpx.Request("GET", "https://huggingface.co/some/model")
        )
        raise OSError("Cannot load model some/model") from cause("refused", response=response)

    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    with pytest.raises(error, match=message):
        HookedTextToImage.from_pretrained("some/model", revision="v9")


# What is wrong with a folder


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(ValueError, match="which has no revisions"):
        HookedTextToImage.from_pretrained(folder, revision="abc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "StableDiffusionPipeline"},
            "is a StableDiffusionPipeline, which has no transformer",
        ),
        ({"_class_name": "Pipeline4"}, "is a Pipeline4, which diffusers .* has not"),
        (
            {"transformer": ["diffusers", "SanaTransformer2DModel"]},
            "has a SanaTransformer2DModel for its transformer",
        ),
    ],
)
def test_a_pipeline_of_another_kind(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(copy / "model_index.json", **changes)
    with pytest.raises(ValueError, match=message):
        HookedTextToImage.from_pretrained(copy)


def test_an_unsupported_transformer_is_refused_before_its_weights_are_read(copy: Path) -> None:
    edit_json(
        copy / "model_index.json",
        _class_name="QwenImagePipeline",
        transformer=["diffusers", "QwenImage21Transformer2DModel"],
    )
    next((copy / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="QwenImage21Transformer2DModel is not supported: its att"):
        HookedTextToImage.from_pretrained(copy)


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


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_truncated_and_missing_weights(copy: Path, component: str) -> None:
    file = next((copy / component).glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(
        OSError, match=rf"{component}/{file.name} is truncated or damaged .* download it again"
    ):
        HookedTextToImage.from_pretrained(copy)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(
        FileNotFoundError, match=rf"has no {component}/{file.name} \(there is: {file.stem}.bin\)"
    ):
        HookedTextToImage.from_pretrained(copy)


def test_a_missing_shard(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", saved=SHARDS)
    next((tmp_path / "model/transformer").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"lacks transformer/diffusion_pytorch_model-00002-of-\d+.safetensors",
    ):
        HookedTextToImage.from_pretrained(tmp_path / "model")


def test_a_pipeline_that_is_spread_out_is_refused(folder: Path) -> None:
    pipe = diffusers_pipeline(folder)
    pipe.transformer.transformer_blocks[1].to("meta")
    with pytest.raises(ValueError, match="transformer is spread over cpu, meta"):
        HookedTextToImage.from_pipeline(pipe)


# Checks at load


def wrong_output(self: MLP, x: torch.Tensor) -> torch.Tensor:
    return 1.01 * self.proj_out(
        self.hook_post(F.gelu(self.hook_pre(self.proj_in(x)), approximate="tanh"))
    )


def silent(self: MLP, x: torch.Tensor) -> torch.Tensor:
    return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


def attention(use_pattern: bool, factor: float) -> Any:
    """An attention whose pattern is not used, or is not what it should be."""

    def forward(self: Attention, q: Any, k: Any, v: Any, bias: Any = None) -> torch.Tensor:
        q, k, v = (
            hook(x).transpose(1, 2)
            for hook, x in ((self.hook_q, q), (self.hook_k, k), (self.hook_v, v))
        )
        scores = q @ k.mT * self.scale
        bias = bias[:, None] if bias is not None and bias.ndim == 3 else bias
        pattern = self.hook_attn_scores(scores if bias is None else scores + bias).softmax(-1)
        seen = self.hook_pattern(factor * pattern) / factor
        return self.hook_z(((seen if use_pattern else pattern) @ v).transpose(1, 2))

    return forward


@pytest.mark.parametrize(
    ("broken", "forward", "message"),
    [
        (
            MLP,
            wrong_output,
            r"the denoiser's output differs from the original's by [\d.e-]+ \(allowed: ",
        ),
        (MLP, silent, r"names do not fire once each: blocks.0.mlp.hook_pre \(0 times\)"),
        (Attention, attention(False, 1), "attn.hook_z does not change when its pattern is edited"),
        (Attention, attention(True, 2), "attn.hook_pattern has rows that do not sum to one"),
    ],
)
def test_a_failed_check_names_the_model_and_the_versions(
    folder: Path, monkeypatch: pytest.MonkeyPatch, broken: type, forward: Any, message: str
) -> None:
    monkeypatch.setattr(broken, "forward", forward)
    with pytest.raises(ModelCheckError, match=message) as error:
        HookedTextToImage.from_pretrained(folder)
    assert f"{folder} failed its checks with diffusers 0." in str(error.value)
    assert "transformers 5." in str(error.value)
    HookedTextToImage.from_pretrained(folder, check=False)


def test_a_model_that_says_nothing_finite(copy: Path) -> None:
    network = PixArtTransformer2DModel.from_pretrained(copy, subfolder="transformer")
    network.proj_out.bias.fill_(torch.nan)
    network.save_pretrained(copy / "transformer")
    with pytest.raises(
        ModelCheckError, match=r"transformer's proj_out\.bias holds a value that is not a number"
    ):
        HookedTextToImage.from_pretrained(copy)
    opened = HookedTextToImage.from_pretrained(copy, check=False)
    with pytest.raises(ModelCheckError, match="not finite even without hooks"):
        check_model(opened)


# The real size


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
