"""HookedDiT against diffusers' PixArtTransformer2DModel, and the contract of its hook names."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor, nn
from transformer_lens import ActivationCache

from hooked_models.hooks.module import UnknownHookError
from hooked_models.pixart.dit import DiTConfig, HookedDiT, TextState

from ..tiny import look, tiny_inputs, tiny_transformer

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


def set_flags(
    dit: HookedDiT,
    result: bool = False,
    split: bool = False,
    attn_in: bool = False,
    mlp_in: bool = False,
) -> None:
    """Every flag at once; the two forks exclude each other, so both go off first."""
    dit.set_use_split_qkv_input(False)
    dit.set_use_attn_in(False)
    dit.set_use_attn_result(result)
    dit.set_use_split_qkv_input(split)
    dit.set_use_attn_in(attn_in)
    dit.set_use_hook_mlp_in(mlp_in)


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


def with_state(dit: HookedDiT, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the text replaced by its state."""
    rest = {key: value for key, value in inputs.items() if not key.startswith("encoder_")}
    return {
        **rest,
        "text_state": dit.encode_text(
            inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
        ),
    }


@pytest.fixture(scope="module")
def model() -> HookedDiT:
    return HookedDiT(tiny_transformer().double())


@pytest.fixture
def inputs(model: HookedDiT) -> dict[str, Any]:
    return tiny_inputs(model.wrapped, pads=2)


@pytest.fixture
def dit(model: HookedDiT) -> HookedDiT:
    """With every flag off. The weights are shared between tests: train a copy."""
    model.reset_hooks(including_permanent=True)
    set_flags(model)
    return model


@pytest.fixture
def full(dit: HookedDiT) -> HookedDiT:
    """With every flag on, so that every hook fires but `attn_in`, which excludes the inputs of q, k
    and v.
    """
    set_flags(dit, result=True, split=True, mlp_in=True)
    return dit


# The function


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


def test_attention_is_fused_until_somebody_looks(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    with mock.patch.object(
        F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention
    ) as fused:
        dit(**inputs)
        assert fused.call_count == 4
        dit.run_with_hooks(**inputs, fwd_hooks=[("blocks.0.attn.hook_pattern", look)])
        assert fused.call_count == 4 + 3
        with dit.hooks(bwd_hooks=[("blocks.1.cross_attn.hook_attn_scores", look)]):
            dit(**inputs)
        assert fused.call_count == 4 + 3 + 3
        dit.run_with_hooks(**inputs, fwd_hooks=[(lambda name: name.endswith("hook_z"), look)])
        assert fused.call_count == 4 + 3 + 3 + 4


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


@pytest.mark.parametrize(
    "option",
    [
        {"dropout": 0.1},
        {"activation_fn": "geglu"},
        {"norm_elementwise_affine": True},
        {"cross_attention_dim": None},
    ],
)
def test_other_architectures_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        HookedDiT(tiny_transformer(**option))


# The weights


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


def test_config_is_read_from_diffusers() -> None:
    dit = HookedDiT(
        tiny_transformer(num_layers=1, attention_bias=False, sample_size=128, norm_eps=1e-5)
    )
    cfg = dit.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_model, cfg.d_mlp) == (1, 3, 8, 24, 96)
    assert (cfg.n_ctx, cfg.d_text, cfg.in_channels, cfg.out_channels, cfg.patch_size) == (
        4096,
        10,
        4,
        8,
        2,
    )
    assert (cfg.sample_size, cfg.interpolation_scale, cfg.use_additional_conditions, cfg.eps) == (
        128,
        2.0,
        True,
        1e-5,
    )
    assert (cfg.device, cfg.dtype, cfg.use_attn_result, cfg.use_split_qkv_input) == (
        "cpu",
        torch.float32,
        False,
        False,
    )
    # TransformerLens would say cuda where there is one
    assert DiTConfig.from_transformer(dit.wrapped).device == "cpu"
    assert dit.config is dit.wrapped.config
    assert dit.device == dit.wrapped.device
    assert not any(module.training for module in dit.modules())


