"""A block adds what its hooks have; its norms split into scale and direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_models.pixart.dit import HookedDiT


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
