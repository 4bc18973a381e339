"""Attribution against plain autograd, hand-written interventions, exact patching and
TransformerLens' own sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from scipy.stats import spearmanr
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)

from dit_lens import attribution, patching, scenes, stats
from hooked_models import HookedDiT, HookedTextToImage, UnknownHookError

from ...hooked_models.pipelines import tiny_pipeline
from ...hooked_models.tiny import tiny_inputs, tiny_transformer

ORIGINAL = ("red circle is above blue square", "blue square is left of red circle")
SOURCE = ("blue square is above red circle", "red circle is left of blue square")
STEPS = 2
KINDS = ("attn", "cross_attn", "mlp", "resid_pre", "resid_post", "embed", "text")


def direction(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def metric(output: Tensor) -> Tensor:
    """One number for each row, curved: a linear one would hide a wrong gradient of the metric."""
    return (output * direction(*output.shape[1:])).flatten(1).mean(1).tanh()


@pytest.fixture(scope="module")
def dit() -> HookedDiT:
    return HookedDiT(tiny_transformer().double())


def views(dit: HookedDiT, difference: float = 1.0, latents: bool = False) -> list[Any]:
    """Two denoiser calls of two rows, the last text tokens masked; their texts differ, and their
    latents if asked for.
    """
    arguments = tiny_inputs(dit.wrapped, pads=1)
    text, x = arguments["encoder_hidden_states"], arguments["hidden_states"]

    def view(difference: float) -> Any:
        other = text + difference * direction(*text.shape)
        moved = x + difference * direction(*x.shape) if latents else x
        return dit.bind(
            moved, arguments["timestep"].double(), other, arguments["encoder_attention_mask"]
        )[0]

    return [view(0), view(difference)]


@pytest.fixture(scope="module")
def calls(dit: HookedDiT) -> attribution.Pair:
    return attribution.pair(*views(dit, latents=True))


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    model = HookedTextToImage.from_pipeline(tiny_pipeline(dtype=torch.float64))
    # away from the clamp to [0, 1], where nothing is smooth
    model.codec.register_to_config(scaling_factor=4.0)
    return model


@contextmanager
def flags(dit: HookedDiT) -> Iterator[None]:
    """With all the hooks that edges are made of."""
    setters = dit.set_use_attn_result, dit.set_use_split_qkv_input, dit.set_use_hook_mlp_in
    for setter in setters:
        setter(True)
    yield
    for setter in setters:
        setter(False)


def generations(model: HookedTextToImage, **call: Any) -> list[Any]:
    with torch.no_grad():
        return [
            model.trajectory(prompts, **{"num_steps": STEPS, "seed": 3, **call})
            for prompts in (ORIGINAL, SOURCE)
        ]


@pytest.fixture(scope="module")
def images(model: HookedTextToImage) -> attribution.Pair:
    return attribution.pair(*generations(model))


def by_autograd(
    run: Callable[[], Tensor], hooks: Callable[..., Any], names: list[str]
) -> dict[str, Tensor]:
    """∂ Σ metric(run()) / ∂ each named activation, with the whole graph, as the derivative in
    something added there.
    """
    added: dict[str, Tensor] = {}

    def add(tensor: Tensor, hook: Any) -> Tensor:
        added[hook.name] = torch.zeros_like(tensor, requires_grad=True)
        return tensor + added[hook.name]

    with torch.enable_grad(), hooks([(name, add) for name in names]):
        found = torch.autograd.grad(metric(run()).sum(), [*added.values()])
    return dict(zip(added, found, strict=True))


def close(a: Any, b: Any, tolerance: float = 1e-11) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return (
        a.shape == b.shape
        and np.abs(b).max() > 1e-6
        and np.abs(a - b).max() <= tolerance * np.abs(b).max()
    )


# Nodes of one call


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


# Edges


def edge(
    original: Any, source: Any, sender: str, receiver: str, scale: Tensor | float = 1.0
) -> tuple[str, Any]:
    """The hook that adds `scale` times a sender's difference to one receiver's input, and to
    nothing else.
    """
    name, head = _tensor(sender, "hook_result")
    change = source[name] - original[name]
    change = change if head is None else change[:, :, head]
    if sender.startswith("text"):
        change = change * (torch.arange(change.shape[1]) == int(sender[5]))[:, None]
    where, to = _tensor(receiver, f"hook_{receiver[-1]}_input")

    def add(tensor: Tensor, hook: Any) -> Tensor:
        if to is None:
            return tensor + scale * change
        return tensor + scale * change[:, :, None] * (torch.arange(tensor.shape[2]) == to)[:, None]

    return where, add


def _tensor(label: str, leaf: str) -> tuple[str, int | None]:
    """Hook and head of one end of an edge."""
    kind, _, rest = label.partition(".")
    if kind.startswith("text"):
        return "hook_caption", None
    if kind in ("embed", "output"):
        return {"embed": "hook_embed", "output": "blocks.1.hook_resid_post"}[kind], None
    if kind == "mlp":
        return f"blocks.{rest[1]}." + (
            "hook_mlp_out" if leaf == "hook_result" else "hook_mlp_in"
        ), None
    return f"blocks.{rest[1]}.{kind}.{leaf}", int(rest[3])


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


# Integrated gradients


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


# The whole generation

SCHEDULERS = {
    "flow": DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True),
    "third order": DPMSolverMultistepScheduler(solver_order=3),
    "unipc": UniPCMultistepScheduler(),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_step_by_step_gradients_equal_the_whole_graphs(scheduler):
    model = HookedTextToImage.from_pipeline(
        tiny_pipeline(dtype=torch.float64, scheduler=SCHEDULERS[scheduler])
    )
    call = {"num_steps": 4, "seed": [3, 4]}
    found = attribution.nodes(
        attribution.pair(*generations(model, **call), branch="both"), metric, KINDS
    ).scores
    names = {kind: attribution.NODES[kind] for kind in KINDS}
    full = [
        f"steps.{step}.{branch}.{name.format(layer=layer)}"
        for name in names.values()
        for step in range(4)
        for branch in ("cond", "uncond")
        for layer in (0, 1)
    ]
    full = list(dict.fromkeys(full))
    gradient = by_autograd(lambda: model(ORIGINAL, **call), model.hooks, full)
    with torch.no_grad():
        original, source = (
            model.run_with_cache(prompts, **call, names_filter=full, branch="both")[1]
            for prompts in (ORIGINAL, SOURCE)
        )
    largest, reference = 0.0, 0.0
    for kind, name in names.items():
        for cell in (
            found[kind]
            .sum("head" if "head" in found[kind].dims else [])
            .transpose("prompt", ...)
            .stack(at=[d for d in found[kind].dims if d not in ("prompt", "head", "text_pos")])
            .transpose("at", ...)
        ):
            at = {
                dim: cell[dim].item() for dim in ("step", "branch", "layer") if dim in cell.coords
            }
            where = f"steps.{at['step']}.{at['branch']}.{name.format(layer=at.get('layer'))}"
            product = ((source[where] - original[where]) * gradient[where]).detach()
            expected = product.flatten(2).sum(2) if kind == "text" else product.flatten(1).sum(1)
            assert cell.shape == expected.shape
            largest = max(largest, float(np.abs(cell.to_numpy() - expected.numpy()).max()))
            reference = max(reference, float(expected.abs().max()))
    assert reference > 1e-3
    # DPM-Solver steps in float32, through which cotangents are rounded
    tolerance = 1e-11 if scheduler == "unipc" else 1e-6
    assert largest < tolerance * reference
    assert float(np.abs(found["mlp"].sel(branch="uncond", step=slice(1, None))).max()) > 1e-6


def peak_saved_bytes(run: Callable[[], Any], weights: set[int]) -> int:
    """The most that autograd keeps for backward at a time, without the weights; each storage
    once.
    """
    kept: dict[int, list[int]] = {}
    peak = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal peak
            self.tensor, self.storage = tensor, tensor.untyped_storage().data_ptr()
            if self.storage not in weights:
                kept.setdefault(self.storage, [0, tensor.untyped_storage().nbytes()])[0] += 1
                peak = max(peak, sum(size for _, size in kept.values()))

        def __del__(self) -> None:
            if self.storage in kept:
                kept[self.storage][0] -= 1
                if kept[self.storage][0] == 0:
                    del kept[self.storage]

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return peak


def test_memory_does_not_grow_with_the_number_of_steps(model):
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def step_by_step(steps: int) -> int:
        pair = attribution.pair(*generations(model, num_steps=steps))
        return peak_saved_bytes(lambda: attribution.nodes(pair, metric), weights)

    def whole(steps: int) -> int:
        def run() -> None:
            with torch.enable_grad():
                latents = model.noise(0, len(ORIGINAL)).to(model.dit.dtype).requires_grad_()
                metric(model(ORIGINAL, num_steps=steps, latents=latents)).sum().backward()

        return peak_saved_bytes(run, weights)

    few, many = step_by_step(2), step_by_step(14)
    assert many < 1.05 * few
    assert whole(14) > 5 * whole(2)
    assert many < whole(14) / 5
    model.zero_grad()


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


def test_edges_of_a_generation_add_up_across_later_steps(images):
    found = attribution.edges(images, metric).scores
    node = attribution.nodes(images, metric).scores
    heads = [f"cross_attn.L{layer}H{head}" for layer in (0, 1) for head in (0, 1)]
    assert found.dims == ("step", "branch", "prompt", "sender", "receiver")
    assert close(
        found.sel(sender=heads).sum("receiver"), node["cross_attn"].stack(at=("layer", "head"))
    )


# Verification


def test_verification_is_a_patch_by_hand(model, images):
    call = {"num_steps": STEPS, "seed": 3}
    with torch.no_grad():
        base = model(ORIGINAL, **call)
        _, source = model.run_with_cache(SOURCE, **call)
    found = attribution.nodes(images, metric)
    verified = found.verify(k=4, sample=9)
    assert set(verified.table["node"]) >= {"attn", "cross_attn", "mlp", "text"}
    for i, row in verified.table.iterrows():
        name = f"steps.{int(row.step)}.{row.branch}.{attribution.NODES[row.node]}"
        name = name if row.node == "text" else name.format(layer=int(row.layer))

        def patch(tensor: Tensor, hook: Any, row: Any = row) -> Tensor:
            part: Any = ...
            if row.node != "mlp":
                part = (
                    (slice(None), int(row.text_pos))
                    if row.node == "text"
                    else (..., int(row["head"]), slice(None))
                )
            new = tensor.clone()
            new[part] = source[hook.name][part]
            return new

        with torch.no_grad():
            patched = model.run_with_hooks(ORIGINAL, fwd_hooks=[(name, patch)], **call)
        effect = metric(patched) - metric(base)
        assert torch.allclose(verified.result.effect()[i], effect, rtol=0, atol=1e-12)
        assert row.exact == pytest.approx(effect.mean().item(), abs=1e-12)

    every = found.table()
    assert len(every) == STEPS * (4 + 4 + 2 + 8)
    largest = every.iloc[:4]["score"]
    assert (verified.table["score"][:4] == largest).all()
    assert largest.abs().min() >= every["score"].abs()[4:].max()
    sample = verified.table[verified.table["drawn"] == "sample"]
    assert len(sample) == 9
    assert verified.spearman.mean == pytest.approx(spearmanr(sample["score"], sample["exact"])[0])
    assert verified.spearman.low < verified.spearman.mean < verified.spearman.high
    # TransformerLens' statistics are at hand
    assert verified.result.permutation_pvalue().shape == (13,)


def test_edges_are_verified_by_changing_one_receivers_input(dit):
    found = attribution.edges(attribution.pair(*views(dit)), metric)
    verified = found.verify(k=5, sample=25)
    assert verified.spearman.low > 0.5
    first, second = views(dit)
    with flags(dit), torch.no_grad():
        base = first(first.to_tokens())
        original, source = (view.run_with_cache(view.to_tokens())[1] for view in (first, second))
        for i, row in verified.table.iterrows():
            patched = first.run_with_hooks(
                first.to_tokens(), fwd_hooks=[edge(original, source, row.sender, row.receiver)]
            )
            effect = metric(patched) - metric(base)
            assert torch.allclose(verified.result.effect()[i], effect, rtol=0, atol=1e-12)


def test_path_patching_finds_the_same_effects_under_the_same_names(model, images):
    original, source = generations(model)
    table = attribution.edges(images, metric).verify(k=4, sample=0).table
    for row in table.itertuples():
        ends = [patching.Nodes(name, steps=int(row.step)) for name in (row.sender, row.receiver)]
        found = patching.path_patch(original, source, *ends, metric)
        assert row.exact == pytest.approx(
            (found["patched"] - found["original"]).mean().item(), abs=1e-12
        )


def test_rank_correlation_has_an_interval_that_covers():
    rng, rho = np.random.default_rng(0), 0.6
    truth = 6 / math.pi * math.asin(rho / 2)  # Spearman's ρ of a bivariate normal
    inside = 0
    for _ in range(300):
        x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=40).T
        interval, p = stats.rank_correlation(x, y)
        inside += interval.low < truth < interval.high
        assert (interval.mean, p) == pytest.approx(tuple(spearmanr(x, y)))
    assert 0.91 < inside / 300 < 0.985
    assert stats.rank_correlation(np.arange(9.0), np.arange(9.0) ** 3)[0].low > 0.99
    assert math.isnan(stats.rank_correlation(np.arange(9.0), np.ones(9))[0].mean)


# Where it is used


def test_frozen_weights_no_grad_and_texts_of_different_lengths():
    model = HookedTextToImage.from_pipeline(tiny_pipeline(dtype=torch.float64))
    shorter, longer = "red circle is above blue square", "red circle is left of blue square"
    with torch.no_grad():
        runs = [model.trajectory(prompt, num_steps=2) for prompt in (shorter, longer)]
        tokens = [model.to_tokens(prompt, length=8) for prompt in (shorter, longer)]
        padded = [model.trajectory(tokens_, num_steps=2) for tokens_ in tokens]
    expected = attribution.nodes(attribution.pair(*padded), metric).scores
    model.requires_grad_(False)
    with torch.no_grad():
        # one prompt: a scalar will do
        found = attribution.nodes(attribution.pair(*runs), lambda out: metric(out)[0]).scores
    for kind in found:
        assert close(found[kind], expected[kind])


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