# The names


def shapes(n_layers: int, b: int, pos: int, text: int) -> dict[str, tuple[int, ...]]:
    """Every name of design.md's section "Names" within one denoiser call, with its shape, for the
    tiny transformer.
    """
    heads, d_head, d, d_text = 3, 8, 24, 10
    named: dict[str, tuple[int, ...]] = {
        "hook_embed": (b, pos, d),
        "hook_pos_embed": (b, pos, d),
        "hook_t_emb": (b, d),
        "hook_t_mod": (b, 6 * d),
        "hook_text": (b, text, d_text),
        "hook_caption": (b, text, d),
        "ln_final.hook_scale": (b, pos, 1),
        "ln_final.hook_normalized": (b, pos, d),
    }
    residual = (
        "resid_pre resid_mid resid_mid_cross resid_post attn_out cross_attn_out mlp_out "
        "attn_out_pre_gate mlp_out_pre_gate"
    )
    for layer in range(n_layers):
        block: dict[str, tuple[int, ...]] = {
            f"hook_{name}": (b, pos, d) for name in [*residual.split(), "mlp_in"]
        }
        block["hook_attn_in"] = block["hook_cross_attn_in"] = (b, pos, heads, d)
        for name in ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"):
            block[f"adaln.hook_{name}"] = (b, 1, d)
        for ln in ("ln1", "ln2"):
            block[f"{ln}.hook_scale"] = (b, pos, 1)
            block[f"{ln}.hook_normalized"] = (b, pos, d)
        for attn, keys in (("attn", pos), ("cross_attn", text)):
            for name, length in (("q", pos), ("k", keys), ("v", keys)):
                block[f"{attn}.hook_{name}"] = (b, length, heads, d_head)
                block[f"{attn}.hook_{name}_input"] = (b, length, heads, d)
            block[f"{attn}.hook_z"] = (b, pos, heads, d_head)
            block[f"{attn}.hook_result"] = (b, pos, heads, d)
            block[f"{attn}.hook_attn_scores"] = block[f"{attn}.hook_pattern"] = (
                b,
                heads,
                pos,
                keys,
            )
        block["mlp.hook_pre"] = block["mlp.hook_post"] = (b, pos, 4 * d)
        named |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return named


