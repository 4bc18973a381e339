"""Other libraries and modes that TransformerLens' users bring along: nnsight, plain torch hooks,
strict type checks.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedDiT

from ..hooked_models.tiny import tiny_transformer
from .oracles import bind, equal, tool

SITES = (
    "cross_attn.hook_z",
    "cross_attn.hook_pattern",
    "attn.hook_attn_scores",
    "hook_mlp_out",
    "ln1.hook_scale",
    "cross_attn.hook_k",
)


@tool(
    "nnsight.NNsight(model).trace",
    "model",
    check="TransformerLens hooks at the same point, read and written",
    note="every hook",
)
@pytest.mark.parametrize("site", SITES)
def test_nnsight_reads_and_writes_the_same_points(site: str) -> None:
    nnsight = pytest.importorskip("nnsight")
    # nnsight leaves its mark on a model
    dit = HookedDiT(tiny_transformer(num_attention_heads=2, sample_size=4).double()).eval()
    call = {**bind(dit).call, "return_dict": False}
    name = f"blocks.1.{site}"
    with torch.no_grad():
        expected, cache = dit.run_with_cache(**call)
        changed = dit.run_with_hooks(**call, fwd_hooks=[(name, lambda tensor, hook: 0.5 * tensor)])
        traced = nnsight.NNsight(dit)
        with traced.trace(**call):
            point = traced.get(name)
            read = point.output.save()
            out = traced.output[0].save()
        equal(read, cache[name])
        equal(out, expected[0])
        with traced.trace(**call):
            point = traced.get(name)
            point.output = 0.5 * point.output
            out = traced.output[0].save()
        equal(out, changed[0])
        assert (changed[0] - expected[0]).abs().max() > 1e-6
        equal(dit(**call)[0], expected[0])  # nothing is left behind


@tool(
    "torch's register_forward_hook on a HookPoint",
    "model",
    check="TransformerLens hooks at the same point",
)
@pytest.mark.parametrize("site", SITES)
def test_plain_torch_hooks(dit: HookedDiT, site: str) -> None:
    call, name = {**bind(dit).call, "return_dict": False}, f"blocks.1.{site}"
    with torch.no_grad():
        changed = dit.run_with_hooks(**call, fwd_hooks=[(name, lambda tensor, hook: 0.5 * tensor)])
        handle = dit.hook_dict[name].register_forward_hook(
            lambda module, args, tensor: 0.5 * tensor
        )
        try:
            equal(dit(**call)[0], changed[0])
        finally:
            handle.remove()


@pytest.mark.slow
def test_tools_with_strict_type_checks() -> None:
    """TransformerLens' own annotations enforced at run time, as its test suite does; in a process
    of its own, at import.
    """
    script = textwrap.dedent(
        """
        from jaxtyping import install_import_hook
        with install_import_hook(["transformer_lens", "hooked_models"], "beartype.beartype"):
            import transformer_lens.patching as patching
            from transformer_lens.tools.analysis import attribution_patch
            from hooked_models import HookedTextToImage
        import torch
        from tests.hooked_models.pipelines import tiny_pipeline

        model = HookedTextToImage.from_pipeline(tiny_pipeline())
        metric = lambda out: out.square().mean()
        for pos in ("image", "text"):
            view, tokens = model.at(1, ["red circle", "blue square"], num_steps=2, pos=pos, returns="out")
            _, clean = view.run_with_cache(tokens[:1])
            with torch.no_grad():
                found = patching.get_act_patch_attn_head_out_all_pos(view, tokens[1:], clean, metric)
            assert found.shape == (2, 2) and found.std() > 0
        view, tokens = model.at(1, ["red circle", "blue square"], num_steps=2, returns="out")
        with torch.no_grad():
            assert patching.get_act_patch_resid_pre(view, tokens[1:], clean, metric).shape == (2, 4)
        assert attribution_patch(view, tokens[:1], tokens[1:], metric).node_scores
        """
    )
    done: Any = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_hook_point_nobody_watches_keeps_attention_fused(
    dit: HookedDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: without a hook on scores or pattern, the fused kernel runs."""
    calls: list[Tensor] = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *args, **kwargs: calls.append(q) or fused(q, *args, **kwargs),
    )
    with torch.no_grad():
        dit(**bind(dit).call)
        assert len(calls) == 4
        dit.run_with_hooks(
            **bind(dit).call,
            fwd_hooks=[("blocks.0.cross_attn.hook_pattern", lambda tensor, hook: None)],
        )
        assert len(calls) == 7
