"""`HookedTextToImage` against `PixArtSigmaPipeline.__call__`, and its own promises: names, forks,
caches, refusals.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
)

from hooked_models import HookedTextToImage

from ..pipelines import PROMPTS, tiny_pipeline

# Names and hooks


def test_hooks_that_a_run_never_reaches_are_refused(model):
    def keep(tensor, hook):
        return None

    with pytest.raises(ValueError, match="steps 0 to 3"):
        model.run_with_hooks(PROMPTS, num_steps=4, fwd_hooks=[("steps.4.cond.hook_embed", keep)])
    with pytest.raises(ValueError, match="no unconditional branch"):
        model.run_with_hooks(PROMPTS, guidance=1.0, fwd_hooks=[("steps.0.uncond.hook_embed", keep)])
    with pytest.raises(ValueError, match="set_use_attn_result"):
        model.run_with_hooks(PROMPTS, fwd_hooks=[("steps.0.cond.blocks.0.attn.hook_result", keep)])
    consistency = HookedTextToImage.from_pipeline(
        tiny_pipeline(scheduler=CMStochasticIterativeScheduler())
    )
    with pytest.raises(ValueError, match="clean-image prediction"):
        consistency.run_with_hooks(PROMPTS, fwd_hooks=[("steps.0.hook_x0", keep)])
    assert model.attached == ()  # nothing is left behind by an error


def test_hooks_are_gone_after_the_block_and_added_ones_stay_until_reset(model):
    base = model(PROMPTS)

    def zero(tensor, hook):
        return torch.zeros_like(tensor)

    with model.hooks([("steps.0.hook_latent", zero)]):
        model.add_hook("steps.1.hook_latent", zero)
    assert not torch.equal(model(PROMPTS), base)
    model.reset_hooks()
    assert torch.equal(model(PROMPTS), base)


# Text


def test_loading_by_folder_and_friendly_failure(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    images = HookedTextToImage.from_pretrained(tmp_path / "model")(PROMPTS)
    assert torch.equal(images, HookedTextToImage.from_pipeline(pipe)(PROMPTS))
    with pytest.raises(FileNotFoundError, match="bundled name"):
        HookedTextToImage.from_pretrained("no-such-model")
    with pytest.raises(
        FileNotFoundError, match=r"wheel carries the micro models only.*Did you mean 'rte-m"
    ):
        HookedTextToImage.from_pretrained("rte-mikro-mini")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="model_index"):
        HookedTextToImage.from_pretrained(tmp_path / "empty")
    with pytest.raises(TypeError, match="PixArt"):
        HookedTextToImage.from_pipeline(object())
