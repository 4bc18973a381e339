"""nnsight's own objects and ours: the same names, and caches that open."""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch

from dit_lens.remote import RENAME, RemoteTextToImage, open_cache
from hooked_models import DiTCache, GenerationCache, HookedDiT, HookedTextToImage

from ...hooked_models.tiny import tiny_inputs, tiny_transformer

PROMPTS = ["red circle is above blue square", "blue square is left of red circle"]


def test_a_cache_of_the_traced_hooked_denoiser_opens() -> None:
    dit = HookedDiT(tiny_transformer(num_attention_heads=2, sample_size=4).double()).eval()
    call = {**tiny_inputs(dit.wrapped, height=4, width=4, text_len=4, pads=1), "return_dict": False}
    with torch.no_grad():
        _, expected = dit.run_with_cache(**call)
        traced = nnsight.NNsight(dit)
        with traced.trace(**call) as tracer:
            view = tracer.cache()
            point = traced.blocks[1].cross_attn.hook_z.output.save()  # the same names
    cache = open_cache(view, dit)
    assert isinstance(cache, DiTCache)
    assert set(cache.keys()) == set(expected.keys())
    for name, tensor in expected.items():
        torch.testing.assert_close(cache[name], tensor, rtol=0, atol=1e-12)
    assert torch.equal(cache["z", 1, "cross_attn"], point)
    torch.testing.assert_close(
        cache.accumulated_resid(return_labels=False),
        expected.accumulated_resid(return_labels=False),
    )


@pytest.mark.parametrize("renamed", [True, False])
def test_a_cache_of_a_traced_generation_opens(
    folder, hooked: HookedTextToImage, renamed: bool
) -> None:
    model = nnsight.DiffusionModel(str(folder), dispatch=True, rename=RENAME if renamed else None)
    model.pipeline.set_progress_bar_config(disable=True)
    blocks: Any = model.dit.blocks if renamed else model.transformer.transformer_blocks
    modules = [envoy for block in blocks for envoy in block.modules()]
    latents = hooked.noise(0, 2)
    call = {
        "max_sequence_length": hooked.to_tokens(PROMPTS).shape[1],
        "latents": latents,
        "output_type": "latent",
    }
    quiet = {"use_resolution_binning": False, "clean_caption": False}
    with model.generate(
        PROMPTS, num_inference_steps=2, guidance_scale=4.5, **call, **quiet
    ) as tracer:
        view = tracer.cache(modules=modules, include_inputs=True)
        attention = (blocks[1].cross_attn if renamed else blocks[1].attn2).output.save()
    cache = open_cache(view, hooked)
    assert isinstance(cache, GenerationCache)
    with torch.no_grad():
        _, expected = hooked.run_with_cache(
            PROMPTS, seed=0, num_steps=2, branch="both", names_filter=list(cache.keys())
        )
    kinds = {name.rpartition(".")[2] for name in cache.keys()}  # noqa: SIM118
    assert {
        "hook_q",
        "hook_z",
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_mid_cross",
        "hook_resid_post",
        "hook_post",
    } <= kinds
    assert len(cache) == 2 * 2 * 2 * 19  # steps, branches, layers, names
    for name, tensor in expected.items():
        torch.testing.assert_close(cache[name], tensor, rtol=0, atol=1e-5)
    assert torch.equal(cache["steps.0.cond.blocks.1.hook_cross_attn_out"], attention[2:])


def test_the_model_inside_has_our_module_names(folder) -> None:
    model = RemoteTextToImage(folder)
    traced = model.nnsight
    with traced.generate(
        PROMPTS,
        num_inference_steps=1,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="latent",
    ):
        out = traced.dit.blocks[1].cross_attn.output.save()
    assert out.shape == (4, 4, 16)