NAMES = sorted(shapes(2, 2, 16, 5))
GATED = [name for name in NAMES if name.endswith(("_result", "_input", "_in"))]


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
    """Of its own row only; in place or by return value; alike whatever the flags; and nothing of it
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


# What the names mean


def test_embedding_and_position_code_add_up(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    _, cache = dit.run_with_cache(**inputs)
    patches = dit.wrapped.pos_embed.proj(inputs["hidden_states"]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cache["hook_embed"], patches)
    assert torch.equal(
        cache["hook_embed"] + cache["hook_pos_embed"], cache["blocks.0.hook_resid_pre"]
    )
    assert torch.equal(cache["hook_text"], inputs["encoder_hidden_states"])
    # else each Linear that reads it takes the slow path
    assert cache["blocks.1.hook_resid_post"].is_contiguous()


@pytest.mark.parametrize("flags", [False, True], ids=["flags off", "flags on"])
def test_what_a_block_adds_is_its_residual_difference_exactly(
    flags: bool, dit: HookedDiT, inputs: dict[str, Any]
) -> None:
    dit.set_use_attn_result(flags)
    dit.set_use_split_qkv_input(flags)
    _, cache = dit.run_with_cache(**inputs)
    for layer in range(2):
        at = {
            name.removeprefix(f"blocks.{layer}."): tensor
            for name, tensor in cache.items()
            if f".{layer}." in name
        }
        mid = at["hook_resid_pre"] + at["hook_attn_out"]
        mid_cross = mid + at["hook_cross_attn_out"]
        assert torch.equal(at["hook_resid_mid"], mid)
        assert torch.equal(at["hook_resid_mid_cross"], mid_cross)
        assert torch.equal(at["hook_resid_post"], mid_cross + at["hook_mlp_out"])
        torch.testing.assert_close(
            at["hook_attn_out"], at["adaln.hook_gate_msa"] * at["hook_attn_out_pre_gate"]
        )
        assert torch.equal(
            at["hook_mlp_out"], at["adaln.hook_gate_mlp"] * at["hook_mlp_out_pre_gate"]
        )
    assert torch.equal(cache["blocks.1.hook_resid_pre"], cache["blocks.0.hook_resid_post"])


def test_results_of_the_heads_are_residual_contributions(
    full: HookedDiT, inputs: dict[str, Any]
) -> None:
    _, cache = full.run_with_cache(**inputs)
    for layer, block in enumerate(full.blocks):
        at = {
            name.removeprefix(f"blocks.{layer}."): tensor
            for name, tensor in cache.items()
            if f".{layer}." in name
        }
        gate = at["adaln.hook_gate_msa"]
        torch.testing.assert_close(
            at["attn.hook_result"].sum(2) + gate * block.attn.b_O, at["hook_attn_out"]
        )
        torch.testing.assert_close(
            at["cross_attn.hook_result"].sum(2) + block.cross_attn.b_O, at["hook_cross_attn_out"]
        )
        one_head = gate * (at["attn.hook_z"][:, :, 2] @ block.attn.W_O[2])
        torch.testing.assert_close(at["attn.hook_result"][:, :, 2], one_head)


def test_edits_before_the_gate_and_to_results_add_up(
    full: HookedDiT, inputs: dict[str, Any]
) -> None:
    before, delta = (
        torch.randn(2, 16, 24, dtype=torch.float64),
        torch.randn(2, 16, 3, 24, dtype=torch.float64),
    )
    edits = [
        ("blocks.1.hook_attn_out_pre_gate", lambda tensor, hook: before),
        ("blocks.1.attn.hook_result", lambda tensor, hook: tensor + delta),
    ]
    with full.hooks(edits):
        _, cache = full.run_with_cache(**inputs)
    expected = cache["blocks.1.adaln.hook_gate_msa"] * before + delta.sum(2)
    torch.testing.assert_close(cache["blocks.1.hook_attn_out"], expected)


def test_attention_is_what_its_hooks_say(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    _, cache = dit.run_with_cache(**inputs)
    for attn, weights in (("attn", dit.blocks[0].attn), ("cross_attn", dit.blocks[0].cross_attn)):
        at = {
            x: cache[f"blocks.0.{attn}.hook_{x}"]
            for x in ("q", "k", "v", "attn_scores", "pattern", "z")
        }
        scores = torch.einsum("bqhd,bkhd->bhqk", at["q"], at["k"]) / 8**0.5
        if attn == "cross_attn":
            scores = scores + (inputs["encoder_attention_mask"][:, None, None] - 1.0) * 10000
            reads = cache["blocks.0.hook_resid_mid"]  # no norm, no modulation
        else:
            shift, scale = (
                cache["blocks.0.adaln.hook_shift_msa"],
                cache["blocks.0.adaln.hook_scale_msa"],
            )
            reads = cache["blocks.0.ln1.hook_normalized"] * (1 + scale) + shift
        torch.testing.assert_close(at["attn_scores"], scores)
        torch.testing.assert_close(at["pattern"], scores.softmax(-1))
        torch.testing.assert_close(at["z"], torch.einsum("bhqk,bkhd->bqhd", at["pattern"], at["v"]))
        torch.testing.assert_close(
            at["q"], torch.einsum("bpd,hde->bphe", reads, weights.W_Q) + weights.b_Q
        )
    assert not cache["blocks.0.cross_attn.hook_pattern"][1, :, :, 2:].any()  # row 1 has 3 pads


def test_layer_norm_splits_into_scale_and_direction(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    _, cache = dit.run_with_cache(**inputs)
    for ln, reads in (
        ("blocks.0.ln1", "blocks.0.hook_resid_pre"),
        ("ln_final", "blocks.1.hook_resid_post"),
    ):
        centred = cache[reads] - cache[reads].mean(-1, keepdim=True)
        torch.testing.assert_close(
            cache[f"{ln}.hook_scale"].squeeze(-1), (centred.pow(2).mean(-1) + 1e-6).sqrt()
        )
        torch.testing.assert_close(
            cache[f"{ln}.hook_normalized"] * cache[f"{ln}.hook_scale"], centred
        )


def test_forks_are_the_residual_stream_before_the_norm(
    full: HookedDiT, inputs: dict[str, Any]
) -> None:
    _, cache = full.run_with_cache(**inputs)
    for fork, source in (
        ("attn.hook_q_input", "blocks.1.hook_resid_pre"),
        ("attn.hook_k_input", "blocks.1.hook_resid_pre"),
        ("attn.hook_v_input", "blocks.1.hook_resid_pre"),
        ("cross_attn.hook_q_input", "blocks.1.hook_resid_mid"),
        ("cross_attn.hook_k_input", "hook_caption"),
        ("cross_attn.hook_v_input", "hook_caption"),
    ):
        assert all(
            torch.equal(head, cache[source]) for head in cache[f"blocks.1.{fork}"].unbind(2)
        ), fork


def test_an_edited_fork_reaches_one_head_and_one_role(
    full: HookedDiT, inputs: dict[str, Any]
) -> None:
    def edit(tensor: Tensor, hook: Any) -> None:
        tensor[:, :, 1] *= 2
        tensor[:, :, 1, 0] += 1

    _, clean = full.run_with_cache(**inputs)
    for attn in ("attn", "cross_attn"):
        with full.hooks([(f"blocks.0.{attn}.hook_k_input", edit)]):
            _, cache = full.run_with_cache(**inputs)
        changed = cache[f"blocks.0.{attn}.hook_k"] != clean[f"blocks.0.{attn}.hook_k"]
        assert changed[:, :, 1].any()
        assert not changed[:, :, [0, 2]].any()
        for role in ("q", "v"):
            assert torch.equal(
                cache[f"blocks.0.{attn}.hook_{role}"], clean[f"blocks.0.{attn}.hook_{role}"]
            )


@pytest.mark.parametrize("flags", [False, True], ids=["flags off", "flags on"])
def test_a_norm_can_be_frozen_with_a_cached_scale(
    flags: bool, dit: HookedDiT, inputs: dict[str, Any]
) -> None:
    """One hook function serves the stream and its forks: the scale has no head axis in either."""
    _, clean = dit.run_with_cache(**inputs)
    dit.set_use_split_qkv_input(flags)
    frozen = [("blocks.0.ln1.hook_scale", lambda tensor, hook: clean["blocks.0.ln1.hook_scale"])]
    doubled = [("blocks.0.hook_resid_pre", lambda tensor, hook: 2 * tensor)]
    with dit.hooks(frozen + doubled):
        _, cache = dit.run_with_cache(**inputs)
    torch.testing.assert_close(
        cache["blocks.0.ln1.hook_normalized"],
        2 * clean["blocks.0.ln1.hook_normalized"],
        atol=1e-10,
        rtol=0,
    )


# Text states


def test_a_text_state_is_what_the_hooks_see(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    state = with_state(dit, inputs)["text_state"]
    assert isinstance(state, TextState)
    _, cache = dit.run_with_cache(**inputs)
    torch.testing.assert_close(state.caption, cache["hook_caption"])
    for layer, (k, v) in enumerate(state.keys_values):
        torch.testing.assert_close(k, cache[f"blocks.{layer}.cross_attn.hook_k"])
        torch.testing.assert_close(v, cache[f"blocks.{layer}.cross_attn.hook_v"])


def test_a_text_state_saves_the_text_projections(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    dit = copy.deepcopy(dit)
    reused = with_state(dit, inputs)
    calls: list[nn.Module] = []
    for module in (dit.wrapped.caption_projection, dit.wrapped.transformer_blocks[1].attn2.to_k):
        module.register_forward_hook(lambda module, args, output: calls.append(module))
    dit(**reused)
    assert not calls
    dit.run_with_hooks(**reused, fwd_hooks=[("blocks.0.cross_attn.hook_k", look)])
    assert not calls
    dit.run_with_hooks(**reused, fwd_hooks=[("hook_caption", look)])
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["hook_text", "hook_caption", "blocks.1.cross_attn.hook_v_input"])
def test_text_hooks_are_noticed(name: str, full: HookedDiT) -> None:
    assert not full.text_hooks_active
    with full.hooks([(name, look)]):
        assert full.text_hooks_active
    with full.hooks([("blocks.1.cross_attn.hook_q_input", look), ("blocks.0.hook_cross_k", look)]):
        assert not full.text_hooks_active


# Names as input


def attach(dit: HookedDiT, how: str, name: str, inputs: dict[str, Any]) -> None:
    if how == "hooks":
        with dit.hooks([(name, look)]):
            pass
    elif how == "bwd_hooks":
        with dit.hooks(bwd_hooks=[(name, look)]):
            pass
    elif how == "run_with_hooks":
        dit.run_with_hooks(**inputs, fwd_hooks=[(name, look)])
    elif how == "add_hook":
        dit.add_hook(name, look)
    elif how == "add_perma_hook":
        dit.add_perma_hook(name, look)
    elif how == "add_caching_hooks":
        dit.add_caching_hooks(name)
    elif how == "run_with_cache":
        dit.run_with_cache(**inputs, names_filter=name)
    else:
        dit.run_with_cache(
            **inputs, names_filter={"tuple": (name,), "list": [name], "set": {name}}[how]
        )


ways = pytest.mark.parametrize(
    "how",
    [
        *("hooks", "bwd_hooks", "run_with_hooks", "add_hook", "add_perma_hook"),
        *("add_caching_hooks", "run_with_cache", "tuple", "list", "set"),
    ],
)


def test_a_flag_stays_on_while_a_hook_needs_it(full: HookedDiT) -> None:
    with (
        full.hooks([("blocks.0.hook_cross_result", look)]),
        pytest.raises(ValueError, match="would silently stop firing"),
    ):
        full.set_use_attn_result(False)
    with (
        full.hooks(bwd_hooks=[("blocks.0.hook_mlp_in", look)]),
        pytest.raises(ValueError, match="would silently stop firing"),
    ):
        full.set_use_hook_mlp_in(False)
    set_flags(full)


@ways
@pytest.mark.parametrize(
    ("name", "setter"),
    [
        ("blocks.0.attn.hook_result", "set_use_attn_result"),
        ("blocks.1.hook_cross_result", "set_use_attn_result"),
        ("blocks.1.cross_attn.hook_q_input", "set_use_split_qkv_input"),
        ("blocks.1.hook_cross_attn_in", "set_use_attn_in"),
        ("blocks.0.hook_mlp_in", "set_use_hook_mlp_in"),
    ],
)
def test_a_gated_name_is_refused_until_its_flag_is_set(
    how: str, name: str, setter: str, dit: HookedDiT, inputs: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=rf"cfg\.{setter[4:]} is False: call {setter}\(True\)"):
        attach(dit, how, name, inputs)
    assert not any(point.has_hooks() for point in dit.hook_points())
    getattr(dit, setter)(True)
    attach(dit, how, name, inputs)


@ways
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocks.1.attn.hook_pattren", "blocks.1.attn.hook_pattern"),
        ("blocks.7.cross_attn.hook_z", "blocks.1.cross_attn.hook_z"),
        ("blocks.0.hook_cros_v", "blocks.0.hook_cross_v"),
        ("blocks.0.attn", "blocks.0.attn.hook_v"),
    ],
)
def test_a_misspelt_name_is_an_error_that_suggests_the_nearest(
    how: str, name: str, nearest: str, dit: HookedDiT, inputs: dict[str, Any]
) -> None:
    with pytest.raises(UnknownHookError) as caught:
        attach(dit, how, name, inputs)
    message = str(caught.value)
    assert message.startswith(f"no hook is called '{name}'; did you mean 'blocks.")
    # those have several names as near
    if name != "blocks.0.attn" and not name.startswith("blocks.7"):
        assert message.endswith(f"'{nearest}'?")
    assert not any(point.has_hooks() for point in dit.hook_points())


@pytest.mark.parametrize(
    ("alias", "name"),
    [(f"hook_cross_{x}", f"cross_attn.hook_{x}") for x in ("q", "k", "v", "z", "pattern", "result")]
    + [("hook_resid_mid2", "hook_resid_mid_cross")],
)
def test_aliases(alias: str, name: str, full: HookedDiT, inputs: dict[str, Any]) -> None:
    alias, name = f"blocks.1.{alias}", f"blocks.1.{name}"
    assert alias not in full.hook_dict
    assert full.mod_dict[alias] is full.hook_dict[name]
    assert full.canonical_name(alias) == name
    seen: list[str] = []
    edited = full.run_with_hooks(
        **inputs, fwd_hooks=[(alias, lambda tensor, hook: seen.append(hook.name) or tensor * 2)]
    )
    assert seen == [name]
    assert not torch.allclose(edited.sample, full(**inputs).sample, atol=1e-3)
    assert set(full.run_with_cache(**inputs, names_filter=alias)[1]) == {name}


def test_predicates_pass_over_gated_names_unless_there_is_nothing_else(
    dit: HookedDiT, inputs: dict[str, Any]
) -> None:
    seen: list[str] = []
    dit.run_with_hooks(
        **inputs, fwd_hooks=[(lambda name: True, lambda tensor, hook: seen.append(hook.name))]
    )
    assert sorted(seen) == sorted(set(NAMES) - set(GATED))
    for attach_predicate in (
        dit.add_hook,
        lambda where, hook: dit.run_with_hooks(**inputs, fwd_hooks=[(where, hook)]),
    ):
        with pytest.raises(ValueError, match=r"set_use_attn_result\(True\)"):
            attach_predicate(lambda name: name.endswith("hook_result"), look)


def test_names_filter_selects(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    wanted = {"blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"}
    for names_filter in (list(wanted), tuple(wanted), wanted, wanted.__contains__):
        output, cache = dit.run_with_cache(**inputs, names_filter=names_filter)
        assert isinstance(cache, ActivationCache)
        assert set(cache) == wanted
    assert set(dit.run_with_cache(**inputs, names_filter="hook_embed")[1]) == {"hook_embed"}
    assert torch.equal(output.sample, dit(**inputs).sample)
    assert not any(point.has_hooks() for point in dit.hook_points())


def test_cache_options(dit: HookedDiT, inputs: dict[str, Any]) -> None:
    one = {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    _, cache = dit.run_with_cache(**one, remove_batch_dim=True)
    assert not cache.has_batch_dim
    assert cache["pattern", 1].shape == (3, 16, 16)
    assert type(dit.run_with_cache(**inputs, return_cache_object=False)[1]) is dict
    with pytest.raises(ValueError, match="exclude each other"):
        set_flags(dit, split=True, attn_in=True)

    class MyCache(ActivationCache):
        pass

    with mock.patch.object(HookedDiT, "cache_class", MyCache):
        assert isinstance(dit.run_with_cache(**inputs)[1], MyCache)


# diffusers' ModelMixin


def test_weights_and_configuration_are_the_wrapped_modules(tmp_path):
    dit = HookedDiT(tiny_transformer())
    dit.save_pretrained(tmp_path)
    saved = PixArtTransformer2DModel.from_pretrained(tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, dit.wrapped.state_dict()[name])
    dit.register_to_config(note="mine")
    assert dit.config["note"] == dit.wrapped.config["note"] == "mine"


def test_modes_that_hooks_could_not_follow_are_refused():
    dit = HookedDiT(tiny_transformer())
    with pytest.raises(NotImplementedError, match=r"dtype=torch\.bfloat16"):
        dit.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="hooks fire twice"):
        dit.enable_gradient_checkpointing()
