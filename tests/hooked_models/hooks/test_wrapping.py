"""Changes of a wrapped module are followed or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hooked_models import HookedTextToImage

from ..pipelines import PROMPTS, tiny_pipeline
from .zeroed import STEPS


def test_weights_edited_after_a_view_are_followed_or_refused(model):
    latents, text = model.noise(0, 2), model.encode(model.to_tokens(PROMPTS), 1.0).text
    bound, tokens = model.dit.bind(latents, 500.0, text)
    view, rows = model.at(1, PROMPTS, num_steps=STEPS)
    run = model.trajectory(PROMPTS, num_steps=STEPS)
    with torch.no_grad():
        before = bound(tokens)
        model.dit.blocks[0].cross_attn.W_V[:] = 0
        fresh, again = model.dit.bind(latents, 500.0, text)
        assert torch.equal(bound(tokens), fresh(again))
        assert not torch.allclose(bound(tokens), before)
        for stale in (lambda: view(rows), lambda: run.fork(1)):
            with pytest.raises(ValueError, match="weights have changed"):
                stale()


@pytest.mark.parametrize(
    "part", ["transformer_blocks.0.attn2.to_v", "transformer_blocks.1.ff.net.2", "proj_out"]
)
def test_a_replaced_leaf_is_an_error_that_names_it(model, part):
    wrapped = model.dit.wrapped
    parent, _, name = part.rpartition(".")
    old = wrapped.get_submodule(part)
    run = model.trajectory(PROMPTS, num_steps=STEPS)
    latents, text = model.noise(0, 2), model.encode(model.to_tokens(PROMPTS), 1.0).text
    bound, tokens = model.dit.bind(latents, 500.0, text)
    setattr(wrapped.get_submodule(parent), name, nn.Linear(old.in_features, old.out_features))
    calls = (
        lambda: model(PROMPTS, num_steps=1),
        lambda: run.fork(1),
        lambda: model.dit(latents, timestep=torch.tensor([500, 500]), encoder_hidden_states=text),
        lambda: bound(tokens),
    )
    for call in calls:
        with pytest.raises(
            ValueError,
            match=part.replace(".", r"\.")
            + " of the wrapped PixArtTransformer2DModel was replaced",
        ):
            call()


def test_torch_hooks_and_processors_that_would_be_ignored_are_refused():
    class Other:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    pipe = tiny_pipeline("t5")
    model = HookedTextToImage.from_pipeline(pipe)
    handle = pipe.transformer.transformer_blocks[0].attn2.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn2 .* torch hook"):
        model(PROMPTS, num_steps=1)
    handle.remove()
    model(PROMPTS, num_steps=1)
    pipe.transformer.transformer_blocks[1].attn1.set_processor(Other())
    for call in (
        lambda: model(PROMPTS, num_steps=1),
        lambda: HookedTextToImage.from_pipeline(pipe),
    ):
        with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1 .* processor Other"):
            call()
