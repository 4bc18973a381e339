"""Every family of transformers through the same assertions; a new one is covered by being listed in `families`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from dit_lens.readout.group_attention import attention_in_call
from hooked_models import ModelCheckError, UnknownHookError, families
from hooked_models.families import class_dit
from hooked_models.families.adapter import FamilyModel

from .pipelines import randomise
from .tiny import tiny_inputs, tiny_transformer

SHARED = ("q", "k", "v", "attn_scores", "pattern", "z")
KINDS = ["PixArtTransformer2DModel", "DiTTransformer2DModel", *families.SUPPORTED]


def small(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A random transformer in which every parameter matters, and inputs."""
    torch.manual_seed(0)
    if kind == "PixArtTransformer2DModel":
        transformer = tiny_transformer(num_attention_heads=2, use_additional_conditions=False)
        return transformer, tiny_inputs(transformer, pads=1)
    if kind == "DiTTransformer2DModel":
        size = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "out_channels": 8, "sample_size": 8}
        transformer = DiTTransformer2DModel(num_embeds_ada_norm=5, norm_eps=1e-3, **size)
        inputs = class_dit.inputs
    else:
        transformer, inputs = families.SUPPORTED[kind].small(), families.SUPPORTED[kind].inputs
    randomise(transformer.eval(), 0.2)
    return transformer, inputs(transformer)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    transformer, inputs = small(request.param)
    with torch.no_grad():
        return families.hook(transformer), inputs


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def sublayers(model: Any) -> list[str]:
    """Attention sublayers, by layer: "blocks.0.attn", …"""
    return [name.removesuffix(".hook_z") for name in model.hook_dict if name.endswith("hook_z")]


def test_the_output_is_the_originals_fused_and_explicit(case) -> None:
    model, inputs = case
    reference = model.wrapped(**inputs)[0]
    assert reference.std() > 0.05
    assert (model(**inputs)[0] - reference).abs().max() < 1e-5
    output, _ = model.run_with_cache(**inputs)
    assert (output[0] - reference).abs().max() < 1e-4
    assert torch.equal(model.wrapped(**inputs)[0], reference)  # the original is as it was


def test_shared_names_fire_with_their_shapes(case) -> None:
    model, inputs = case
    _, cache = model.run_with_cache(**inputs)
    assert set(cache) == set(model.names(None))
    heads, d_head = model.cfg.n_heads, model.cfg.d_head
    assert {name.split(".")[1] for name in sublayers(model)} == {str(layer) for layer in range(model.cfg.n_layers)}
    for name in sublayers(model):
        q, k, v, scores, pattern, z = (cache[f"{name}.hook_{x}"] for x in SHARED)
        assert q.shape == z.shape == (2, q.shape[1], heads, d_head)
        assert k.shape == v.shape == (2, k.shape[1], heads, d_head)
        assert scores.shape == pattern.shape == (2, heads, q.shape[1], k.shape[1])


def test_attention_is_what_its_hooks_say(case) -> None:
    model, inputs = case
    _, cache = model.run_with_cache(**inputs)
    for name in sublayers(model):
        q, k, v, scores, pattern, z = (cache[f"{name}.hook_{x}"] for x in SHARED)
        products = torch.einsum("bqhd,bkhd->bhqk", q, k) * model.cfg.d_head**-0.5
        seen = scores > -1000
        assert torch.allclose(products[seen], scores[seen], atol=1e-4)
        assert torch.allclose(scores.softmax(-1), pattern, atol=1e-6)
        assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, atol=1e-5)


def test_every_hooks_return_value_is_used(case) -> None:
    model, inputs = case
    reference = model(**inputs)[0]
    for name in [
        f"{sublayer}.hook_{x}" for sublayer in sublayers(model)[:2] for x in ("q", "k", "v", "attn_scores", "pattern", "z")
    ]:

        def scramble(tensor: Tensor, hook: Any) -> Tensor:
            return tensor + torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))

        assert (model.run_with_hooks(fwd_hooks=[(name, scramble)], **inputs)[0] - reference).abs().max() > 1e-4, name


