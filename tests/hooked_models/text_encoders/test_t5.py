"""HookedT5Encoder against transformers' T5EncoderModel: its function, its names, its weights, and
its place in a generation.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens import ActivationCache, patching
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from hooked_models import HookedT5Encoder, HookedTextToImage, HookedTokenEncoder
from hooked_models.generation.cache_estimate import estimate_recorded
from hooked_models.generation.capture import Recorder
from hooked_models.text_encoders.t5 import position_buckets

from ..pipelines import CALL, PROMPTS, randomise, tiny_pipeline

VARIANTS: dict[str, dict[str, Any]] = {
    "gated": {},
    "relu": {"feed_forward_proj": "relu"},
    "gated silu": {"feed_forward_proj": "gated-silu"},
    "one layer, one wide head": {"num_layers": 1, "num_heads": 1, "d_kv": 20},
    "deep, many narrow heads": {
        "num_layers": 5,
        "num_heads": 9,
        "d_kv": 2,
        "feed_forward_proj": "relu",
    },
    "few buckets, near": {
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 30,
    },
}
INPUTS = {"short": 6, "150, padded": 150, "300": 300}
PATHS = {
    "fused": (),
    "explicit": (),
    "head by head": ("use_attn_result", "use_split_qkv_input"),
    "one fork": ("use_attn_in", "use_hook_mlp_in"),
}


def tiny_t5(seed: int = 0, **config: Any) -> T5EncoderModel:
    """A T5 in which every parameter matters: norm weights and position biases are random too."""
    sizes = {
        "vocab_size": 40,
        "d_model": 12,
        "d_kv": 5,
        "num_heads": 3,
        "d_ff": 20,
        "num_layers": 2,
    }
    encoder = T5EncoderModel(
        T5Config(**{**sizes, "feed_forward_proj": "gated-gelu", **config})
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_table = parameter.ndim == 1 or "shared" in name or "relative" in name
            parameter.copy_(1.5 * noise if is_table else noise / parameter.shape[1] ** 0.5)
    return encoder


def tiny_text(name: str) -> dict[str, Tensor]:
    """Token ids; padded on the right, on the left, and altogether."""
    length = INPUTS[name]
    ids = torch.randint(0, 40, (4, length), generator=torch.Generator().manual_seed(1))
    if "padded" not in name:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, 100:] = 0
    mask[2, :20] = 0
    mask[3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def build(variant: str, dtype: torch.dtype) -> HookedT5Encoder:
    """Shared between tests, which must leave it as they find it (``run`` sets the flags itself)."""
    return HookedT5Encoder(tiny_t5(**VARIANTS[variant]).to(dtype))


@functools.cache
def expected(variant: str, dtype: torch.dtype, text: str, implementation: str) -> Tensor:
    """transformers' output."""
    encoder = build(variant, dtype).wrapped
    encoder.set_attn_implementation(implementation)
    with torch.no_grad():
        return encoder(**tiny_text(text)).last_hidden_state


def set_flags(t5: HookedT5Encoder, *flags: str) -> HookedT5Encoder:
    # (their setters refuse to have both on, in passing too)
    t5.cfg.use_attn_in = t5.cfg.use_split_qkv_input = False
    for flag in ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"):
        getattr(t5, f"set_{flag}")(flag in flags)
    return t5


def look(tensor: Tensor, hook: Any) -> None:
    """A hook that changes nothing, but makes its HookPoint watched."""


def run(t5: HookedT5Encoder, path: str, **inputs: Any) -> Tensor:
    """The output along one of the ways through the model."""
    set_flags(t5, *PATHS[path])
    if path == "explicit":
        watched = re.compile(r"attn\.hook_pattern|ln\w+\.hook_scale|rel_pos_bias")
        return t5.run_with_hooks(
            **inputs, fwd_hooks=[(lambda name: bool(watched.search(name)), look)]
        ).last_hidden_state
    return t5(**inputs).last_hidden_state


@pytest.fixture
def t5() -> HookedT5Encoder:
    """In float64, with every flag off. The weights are shared between tests: change a copy."""
    return set_flags(build("gated", torch.float64))


@pytest.fixture(scope="module")
def text() -> dict[str, Tensor]:
    return {key: value[:3, 95:110] for key, value in tiny_text("150, padded").items()}


