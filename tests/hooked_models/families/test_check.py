"""Kernel backends, the cost of a model that nobody watches, and what the check at load refuses."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dit_lens import Intervention, sweep
from hooked_models import ModelCheckError, families
from hooked_models.families.blocks import Attention, Blocks, one_stream, two_streams
from hooked_models.families.layout import ids, in_order, patches
from hooked_models.families.taps import SilentHookError

from ..pipelines import randomise

FLUX = "FluxTransformer2DModel"


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    transformer = families.SUPPORTED[kind].small().eval()
    randomise(transformer, 0.2)
    return transformer


@pytest.fixture(autouse=True)
def _no_grad():
    # set_attention_backend also sets the default of all models
    with torch.no_grad(), attention_backend("native"):
        yield


# Backends


def zeroed(model: Any, inputs: dict[str, Any], name: str = "blocks.0.attn.hook_z") -> Tensor:
    return model.run_with_hooks(fwd_hooks=[(name, lambda x, hook: torch.zeros_like(x))], **inputs)[
        0
    ]


def test_watched_attentions_run_natively_and_the_others_as_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = families.hook(small(FLUX))
    inputs = model.family.inputs(model.wrapped)
    clean = model(**inputs)[0]
    expected = zeroed(model, inputs)
    model.wrapped.set_attention_backend("_native_math")
    used: Counter[str] = Counter()
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    for name in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
        kernel = registry._backends[name]
        monkeypatch.setitem(
            registry._backends,
            name,
            lambda *a, k=kernel, n=name, **kw: (used.update([n.value]), k(*a, **kw))[1],
        )
    found = zeroed(model, inputs)
    assert used == {"native": 1, "_native_math": 2}
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, clean, atol=1e-3)
    backends = {
        m.processor._attention_backend for m in model.wrapped.modules() if hasattr(m, "processor")
    }
    assert backends == {AttentionBackendName._NATIVE_MATH}


def test_another_models_backend_does_not_silence_hooks() -> None:
    """The setting is global: `set_attention_backend` on any model changes the default of all."""
    model = families.hook(small(FLUX))
    inputs = model.family.inputs(model.wrapped)
    expected = zeroed(model, inputs)
    with attention_backend("flex"):  # a kernel that is not torch's scaled_dot_product_attention
        found = zeroed(model, inputs)
        again = families.hook(small(FLUX))  # the check at load, too
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(zeroed(again, inputs), expected, atol=1e-4)


def test_a_hook_that_should_have_fired_and_did_not_is_an_error() -> None:
    model = families.hook(small(FLUX))
    inputs = model.family.inputs(model.wrapped)
    attention = model.wrapped.transformer_blocks[0].attn

    def own_kernel(
        attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor]:
        return hidden_states, encoder_hidden_states

    attention.processor = own_kernel
    model(**inputs)
    with pytest.raises(
        SilentHookError, match=r"blocks\.0\.attn\.hook_\* has a hook that did not fire in this call"
    ):
        zeroed(model, inputs)
    model.wrapped.transformer_blocks[1].forward = (
        lambda hidden_states, encoder_hidden_states, **kwargs: (
            encoder_hidden_states,
            hidden_states,
        )
    )
    with pytest.raises(SilentHookError, match=r"blocks\.1\.hook_mlp_out_pre_gate has a hook"):
        zeroed(model, inputs, "blocks.1.hook_mlp_out_pre_gate")


def test_layers_that_the_caller_skips_are_no_error() -> None:
    model = families.hook(small("SD3Transformer2DModel"))
    inputs = model.family.inputs(model.wrapped)
    names: list[str] = []
    model.run_with_hooks(
        fwd_hooks=[(lambda n: n.endswith("hook_z"), lambda x, hook: names.append(hook.name))],
        **inputs,
        skip_layers=[1],
    )
    assert not any(name.startswith("blocks.1.") for name in names)
    assert any(name.startswith("blocks.2.") for name in names)


def test_a_hook_that_returns_another_shape_is_an_error() -> None:
    model = families.hook(small(FLUX))
    for name in ("blocks.0.attn.hook_q", "blocks.1.hook_resid_pre"):
        with pytest.raises(ValueError, match=rf"A hook on {name} returned shape .*; it must be"):
            model.run_with_hooks(
                fwd_hooks=[(name, lambda x, hook: x[:, :3])], **model.family.inputs(model.wrapped)
            )


# Cost


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", families.SUPPORTED)
def test_a_model_that_nobody_watches_costs_nothing(kind: str) -> None:
    model = families.hook(small(kind), check=False)
    inputs = model.family.inputs(model.wrapped)
    model.wrapped(**inputs)  # fills what diffusers caches
    with Count() as plain:
        theirs = model.wrapped(**inputs)[0]
    with Count() as hooked:
        ours = model(**inputs)[0]
    assert hooked.ops == plain.ops
    assert all(map(torch.equal, ours, theirs))
    assert model.layout is None


# Declarations that are wrong


def refused(monkeypatch: pytest.MonkeyPatch, kind: str, **wrong: Any) -> str:
    right = families.SUPPORTED[kind]
    monkeypatch.setitem(families.SUPPORTED, kind, replace(right, **wrong))
    with pytest.raises(ModelCheckError, match=f"{kind} failed its checks with diffusers") as error:
        families.hook(small(kind))
    monkeypatch.setitem(families.SUPPORTED, kind, right)
    families.hook(small(kind))
    return str(error.value)


def test_text_on_the_wrong_side_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = refused(monkeypatch, FLUX, layout=in_order("image", ids))
    assert (
        "blocks.0.attn.hook_q: when image token 1 of row 0 changes, positions [6] change where the "
        "family declares [1]" in found
    )
    found = refused(monkeypatch, "SD3Transformer2DModel", layout=in_order("text", patches))
    assert "blocks.0.attn.hook_q: when image token 1 of row 0 changes" in found


def test_image_blocks_declared_as_joint_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = families.SUPPORTED["Flux3Transformer2DModel"].blocks
    joint = replace(blocks[0], attentions={"attn": Attention("attn")}, enters={}, leaves=("image",))
    found = refused(monkeypatch, "Flux3Transformer2DModel", blocks=(joint, blocks[1]))
    assert "blocks.0.attn.hook_q has 6 positions where its family declares 11 (joint)" in found
    turned = in_order("image", ids)  # of equal length, in another order, in the joint blocks alone
    found = refused(monkeypatch, "Flux3Transformer2DModel", layout=turned)
    assert "blocks.1.attn.hook_q" in found


def test_queries_of_the_image_declared_as_joint_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PRX: queries are the image's alone, keys are both; the old check looked at keys only."""
    kind = "PRXTransformer2DModel"
    blocks = families.SUPPORTED[kind].blocks[0]
    found = refused(
        monkeypatch, kind, blocks=(replace(blocks, attentions={"attn": Attention("attention")}),)
    )
    assert "blocks.0.attn.hook_q has 6 positions where its family declares 11 (joint)" in found