def outputs_of_heads(model: Any, sublayer: str) -> list[Tensor]:
    """The weights that read z, [d_out, head · d_head]; what the test below sets to zero is independent of every hook."""
    if not isinstance(model, FamilyModel):
        return [model.get_submodule(sublayer).to_out.weight]
    attentions = dict(zip(sublayers(model), (attention for attention, _ in model._attentions), strict=True))
    attention: Any = attentions[sublayer]
    if not hasattr(attention, "to_out") or attention.to_out is None:  # FLUX's single blocks project attention and MLP at once
        block = model.wrapped.single_transformer_blocks[int(sublayer.split(".")[1]) - len(model.wrapped.transformer_blocks)]
        return [block.proj_out.weight]
    added = getattr(attention, "to_add_out", None)
    return [attention.to_out[0].weight] + ([] if added is None else [added.weight])


def test_a_head_that_is_silenced_is_a_head_without_output_weights(case) -> None:
    model, inputs = case
    for sublayer in (sublayers(model)[0], sublayers(model)[-1]):

        def silence(z: Tensor, hook: Any) -> None:
            z[:, :, 1] = 0

        ours = model.run_with_hooks(fwd_hooks=[(f"{sublayer}.hook_z", silence)], **inputs)[0]
        d_head, weights = model.cfg.d_head, outputs_of_heads(model, sublayer)
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            weight[:, d_head : 2 * d_head] = 0
        theirs = model.wrapped(**inputs)[0]
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
        assert (ours - theirs).abs().max() < 1e-5
        assert (ours - model(**inputs)[0]).abs().max() > 1e-4


def test_text_stands_where_the_family_says(case) -> None:
    model, inputs = case
    if "encoder_hidden_states" not in inputs:
        return
    sublayer = "cross_attn" if any(".cross_attn." in name for name in model.hook_dict) else "attn"
    name = f"blocks.0.{sublayer}.hook_k"

    def keys(**changes: Tensor) -> Tensor:
        return model.run_with_cache(**inputs | changes, names_filter=name)[1][name]

    text = inputs["encoder_hidden_states"]
    by_text = (keys() != keys(encoder_hidden_states=-text)).any(dim=(0, 2, 3))
    by_image = (keys() != keys(hidden_states=-inputs["hidden_states"])).any(dim=(0, 2, 3))
    n_image = len(by_text) - text.shape[1]
    assert by_text.tolist() == [False] * n_image + [True] * text.shape[1]
    assert by_image.tolist() == [True] * n_image + [False] * text.shape[1]


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_a_synopsis_is_the_patterns_group_sums_and_makes_no_pattern(case, reduce) -> None:
    model, inputs = case
    _, cache = model.run_with_cache(**inputs)
    for kind in dict.fromkeys(name.split(".")[2] for name in sublayers(model)):
        first = next(name for name in sublayers(model) if name.endswith(f".{kind}"))
        n_q, n_k = cache[f"{first}.hook_pattern"].shape[2:]
        generator = torch.Generator().manual_seed(0)
        queries, keys = ((torch.rand(2, n, 3, generator=generator) > 0.5).float() for n in (n_q, n_k))
        with pytest.MonkeyPatch.context() as patch:
            if reduce == "sum" and n_k > model.cfg.d_head:  # a smaller pattern is smaller than the queries
                patch.setattr(Tensor, "softmax", lambda *args, **kwargs: pytest.fail("a pattern was made"))
            found = attention_in_call(model, inputs, queries, keys, kind, reduce)
        for layer in range(model.cfg.n_layers):
            values = found.sel(layer=layer).values if "layer" in found.coords else found.values[:, layer]
            if f"blocks.{layer}.{kind}" not in sublayers(model):
                assert torch.from_numpy(values).isnan().all()
                continue
            pattern = cache[f"blocks.{layer}.{kind}.hook_pattern"]
            pairs = queries[:, None, :, None, :, None] * keys[:, None, None, :, None, :]
            each = pattern[..., None, None] * pairs
            expected = each.sum(dim=(2, 3)) if reduce == "sum" else each.amax(dim=(2, 3))
            assert torch.allclose(torch.from_numpy(values), expected, atol=1e-4)


def test_an_error_inside_leaves_nothing_behind(case) -> None:
    model, inputs = case
    reference = model.wrapped(**inputs)[0]

    def fail(tensor: Tensor, hook: Any) -> None:
        raise RuntimeError("from a hook")

    with pytest.raises(RuntimeError, match="from a hook"):
        model.run_with_hooks(fwd_hooks=[(f"{sublayers(model)[0]}.hook_z", fail)], **inputs)
    assert torch.equal(model.wrapped(**inputs)[0], reference)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.wrapped.modules())