# The function


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_output_is_that_of_transformers(
    variant: str, dtype: torch.dtype, tolerance: float, path: str, implementation: str
) -> None:
    for name in INPUTS:
        truth = expected(variant, dtype, name, implementation)
        output = run(build(variant, dtype), path, **tiny_text(name))
        assert output.dtype == dtype
        assert truth.std() > 0.5  # the oracle says something
        # pads included
        torch.testing.assert_close(output, truth, atol=tolerance * truth.abs().max().item(), rtol=0)


@torch.no_grad()
def test_distance_matters_up_to_the_last_bucket_and_pads_do_not() -> None:
    """Parts that the oracle test would miss if random weights hid it."""
    t5, ids = set_flags(build("gated", torch.float64)), tiny_text("300")["input_ids"]
    whole = t5(ids)[0]
    assert not torch.allclose(t5(ids.roll(1, dims=1))[0].roll(-1, dims=1), whole, atol=1e-3)
    mask = torch.ones_like(ids)
    mask[:, 200:] = 0
    torch.testing.assert_close(
        t5(ids, attention_mask=mask)[0][:, :200], t5(ids[:, :200])[0], atol=1e-9, rtol=0
    )


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (16, 50), (12, 30), (64, 300)])
def test_buckets_are_those_of_transformers(n_buckets: int, max_distance: int) -> None:
    position = torch.arange(700)
    truth = T5Attention._relative_position_bucket(
        position - position[:, None], True, n_buckets, max_distance
    )
    assert torch.equal(position_buckets(700, n_buckets, max_distance, torch.device("cpu")), truth)
    assert truth.unique().numel() == n_buckets - 1  # (one of the two zeros is never used)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", ["gated", "relu"])
