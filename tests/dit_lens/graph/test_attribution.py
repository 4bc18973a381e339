"""Attribution against plain autograd, hand-written interventions, exact patching and
TransformerLens' own sweep.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)

from dit_lens import attribution, scenes
from hooked_models import UnknownHookError

from ...hooked_models.tiny import tiny_inputs
from ..pairs import (
    KINDS,
    ORIGINAL,
    SOURCE,
    STEPS,
    by_autograd,
    close,
    generations,
    metric,
    views,
)


def test_scores_are_difference_times_gradient(dit, calls):
    first, second = views(dit, latents=True)
    found = attribution.nodes(
        calls,
        metric,
        (*KINDS, "blocks.{layer}.cross_attn.hook_pattern", "blocks.1.cross_attn.hook_v"),
    )
    names = [
        name
        for name in dit.hook_dict
        if "attn_in" not in name and not name.endswith(("_input", "result", "mlp_in"))
    ]
    gradient = by_autograd(
        lambda: first(first.to_tokens()), dit.hooks, [n for n in names if "scale" not in n]
    )
    with torch.no_grad():
        original, source = (view.run_with_cache(view.to_tokens())[1] for view in (first, second))

    def product(name: str) -> Tensor:
        return ((source[name] - original[name]) * gradient[name]).sum(-1).detach()

    for kind, leaf in {"attn": "attn.hook_z", "cross_attn": "cross_attn.hook_z"}.items():
        expected = torch.stack([product(f"blocks.{layer}.{leaf}").sum(1) for layer in (0, 1)], 1)
        assert found.scores[kind].dims == ("prompt", "layer", "head")
        assert close(found.scores[kind], expected)
    for kind, leaf in {
        "mlp": "mlp_out",
        "resid_pre": "resid_pre",
        "resid_post": "resid_post",
    }.items():
        expected = torch.stack(
            [product(f"blocks.{layer}.hook_{leaf}").sum(1) for layer in (0, 1)], 1
        )
        assert found.scores[kind].dims == ("prompt", "layer")
        assert close(found.scores[kind], expected)
    assert close(found.scores["embed"], product("hook_embed").sum(1))
    assert close(found.scores["text"], product("hook_text"))
    assert found.scores["text"].dims == ("prompt", "text_pos")
    pattern = torch.stack(
        [product(f"blocks.{layer}.cross_attn.hook_pattern").sum(2) for layer in (0, 1)], 1
    )
    assert close(found.scores["blocks.{layer}.cross_attn.hook_pattern"], pattern)
    values = found.scores["blocks.1.cross_attn.hook_v"]
    assert close(
        values.transpose("prompt", "text_pos", "head"), product("blocks.1.cross_attn.hook_v")
    )

    by_position = attribution.nodes(calls, metric, ("cross_attn", "mlp"), positions=True).scores
    assert close(by_position["cross_attn"].sum("pos"), found.scores["cross_attn"])
    assert close(by_position["mlp"].sel(layer=1), product("blocks.1.hook_mlp_out"))


def test_transformer_lens_own_sweep_gives_the_same(dit):
    """`attribution_patch` on the denoiser's view, for all that it knows; its graph has no
    cross-attention.
    """
    rows = [0, 1]
    arguments = [{**tiny_inputs(dit.wrapped, batch=1, seed=seed)} for seed in (1, 2)]
    call = [
        torch.cat([a[name] for a in arguments])
        for name in ("hidden_states", "encoder_hidden_states")
    ]
    both, tokens = dit.bind(call[0], 901.0, call[1])
    pair = attribution.pair(*(dit.bind(call[0][[i]], 901.0, call[1][[i]])[0] for i in rows))

    def scalar(output: Tensor) -> Tensor:
        return metric(output)[0]

    theirs = attribution_patch(both, tokens[[1]], tokens[[0]], scalar)
    ours = attribution.nodes(pair, metric, ("attn", "mlp", "embed"), positions=True).scores.isel(
        prompt=0
    )
    for node, score in theirs.node_scores.items():
        place = {"pos": node.position, "layer": node.layer, "head": node.head}
        kind = {"attn_head_out": "attn", "mlp_out": "mlp", "embed": "embed"}[node.kind]
        assert ours[kind].sel(
            {dim: label for dim, label in place.items() if label is not None}
        ).item() == pytest.approx(score)

    theirs = attribution_patch(
        both, tokens[[1]], tokens[[0]], scalar, EdgeAttributionConfig(granularity="edge")
    )
    ours = attribution.edges(pair, metric).scores.isel(prompt=0)
    sums: dict[tuple[str, str], float] = {}
    for (sender, receiver), score in theirs.edge_scores.items():
        edge = _label(sender), _label(receiver)
        sums[edge] = sums.get(edge, 0) + score
    assert len(sums) > 50
    for (sender, receiver), score in sums.items():
        assert ours.sel(sender=sender, receiver=receiver).item() == pytest.approx(score, abs=1e-12)


def _label(node: Any) -> str:
    """A node of TransformerLens' graph in our words, without its position."""
    if node.kind in ("embed", "logits"):
        return {"embed": "embed", "logits": "output"}[node.kind]
    if node.kind.startswith("mlp"):
        return f"mlp.L{node.layer}"
    return f"attn.L{node.layer}H{node.head}" + (
        f".{node.kind[0]}" if node.kind.endswith("input") else ""
    )


def test_for_small_differences_scores_are_exact_effects(dit):
    def worst(difference: float) -> float:
        found = attribution.nodes(attribution.pair(*views(dit, difference)), metric)
        table = found.verify(k=25, sample=0).table
        return float(np.abs(table["exact"] / table["score"] - 1).max())

    assert worst(1e-4) < 5e-3
    assert worst(1) > 0.05  # where it is only a first order