def test_rows_with_texts_of_unequal_length_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lumina 2: the second row's image begins where its own text ends."""
    found = refused(
        monkeypatch,
        "Lumina2Transformer2DModel",
        layout=in_order("text", patches, mask="encoder_attention_mask"),
    )
    assert "of row 1 changes, positions" in found


def test_an_attention_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """SANA's attention within the image is linear."""
    blocks = families.SUPPORTED["SanaTransformer2DModel"].blocks[0]
    listed = replace(
        blocks, attentions={"attn": Attention("attn1", "image", "image"), **blocks.attentions}
    )
    assert "blocks.0.attn.hook_*" in refused(
        monkeypatch, "SanaTransformer2DModel", blocks=(listed,)
    )


def test_streams_that_are_mixed_up_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = families.SUPPORTED[FLUX].blocks
    mixed = replace(two_streams("transformer_blocks"), leaves=("image", "text"))
    assert (
        "blocks.0.hook_resid_post has 5 positions where its family declares 6 (image)"
        in refused(monkeypatch, FLUX, blocks=(mixed, blocks[1]))
    )
    late = Blocks(
        "layers",
        {"attn": Attention("attn")},
        {"hidden_states": "joint"},
        ("joint",),
        one_stream("layers").writes,
    )
    assert "declares" in refused(
        monkeypatch,
        "Lumina2Transformer2DModel",
        blocks=(replace(late, enters={"hidden_states": "joint"}),),
        layout=in_order("image", patches),
    )


# Messages


def test_a_denoiser_alone_says_how_to_open_its_pipeline() -> None:
    model = families.hook(small(FLUX))
    for tool in ("check_no_hooks", "trajectory", "sampler", "text_encoder"):
        with pytest.raises(
            AttributeError,
            match=rf"FLUX.1 is hooked here as a denoiser alone.*no '{tool}'.*from_pipeline\(pipe\)",
        ):
            getattr(model, tool)
    with pytest.raises(
        TypeError, match=r"FLUX.1 is hooked here as a denoiser alone.*from_pipeline\(pipe\)"
    ):
        model.to_tokens(["red circle"])
    head = Intervention("blocks.0.attn.hook_z", heads=[0])
    for tool in (
        lambda: head.hooks(model, ["red circle"]),
        lambda: sweep.plan(model, ["red circle"], [0], [head], {"mean": torch.mean}),
    ):
        with pytest.raises(
            (AttributeError, TypeError), match=r"denoiser alone.*from_pipeline\(pipe\)"
        ):
            tool()
    assert model.config.num_layers == 2
    assert not hasattr(model, "no_such_attribute")
