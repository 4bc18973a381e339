"""Edges are derivatives of interventions on one receiver's input, and add up."""

from __future__ import annotations

import pytest
import torch

from dit_lens import attribution

from ..pairs import KINDS, close, edge, flags, metric, views


def test_edges_are_derivatives_of_a_hand_written_intervention(dit, calls):
    found = attribution.edges(calls, metric).scores.sum("prompt")
    first, second = views(dit, latents=True)
    with flags(dit):
        with torch.no_grad():
            original, source = (
                view.run_with_cache(view.to_tokens())[1] for view in (first, second)
            )
        for sender, receiver in [
            ("embed", "attn.L0H1.q"),
            ("embed", "cross_attn.L0H2.q"),
            ("attn.L0H1", "cross_attn.L0H0.q"),
            ("cross_attn.L0H1", "mlp.L0"),
            ("cross_attn.L0H1", "attn.L1H2.k"),
            ("cross_attn.L0H1", "cross_attn.L1H2.q"),
            ("mlp.L0", "attn.L1H0.v"),
            ("mlp.L1", "output"),
            ("attn.L0H2", "output"),
            ("text[1]", "cross_attn.L1H0.k"),
            ("text[2]", "cross_attn.L0H1.v"),
        ]:
            epsilon = torch.zeros((), dtype=torch.float64, requires_grad=True)
            hook = edge(original, source, sender, receiver, epsilon)
            with torch.enable_grad():
                output = first.run_with_hooks(first.to_tokens(), fwd_hooks=[hook])
                (expected,) = torch.autograd.grad(metric(output).sum(), epsilon)
            assert abs(expected) > 1e-9
            assert found.sel(sender=sender, receiver=receiver).item() == pytest.approx(
                expected.item(), rel=1e-9
            )


@pytest.mark.parametrize("ig_steps", [1, 3])
def test_edges_add_up(dit, calls, ig_steps):
    """A receiver's column to its whole input, a sender's row to its score as a node: no edge is
    missing, none is too many.
    """
    found = attribution.edges(calls, metric, ig_steps=ig_steps).scores
    heads = [f"L{layer}H{head}" for layer in (0, 1) for head in (0, 1, 2)]
    inputs = [f"{kind}.{x}" for kind in ("attn", "cross_attn") for x in "qkv"]
    sublayers = {label: f"blocks.{{layer}}.{label[:-2]}.hook_{label[-1]}_input" for label in inputs}
    with flags(dit):
        kinds = (*sublayers.values(), "blocks.{layer}.hook_mlp_in", "hook_caption", *KINDS)
        node = attribution.nodes(calls, metric, kinds, ig_steps=ig_steps).scores

    for label, kind in sublayers.items():
        sublayer, x = label.split(".")
        columns = found.sel(receiver=[f"{sublayer}.{head}.{x}" for head in heads]).sum("sender")
        whole = node[kind].sum("text_pos") if "text_pos" in node[kind].dims else node[kind]
        assert close(columns, whole.stack(at=("layer", "head")))
    assert close(
        found.sel(receiver=["mlp.L0", "mlp.L1"]).sum("sender"), node["blocks.{layer}.hook_mlp_in"]
    )
    assert close(found.sel(receiver="output").sum("sender"), node["resid_post"].sel(layer=1))

    rows = found.sum("receiver")
    for kind in ("attn", "cross_attn"):
        assert close(
            rows.sel(sender=[f"{kind}.{head}" for head in heads]),
            node[kind].stack(at=("layer", "head")),
        )
    assert close(rows.sel(sender=["mlp.L0", "mlp.L1"]), node["mlp"])
    assert close(rows.sel(sender="embed"), node["embed"])
    assert close(rows.sel(sender=[f"text[{word}]" for word in range(5)]), node["hook_caption"])
    assert not any((dit.cfg.use_split_qkv_input, dit.cfg.use_hook_mlp_in, dit.cfg.use_attn_result))


def test_edges_of_a_generation_add_up_across_later_steps(images):
    found = attribution.edges(images, metric).scores
    node = attribution.nodes(images, metric).scores
    heads = [f"cross_attn.L{layer}H{head}" for layer in (0, 1) for head in (0, 1)]
    assert found.dims == ("step", "branch", "prompt", "sender", "receiver")
    assert close(
        found.sel(sender=heads).sum("receiver"), node["cross_attn"].stack(at=("layer", "head"))
    )
