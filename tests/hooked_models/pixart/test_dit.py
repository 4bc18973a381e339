"""HookedDiT against diffusers' PixArtTransformer2DModel, and the contract of its hook names."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
)
from torch import Tensor, nn

from hooked_models.pixart.dit import HookedDiT

from ..tiny import (
    GATED,
    NAMES,
    look,
    set_flags,
    shapes,
    tiny_inputs,
    tiny_transformer,
    with_state,
)

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "padded": ({}, {"pads": 2}),
    "deep": ({"num_layers": 5}, {"pads": 1}),
    "one wide head": ({"num_attention_heads": 1, "attention_head_dim": 40}, {}),
    "many narrow heads": ({"num_attention_heads": 8, "attention_head_dim": 4}, {"batch": 3}),
    "no attention bias": ({"attention_bias": False}, {"pads": 2}),
    "size conditions": ({"use_additional_conditions": True}, {"pads": 2}),
    "tall": ({}, {"height": 12, "width": 4, "pads": 2}),
    "wide, other scale": ({"interpolation_scale": 0.5}, {"height": 4, "width": 16}),
    "scale from sample_size": ({"sample_size": 192, "patch_size": 8}, {"height": 16, "width": 16}),
    "text longer than image": ({}, {"height": 4, "width": 4, "text_len": 19, "pads": 3}),
    "no variance": ({"out_channels": 4}, {}),
    "patch of one": (
        {"patch_size": 1, "in_channels": 3, "out_channels": None},
        {"height": 4, "width": 6},
    ),
    "text not projected": ({"caption_channels": None}, {"pads": 2}),
}


variants = pytest.mark.parametrize("variant", VARIANTS)


paths = pytest.mark.parametrize(
    "path", ["fused", "explicit", "text state", "head by head", "one fork"]
)


@functools.cache
def build(variant: str, dtype: torch.dtype) -> tuple[nn.Module, HookedDiT, dict[str, Any]]:
    """Shared between tests, which must leave it as they find it (``run`` sets the flags itself)."""
    config, inputs = VARIANTS[variant]
    transformer = tiny_transformer(**config).to(dtype)
    return transformer, HookedDiT(transformer), tiny_inputs(transformer, **inputs)


def run(dit: HookedDiT, path: str, inputs: dict[str, Any]) -> Tensor:
    """The output along one of the ways through the model."""
    by_head = path == "head by head"
    set_flags(dit, result=by_head, split=by_head, attn_in=path == "one fork", mlp_in=by_head)
    if path == "explicit":
        watched = re.compile(r"attn\.hook_pattern|ln\w+\.hook_scale")
        return dit.run_with_hooks(
            **inputs, fwd_hooks=[(lambda name: bool(watched.search(name)), look)]
        ).sample
    if path == "text state":
        return dit(**with_state(dit, inputs)).sample
    return dit(**inputs).sample


@paths
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)
@variants
def test_output_is_that_of_diffusers(
    variant: str, dtype: torch.dtype, tolerance: float, path: str
) -> None:
    transformer, dit, inputs = build(variant, dtype)
    with torch.no_grad():
        expected = transformer(**inputs).sample
        output = run(dit, path, inputs)
    assert output.dtype == dtype
    assert expected.std() > 0.5  # the oracle says something
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)


@paths
@pytest.mark.parametrize(
    "variant", ["padded", "size conditions", "no attention bias", "text not projected"]
)
def test_gradients_are_those_of_diffusers(variant: str, path: str) -> None:
    transformer, dit, inputs = build(variant, torch.float64)
    inputs = {
        k: v.clone().requires_grad_() if k.endswith("hidden_states") else v
        for k, v in inputs.items()
    }
    leaves = [inputs["hidden_states"], inputs["encoder_hidden_states"], *transformer.parameters()]
    direction = torch.randn(transformer(**inputs).sample.shape, dtype=torch.float64)
    expected = torch.autograd.grad((transformer(**inputs).sample * direction).sum(), leaves)
    gradients = torch.autograd.grad((run(dit, path, inputs) * direction).sum(), leaves)
    for gradient, truth in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, truth, atol=1e-10, rtol=1e-10)
    # (keys have a bias of which softmax takes no notice; everything else must have a gradient to
    # compare)
    assert sum(truth.abs().max() < 1e-12 for truth in expected) == (
        0 if variant == "no attention bias" else 4
    )


@pytest.mark.parametrize("path", ["fused", "explicit"])
@pytest.mark.parametrize("variant", ["padded", "tall"])
def test_bfloat16_is_as_close_to_float32_as_diffusers_is(variant: str, path: str) -> None:
    _, dit, inputs = build(variant, torch.float32)
    dit = copy.deepcopy(dit)
    transformer = dit.wrapped
    truth = transformer(**inputs).sample
    dit.to(torch.bfloat16)
    half = {
        key: value.bfloat16() if key.endswith("hidden_states") else value
        for key, value in inputs.items()
    }
    output = run(dit, path, half)
    assert output.dtype == torch.bfloat16
    error, accepted = (
        (sample.float() - truth).norm() for sample in (output, transformer(**half).sample)
    )
    assert error < 1.5 * accepted


def test_image_mask_and_ready_made_biases(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    image_mask = torch.ones(2, 16)
    image_mask[0, 3:7] = 0
    bias = torch.randn(2, 1, 5, dtype=torch.float64)
    masked = {**inputs, "attention_mask": image_mask, "encoder_attention_mask": bias}
    torch.testing.assert_close(
        dit(**masked).sample, dit.wrapped(**masked).sample, atol=1e-10, rtol=0
    )
    assert not torch.allclose(dit(**masked).sample, dit(**inputs).sample, atol=1e-3)


def test_stands_in_the_pipeline() -> None:
    transformer = tiny_transformer()
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    scheduler = DPMSolverMultistepScheduler()
    pipe = PixArtSigmaPipeline(None, None, vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    text, mask = torch.randn(2, 1, 5, 10), torch.tensor([[[1, 1, 1, 1, 0]], [[1, 0, 0, 0, 0]]])

    def latents() -> Tensor:
        return pipe(
            negative_prompt=None,
            prompt_embeds=text[0],
            prompt_attention_mask=mask[0],
            negative_prompt_embeds=text[1],
            negative_prompt_attention_mask=mask[1],
            num_inference_steps=3,
            use_resolution_binning=False,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images

    expected = latents()
    pipe.transformer = HookedDiT(transformer)
    torch.testing.assert_close(latents(), expected, atol=1e-4, rtol=1e-4)
    with pipe.transformer.hooks(
        [("blocks.1.hook_cross_attn_out", lambda tensor, hook: tensor * 0)]
    ):
        assert not torch.allclose(latents(), expected, atol=1e-2)


def test_what_cannot_be_run_is_refused(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    def without(key: str) -> dict[str, Any]:
        return {**inputs, key: None}

    with pytest.raises(ValueError, match="timestep"):
        dit(**without("timestep"))
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        dit(**without("encoder_hidden_states"))
    with pytest.raises(ValueError, match="cross_attention_kwargs: scale"):
        dit(**inputs, cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="aspect_ratio"):
        HookedDiT(tiny_transformer(use_additional_conditions=True).double())(**inputs)
    one_row = dit.encode_text(inputs["encoder_hidden_states"][:1])
    with pytest.raises(ValueError, match="1 rows, hidden_states 2"):
        dit(**inputs, text_state=one_row)


@pytest.mark.parametrize("variant", ["plain", "size conditions", "text not projected"])
def test_parameters_are_the_wrapped_ones_each_once(variant: str) -> None:
    transformer, dit, _ = build(variant, torch.float32)
    mine = list(dit.named_parameters(remove_duplicate=False))
    assert sorted(id(parameter) for _, parameter in mine) == sorted(
        id(p) for p in transformer.parameters()
    )
    assert not [name for name, _ in mine if name.startswith("wrapped")]


@pytest.mark.parametrize("attention_bias", [True, False])
def test_weights_are_views_in_the_layout_of_transformer_lens(attention_bias: bool) -> None:
    transformer = tiny_transformer(attention_bias=attention_bias)
    block, theirs = HookedDiT(transformer).blocks[1], transformer.transformer_blocks[1]
    for attn, original in ((block.attn, theirs.attn1), (block.cross_attn, theirs.attn2)):
        for x in "qkv":
            linear = getattr(original, f"to_{x}")
            weight, bias = getattr(attn, f"W_{x.upper()}"), getattr(attn, f"b_{x.upper()}")
            assert weight.shape == (3, 24, 8)
            assert weight.data_ptr() == linear.weight.data_ptr()
            torch.testing.assert_close(weight[1], linear.weight[8:16].T)
            assert bias.shape == (3, 8)
            if attention_bias:
                assert bias.data_ptr() == linear.bias.data_ptr()
            else:
                assert not bias.any()
        assert attn.W_O.shape == (3, 8, 24)
        assert attn.W_O.data_ptr() == original.to_out[0].weight.data_ptr()
        torch.testing.assert_close(attn.W_O[1], original.to_out[0].weight[:, 8:16].T)
        assert attn.b_O.data_ptr() == original.to_out[0].bias.data_ptr()
    w_in, w_out = theirs.ff.net[0].proj, theirs.ff.net[2]
    for view, original, shape in (
        (block.mlp.W_in, w_in.weight, (24, 96)),
        (block.mlp.b_in, w_in.bias, (96,)),
        (block.mlp.W_out, w_out.weight, (96, 24)),
        (block.mlp.b_out, w_out.bias, (24,)),
    ):
        assert view.shape == shape
        assert view.data_ptr() == original.data_ptr()


def test_training_the_wrapped_model_shows_through(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    dit = copy.deepcopy(dit)
    before = dit(**inputs).sample
    optimizer = torch.optim.SGD(dit.wrapped.parameters(), lr=0.01)
    dit.wrapped(**inputs).sample.pow(2).mean().backward()
    optimizer.step()
    after = dit(**inputs).sample
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, dit.wrapped(**inputs).sample, atol=1e-10, rtol=0)


def test_moving_one_moves_both_and_a_copy_is_independent(
    dit: HookedDiT, inputs: dict[str, Any]
) -> None:
    dit, clone = copy.deepcopy(dit), copy.deepcopy(dit)
    with torch.no_grad():
        dit.blocks[0].attn.W_O.zero_()
    torch.testing.assert_close(
        dit(**inputs).sample, dit.wrapped(**inputs).sample, atol=1e-10, rtol=0
    )
    torch.testing.assert_close(
        clone(**inputs).sample, clone.wrapped(**inputs).sample, atol=1e-10, rtol=0
    )
    assert not torch.allclose(clone(**inputs).sample, dit(**inputs).sample, atol=1e-3)

    dit.to(torch.float32)
    assert {parameter.dtype for parameter in dit.wrapped.parameters()} == {torch.float32}
    dit.wrapped.to(torch.float64)
    assert dit.dtype == dit.cfg.dtype == torch.float64


def test_an_adapter_in_place_of_a_linear_runs_but_has_no_weight_view(
    inputs: dict[str, Any],
) -> None:
    transformer = tiny_transformer().double()
    attention = transformer.transformer_blocks[0].attn1
    # as a peft layer: a module around the Linear
    attention.to_q = nn.Sequential(attention.to_q, nn.Tanh())
    dit = HookedDiT(transformer)
    torch.testing.assert_close(
        dit(**inputs).sample, transformer(**inputs).sample, atol=1e-10, rtol=0
    )
    with pytest.raises(TypeError, match="fuse the adapter"):
        _ = dit.blocks[0].attn.W_Q


def test_the_names_are_exactly_these(dit: HookedDiT) -> None:
    assert sorted(dit.hook_dict) == NAMES
    assert all(point.name == name for name, point in dit.hook_dict.items())


def test_every_name_fires_with_its_shape(full: HookedDiT, inputs: dict[str, Any]) -> None:
    _, cache = full.run_with_cache(**inputs)
    set_flags(full, attn_in=True)
    _, forked = full.run_with_cache(
        **inputs, names_filter=[name for name in NAMES if name.endswith("attn_in")]
    )
    assert {
        name: tuple(tensor.shape) for name, tensor in (*cache.items(), *forked.items())
    } == shapes(2, 2, 16, 5)


def test_gated_names_alone_do_not_fire_without_their_flag(
    dit: HookedDiT, inputs: dict[str, Any]
) -> None:
    _, cache = dit.run_with_cache(**inputs)
    assert set(cache) == set(NAMES) - set(GATED)


def edit_first_row(tensor: Tensor, hook: Any) -> None:
    """Change row 0 in place, as TransformerLens' patching does; the noise is the same in every
    call.
    """
    noise = torch.randn(
        tensor.shape[1:], generator=torch.Generator().manual_seed(0), dtype=tensor.dtype
    )
    tensor[0] += 0.1 * noise


def return_edited(tensor: Tensor, hook: Any) -> Tensor:
    """The same edit by return value, its input left alone."""
    edited = tensor.clone()
    edit_first_row(edited, hook)
    return edited


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_edits_the_output(name: str, dit: HookedDiT, inputs: dict[str, Any]) -> None:
    """Edit its own row only; in place or by return value; alike whatever the flags; and nothing of it
    stays behind.
    """
    attn_in = name.endswith("attn_in")
    set_flags(
        dit, name.endswith("_result"), name.endswith("_input"), attn_in, name.endswith("mlp_in")
    )
    with torch.no_grad():
        reused = with_state(dit, inputs)
        clean = dit(**inputs).sample
        edited = dit.run_with_hooks(**inputs, fwd_hooks=[(name, edit_first_row)]).sample
        edited_reused = dit.run_with_hooks(**reused, fwd_hooks=[(name, edit_first_row)]).sample
        after, after_reused = dit(**inputs).sample, dit(**reused).sample
        set_flags(dit, result=True, split=not attn_in, attn_in=attn_in, mlp_in=True)
        returned = dit.run_with_hooks(**inputs, fwd_hooks=[(name, return_edited)]).sample
    assert (edited - clean)[0].abs().max() > 1e-3
    torch.testing.assert_close(edited[1], clean[1], atol=1e-10, rtol=0)
    torch.testing.assert_close(edited_reused, edited, atol=1e-10, rtol=0)
    torch.testing.assert_close(returned, edited, atol=1e-10, rtol=0)
    assert torch.equal(after, clean)
    torch.testing.assert_close(after_reused, clean, atol=1e-10, rtol=0)
    assert not any(point.has_hooks() for point in dit.hook_points())


def test_backward_hooks_see_the_gradient(full: HookedDiT, inputs: dict[str, Any]) -> None:
    """Against the finite difference of a forward edit along the same direction."""
    # the position code needs no gradient, and `full` has no attn_in
    names = [
        name
        for name in NAMES
        if "blocks.0" not in name and name != "hook_pos_embed" and not name.endswith("attn_in")
    ]
    inputs = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].requires_grad_()}

    def direction(name: str, tensor: Tensor) -> Tensor:
        return torch.randn(
            tensor.shape, generator=torch.Generator().manual_seed(len(name)), dtype=tensor.dtype
        )

    slopes = dict.fromkeys(names, torch.zeros((), dtype=torch.float64))

    def project(gradient: Tensor, hook: Any) -> None:
        # a norm fires for each fork
        slopes[hook.name] = slopes[hook.name] + (gradient * direction(hook.name, gradient)).sum()

    with full.hooks(bwd_hooks=[(name, project) for name in names]):
        full(**inputs).sample.sin().sum().backward()
    step = 1e-5
    for name in names:
        with torch.no_grad():
            up, down = (
                full.run_with_hooks(
                    **inputs,
                    fwd_hooks=[(name, lambda t, hook, e=e: t + e * direction(hook.name, t))],
                )
                .sample.sin()
                .sum()
                for e in (step, -step)
            )
        torch.testing.assert_close(
            slopes[name], (up - down) / (2 * step), atol=1e-5, rtol=1e-5, msg=name
        )
        assert slopes[name].abs() > 1e-3, name


def test_modes_that_hooks_could_not_follow_are_refused():
    dit = HookedDiT(tiny_transformer())
    with pytest.raises(NotImplementedError, match=r"dtype=torch\.bfloat16"):
        dit.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="hooks fire twice"):
        dit.enable_gradient_checkpointing()