def test_gradients_are_those_of_transformers(
    variant: str, path: str, text: dict[str, Tensor]
) -> None:
    t5 = build(variant, torch.float64)
    embeds, direction = torch.randn(
        2, 3, 15, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    embeds.requires_grad_()
    leaves = [embeds, *(p for name, p in t5.wrapped.named_parameters() if name != "shared.weight")]

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((output * direction).sum(), leaves)

    inputs = {"inputs_embeds": embeds, "attention_mask": text["attention_mask"]}
    truths = gradients(t5.wrapped(**inputs)[0])
    # Through a norm's root the gradient passes in float32, and is rounded for each fork where there
    # are some.
    tolerance = 1e-6 if PATHS[path] else 1e-10
    for ours, truth in zip(gradients(run(t5, path, **inputs)), truths, strict=True):
        assert truth.abs().max() > 1
        torch.testing.assert_close(ours, truth, atol=tolerance * truth.abs().max().item(), rtol=0)


@pytest.mark.parametrize("path", ["fused", "explicit"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float16 as loaded"])
@torch.no_grad()
def test_half_precision_is_as_close_to_float32_as_transformers_is(kind: str, path: str) -> None:
    t5, inputs = copy.deepcopy(build("gated", torch.float32)), tiny_text("150, padded")
    inputs = {key: value[:3] for key, value in inputs.items()}
    truth = t5.wrapped(**inputs)[0]
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float16
    t5.to(dtype)
    if kind.endswith("as loaded"):  # transformers keeps these in float32
        for block in t5.blocks:
            block.mlp.proj_out.float()
    accepted, output = t5.wrapped(**inputs)[0], run(t5, path, **inputs)
    assert output.dtype == accepted.dtype == t5.dtype == t5.cfg.dtype == dtype
    assert (output.float() - truth).norm() < 1.5 * (accepted.float() - truth).norm()


@torch.no_grad()
def test_overflow_in_float16_is_clipped_as_transformers_does() -> None:
    t5 = HookedT5Encoder(tiny_t5().half())
    t5.blocks[0].attn.to_out.weight *= 60_000
    t5.blocks[1].mlp.proj_out.weight *= 60_000
    inputs = tiny_text("short")
    output, cache = t5.run_with_cache(**inputs)
    for name in ("attn_out", "resid_mid", "mlp_out", "resid_post"):
        layer = 0 if name in ("attn_out", "resid_mid") else 1
        assert cache[name, layer].isinf().any() == name.endswith("_out"), name
    torch.testing.assert_close(output[0], t5.wrapped(**inputs)[0], atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_takes_and_returns_what_the_wrapped_module_does(
    t5: HookedT5Encoder, text: dict[str, Tensor]
) -> None:
    wrapped = t5.wrapped
    for inputs in (text, {"inputs_embeds": t5.W_E[text["input_ids"]]}):
        for extra in ({}, {"return_dict": False}, {"return_dict": True}):
            ours, theirs = t5(**inputs, **extra), wrapped(**inputs, **extra)
            assert isinstance(ours, tuple) == isinstance(theirs, tuple)
            torch.testing.assert_close(ours[0], theirs[0], atol=1e-10, rtol=0)
    boolean = {**text, "attention_mask": text["attention_mask"].bool()}
    torch.testing.assert_close(t5(**boolean)[0], wrapped(**boolean)[0], atol=1e-10, rtol=0)
    embeds = t5.W_E[text["input_ids"]].clone()
    t5.run_with_hooks(
        inputs_embeds=embeds, fwd_hooks=[("hook_embed", lambda tensor, hook: tensor.zero_())]
    )
    # a hook in place has not reached the caller's tensor
    assert torch.equal(embeds, t5.W_E[text["input_ids"]])


def test_what_cannot_be_run_is_refused(t5: HookedT5Encoder, text: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match="not UMT5EncoderModel"):
        HookedT5Encoder(
            UMT5EncoderModel(
                UMT5Config(vocab_size=9, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)
            )
        )
    with pytest.raises(ValueError, match=r"call \.eval"):
        copy.deepcopy(t5).train()(**text)
    HookedT5Encoder(tiny_t5(dropout_rate=0.0)).train()(**text)
    with pytest.raises(ValueError, match="output_attentions"):
        t5(**text, output_attentions=True)
    t5(**text, output_attentions=False)
    with pytest.raises(ValueError, match="one of the two"):
        t5()
    with pytest.raises(ValueError, match="one of the two"):
        t5(**text, inputs_embeds=torch.zeros(3, 15, 12))
    with pytest.raises(ValueError, match=r"\(3, 1, 15\)"):
        inspect.unwrap(HookedT5Encoder.forward)(
            t5, text["input_ids"], text["attention_mask"][:, None]
        )


def test_attention_is_fused_until_somebody_looks(
    t5: HookedT5Encoder, text: dict[str, Tensor]
) -> None:
    with mock.patch.object(
        F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention
    ) as fused:
        t5(**text)
        assert fused.call_count == 2
        t5.run_with_hooks(
            **text, fwd_hooks=[("blocks.0.attn.hook_pattern", look), ("blocks.1.attn.hook_z", look)]
        )
        assert fused.call_count == 2 + 1


# Names

SHAPES = {
    "hook_embed": (3, 15, 12),
    "hook_rel_pos_bias": (3, 3, 15, 15),
    "blocks.{l}.hook_attn_in": (3, 15, 3, 12),
    "blocks.{l}.hook_mlp_in": (3, 15, 12),
    **{
        f"blocks.{{l}}.hook_{x}": (3, 15, 12)
        for x in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    },
    **{f"{n}.hook_scale": (3, 15, 1) for n in ("blocks.{l}.ln1", "blocks.{l}.ln2", "ln_final")},
    **{
        f"{n}.hook_normalized": (3, 15, 12)
        for n in ("blocks.{l}.ln1", "blocks.{l}.ln2", "ln_final")
    },
    **{f"blocks.{{l}}.attn.hook_{x}_input": (3, 15, 3, 12) for x in ("q", "k", "v")},
    **{f"blocks.{{l}}.attn.hook_{x}": (3, 15, 3, 5) for x in ("q", "k", "v", "z")},
    **{f"blocks.{{l}}.attn.hook_{x}": (3, 3, 15, 15) for x in ("attn_scores", "pattern")},
    "blocks.{l}.attn.hook_result": (3, 15, 3, 12),
    **{f"blocks.{{l}}.mlp.hook_{x}": (3, 15, 20) for x in ("pre", "pre_linear", "post")},
    "hook_out": (3, 15, 12),
}
FORKS = ["use_split_qkv_input", "use_attn_in"]


@torch.no_grad()
def test_every_name_fires_with_its_shape(t5: HookedT5Encoder, text: dict[str, Tensor]) -> None:
    shapes = {name.format(l=layer): shape for name, shape in SHAPES.items() for layer in (0, 1)}
    assert set(t5.hook_dict) == set(shapes)
    fired = {}
    for fork in FORKS:
        fired |= (
            set_flags(t5, fork, "use_attn_result", "use_hook_mlp_in")
            .run_with_cache(**text)[1]
            .cache_dict
        )
    assert {name: tuple(tensor.shape) for name, tensor in fired.items()} == shapes
    ungated = build("relu", torch.float64)
    assert set(ungated.hook_dict) == set(shapes) - {
        f"blocks.{layer}.mlp.hook_pre_linear" for layer in (0, 1)
    }


@torch.no_grad()
def test_every_hooks_return_value_is_used(t5: HookedT5Encoder, text: dict[str, Tensor]) -> None:
    """A hook on the first row changes that row's output and no other row's, whether it returns a
    tensor or writes in place.
    """
    plain = t5(**text)[0]

    def bump_in_place(tensor: Tensor, hook: Any) -> None:
        tensor[0] += torch.randn(
            tensor[0].shape, generator=torch.Generator().manual_seed(0), dtype=tensor.dtype
        )

    def bump(tensor: Tensor, hook: Any) -> Tensor:
        bump_in_place(changed := tensor.clone(), hook)
        return changed

    for fork in FORKS:
        set_flags(t5, fork, "use_attn_result", "use_hook_mlp_in")
        for name in t5.names(None):
            bumped, in_place = (
                t5.run_with_hooks(**text, fwd_hooks=[(name, hook)])[0]
                for hook in (bump, bump_in_place)
            )
            change = (bumped - plain).abs().amax(dim=(1, 2))
            assert change[0] > 1e-3, name
            assert change[1:].max() < 1e-9, name
            assert torch.equal(bumped, in_place), name


def test_a_flag_that_is_off_is_an_error(t5: HookedT5Encoder) -> None:
    assert {name.rpartition(".")[2] for name in t5.hook_flags} >= {
        "hook_result",
        "hook_q_input",
        "hook_attn_in",
        "hook_mlp_in",
    }
    for name, flag in t5.hook_flags.items():
        with pytest.raises(ValueError, match=f"set_{flag}"):
            t5.add_hook(name, look)
    t5.set_use_attn_in(True)
    with pytest.raises(ValueError, match="exclude each other"):
        t5.set_use_split_qkv_input(True)


@torch.no_grad()
def test_forks_are_of_one_head(t5: HookedT5Encoder, text: dict[str, Tensor]) -> None:
    set_flags(t5, "use_split_qkv_input")

    def zero_head_1(tensor: Tensor, hook: Any) -> None:
        tensor[:, :, 1] = 0

    plain = t5.run_with_cache(**text)[1]
    with t5.hooks([("blocks.0.attn.hook_k_input", zero_head_1)]):
        edited = t5.run_with_cache(**text)[1]
    for name in ("q", "k", "v"):
        changed = (edited[name, 0] - plain[name, 0]).abs().amax(dim=(0, 1, 3)) > 0
        assert changed.tolist() == [False, name == "k", False]


# What the tensors are


@torch.no_grad()
def test_states_and_patterns_are_those_transformers_reports() -> None:
    t5, inputs = set_flags(build("gated", torch.float64)), tiny_text("150, padded")
    t5.wrapped.set_attn_implementation("eager")
    truth = t5.wrapped(**inputs, output_attentions=True, output_hidden_states=True)
    _, cache = t5.run_with_cache(**inputs)
    for layer in range(2):
        torch.testing.assert_close(
            cache["pattern", layer], truth.attentions[layer], atol=1e-10, rtol=0
        )
        torch.testing.assert_close(
            cache["resid_pre", layer], truth.hidden_states[layer], atol=1e-10, rtol=0
        )
        torch.testing.assert_close(
            cache["pattern", layer].sum(-1), torch.ones(4, 3, 150).double(), atol=1e-12, rtol=0
        )
        assert cache["pattern", layer][1, :, :, 100:].max() == 0  # no attention to pads
    position_bias = t5.wrapped.encoder.block[0].layer[0].SelfAttention.compute_bias(150, 150)
    assert torch.equal(cache["rel_pos_bias"], position_bias.repeat(4, 1, 1, 1))
    assert position_bias.std() > 0.5


@torch.no_grad()
def test_a_pattern_can_be_replaced(t5: HookedT5Encoder, text: dict[str, Tensor]) -> None:
    """Where every token attends to itself alone, a head writes its own value."""
    itself = torch.eye(15, dtype=torch.float64).expand(3, 3, 15, 15)
    with t5.hooks([("blocks.1.attn.hook_pattern", lambda tensor, hook: itself)]):
        _, cache = t5.run_with_cache(**text)
    written = torch.einsum("bphe,hed->bpd", cache["v", 1], t5.blocks[1].attn.W_O)
    torch.testing.assert_close(cache["attn_out", 1], written, atol=1e-12, rtol=0)


@torch.no_grad()
def test_scores_and_outputs_follow_from_the_weights_per_head(
    t5: HookedT5Encoder, text: dict[str, Tensor]
) -> None:
    _, cache = t5.run_with_cache(text["input_ids"])
    QK, OV = t5.QK, t5.OV
    assert QK.shape == OV.shape == (2, 3, 12, 12)
    for layer, block in enumerate(t5.blocks):
        read = cache["normalized", layer, "ln1"] * block.ln1.weight
        for name in "qkv":
            heads = torch.einsum("bpd,hde->bphe", read, getattr(block.attn, f"W_{name.upper()}"))
            torch.testing.assert_close(heads, cache[name, layer], atol=1e-12, rtol=0)
        # not divided
        scores = torch.einsum("bqd,hde,bke->bhqk", read, QK.AB[layer], read) + cache["rel_pos_bias"]
        torch.testing.assert_close(scores, cache["attn_scores", layer], atol=1e-11, rtol=0)
        written = torch.einsum("bhqk,bkd,hde->bqe", cache["pattern", layer], read, OV.AB[layer])
        torch.testing.assert_close(written, cache["attn_out", layer], atol=1e-11, rtol=0)
        read, mlp = cache["normalized", layer, "ln2"] * block.ln2.weight, block.mlp
        post = F.gelu(read @ mlp.W_gate, approximate="tanh") * (read @ mlp.W_in)
        torch.testing.assert_close(post, cache["post", layer], atol=1e-12, rtol=0)
        torch.testing.assert_close(post @ mlp.W_out, cache["mlp_out", layer], atol=1e-12, rtol=0)
    assert torch.equal(cache["embed"], t5.W_E[text["input_ids"]])
    assert build("relu", torch.float64).blocks[0].mlp.W_gate is None


@torch.no_grad()
def test_transformer_lens_decompositions_are_exact(
    t5: HookedT5Encoder, text: dict[str, Tensor]
) -> None:
    output, plain = t5.run_with_cache(**text)
    _, cache = set_flags(t5, "use_attn_result").run_with_cache(**text)
    assert type(cache) is ActivationCache
    close = functools.partial(torch.testing.assert_close, atol=1e-11, rtol=0)
    for layer in (0, 1):
        close(cache["resid_mid", layer], cache["resid_pre", layer] + cache["attn_out", layer])
        close(cache["resid_post", layer], cache["resid_mid", layer] + cache["mlp_out", layer])
        close(cache["result", layer].sum(2), plain["attn_out", layer])
    final = cache["resid_post", -1]
    pieces, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    close(pieces.sum(0), final)
    close(cache.accumulated_resid()[-1], final)
    attention = cache["attn_out", 0] + cache["attn_out", 1]
    # from hook_result, and from z W_O where there is none:
    close(cache.stack_head_results().sum(0), attention)
    close(plain.stack_head_results().sum(0), attention)
    for expand_neurons in (False, True):
        close(cache.get_full_resid_decomposition(expand_neurons=expand_neurons).sum(0), final)
    close(cache.decompose_resid(apply_ln=True).sum(0) * t5.ln_final.weight, output[0])


@torch.no_grad()
def test_transformer_lens_patching_applies(t5: HookedT5Encoder) -> None:
    clean, corrupted = tiny_text("short")["input_ids"].chunk(2)
    cache = t5.run_with_cache(clean)[1]

    def metric(output: Any) -> Tensor:
        return output[0].square().mean(dim=(1, 2)).sum()

    effects = patching.get_act_patch_attn_head_out_all_pos(t5, corrupted, cache, metric)
    assert effects.shape == (2, 3)

    def patch(tensor: Tensor, hook: Any) -> None:
        tensor[:, :, 2] = cache["z", 1][:, :, 2]

    by_hand = metric(t5.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.attn.hook_z", patch)]))
    assert abs(effects[1, 2] - by_hand) < 1e-5  # (the sweep's table is float32)
    assert abs(by_hand - metric(t5(corrupted))) > 1e-3


# Weights


def test_leaves_are_the_wrapped_modules_own(t5: HookedT5Encoder) -> None:
    assert {id(p) for p in t5.parameters()} == {id(p) for p in t5.wrapped.parameters()}
    for block, live in zip(t5.blocks, t5.wrapped.encoder.block, strict=True):
        attention, mlp = live.layer[0].SelfAttention, live.layer[1].DenseReluDense
        pairs = [(getattr(block.attn, f"W_{x}"), getattr(attention, x.lower())) for x in "QKVO"]
        pairs += [
            (block.mlp.W_gate, mlp.wi_0),
            (block.mlp.W_in, mlp.wi_1),
            (block.mlp.W_out, mlp.wo),
        ]
        for view, linear in pairs:
            assert view.data_ptr() == linear.weight.data_ptr()
        assert block.attn.W_Q.shape == block.attn.W_K.shape == block.attn.W_V.shape == (3, 12, 5)
        assert block.attn.W_O.shape == (3, 5, 12)
    assert t5.W_E.data_ptr() == t5.wrapped.shared.weight.data_ptr()


@torch.no_grad()
def test_writing_to_a_weight_reaches_both(text: dict[str, Tensor]) -> None:
    t5 = copy.deepcopy(build("gated", torch.float64))
    before = t5(**text)[0]
    for view in (
        t5.blocks[1].attn.W_O[2],
        t5.blocks[0].attn.W_Q[0],
        t5.blocks[0].mlp.W_in,
        t5.relative_attention_bias.weight,
    ):
        view *= 1.5
        after = t5(**text)[0]
        assert not torch.allclose(after, before, atol=1e-3)
        torch.testing.assert_close(after, t5.wrapped(**text)[0], atol=1e-10, rtol=0)
        before = after


# Inside a generation

SAME_LENGTH = ("red circle is above blue square", "blue square is above red circle")


def t5_pipeline(dtype: torch.dtype = torch.float32) -> Any:
    pipe = tiny_pipeline("t5", dtype=dtype)
    randomise(pipe.text_encoder, 0.5)
    return pipe


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(t5_pipeline())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("has_hooks_inside", [False, True], ids=["model", "as_diffusers"])
@torch.no_grad()
def test_images_equal_the_pipelines(
    dtype: torch.dtype, tolerance: float, has_hooks_inside: bool
) -> None:
    pipe = t5_pipeline(dtype)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3)).to(dtype)

    def images(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(list(PROMPTS), latents=noise.clone(), num_inference_steps=5, **CALL).images

    reference = images(pipe)
    model = HookedTextToImage.from_pipeline(pipe)
    assert isinstance(model.text_encoder, HookedT5Encoder)
    ours = (
        images(model.as_diffusers())
        if has_hooks_inside
        else model(PROMPTS, latents=noise, num_steps=5)
    )
    assert reference.std() > 0.05
    assert (ours - reference).abs().max() < tolerance


@torch.no_grad()
def test_a_hook_in_the_text_encoder_changes_the_images(model: HookedTextToImage) -> None:
    seen = []

    def ablate(tensor: Tensor, hook: Any) -> Tensor:
        seen.append((hook.name, hook.layer(), hook.step, tuple(tensor.shape)))
        return torch.zeros_like(tensor)

    plain = model(PROMPTS, num_steps=3)
    for encoder in ("text_encoder", "null_text_encoder"):
        images = model.run_with_hooks(
            PROMPTS, num_steps=3, fwd_hooks=[(f"{encoder}.blocks.0.attn.hook_z", ablate)]
        )
        assert (images - plain).abs().max() > 1e-3
    names = [f"{encoder}.blocks.0.attn.hook_z" for encoder in ("text_encoder", "null_text_encoder")]
    assert seen == [(name, 0, None, (2, 8, 4, 4)) for name in names]


@torch.no_grad()
def test_patching_the_last_residual_stream_gives_the_other_prompts_images(
    model: HookedTextToImage,
) -> None:
    name = "text_encoder.blocks.1.hook_resid_post"
    target, cache = model.run_with_cache(SAME_LENGTH[1], num_steps=3, names_filter=name)
    patched = model.run_with_hooks(
        SAME_LENGTH[0], num_steps=3, fwd_hooks=[(name, lambda tensor, hook: cache[hook.name])]
    )
    assert torch.equal(patched, target)
    assert (model(SAME_LENGTH[0], num_steps=3) - target).abs().max() > 1e-3
    earlier = "text_encoder.blocks.1.hook_attn_out"  # a part of it is not the whole
    _, cache = model.run_with_cache(SAME_LENGTH[1], num_steps=3, names_filter=earlier)
    patched = model.run_with_hooks(
        SAME_LENGTH[0], num_steps=3, fwd_hooks=[(earlier, lambda tensor, hook: cache[hook.name])]
    )
    assert not torch.allclose(patched, target, atol=1e-4)


def test_gradients_of_the_image_reach_the_text_encoder(model: HookedTextToImage) -> None:
    seen = {}
    names = ["text_encoder.blocks.0.attn.hook_pattern", "null_text_encoder.hook_embed"]
    with model.hooks(
        bwd_hooks=[
            (name, lambda grad, hook: seen.update({hook.name: grad.abs().max().item()}))
            for name in names
        ]
    ):
        model(PROMPTS, num_steps=2).sum().backward()
    assert set(seen) == set(names)
    assert min(seen.values()) > 0
    model.zero_grad()


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_estimate_is_what_is_used(dtype: torch.dtype, fork: str) -> None:
    model = HookedTextToImage.from_pipeline(t5_pipeline(dtype))
    set_flags(model.text_encoder, fork, "use_attn_result", "use_hook_mlp_in")
    tokens = model.to_tokens(PROMPTS, length=11)
    sites = [
        site
        for site in model.names.select(branch="both", num_steps=1)
        if site.part.endswith("text_encoder")
    ]
    assert len(sites) == 2 * len(model.text_encoder.names(None))
    _, cache = model.run_with_cache(
        tokens, num_steps=1, branch="both", names_filter=[site.name for site in sites]
    )
    assert {name: tensor.nbytes for name, tensor in cache.items()} == estimate_recorded(
        Recorder(model, sites), *tokens.shape
    ).sizes


def test_a_prompt_that_is_too_long_is_refused(model: HookedTextToImage) -> None:
    with pytest.raises(ValueError, match="longest that this model reads"):
        model.to_tokens("red " * 30)


@pytest.mark.parametrize("text", ["t5", "rte"])
@torch.no_grad()
def test_both_encoders_have_the_same_surface(text: str) -> None:
    pipe = tiny_pipeline(text)
    live, encoder = pipe.text_encoder, HookedTextToImage.from_pipeline(pipe).text_encoder
    assert isinstance(encoder, HookedT5Encoder if text == "t5" else HookedTokenEncoder)
    assert encoder.wrapped is live
    assert encoder.config is live.config
    assert (
        encoder.W_E.data_ptr()
        == live.get_parameter("shared.weight" if text == "t5" else "embed_tokens.weight").data_ptr()
    )
    assert (encoder.cfg.n_layers, encoder.cfg.d_model, encoder.cfg.d_vocab) == (
        2 if text == "t5" else 0,
        16,
        11,
    )
    ids = pipe.tokenizer(list(PROMPTS), padding=True, return_tensors="pt").input_ids
    mask = (ids != 0).long()
    output, cache = encoder.run_with_cache(input_ids=ids, attention_mask=mask)
    assert isinstance(cache, ActivationCache)
    assert torch.equal(output.last_hidden_state, cache["hook_out"])
    assert torch.equal(
        encoder(ids, attention_mask=mask, return_dict=False)[0], live(ids, attention_mask=mask)[0]
    )
    assert torch.equal(cache["hook_embed"], encoder.W_E[ids])
    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        getattr(encoder, f"set_{flag}")(True)
        assert getattr(encoder.cfg, flag)
    encoder.to(torch.float64)
    assert (encoder.dtype, encoder.cfg.dtype, encoder.cfg.device) == (
        torch.float64,
        torch.float64,
        str(encoder.device),
    )
