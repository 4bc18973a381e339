"""Activation patching: `transformer_lens.patching`."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import Tensor
from transformer_lens import patching

from hooked_models import HookedTextToImage, NotFoldedError
from hooked_models.pixart.block import modulate

from .oracles import Bound, equal, metric, per_example, tool, writes

pytestmark = pytest.mark.usefixtures("no_grad")

SWEEPS = {  # tool → hook, axes after the layer
    "get_act_patch_resid_pre": ("hook_resid_pre", ("pos",)),
    "get_act_patch_resid_mid": ("hook_resid_mid", ("pos",)),
    "get_act_patch_attn_out": ("hook_attn_out", ("pos",)),
    "get_act_patch_mlp_out": ("hook_mlp_out", ("pos",)),
    "get_act_patch_attn_head_out_by_pos": ("attn.hook_z", ("pos", "head")),
    "get_act_patch_attn_head_q_by_pos": ("attn.hook_q", ("pos", "head")),
    "get_act_patch_attn_head_k_by_pos": ("attn.hook_k", ("pos", "head")),
    "get_act_patch_attn_head_v_by_pos": ("attn.hook_v", ("pos", "head")),
    "get_act_patch_attn_head_pattern_by_pos": ("attn.hook_pattern", ("head", "pos")),
    "get_act_patch_attn_head_pattern_dest_src_pos": ("attn.hook_pattern", ("head", "pos", "pos")),
    "get_act_patch_attn_head_out_all_pos": ("attn.hook_z", ("head",)),
    "get_act_patch_attn_head_q_all_pos": ("attn.hook_q", ("head",)),
    "get_act_patch_attn_head_k_all_pos": ("attn.hook_k", ("head",)),
    "get_act_patch_attn_head_v_all_pos": ("attn.hook_v", ("head",)),
    "get_act_patch_attn_head_pattern_all_pos": ("attn.hook_pattern", ("head",)),
}
CROSS = {  # activation_name → hook, setter, axes, positions
    "cross_z": ("cross_attn.hook_z", patching.layer_head_vector_patch_setter, ("head",), "image"),
    "cross_q": (
        "cross_attn.hook_q",
        patching.layer_pos_head_vector_patch_setter,
        ("pos", "head"),
        "image",
    ),
    "cross_pattern": (
        "cross_attn.hook_pattern",
        patching.layer_head_pattern_patch_setter,
        ("head",),
        "image",
    ),
    "cross_attn_out": ("hook_cross_attn_out", patching.layer_pos_patch_setter, ("pos",), "image"),
    "resid_mid_cross": ("hook_resid_mid_cross", patching.layer_pos_patch_setter, ("pos",), "image"),
    "cross_k": (
        "cross_attn.hook_k",
        patching.layer_pos_head_vector_patch_setter,
        ("pos", "head"),
        "text",
    ),
    "cross_v": (
        "cross_attn.hook_v",
        patching.layer_pos_head_vector_patch_setter,
        ("pos", "head"),
        "text",
    ),
}
AXES = {
    ("pos",): ("layer", "pos"),
    ("head",): ("layer", "head"),
    ("pos", "head"): ("layer", "pos", "head"),
}
PLAIN = "a plain hook, at every index"


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


def index_in(hook: str, axes: tuple[str, ...], values: tuple[int, ...]) -> tuple[Any, ...]:
    """Where in a hook's tensor these values of the axes point: [batch pos head …], patterns [batch
    head dest src].
    """
    every = slice(None)
    return (
        (every, every, *values)
        if axes == ("head",) and not hook.endswith("pattern")
        else (every, *values)
    )


def by_hand(bound: Bound, hook: str, axes: tuple[str, ...]) -> Tensor:
    """The whole sweep with plain hooks."""
    sizes = [bound.tokens.shape[1] if axis == "pos" else bound.dit.cfg.n_heads for axis in axes]
    result = torch.zeros(bound.dit.cfg.n_layers, *sizes)
    for layer, *values in product(range(bound.dit.cfg.n_layers), *map(range, sizes)):
        out = bound.patched(f"blocks.{layer}.{hook}", index_in(hook, axes, tuple(values)))
        result[(layer, *values)] = metric(out)
    assert (result - metric(bound.plain())).abs().max() > 1e-3  # the patches do something
    return result


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=tool(f"patching.{name}", "bind fold", check=PLAIN))
        for name in SWEEPS
    ],
)
def test_sweeps(bound: Bound, folded: Bound, name: str) -> None:
    for model in (bound, folded):
        found = getattr(patching, name)(model.view, model.corrupted, model.clean_cache, metric)
        equal(found, by_hand(model, *SWEEPS[name]))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n,
            marks=tool(
                f'patching.generic_activation_patch, activation_name="{n}"', "bind", check=PLAIN
            ),
        )
        for n in CROSS
    ],
)
def test_cross_attention_sweeps(bound: Bound, text_bound: Bound, name: str) -> None:
    hook, setter, axes, positions = CROSS[name]
    model = text_bound if positions == "text" else bound
    found = patching.generic_activation_patch(
        model.view, model.corrupted, model.clean_cache, metric, setter, name, AXES[axes]
    )
    equal(found, by_hand(model, hook, axes))


@pytest.mark.parametrize("name", ["q_input", "k_input", "v_input"])
def test_sweeps_of_what_each_head_reads(bound: Bound, name: str) -> None:
    bound.view.set_use_split_qkv_input(True)
    try:
        _, cache = bound.view.run_with_cache(bound.clean)
        setter = patching.layer_pos_head_vector_patch_setter
        found = patching.generic_activation_patch(
            bound.view, bound.corrupted, cache, metric, setter, name, ("layer", "pos", "head")
        )
        for layer, pos, head in ((0, 1, 0), (1, 2, 1)):
            hook = f"blocks.{layer}.attn.hook_{name}"
            index = (slice(None), pos, head)
            equal(
                found[layer, pos, head],
                metric(bound.plain(hooks=[(hook, writes(cache[hook], index))])),
            )
        assert (found - metric(bound.plain())).abs().max() > 1e-6
    finally:
        bound.view.set_use_split_qkv_input(False)


@tool(
    "patching.generic_activation_patch(index_df=…)",
    "bind",
    check="plain hooks",
    note="any subset, e.g. image × text positions",
)
def test_chosen_indices_of_a_pattern_that_is_not_square(bound: Bound) -> None:
    rows = pd.DataFrame(
        [(0, 1, 3, 2), (1, 0, 2, 0), (1, 1, 0, 1)], columns=["layer", "head", "dest_pos", "src_pos"]
    )
    setter = patching.layer_head_dest_src_pos_pattern_patch_setter
    found = patching.generic_activation_patch(
        bound.view,
        bound.corrupted,
        bound.clean_cache,
        metric,
        setter,
        "cross_pattern",
        index_df=rows,
    )
    expected = [
        metric(bound.patched(f"blocks.{layer}.cross_attn.hook_pattern", (slice(None), *rest)))
        for layer, *rest in rows.itertuples(index=False)
    ]
    equal(found, torch.stack(expected))
    assert (found - metric(bound.plain())).abs().min() > 1e-6
    table = patching.make_df_from_ranges((2, 3), ("layer", "pos"))
    result, index = patching.generic_activation_patch(
        bound.view, bound.corrupted, bound.clean_cache, metric, patching.layer_pos_patch_setter, "attn_out", ("layer", "pos"),
        return_index_df=True,
    )  # fmt: skip
    equal(
        result[:, :3].flatten(),
        torch.stack([result[row.layer, row.pos] for row in table.itertuples()]),
    )
    assert len(index) == result.numel()


@tool("patching.get_act_patch_attn_head_all_pos_every", "bind", check="its five sweeps")
@tool("patching.get_act_patch_attn_head_by_pos_every", "bind", check="its five sweeps")
@tool("patching.get_act_patch_block_every", "bind", check="its three sweeps")
def test_stacked_sweeps(bound: Bound) -> None:
    run = (bound.view, bound.corrupted, bound.clean_cache, metric)

    def single(*names: str) -> list[Tensor]:
        return [getattr(patching, f"get_act_patch_{name}")(*run) for name in names]

    blocks = patching.get_act_patch_block_every(*run)
    equal(blocks, torch.stack(single("resid_pre", "attn_out", "mlp_out")))
    heads = patching.get_act_patch_attn_head_all_pos_every(*run)
    equal(
        heads,
        torch.stack(single(*(f"attn_head_{x}_all_pos" for x in ("out", "q", "k", "v", "pattern")))),
    )
    by_pos = patching.get_act_patch_attn_head_by_pos_every(*run)
    *vectors, pattern = single(
        *(f"attn_head_{x}_by_pos" for x in ("out", "q", "k", "v", "pattern"))
    )
    equal(by_pos, torch.stack([*vectors, pattern.transpose(1, 2)]))
    kept = patching.get_act_patch_attn_head_all_pos_every(
        *run[:3], per_example, reduce="none", baseline=True
    )
    assert kept.patch_type_names == ["out", "q", "k", "v", "pattern"]
    equal(kept.mean(), heads)


@tool(
    "patching.generic_activation_patch(reduce=, baseline=, several metrics)",
    "bind",
    check="plain hooks, each example",
)
def test_several_metrics_example_by_example(bound: Bound) -> None:
    metrics = {"score": per_example, "largest": lambda out: out.flatten(1).amax(1)}
    run = (bound.view, bound.corrupted, bound.clean_cache)
    result = patching.get_act_patch_attn_head_out_all_pos(
        *run, metrics, reduce="none", baseline=True
    )
    for layer, head in product(range(2), range(2)):
        out = bound.patched(f"blocks.{layer}.attn.hook_z", (slice(None), slice(None), head))
        for name, function in metrics.items():
            equal(result[name].values[layer, head], function(out))
    for name, function in metrics.items():
        equal(result[name].baseline, function(bound.plain()))
        equal(result[name].effect(), result[name].values - function(bound.plain()))
    mean = patching.get_act_patch_attn_head_out_all_pos(*run, per_example, reduce="mean")
    equal(mean, result["score"].mean())
    rows = result.to_dataframe()
    chosen = (
        rows[(rows.metric == "largest") & (rows.layer == 1) & (rows["head"] == 0)]
        .sort_values("example")
        .value
    )
    equal(torch.tensor(chosen.to_numpy()), result["largest"].values[1, 0])


@tool(
    "patching.PatchingResult statistics",
    "bind",
    check="scipy.stats.sem, permutation_test; the exact bootstrap",
)
def test_statistics_of_a_sweep(bound: Bound) -> None:
    result = patching.get_act_patch_attn_head_out_all_pos(
        bound.view, bound.corrupted, bound.clean_cache, per_example, reduce="none", baseline=True
    )
    effect = result.effect().numpy()
    clean = bound.plain(slice(0, len(bound.clean)))
    corrupted = result.baseline.numpy()
    equal(result.stderr(), torch.from_numpy(scipy.stats.sem(result.values.numpy(), axis=-1)))
    recovered = (result.values.numpy() - corrupted) / (per_example(clean).numpy() - corrupted)
    equal(result.normalized(per_example(clean)), torch.from_numpy(recovered))
    low, high = result.bootstrap_ci(of_effect=True, n_resamples=20_000)
    # every one there is
    resamples = np.array(list(product(range(effect.shape[-1]), repeat=effect.shape[-1])))
    for index in product(range(2), range(2)):
        test = scipy.stats.permutation_test(
            (effect[index],), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        equal(result.permutation_pvalue()[index].item(), float(test.pvalue))
        exact = np.quantile(effect[index][resamples].mean(1), [0.025, 0.975])
        width = exact[1] - exact[0]
        np.testing.assert_allclose(
            [low[index].item(), high[index].item()], exact, atol=0.03 * width
        )


# One step of a whole generation

STEP, STEPS = 1, 3
PROMPTS = ("red circle", "blue square")


def generated(model: HookedTextToImage, returns: str, hooks: list[Any]) -> Tensor:
    """Result of the step view for the second prompt, by full names on the whole generation."""
    found: list[Tensor] = []
    read = (
        []
        if returns == "images"
        else [(f"steps.{STEP}.hook_{returns}", lambda tensor, hook: found.append(tensor.clone()))]
    )
    images = model.run_with_hooks(PROMPTS[1:2], fwd_hooks=[*hooks, *read], seed=3, num_steps=STEPS)
    return images if returns == "images" else found[0]


@pytest.mark.parametrize(
    ("returns", "hook", "sweep", "axes", "pos"),
    [
        ("images", "attn.hook_z", patching.get_act_patch_attn_head_out_all_pos, ("head",), "image"),
        ("x0", "hook_resid_pre", patching.get_act_patch_resid_pre, ("pos",), "image"),
        ("out", "hook_mlp_out", patching.get_act_patch_mlp_out, ("pos",), "image"),
        ("images", "cross_attn.hook_v", "cross_v", ("pos", "head"), "text"),
        ("x0", "cross_attn.hook_pattern", "cross_pattern", ("head",), "image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@tool(
    "patching.generic_activation_patch and sweeps",
    "at",
    check="plain hooks under full names, whole generation again",
)
def test_sweeps_at_one_step_of_a_generation(
    generation: HookedTextToImage,
    returns: Any,
    hook: str,
    sweep: Any,
    axes: tuple[str, ...],
    pos: Any,
) -> None:
    view, tokens = generation.at(STEP, PROMPTS, seed=3, num_steps=STEPS, pos=pos, returns=returns)
    _, clean = view.run_with_cache(tokens[:1])
    if isinstance(sweep, str):
        setter = (
            patching.layer_head_pattern_patch_setter
            if axes == ("head",)
            else patching.layer_pos_head_vector_patch_setter
        )
        found = patching.generic_activation_patch(
            view, tokens[1:], clean, metric, setter, sweep, AXES[axes]
        )
    else:
        found = sweep(view, tokens[1:], clean, metric)
    _, full = generation.run_with_cache(PROMPTS[:1], seed=3, num_steps=STEPS, steps=STEP)
    sizes = [tokens.shape[1] if axis == "pos" else 2 for axis in axes]
    expected = torch.zeros(2, *sizes)
    for layer, *values in product(range(2), *map(range, sizes)):
        name = f"steps.{STEP}.cond.blocks.{layer}.{hook}"
        writer = writes(full[name], index_in(hook, axes, tuple(values)))
        expected[(layer, *values)] = metric(generated(generation, returns, [(name, writer)]))
    equal(found, expected, 1e-10)
    assert (found - metric(generated(generation, returns, []))).abs().max() > 1e-5


@tool(
    "ActivationCache of a whole generation as the clean cache",
    "at",
    check="the view's own cache",
    note="`cache.at(step=s)`",
)
def test_a_full_runs_cache_serves_a_step(generation: HookedTextToImage) -> None:
    view, tokens = generation.at(STEP, PROMPTS, seed=3, num_steps=STEPS)
    _, own = view.run_with_cache(tokens)
    _, full = generation.run_with_cache(PROMPTS, seed=3, num_steps=STEPS)
    assert set(own.keys()) == set(full.at(step=STEP).keys())
    for name, tensor in own.items():
        equal(full.at(step=STEP)[name], tensor)


@tool("run_with_hooks with a clean cache", "model", check="the clean image, exactly")
def test_all_cross_attention_from_the_clean_run_gives_the_clean_image(
    generation: HookedTextToImage,
) -> None:
    clean, cache = generation.run_with_cache(
        PROMPTS[0],
        seed=3,
        num_steps=4,
        names_filter=lambda name: name.endswith("hook_cross_attn_out"),
    )
    hooks = [(name, lambda tensor, hook: cache[hook.name]) for name in cache]
    assert len(hooks) == 4 * 2
    patched = generation.run_with_hooks(PROMPTS[1], fwd_hooks=hooks, seed=3, num_steps=4)
    assert torch.equal(patched, clean)
    assert (generation(PROMPTS[1], seed=3, num_steps=4) - clean).abs().max() > 1e-3


# Direct paths


def edge_by_hand(bound: Bound, source: tuple[int, int], target: int, component: str) -> Tensor:
    """The edge head → (q | k | v) of one head of layer 1, on the unfolded model, with shift, scale
    and gate written out.
    """
    dit, (layer, head) = bound.dit, source
    clean, corrupted = bound.clean_cache, bound.corrupted_cache
    moved = (clean["z", layer] - corrupted["z", layer])[:, :, head] @ dit.blocks[layer].attn.W_O[
        head
    ]
    residual = corrupted["resid_pre", 1] + corrupted[f"blocks.{layer}.adaln.hook_gate_msa"] * moved
    normed = (residual - residual.mean(-1, keepdim=True)) / (
        residual.var(-1, unbiased=False, keepdim=True) + dit.cfg.eps
    ).sqrt()
    shift, scale = (corrupted[f"blocks.1.adaln.hook_{x}_msa"] for x in ("shift", "scale"))
    attn, x = dit.blocks[1].attn, component.upper()
    value = (
        modulate(normed, shift, scale) @ getattr(attn, f"W_{x}")[target]
        + getattr(attn, f"b_{x}")[target]
    )

    def hook(tensor: Tensor, hook: Any) -> Tensor:
        changed = tensor.clone()
        changed[:, :, target] = value
        return changed

    return metric(bound.plain(hooks=[(f"blocks.1.attn.hook_{component}", hook)]))


@tool(
    "patching.get_act_patch_direct_path",
    "fold",
    check="an edge patch written out on the unfolded model, 1e-10",
)
@tool(
    "patching.get_act_patch_direct_path_all_sources",
    "fold",
    check="an edge patch written out on the unfolded model, 1e-10",
)
@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_paths(bound: Bound, folded: Bound, component: Any) -> None:
    run = (folded.view, folded.corrupted, folded.clean_cache, folded.corrupted_cache, metric)
    every = patching.get_act_patch_direct_path_all_sources(*run, component=component, verbose=False)
    for head, target in product(range(2), range(2)):
        one = patching.get_act_patch_direct_path(
            *run, src_layer=0, src_head=head, component=component, verbose=False
        )
        equal(one[1, target], edge_by_hand(bound, (0, head), target, component), 1e-10)
        equal(one[0], torch.zeros(2))
        equal(every[0, head], one)
    assert (every[0, :, 1] - metric(bound.plain())).abs().min() > 1e-6
    assert not folded.dit.cfg.use_split_qkv_input


@tool(
    "patching.get_act_patch_direct_path",
    "bind at",
    "refuses",
    check="the error",
    note="unfolded: W_O lacks the gate; or use dit_lens.patching",
)
@tool(
    "patching.get_act_patch_direct_path_all_sources",
    "bind at",
    "refuses",
    check="the error",
    note="the same",
)
def test_direct_paths_need_a_folded_model(bound: Bound, generation: HookedTextToImage) -> None:
    caches = (bound.clean_cache, bound.corrupted_cache)
    with pytest.raises(NotFoldedError, match=r"fold_timestep\(t\)"):
        patching.get_act_patch_direct_path(
            bound.view, bound.corrupted, *caches, metric, 0, 0, verbose=False
        )
    with pytest.raises(NotFoldedError, match=r"fold_timestep\(t\)"):
        patching.get_act_patch_direct_path_all_sources(
            bound.view, bound.corrupted, *caches, metric, verbose=False
        )
    view, tokens = generation.at(STEP, PROMPTS, num_steps=STEPS)
    _, cache = view.run_with_cache(tokens)
    with pytest.raises(NotFoldedError, match=r"fold_timestep\(t\)"):
        patching.get_act_patch_direct_path(view, tokens, cache, cache, metric, 0, 0, verbose=False)


@tool(
    "patching.*",
    "bind",
    "refuses",
    check="the error",
    note="in training mode, as TransformerLens does",
)
def test_training_mode_is_refused(bound: Bound) -> None:
    bound.view.train()
    try:
        with pytest.raises(ValueError, match="evaluation mode"):
            patching.get_act_patch_resid_pre(bound.view, bound.corrupted, bound.clean_cache, metric)
    finally:
        bound.view.eval()
