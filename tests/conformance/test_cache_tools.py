"""The cache and its decompositions: `transformer_lens.ActivationCache`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice

from hooked_models import HookedTextToImage, NotFoldedError

from .oracles import ROWS, Bound, equal, tool

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


def normed(stack: Tensor, cache: ActivationCache, norm: str) -> Tensor:
    """A stack as the norm before some layer passes it on, with that run's scale."""
    return (stack - stack.mean(-1, keepdim=True)) / cache[f"{norm}.hook_scale"]


TARGETS = [  # layer, mlp_input, what the parts add up to, the norm that reads it
    (None, False, "blocks.1.hook_resid_post", "ln_final"),
    (1, False, "blocks.1.hook_resid_pre", "blocks.1.ln1"),
    (1, True, "blocks.1.hook_resid_mid_cross", "blocks.1.ln2"),
]


@tool(
    "ActivationCache[…] shorthands, stack_activation, run_with_cache",
    "bind",
    check="plain hooks",
    note='`cache["z", 0, "cross_attn"]`, `cache["cross_z", 0]`',
)
def test_shorthands(bound: Bound) -> None:
    cache = bound.clean_cache
    assert isinstance(cache, ActivationCache)
    for key in (
        ("z", 1, "cross_attn"),
        ("cross_z", 1),
        ("z", -1, "cross_attn"),
        "blocks.1.hook_cross_z",
    ):
        equal(cache[key], bound.plain_cache["blocks.1.cross_attn.hook_z"])
    equal(cache["z", 1], bound.plain_cache["blocks.1.attn.hook_z"])
    assert (cache["z", 1] - cache["cross_z", 1]).abs().max() > 0.1
    equal(cache["gate_msa", 0, "adaln"], bound.plain_cache["blocks.0.adaln.hook_gate_msa"])
    equal(cache["resid_mid2", 0], bound.plain_cache["blocks.0.hook_resid_mid_cross"])
    equal(cache["scale", 0, "ln1"], bound.plain_cache["blocks.0.ln1.hook_scale"])
    compact = {
        "k1a": "blocks.1.attn.hook_k",
        "scale1ln1": "blocks.1.ln1.hook_scale",
        "pattern0": "blocks.0.attn.hook_pattern",
    }
    compact |= {
        "post0": "blocks.0.mlp.hook_post",
        "z1cross_attn": "blocks.1.cross_attn.hook_z",
        "embed": "hook_embed",
    }
    for key, name in compact.items():
        equal(cache[key], bound.plain_cache[name])
    with pytest.raises(KeyError, match="no layer 7"):
        cache["k7a"]
    stacked = cache.stack_activation("pattern", sublayer_type="cross_attn")
    equal(
        stacked,
        torch.stack(
            [bound.plain_cache[f"blocks.{layer}.cross_attn.hook_pattern"] for layer in range(2)]
        ),
    )
    for name, tensor in bound.plain_cache.items():
        equal(cache[name], tensor)


@tool(
    "ActivationCache.remove_batch_dim, apply_slice_to_batch_dim, to",
    "bind",
    check="rows of the cache",
)
def test_batches_of_a_cache(bound: Bound) -> None:
    cache = bound.clean_cache
    for kept in (slice(1, 3), [0, 2]):
        part = cache.apply_slice_to_batch_dim(Slice(kept) if isinstance(kept, list) else (1, 3))
        # still cross-attention
        equal(part["z", 0, "cross_attn"], cache["blocks.0.cross_attn.hook_z"][kept])
        equal(part.decompose_resid().sum(0), part["resid_post", -1], 1e-10)
    _, one = bound.view.run_with_cache(bound.clean[2:3], remove_batch_dim=True)
    assert not one.has_batch_dim
    equal(one["cross_pattern", 1], cache["cross_pattern", 1][2])
    equal(one.decompose_resid().sum(0), cache["resid_post", 1][2], 1e-10)
    one = bound.view.run_with_cache(bound.clean[2:3])[1].remove_batch_dim()
    equal(one["cross_pattern", 1], cache["cross_pattern", 1][2])
    assert one.to("cpu")["hook_embed"].device.type == "cpu"


