"""Names of a generation's tensors."""

from __future__ import annotations

import pytest
import torch

from hooked_models import UnknownHookError

from ..pipelines import PROMPTS


def test_hook_dict_lists_what_a_default_run_fires(model):
    fired = []
    with model.hooks([(lambda name: True, lambda tensor, hook: fired.append(hook.name))]):
        model(PROMPTS)
    # text is encoded once and no hook asks for it at a step … except that here every hook does, so
    # all names fire
    assert sorted(fired) == sorted(model.hook_dict)
    assert len(model.hook_dict) == len(set(model.hook_dict)) == len(fired)


def test_aliases_reach_the_same_tensor(model):
    def zero(tensor, hook):
        assert hook.name == "steps.2.cond.blocks.1.cross_attn.hook_z"
        return torch.zeros_like(tensor)

    a = model.run_with_hooks(PROMPTS, fwd_hooks=[("steps.2.cond.blocks.1.hook_cross_z", zero)])
    b = model.run_with_hooks(PROMPTS, fwd_hooks=[("steps.2.cond.blocks.1.cross_attn.hook_z", zero)])
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        (
            "steps.0.cond.blocks.1.cross_attn.hook_patern",
            "steps.0.cond.blocks.1.cross_attn.hook_pattern",
        ),
        ("steps.0.con.blocks.1.attn.hook_z", "steps.0.cond.blocks.1.attn.hook_z"),
        ("steps.1.hook_latents", "steps.1.hook_latent"),
        ("text_encoder.hook_embd", "text_encoder.hook_embed"),
        ("hook_images", "hook_image"),
    ],
)
def test_a_misspelt_name_is_an_error_with_the_nearest_one(model, wrong, nearest):
    with (
        pytest.raises(UnknownHookError) as error,
        model.hooks([(wrong, lambda tensor, hook: None)]),
    ):
        pass
    assert f"did you mean {nearest!r}" in str(error.value)
    with pytest.raises(UnknownHookError):
        model.run_with_cache(PROMPTS, names_filter=wrong)
