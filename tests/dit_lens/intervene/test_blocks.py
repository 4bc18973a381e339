"""Edits of blocks equal independent PyTorch hooks on the plain pipelines, and diffusers' own layer
skipping.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch import Tensor, nn

from dit_lens.intervene.blocks import remove_blocks, scale_text, toward_identity
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import CALL, PROMPTS
from ...hooked_models.pipelines import tiny_pipeline as tiny_pixart
from ...hooked_models.tiny_pipelines import tiny_pipeline

SEEDS = [3, 4]
BLOCKS = {
    "PixArt": "transformer_blocks.1",
    "FLUX.1 true CFG": "transformer_blocks.1",
    "SD3": "transformer_blocks.1",
    "Qwen-Image": "transformer_blocks.1",
    "SANA": "transformer_blocks.1",
}
"""Pipeline → its block of layer 1."""


def opened(
    name: str,
) -> tuple[Any, Callable[..., Tensor], HookedTextToImage, Callable[[Any], Tensor]]:
    """A plain pipeline and how it draws, the hooked model around it and how that draws with
    hooks.
    """
    if name == "PixArt":
        pipe, options, call = tiny_pixart("t5"), {}, {**CALL, "guidance_scale": 4.5}
    else:
        pipe, call = tiny_pipeline(name)
        options = {
            key: value
            for key, value in call.items()
            if key not in ("num_inference_steps", "output_type")
        }
    call = {**call, "num_inference_steps": 3, "output_type": "pt"}
    model = HookedTextToImage.from_pipeline(pipe)

    def plain() -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        with torch.no_grad():
            return pipe(prompt=list(PROMPTS), generator=generators, **call).images

    def hooked(hooks: Any) -> Tensor:
        with torch.no_grad():
            return model.run_with_hooks(PROMPTS, SEEDS, 3, fwd_hooks=hooks, **options)

    return pipe, plain, model, hooked


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 1e-4)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_removed_block_hands_on_what_it_receives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, plain, model, hooked = opened(name)
    untouched = plain()
    block = pipe.transformer.get_submodule(BLOCKS[name])

    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return (
            hidden_states if name in ("PixArt", "SANA") else (encoder_hidden_states, hidden_states)
        )

    ours = hooked(remove_blocks(model, 1))
    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", forward)
        skipped = plain()
    assert close(ours, skipped)
    assert not close(ours, untouched)
    first, last = (hooked(remove_blocks(model, 1, steps=steps)) for steps in ([0], [1, 2]))
    assert not close(first, ours)
    assert not close(first, last)
    assert not close(hooked(remove_blocks(model, 1, branch="cond")), ours)


def text_scaled(pipe: Any, path: str, factor: float) -> ExitStack:
    """The text argument of a block, or of its cross-attention, multiplied, by a plain torch
    hook.
    """
    stack, block = ExitStack(), pipe.transformer.get_submodule(path)
    place = (
        getattr(block, "attn2", block) if type(block).__name__ != "JointTransformerBlock" else block
    )

    def scaled(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if "encoder_hidden_states" in kwargs:
            return args, {
                **kwargs,
                "encoder_hidden_states": factor * kwargs["encoder_hidden_states"],
            }
        return (args[0], factor * args[1], *args[2:]), kwargs

    stack.callback(place.register_forward_pre_hook(scaled, with_kwargs=True).remove)
    return stack


@pytest.mark.parametrize("factor", [0.0, 2.0])
@pytest.mark.parametrize("name", BLOCKS)
def test_text_is_scaled_for_one_block(name: str, factor: float) -> None:
    pipe, plain, model, hooked = opened(name)
    untouched = plain()
    ours = hooked(scale_text(model, 0, factor))
    # the hooked model does not call the live attention: the plain pipeline must
    if name == "PixArt":
        assert torch.equal(plain(), untouched)
    with text_scaled(pipe, BLOCKS[name].replace("1", "0"), factor):
        theirs = plain()
    assert close(ours, theirs)
    assert not close(ours, untouched)
    assert close(hooked(scale_text(model, None, 1.0)), untouched)


def test_keys_with_a_norm_are_refused() -> None:
    *_, model, _ = opened("HunyuanDiT")
    with pytest.raises(ValueError, match="pass a norm, which undoes a scaled text"):
        scale_text(model, None, 2.0)


ATTENTIONS = {
    "FLUX.1 true CFG": "transformer_blocks.1.attn",
    "SD3": "transformer_blocks.1.attn",
    "PixArt": "transformer_blocks.1.attn1",
    "Qwen-Image": "",
}
"""Pipeline → its attention of layer 1; none where diffusers' LayerSkip knows the attention
itself.
"""


@pytest.mark.parametrize("name", ATTENTIONS)
def test_full_strength_is_what_layer_skip_makes_of_scores(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, plain, model, hooked = opened(name)
    untouched = plain()
    assert torch.equal(hooked(toward_identity(model, None, 0.0)), hooked([]))
    ours = hooked(toward_identity(model, ["L1H0", "L1H1"]))
    if ATTENTIONS[name]:
        attention = pipe.transformer.get_submodule(ATTENTIONS[name])
        forward = attention.forward

        def skipping(*args: Any, **kwargs: Any) -> Any:
            with AttentionScoreSkipFunctionMode():
                return forward(*args, **kwargs)

        monkeypatch.setattr(attention, "forward", skipping)
    else:
        config = LayerSkipConfig(
            [1],
            "transformer_blocks",
            skip_attention=False,
            skip_attention_scores=True,
            skip_ff=False,
        )
        apply_layer_skip(pipe.transformer, config)
    assert close(ours, plain())
    assert not close(ours, untouched)


@pytest.mark.parametrize("name", ["FLUX.1 true CFG", "SANA", "PixArt", "PRX"])
def test_part_strength_is_an_interpolated_pattern(name: str) -> None:
    *_, model, hooked = opened(name)
    if name == "SANA":
        with pytest.raises(ValueError, match="no attn with a pattern"):
            toward_identity(model, None)
        return

    def interpolated(pattern: Tensor, hook: Any) -> Tensor:
        n_queries, n_keys = pattern.shape[2:]
        new = pattern.clone()
        new[:, 1] = 0.7 * pattern[:, 1] + 0.3 * torch.eye(n_queries, n_keys)
        return new

    theirs = hooked(
        [
            (
                lambda name: name.startswith("steps.") and ".blocks.1.attn.hook_pattern" in name,
                interpolated,
            )
        ]
    )
    assert close(hooked(toward_identity(model, "L1H1", 0.3)), theirs)
    assert not close(hooked(toward_identity(model, "L1H1", 0.6)), theirs)