@tool(
    "run_with_cache(incl_bwd=True)",
    "bind",
    check="autograd by hand",
    note="for scalar outputs, as in TransformerLens",
)
def test_gradients_in_the_cache(bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = type(bound.view).forward
    monkeypatch.setattr(
        type(bound.view), "forward", lambda self, tokens: forward(self, tokens).pow(2).mean()
    )
    names = ["hook_text", "blocks.0.cross_attn.hook_z", "blocks.1.hook_mlp_out"]
    with torch.enable_grad():
        _, cache = bound.view.run_with_cache(bound.corrupted, names, incl_bwd=True)
        bound.dit.zero_grad(set_to_none=True)
        for name in names:
            nudge = torch.zeros_like(cache[name]).requires_grad_()
            out = bound.plain(hooks=[(name, lambda tensor, hook: tensor + nudge)])  # noqa: B023
            equal(cache[f"{name}_grad"], torch.autograd.grad(out.pow(2).mean(), nudge)[0])
            assert cache[f"{name}_grad"].abs().max() > 1e-6


# Decompositions


@tool(
    "ActivationCache.decompose_resid",
    "bind fold",
    check="sums to the residual stream, 1e-10",
    note="with cross-attention; with apply_ln to what the norm passes on",
)
@pytest.mark.parametrize(("layer", "mlp_input", "target", "norm"), TARGETS)
def test_parts_of_the_residual_stream(
    bound: Bound, folded: Bound, layer: Any, mlp_input: bool, target: str, norm: str
) -> None:
    for model in (bound, folded):
        cache = model.clean_cache
        parts, labels = cache.decompose_resid(layer, mlp_input, return_labels=True)
        equal(parts.sum(0), cache[target], 1e-10)
        n = 2 if layer is None else layer
        expected = ["embed", "pos_embed"]
        expected += [
            f"{i}_{x}" for i in range(n) for x in ("attn_out", "cross_attn_out", "mlp_out")
        ]
        assert labels == expected + (["1_attn_out", "1_cross_attn_out"] if mlp_input else [])
        equal(
            parts[labels.index("0_cross_attn_out")],
            model.plain_cache["blocks.0.hook_cross_attn_out"],
        )
        scaled = cache.decompose_resid(layer, mlp_input, apply_ln=True)
        equal(scaled, normed(parts, cache, norm))
        equal(scaled.sum(0), cache[f"{norm}.hook_normalized"], 1e-10)
        only = [
            cache.decompose_resid(layer, mlp_input, mode=mode, incl_embeds=False).sum(0)
            for mode in ("attn", "mlp")
        ]
        equal(sum(only) + cache["hook_embed"] + cache["hook_pos_embed"], cache[target], 1e-10)  # type: ignore[operator]


@tool("ActivationCache.decompose_resid", "at", check="sums to the residual stream, 1e-10")
def test_parts_of_the_residual_stream_at_one_step(generation: HookedTextToImage) -> None:
    view, tokens = generation.at(1, ("red circle", "blue square"), num_steps=2)
    _, cache = view.run_with_cache(tokens)
    equal(cache.decompose_resid().sum(0), cache["resid_post", -1], 1e-10)


@tool(
    "ActivationCache.accumulated_resid",
    "bind",
    check="the residual hooks",
    note='incl_mid has "mid" and "mid_cross"',
)
def test_accumulated_residual(bound: Bound) -> None:
    cache = bound.clean_cache
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    names = [
        f"blocks.{i}.hook_resid_{x}" for i in range(2) for x in ("pre", "mid", "mid_cross")
    ] + ["blocks.1.hook_resid_post"]
    assert labels == [
        "0_pre",
        "0_mid",
        "0_mid_cross",
        "1_pre",
        "1_mid",
        "1_mid_cross",
        "final_post",
    ]
    equal(stack, torch.stack([bound.plain_cache[name] for name in names]))
    equal(cache.accumulated_resid(1, mlp_input=True), stack[[0, 3, 4, 5]])
    for layer, mlp_input, target, norm in TARGETS[1:]:
        scaled = cache.accumulated_resid(layer, apply_ln=True, mlp_input=mlp_input)
        equal(scaled, normed(cache.accumulated_resid(layer, mlp_input=mlp_input), cache, norm))
        equal(scaled[-1], normed(cache[target], cache, norm))
    final = cache.accumulated_resid(apply_ln=True)  # at the end each entry has its own statistics
    equal(
        final,
        torch.nn.functional.layer_norm(cache.accumulated_resid(), (16,), eps=bound.dit.cfg.eps),
    )


@tool(
    "ActivationCache.stack_head_results, compute_head_results",
    "fold",
    check="self- and cross-heads + biases sum to what is written, 1e-10",
    note='"cross_L0H1" is cross-attention',
)
def test_what_every_head_writes(bound: Bound, folded: Bound) -> None:
    cache = ActivationCache.__new__(type(folded.clean_cache))
    cache.__init__({**folded.clean_cache.cache_dict}, folded.dit)  # type: ignore[misc]
    cache.compute_head_results()
    stack, labels = cache.stack_head_results(return_labels=True)
    assert labels == [f"{x}L{i}H{h}" for i in range(2) for x in ("", "cross_") for h in range(2)]
    gated = bound.clean_cache
    for label, result in zip(labels, stack, strict=True):
        kind, layer, head = (
            ("cross_attn" if "cross" in label else "attn"),
            int(label[-3]),
            int(label[-1]),
        )
        attn = getattr(bound.dit.blocks[layer], kind)  # of the unfolded model, gate written out
        written = gated[f"blocks.{layer}.{kind}.hook_z"][:, :, head] @ attn.W_O[head]
        equal(
            result,
            written * (gated[f"blocks.{layer}.adaln.hook_gate_msa"] if kind == "attn" else 1),
            1e-10,
        )
    for layer, block in enumerate(folded.dit.blocks):
        for kind in ("attn", "cross_attn"):
            prefix = "cross_" if kind == "cross_attn" else ""
            own = sum(stack[labels.index(f"{prefix}L{layer}H{head}")] for head in range(2))
            equal(own + getattr(block, kind).b_O, gated[f"blocks.{layer}.hook_{kind}_out"], 1e-10)
    whole, names = cache.stack_head_results(incl_remainder=True, return_labels=True)
    assert names[-1] == "remainder"
    equal(whole.sum(0), gated["resid_post", -1], 1e-10)
    equal(cache.stack_head_results(1, apply_ln=True), normed(stack[:4], cache, "blocks.1.ln1"))
    equal(cache.stack_head_results(1, pos_slice=2), stack[:4, :, 2])
    equal(cache.stack_head_results(1, pos_slice=[2, 0]), stack[:4, :, [2, 0]])


@tool(
    "ActivationCache.stack_head_results, compute_head_results",
    "bind",
    "exact with use_attn_result",
    check="self- and cross-heads + biases sum to what is written, 1e-10",
    note="without the flag: refuses, W_O lacks the gate",
)
def test_head_results_of_an_unfolded_model(bound: Bound, folded: Bound) -> None:
    with pytest.raises(NotFoldedError, match=r"fold_timestep\(t\)"):
        bound.clean_cache.stack_head_results()
    with pytest.raises(NotFoldedError, match=r"fold_timestep\(t\)"):
        bound.clean_cache.get_full_resid_decomposition()
    with pytest.raises(NotFoldedError, match=r"fold_timestep\(t\)"):
        bound.clean_cache.stack_neuron_results(-1)
    bound.view.set_use_attn_result(True)
    try:
        _, cache = bound.view.run_with_cache(bound.clean)
    finally:
        bound.view.set_use_attn_result(False)
    equal(cache.stack_head_results(), folded.clean_cache.stack_head_results(), 1e-10)


def test_before_the_first_layer_no_neuron_has_written(folded: Bound) -> None:
    stack, labels = folded.clean_cache.stack_neuron_results(
        0, incl_remainder=True, return_labels=True
    )
    assert labels == ["remainder"]
    equal(stack[0], folded.plain_cache["blocks.0.hook_resid_pre"])
    assert (stack[0] - folded.plain_cache["blocks.1.hook_resid_post"]).abs().max() > 0.1


@tool(
    "ActivationCache.get_neuron_results, stack_neuron_results",
    "fold",
    check="neurons + bias sum to what the MLP writes, 1e-10",
)
@pytest.mark.parametrize(("layer", "mlp_input", "target", "norm"), TARGETS)
def test_what_every_neuron_writes(
    bound: Bound, folded: Bound, layer: Any, mlp_input: bool, target: str, norm: str
) -> None:
    cache, n = folded.clean_cache, layer or 2
    stack, labels = cache.stack_neuron_results(layer or -1, return_labels=True)
    assert [str(label) for label in labels[:2]] == ["L0N0", "L0N1"]
    for index in range(n):
        own = stack[64 * index : 64 * (index + 1)].sum(0)
        equal(own + folded.dit.blocks[index].mlp.b_out, bound.clean_cache["mlp_out", index], 1e-10)
    options: dict[str, Any] = {"mlp_input": mlp_input, "incl_remainder": True}
    whole = cache.stack_neuron_results(layer or -1, **options)
    equal(whole[:-1], stack)
    equal(whole.sum(0), cache[target], 1e-10)
    scaled = cache.stack_neuron_results(layer or -1, apply_ln=True, **options)
    equal(scaled, normed(whole, cache, norm), 1e-10)
    onto = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    for projection in (onto, onto[:, 0]):
        equal(
            cache.stack_neuron_results(layer or -1, project_output_onto=projection, **options),
            whole @ projection,
            1e-10,
        )
        both = cache.stack_neuron_results(
            layer or -1, project_output_onto=projection, apply_ln=True, **options
        )
        equal(both, scaled @ projection, 1e-10)
    some = cache.stack_neuron_results(layer or -1, pos_slice=1, neuron_slice=[3, 7])
    equal(some, stack[[64 * index + neuron for index in range(n) for neuron in (3, 7)]][:, :, 1])


@tool(
    "ActivationCache.get_full_resid_decomposition",
    "fold",
    check="sums to the residual stream, 1e-10",
    note="with cross-attention's heads and biases",
)
@pytest.mark.parametrize(("layer", "mlp_input", "target", "norm"), TARGETS)
@pytest.mark.parametrize("neurons", [True, False])
def test_everything_that_writes(
    folded: Bound, layer: Any, mlp_input: bool, target: str, norm: str, neurons: bool
) -> None:
    cache = folded.clean_cache
    options = {"layer": layer, "mlp_input": mlp_input, "expand_neurons": neurons}
    stack, labels = cache.get_full_resid_decomposition(**options, return_labels=True)
    assert len(labels) == len(stack)
    assert labels[-3:] == ["embed", "pos_embed", "bias"]
    equal(stack.sum(0), cache[target], 1e-10)
    scaled = cache.get_full_resid_decomposition(**options, apply_ln=True)
    equal(scaled, normed(stack, cache, norm), 1e-10)
    equal(scaled.sum(0), cache[f"{norm}.hook_normalized"], 1e-10)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    equal(
        cache.get_full_resid_decomposition(**options, project_output_onto=direction),
        stack @ direction,
        1e-10,
    )
    both = cache.get_full_resid_decomposition(
        **options, project_output_onto=direction, apply_ln=True
    )
    equal(both, scaled @ direction, 1e-10)
    equal(
        cache.get_full_resid_decomposition(**options, pos_slice=[3, 1]), stack[:, :, [3, 1]], 1e-10
    )


@pytest.mark.parametrize("positions", [2, -1, [1, 3], (0, 3), Slice(1)])
def test_position_slices_of_decompositions_are_transformer_lens_own(
    folded: Bound, positions: Any
) -> None:
    """An int drops the axis, as in every ActivationCache; compared with TransformerLens on what it
    knows, self-attention.
    """
    cache = folded.clean_cache
    plain = ActivationCache(cache.cache_dict, folded.dit)
    for options in ({}, {"apply_ln": True}):
        ours, labels = cache.decompose_resid(pos_slice=positions, return_labels=True, **options)
        theirs, names = plain.decompose_resid(pos_slice=positions, return_labels=True, **options)
        equal(ours[[labels.index(name) for name in names]], theirs)
        equal(
            cache.accumulated_resid(pos_slice=positions, **options),
            plain.accumulated_resid(pos_slice=positions, **options),
        )
        ours, labels = cache.stack_head_results(pos_slice=positions, return_labels=True, **options)
        theirs, names = plain.stack_head_results(pos_slice=positions, return_labels=True, **options)
        equal(ours[[labels.index(name) for name in names]], theirs)


# Position slices of a run

IMAGE_AXES = {  # as documented beside each hook; every other hook has no image positions
    r"hook_(embed|pos_embed)": 1, r"blocks\.\d\.hook_(resid_.*|.*out|.*out_pre_gate|mlp_in)": 1,
    r".*\.ln[12f].*": 1, r"ln_final.*": 1,
    r".*\.attn\.hook_(q|k|v|z|result|q_input|k_input|v_input)": 1, r".*\.cross_attn\.hook_(q|z|result|q_input)": 1,
    r".*\.hook_(attn_in|cross_attn_in)": 1, r".*\.mlp\.hook_(pre|post)": 1, r".*attn\.hook_(attn_scores|pattern)": 2,
}  # fmt: skip
TEXT_AXES = {
    r"hook_(text|caption)": 1, r".*\.cross_attn\.hook_(k|v|k_input|v_input)": 1, r".*\.cross_attn\.hook_(attn_scores|pattern)": 3,
}  # fmt: skip


@tool(
    "run_with_cache(pos_slice=…)",
    "bind model",
    check="slices of the whole tensors, every hook, every flag",
    note="image or text positions, as the view was bound",
)
@pytest.mark.parametrize("positions", [1, -1, [2, 0], (1, 3)])
@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
def test_position_slices_of_every_hook(
    bound: Bound, text_bound: Bound, positions: Any, flag: str
) -> None:
    dit = bound.dit
    switches = [
        getattr(dit, f"set_{name}") for name in (flag, "use_attn_result", "use_hook_mlp_in")
    ]
    for switch in switches:
        switch(True)
    try:
        whole, part = (
            bound.view.run_with_cache(bound.clean, pos_slice=s)[1] for s in (None, positions)
        )
        _, text = text_bound.view.run_with_cache(text_bound.clean, pos_slice=positions)
        call = {name: None if value is None else value[:ROWS] for name, value in bound.call.items()}
        _, direct = dit.run_with_cache(**call, pos_slice=positions)
    finally:
        for switch in switches:
            switch(False)
    kept = (
        [positions]
        if isinstance(positions, int)
        else list(range(*positions))
        if isinstance(positions, tuple)
        else positions
    )
    sliced = 0
    for name, tensor in whole.items():
        for found, axes in ((part, IMAGE_AXES), (direct, IMAGE_AXES), (text, TEXT_AXES)):
            axis = next(
                (axis for pattern, axis in axes.items() if re.fullmatch(pattern, name)), None
            )
            equal(
                found[name],
                tensor
                if axis is None
                else tensor.index_select(axis, torch.tensor(kept) % tensor.shape[axis]),
            )
            sliced += axis is not None
    assert sliced > 100


def test_options_that_do_not_exist_are_refused(bound: Bound) -> None:
    with pytest.raises(TypeError):
        bound.view.run_with_cache(bound.clean, name_filter="hook_embed")
    with pytest.raises(ValueError, match="no tokens of this view"):
        bound.view(torch.tensor([[0, 1, 2, 3]]))
