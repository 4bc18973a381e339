"""The table of hooks against what models really have and compute."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from hooked_models import HookedTextToImage, families
from hooked_models.generation.cache_estimate import activation_shape
from hooked_models.hooks.table import HOOKS, axis_sizes, hook_row

from ..families.test_families import KINDS, small
from ..pipelines import PROMPTS, tiny_pipeline

SCHEDULER = DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True)


FORKS = ("use_split_qkv_input", "use_attn_in")


TEXT_LENGTH = 9  # unlike every width and the number of image positions


def pattern(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "blocks.{l}.", name)


def tiny(text: str) -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(
        tiny_pipeline(text, learned_sigma=True, scheduler=SCHEDULER)
    )


def set_all(model: HookedTextToImage, fork: str) -> None:
    for part in (model.dit, model.text_encoder):
        for flag in ("use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in"):
            if flag in set(part.hook_flags.values()):
                getattr(part, f"set_{flag}")(False)
        for flag in (fork, "use_attn_result", "use_hook_mlp_in"):
            if flag in set(part.hook_flags.values()):
                getattr(part, f"set_{flag}")(True)


@pytest.mark.parametrize("text", ["t5", "rte"])
@pytest.mark.parametrize("fork", FORKS)
@torch.no_grad()
def test_shapes_of_a_whole_run(text: str, fork: str) -> None:
    model = tiny(text)
    set_all(model, fork)
    images, cache = model.run_with_cache(
        model.to_tokens(PROMPTS, length=TEXT_LENGTH), num_steps=1, branch="both"
    )
    grid = (model.cfg.sample_size,) * 2
    seen = set()
    for name, tensor in cache.items():
        site = model.names.site(name)
        cfg = model.text_encoder.cfg if site.part.endswith("text_encoder") else model.cfg
        sizes = axis_sizes(cfg, len(PROMPTS), TEXT_LENGTH, grid, tuple(images.shape[-2:]))
        assert tuple(tensor.shape) == tuple(sizes[axis] for axis in site.row.axes), name
        assert tuple(tensor.shape) == activation_shape(
            cfg, site, 2, grid, TEXT_LENGTH, tuple(images.shape[-2:])
        )
        seen.add((site.part, site.inner))
    fires = {
        name
        for name in model.dit.hook_dict
        if model.dit.hook_flags.get(name) not in {*FORKS} - {fork}
    }
    assert {name for part, name in seen if part == "dit"} == fires
    assert {name for part, name in seen if part == "sampler"} == set(model.sampler_hooks.hook_dict)


def test_the_table_has_every_name_and_no_other() -> None:
    t5, rte = tiny("t5"), tiny("rte")
    families_too: list[Any] = [families.hook(small(kind)[0], check=False) for kind in KINDS[1:]]
    found = {
        ("dit", pattern(name)) for model in (t5.dit, *families_too) for name in model.hook_dict
    }
    found |= {
        ("text_encoder", pattern(name))
        for model in (t5, rte)
        for name in model.text_encoder.hook_dict
    }
    found |= {("sampler", name) for name in t5.sampler_hooks.hook_dict}
    assert found <= set(HOOKS)
    nowhere = {name for part, name in set(HOOKS) - found}
    # of families that none of these models is
    assert all("image_attn" in name for name in nowhere), nowhere


@torch.no_grad()
def test_every_flag_holds_its_hooks_back_and_no_others() -> None:
    model = tiny("t5")
    for module in (model.dit, model.text_encoder):
        for name in module.hook_dict:
            gated = hook_row(name, module.hook_part).flag
            assert (name in module.names(None)) == (gated is None), name
            if gated is not None:
                getattr(module, f"set_{gated}")(True)
                assert name in module.names(None)
                getattr(module, f"set_{gated}")(False)


def test_layers_of_sites() -> None:
    model = tiny("t5")
    assert model.names.site("steps.0.cond.blocks.1.hook_cross_z").layer == 1
    assert model.names.site("text_encoder.blocks.0.hook_resid_pre").layer == 0
    for name in (
        "steps.0.hook_latent",
        "hook_image",
        "steps.0.uncond.hook_t_emb",
        "text_encoder.hook_out",
    ):
        assert model.names.site(name).layer is None
    with pytest.raises(KeyError, match="stands in no row"):
        hook_row("blocks.0.hook_nothing")
