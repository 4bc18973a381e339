"""Weights that are offloaded, stored in few bits or compiled: hooked as they are, or refused with
the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from dit_lens.readout import heatmap
from hooked_models import HookedTextToImage, families
from hooked_models.pixart.attention import weight_of

from ..pipelines import PROMPTS
from ..tiny_pipelines import tiny_pipeline

SEEDS, STEPS = [3, 4], 3
Z = "steps.1.cond.blocks.1.attn.hook_z"


def offload(kind: str) -> Callable[[Any], None]:
    cpu = torch.device("cpu")
    return lambda pipe: apply_group_offloading(
        pipe.transformer,
        onload_device=cpu,
        offload_device=cpu,
        offload_type=kind,
        num_blocks_per_group=1,
    )


STORED: dict[str, Callable[[Any], Any]] = {
    "group offload, leaves": offload("leaf_level"),
    "group offload, blocks": offload("block_level"),
    "bfloat16 storage": lambda pipe: pipe.transformer.enable_layerwise_casting(
        torch.bfloat16, torch.float32
    ),
    "compiled": lambda pipe: pipe.transformer.compile(backend="eager"),
    "compiled blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
}


def zero(tensor: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(tensor)


def plain(pipe: Any, call: dict[str, Any]) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(prompt=list(PROMPTS), generator=generators, **call).images


@pytest.mark.parametrize("how", STORED)
def test_hooks_act_as_torchs_own(how: str) -> None:
    pipe, call = tiny_pipeline("FLUX.1")
    options = {
        key: value
        for key, value in call.items()
        if key not in ("num_inference_steps", "output_type")
    }
    STORED[how](pipe)
    model = HookedTextToImage.from_pipeline(pipe)
    drawn = plain(pipe, call)
    with torch.no_grad():
        assert torch.equal(model(PROMPTS, SEEDS, STEPS, **options), drawn)
        hooked, cache = model.run_with_cache(PROMPTS, SEEDS, STEPS, names_filter=Z, **options)
        assert torch.equal(hooked, drawn)
        edited = model.run_with_hooks(PROMPTS, SEEDS, STEPS, fwd_hooks=[(Z, zero)], **options)
        found = heatmap(model, PROMPTS, "circle", SEEDS, STEPS, **options)
    assert bool(cache[Z].any())
    calls: list[int] = []

    # of the second step's attention, what zeros in z leave
    def without(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(1)
        if len(calls) != 2:
            return None
        biases = pipe.transformer.transformer_blocks[1].attn
        return biases.to_out[0].bias.expand_as(output[0]).clone(), biases.to_add_out.bias.expand_as(
            output[1]
        ).clone()

    if "compiled" not in how and "storage" not in how:
        handle = pipe.transformer.transformer_blocks[1].attn.register_forward_hook(without)
        assert torch.allclose(plain(pipe, call), edited, atol=1e-4)
        handle.remove()
    assert not torch.allclose(edited, drawn, atol=1e-3)
    assert torch.equal(plain(pipe, call), drawn)
    assert float(found.max()) > 1e-3


def test_a_wrapper_of_torch_compile_is_refused_with_the_way_out() -> None:
    pipe, _ = tiny_pipeline("SD3")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match=r"pipe\.transformer\._orig_mod"):
        HookedTextToImage.from_pipeline(pipe)


def test_packed_weights_are_no_weights_to_view() -> None:
    packed = nn.Linear(4, 4, bias=False)
    # as in 4 bits
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="is quantised"):
        weight_of(packed)


def to_int8(transformer: nn.Module) -> None:
    """torchao's int8 weights."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(transformer, quantization.Int8WeightOnlyConfig())


def to_gguf(transformer: nn.Module) -> None:
    """The Linears and parameters that diffusers' GGUF loader makes of Q8_0 weights."""
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0
    linears = {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % 32 == 0
    }
    packed = {
        f"{name}.weight": utils.GGUFParameter(
            torch.from_numpy(gguf.quants.quantize(module.weight.detach().numpy(), kind)),
            quant_type=kind,
        )
        for name, module in linears.items()
    }
    utils._replace_with_gguf_linear(transformer, torch.float32, packed)
    for name, module in linears.items():
        made: Any = transformer.get_submodule(name)
        made.weight, made.bias = packed[f"{name}.weight"], module.bias


def to_bitsandbytes(transformer: nn.Module, bits: int) -> None:
    """bitsandbytes' Linears, as diffusers' loader puts them in; it asks for a GPU, they do not."""
    bnb = pytest.importorskip("bitsandbytes").nn
    for name, linear in list(transformer.named_modules()):
        if type(linear) is not nn.Linear or linear.in_features % (64 if bits == 4 else 8):
            continue  # a CPU's kernels of 4 bits take blocks of 64, so MLPs alone are packed
        sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        if bits == 4:
            made = bnb.Linear4bit(*sizes, has_bias, compute_dtype=torch.float32, quant_type="nf4")
            made.weight = bnb.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            made = bnb.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False)
            made.weight = bnb.Int8Params(linear.weight.data, requires_grad=False)
        made.bias = linear.bias
        transformer.set_submodule(name, made.to("cpu").eval())  # packs the weight


@pytest.mark.parametrize(
    "pack",
    [to_int8, to_gguf, *(partial(to_bitsandbytes, bits=bits) for bits in (4, 8))],
    ids=["int8", "gguf", "bitsandbytes4", "bitsandbytes8"],
)
def test_packed_weights_are_hooked(pack: Callable[[nn.Module], None]) -> None:
    pipe, call = tiny_pipeline("FLUX.1")
    options = {
        key: value
        for key, value in call.items()
        if key not in ("num_inference_steps", "output_type")
    }
    before = plain(pipe, call)
    pack(pipe.transformer)
    model = HookedTextToImage.from_pipeline(pipe)
    drawn = plain(pipe, call)
    assert not torch.equal(drawn, before)
    with torch.no_grad():
        hooked, _ = model.run_with_cache(PROMPTS, SEEDS, STEPS, names_filter=Z, **options)
        assert torch.equal(hooked, drawn)
        edited = model.run_with_hooks(PROMPTS, SEEDS, STEPS, fwd_hooks=[(Z, zero)], **options)
    assert not torch.allclose(edited, drawn, atol=1e-3)
    linears = [part for part in pipe.transformer.modules() if isinstance(part, nn.Linear)]
    for linear in [one for one in linears if type(one.weight) is not nn.Parameter]:
        with pytest.raises(TypeError, match="is quantised"):
            weight_of(linear)
    attention = families.hook(pipe.transformer, check=False).blocks[0].attn
    if type(pipe.transformer.transformer_blocks[0].attn.to_q.weight) is not nn.Parameter:
        with pytest.raises(TypeError, match="is quantised"):
            _ = attention.W_Q