def test_over_inputs_the_inputs_scores_add_up_to_the_metrics_difference(calls, images):
    for pair, kinds in ((calls, ("text", "embed")), (images, ("text",))):
        gap = metric(pair.source.output) - metric(pair.original.output)

        def error(ig_steps: int, pair: Any = pair, kinds: Any = kinds, gap: Any = gap) -> float:
            scores = attribution.nodes(pair, metric, kinds, ig_steps=ig_steps).scores
            total = sum(
                scores[kind].sum([dim for dim in scores[kind].dims if dim != "prompt"])
                for kind in kinds
            )
            return float(np.abs(total - gap.numpy()).max() / gap.abs().max())

        assert error(1) > 0.05
        assert error(8) < 5e-3


def test_over_activations_scores_add_up_to_the_exact_patch_of_the_hook(model):
    call = {"num_steps": STEPS, "seed": 3}
    pair = attribution.pair(*generations(model))
    found = attribution.nodes(
        pair, metric, ("cross_attn",), ig_steps=4, ig_over="activations"
    ).scores["cross_attn"]
    plain = attribution.nodes(pair, metric, ("cross_attn",)).scores["cross_attn"]
    for step, layer in ((0, 0), (1, 1)):
        name = f"steps.{step}.cond.blocks.{layer}.cross_attn.hook_z"
        with torch.no_grad():
            base, _ = model.run_with_cache(ORIGINAL, **call, names_filter=name)
            _, cache = model.run_with_cache(SOURCE, **call, names_filter=name)
            patched = model.run_with_hooks(
                ORIGINAL, fwd_hooks=[(name, lambda z, hook, c=cache: c[hook.name])], **call
            )
        exact = (metric(patched) - metric(base)).numpy()
        assert close(found.sel(step=step, layer=layer, branch="cond").sum("head"), exact, 1e-5)
        assert not close(plain.sel(step=step, layer=layer, branch="cond").sum("head"), exact, 1e-3)


@pytest.mark.parametrize("returns", ["x0", "out"])
def test_one_step_is_that_of_the_step_view(model, returns):
    pair = attribution.pair(*generations(model), steps=1, returns=returns)
    found = attribution.nodes(pair, metric).scores.sel(step=1, branch="cond")
    (first, tokens), (second, _) = (
        model.at(step=1, prompts=model.to_tokens(p), seed=3, num_steps=STEPS, returns=returns)
        for p in (ORIGINAL, SOURCE)
    )
    names = [f"blocks.{layer}.cross_attn.hook_z" for layer in (0, 1)]
    gradient = by_autograd(lambda: first(tokens), first.hooks, names)
    with torch.no_grad():
        original, source = (view.run_with_cache(view.to_tokens())[1] for view in (first, second))
    for layer, name in enumerate(names):
        expected = ((source[name] - original[name]) * gradient[name]).sum((1, 3)).detach()
        assert close(found["cross_attn"].sel(layer=layer), expected, 1e-10)


def test_refusals(model, dit, calls, images):
    scene = scenes.sample(2, seed=0)
    with pytest.raises(TypeError, match="cannot be differentiated"):
        attribution.nodes(images, lambda out: torch.as_tensor(out.numpy()).sum((1, 2, 3)))
    with pytest.raises(TypeError, match=r"cannot be differentiated.*scenes\.evaluate"):
        attribution.nodes(images, lambda out: (out > 0.5).double().sum((1, 2, 3)))
    with pytest.raises(TypeError, match="must return a tensor"):
        attribution.edges(images, lambda out: scene)
    with pytest.raises(ValueError, match=r"one number for each prompt, shape \(2,\), not \(\)"):
        attribution.nodes(images, lambda out: out.sum())
    with pytest.raises(UnknownHookError, match="did you mean"):
        attribution.nodes(images, metric, ("cross_atn",))
    with pytest.raises(ValueError, match="set_use_attn_result"):
        attribution.nodes(images, metric, ("blocks.0.attn.hook_result",))
    with pytest.raises(ValueError, match="does not depend on the prompt"):
        attribution.nodes(calls, metric, ("blocks.{layer}.adaln.hook_gate_msa",))
    with pytest.raises(ValueError, match="at least 1"):
        attribution.nodes(calls, metric, ig_steps=0)
    runs = generations(model)
    with pytest.raises(ValueError, match="steps 0 to 1"):
        attribution.pair(*runs, steps=[1, 2])
    with pytest.raises(ValueError, match="a single step predicts"):
        attribution.pair(*runs, returns="x0")
    with pytest.raises(TypeError, match="two trajectories"):
        attribution.pair(runs[0], views(dit)[0])
    with pytest.raises(ValueError, match="same guidance"):
        attribution.pair(runs[0], generations(model, guidance=2.0)[1])
    unguided = generations(model, guidance=1.0)
    with pytest.raises(ValueError, match="no unconditional branch"):
        attribution.pair(*unguided, branch="both")
    with pytest.raises(ValueError, match="stopped before step 0"):
        attribution.pair(
            *(model.trajectory(p, num_steps=STEPS, until=0) for p in (ORIGINAL, SOURCE)), steps=0
        )
    lengths = [
        model.trajectory(["red circle is above blue square", p], num_steps=2)
        for p in (ORIGINAL[0], ORIGINAL[1])
    ]
    with pytest.raises(ValueError, match="different numbers of tokens"):
        attribution.nodes(attribution.pair(*lengths), metric, ig_steps=2)
