"""Attention is what its hooks say, fused until one needs scores."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_models.pixart.dit import HookedDiT

from ..tiny import look


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