def test_weights_are_the_wrapped_ones_and_gradients_reach_them(case) -> None:
    model, inputs = case
    parameters = {id(parameter) for parameter in model.wrapped.parameters()}
    assert {id(parameter) for parameter in model.parameters()} == parameters
    with torch.enable_grad():
        model.run_with_hooks(fwd_hooks=[(f"{sublayers(model)[0]}.hook_pattern", lambda p, hook: p)], **inputs)[0].sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert max(float(grad.abs().max()) for grad in grads) > 0
    model.zero_grad()


def test_it_stands_in_its_pipeline() -> None:
    transformer, _ = small("FluxTransformer2DModel")
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": torch.randn(1, 5, 12), "pooled_prompt_embeds": torch.randn(1, 6)}
    call = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "latent", "latents": torch.randn(1, 16, 4), **text}
    reference = pipe(**call).images
    pipe.transformer = model = families.hook(transformer)
    steps = []
    with model.hooks([("blocks.2.attn.hook_pattern", lambda pattern, hook: steps.append(pattern.shape))]):
        images = pipe(**call).images
    assert steps == [(1, 2, 21, 21)] * 2
    assert (images - reference).abs().max() < 1e-5


# What is refused


def test_sana_says_why_its_self_attention_has_no_pattern() -> None:
    transformer, _ = small("SanaTransformer2DModel")
    model = families.hook(transformer)
    with pytest.raises(UnknownHookError, match=r"SANA has no 'blocks.0.attn.hook_pattern': .* linear \(ReLU"):
        model.canonical_name("blocks.0.attn.hook_pattern")
    assert not any(".attn." in name for name in model.hook_dict)


def test_unsupported_families_are_named_with_the_reason() -> None:
    for cls in (Lumina2Transformer2DModel, WanTransformer3DModel, CogVideoXTransformer3DModel):
        assert cls.__name__ in families.UNSUPPORTED
        with pytest.raises(ValueError, match=f"{cls.__name__} is not supported: .* Known are PixArtTransformer2DModel"):
            families.hook(cls.__new__(cls))
    with pytest.raises(ValueError, match="HunyuanDiT2DModel is of no known family"):
        families.hook(HunyuanDiT2DModel.__new__(HunyuanDiT2DModel))
    assert not {*families.UNSUPPORTED} & {*families.SUPPORTED, *families.NATIVE}


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("FluxTransformer2DModel", {"text": "after"}, "text is not at the last 5 positions of blocks.0.attn.hook_k"),
        ("SD3Transformer2DModel", {"text": "before"}, "text is not at the last 5 positions"),
        ("SanaTransformer2DModel", {"attentions": {"attn": "attn1", "cross_attn": "attn2"}}, r"blocks.0.attn.hook_q \(0 times\)"),
    ],
)
def test_an_adapter_that_is_wrong_fails_its_check(monkeypatch: pytest.MonkeyPatch, kind, wrong, message) -> None:
    transformer, _ = small(kind)
    monkeypatch.setitem(families.SUPPORTED, kind, replace(families.SUPPORTED[kind], **wrong))
    with pytest.raises(ModelCheckError, match=message) as error:
        families.hook(transformer)
    assert f"{kind} failed its checks with diffusers" in str(error.value)


def test_class_dit_refuses_what_it_has_not() -> None:
    transformer, inputs = small("DiTTransformer2DModel")
    model = families.hook(transformer)
    with pytest.raises(ValueError, match="pass timestep and class_labels"):
        model(inputs["hidden_states"])
    with pytest.raises(TypeError, match="not PixArtTransformer2DModel"):
        families.HookedClassDiT(tiny_transformer())
    model.train()
    with pytest.raises(ValueError, match=r"call .eval\(\)"):
        model(**inputs)


def test_class_dit_has_a_name_for_every_tensor_and_its_writes_add_up() -> None:
    transformer, inputs = small("DiTTransformer2DModel")
    model = families.hook(transformer)
    _, cache = model.run_with_cache(**inputs)
    x = cache["hook_embed"] + cache["hook_pos_embed"]
    for layer in range(2):
        assert torch.allclose(cache["resid_pre", layer], x, atol=1e-6)
        x = x + cache["attn_out", layer] + cache["mlp_out", layer]
        assert torch.allclose(cache["resid_post", layer], x, atol=1e-5)
        for part in ("shift", "scale", "gate"):
            assert cache[f"blocks.{layer}.adaln.hook_{part}_mlp"].shape == (2, 1, 16)
    assert torch.allclose(cache.decompose_resid().sum(0), x, atol=1e-5)  # TransformerLens' own, over both sublayers
