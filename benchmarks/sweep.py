"""Causal sweeps over layers × heads × steps, against the peers' ways of doing them, in one run.

`python -m benchmarks.sweep --model rte-micro` prints seconds a cell and ratios. A one-step effect
on x0 is measured against TransformerLens' `generic_activation_patch` on a view of that step; an
effect on the image against whole generations: one with hooks a cell, as scripts do it; an nnsight
trace with an invoke a cell; and `PixArtSigmaPipeline` with an attention processor that leaves a
head out. All sides zero the same heads on the same prompts and noise, and their numbers are
compared.

The bound is arithmetic: the saving by shared prefixes (row-layers of the peer over ours), times
that by batching: a row's time in the peer's batch over that in a full batch, measured here on the
denoiser alone.

A second table compares searches (scores first, then the top and a random sample exactly) with the
exhaustive sweep: by which head and step the relation of several scenes is moved most, and by which
the image is changed most.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import nnsight
import pandas as pd
import torch
import tyro
from diffusers import PixArtSigmaPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from scipy.stats import spearmanr
from torch import Tensor
from transformer_lens import patching as tl_patching

from dit_lens import Intervention, scenes, sweep
from dit_lens.sweep.cost import seconds_of_step
from dit_lens.sweep.scores import Method
from hooked_models import HookedTextToImage
from hooked_models.pipelines.hub import resolve

from .measuring import agree, ratio, record, seconds, turns

PROMPTS = ["red circle is above blue square", "blue triangle is to the left of red circle"]
Cells = Mapping[str, Intervention]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "rte-micro"
    steps: tuple[int, ...] = (0, 4, 9)
    """Denoising steps of the sweep; every layer and head of each."""
    seed: int = 0
    repeats: int = 2
    """Sides take turns; the median is reported."""
    peer_cells: int = 6
    """Cells of one step, spread over heads, that nnsight and diffusers, which generate anew for every
    cell, are timed on.
    """
    search_steps: int = 14
    """Steps of the search, from the first; 0 leaves it out."""
    search_scenes: int = 8
    search_sublayers: tuple[str, ...] = ("cross_attn",)
    """Whose heads are searched: "cross_attn", "attn"."""
    top: int = 20
    sample: int = 10
    best: int = 10
    """The true largest effects, which the search should have among those that it runs."""
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None


def strength(tensor: Tensor) -> Tensor:
    """Something to measure of every row: how far its left half is from its right."""
    half = tensor.shape[-1] // 2
    return (tensor[..., :half] - tensor[..., half:]).flatten(1).square().mean(dim=1)


@torch.no_grad()
def main(config: Config) -> None:
    warnings.filterwarnings("ignore", module="nnsight")
    torch.set_num_threads(config.threads)
    model = HookedTextToImage.from_pretrained(config.model).to(config.device)
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    every = Intervention("blocks.*.cross_attn.hook_z")
    cells = sweep.grid(every, layers=layers, heads=heads, steps=config.steps)
    plans = {
        on: sweep.plan(model, PROMPTS, config.seed, cells, {"m": sweep.Metric(strength, on=on)})
        for on in ("x0", "image")
    }
    few = dict(list(cells.items())[:: max(1, len(cells) // config.peer_cells)])
    # with the cells it is run on, and rows together
    peers: dict[tuple[str, str], tuple[Callable[[], Tensor], Cells, int]] = {
        ("x0", "TransformerLens, a step view"): (
            partial(one_step_peer, model, config),
            cells,
            len(PROMPTS),
        ),
        ("image", "hooks, a generation a cell"): (
            partial(whole_run_peer, model, config, cells),
            cells,
            len(PROMPTS),
        ),
        ("image", "nnsight, an invoke a cell"): (
            nnsight_peer(config, few),
            few,
            len(few) * len(PROMPTS),
        ),
        ("image", "diffusers, attention processor"): (
            diffusers_peer(config, few),
            few,
            len(PROMPTS),
        ),
    }
    sides = {
        **{key: run for key, (run, _, _) in peers.items()},
        **{(on, "sweep"): partial(ours, plans[on]) for on in plans},
    }
    times, values = turns(sides, config.repeats, config.device)
    full = plans["image"].batch
    of_row = {
        n: seconds_of_step(plans["image"], n) / n
        for n in {full, *(n for _, _, n in peers.values())}
    }
    rows = []
    for (on, peer), (_, run_on, together) in peers.items():
        where = [list(cells).index(label) for label in run_on]
        worst = agree(f"{on} by {peer}", values[on, "sweep"][where], values[on, peer], 1e-3)
        cost, share = plans[on].cost, len(run_on) / len(cells)
        calls = plans[on].num_steps if on == "image" else 1
        shared = len(cells) * len(PROMPTS) * 2 * len(layers) * calls / cost.row_layers
        faster = ratio(times, (on, peer), (on, "sweep")) / share
        bound = shared * of_row[together] / of_row[full]
        rows.append(
            {
                "metric": on,
                "peer": peer,
                "its batch": together,
                "its s/cell": statistics.median(times[on, peer]) / len(run_on),
                "sweep s/cell": statistics.median(times[on, "sweep"]) / len(cells),
                "expected": cost.seconds / len(cells),
                "ratio": faster,
                "bound": bound,
                "of bound": faster / bound,
                "difference": worst,
            }
        )
    batching = of_row[len(PROMPTS)] / of_row[full]
    facts: dict[str, Any] = {
        "cells": len(cells),
        "prompts": len(PROMPTS),
        f"a row in a batch of {full} is faster by": round(batching, 2),
    }
    if config.search_steps:
        found = searched(model, config)
        print(pd.DataFrame(found).round(3).to_string(index=False))
        facts["search"] = found
    record("sweep", config, pd.DataFrame(rows), config.out, **facts)


def ours(plan: sweep.Plan) -> Tensor:
    """Values [cell, prompt] of a plan that is run."""
    return torch.from_numpy(plan.run()["m"].isel(seed=0).values)


def searched(model: HookedTextToImage, config: Config) -> list[dict[str, Any]]:
    """Searches beside the exhaustive sweep, by two metrics: time, and how many of the
    true largest were run.

    Over all heads at every step.
    """
    along = {
        "layers": range(model.cfg.n_layers),
        "heads": range(model.cfg.n_heads),
        "steps": range(config.search_steps),
    }
    cells = {
        f"{kind} {name}": one
        for kind in config.search_sublayers
        for name, one in sweep.grid(Intervention(f"blocks.*.{kind}.hook_z"), **along).items()
    }
    wanted = scenes.sample(config.search_scenes, seed=3, color_words="both")
    metrics = {"relation": sweep.relation_metric(wanted), "strength": sweep.Metric(strength)}
    plan = sweep.plan(
        model, [scenes.caption(scene) for scene in wanted], config.seed, cells, metrics
    )
    exhaustive, whole = seconds(plan.run, config.device)
    ways: tuple[Method, ...] = ("step", "attribution")
    rows = []
    for metric, score in product(metrics, ways):
        search = partial(sweep.search, plan, metric, config.top, sample=config.sample, score=score)
        spent, found = seconds(search, config.device)
        sizes = (
            abs(whole[f"{metric}_effect"].sel(interval="mean"))
            .to_series()
            .sort_values(ascending=False)
        )
        ran, rank = (
            found.table.loc[found.table["drawn"] != "", "intervention"],
            min(config.best, config.top),
        )
        of_all = found.table.set_index("intervention").loc[sizes.index, "score"]
        rows.append(
            {
                "metric": metric,
                "score": score,
                "cells": len(cells),
                "run exactly": len(ran),
                "seconds": spent,
                "times faster": exhaustive / spent,
                **{
                    f"of the true top {n}": len(set(sizes.index[:n]) & set(ran)) / n
                    for n in (3, config.best)
                },
                "effect size of those run": float(sizes[ran].sum() / sizes.sum()),
                "rank correlation of sizes, all cells": float(
                    spearmanr(of_all.abs(), sizes).statistic
                ),
                "in the sample": str(found.of_sizes),
                f"missed above rank {rank}, at most": found.missed(rank).most,
            }
        )
    return rows


# The peers. Each gives values [cell, prompt].


def whole_run_peer(model: HookedTextToImage, config: Config, cells: Cells) -> Tensor:
    """One generation of all prompts for every cell, hooked from its start."""
    runs = [
        model.run_with_hooks(PROMPTS, seed=config.seed, fwd_hooks=cell.hooks(model, PROMPTS))
        for cell in cells.values()
    ]
    return torch.stack([strength(images) for images in runs]).double()


def one_step_peer(model: HookedTextToImage, config: Config) -> Tensor:
    """TransformerLens' patching of every head's z by zeros, on a view of each step."""
    found = []
    for step in config.steps:
        view, tokens = model.at(step=step, prompts=PROMPTS, seed=config.seed, returns="x0")
        _, zeros = view.run_with_cache(tokens)
        zeros.cache_dict.update({name: torch.zeros_like(value) for name, value in zeros.items()})
        setter, axes = tl_patching.layer_head_vector_patch_setter, ("layer", "head")
        result = tl_patching.generic_activation_patch(
            view, tokens, zeros, strength, setter, "cross_z", axes, reduce="none"
        )
        found.append(result.values.flatten(0, 1))
    return torch.stack(found, dim=1).flatten(0, 1).double()


def _call(model: HookedTextToImage, config: Config, copies: int) -> dict[str, Any]:
    """Arguments of a diffusers pipeline's call, for the noise and the text of our runs."""
    return {
        "latents": model.noise(config.seed, copies * len(PROMPTS)).to(model.device),
        "num_inference_steps": 14,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        "max_sequence_length": model.to_tokens(PROMPTS).shape[1],
        "clean_caption": False,
        "output_type": "pt",
    }


def nnsight_peer(config: Config, cells: Cells) -> Callable[[], Tensor]:
    """One trace of a generation, with an invoke of all prompts for every cell."""
    traced = nnsight.DiffusionModel(resolve(config.model), dispatch=True, dtype=torch.float32)
    traced.pipeline.to(config.device)
    traced.pipeline.set_progress_bar_config(disable=True)
    model = HookedTextToImage.from_pretrained(config.model).to(config.device)  # for its noise
    call, d_head, n = _call(model, config, len(cells)), model.cfg.d_head, len(PROMPTS)

    def run() -> Tensor:
        with torch.no_grad(), traced.generate(return_dict=False, **call) as tracer:
            images = nnsight.save([])
            for cell in cells.values():
                layer, head, step = (
                    int(cell.site.split(".")[1]),
                    int(cell.heads[0]),
                    int(cell.steps),
                )
                with tracer.invoke(PROMPTS):
                    for _ in tracer.iter[step]:
                        out = traced.transformer.transformer_blocks[layer].attn2.to_out[0]
                        z = out.input.clone()  # [uncond; cond] of this invoke
                        z[n:, :, head * d_head : (head + 1) * d_head] = 0
                        out.input = z
            with tracer.invoke():
                images.append(traced.output[0])
        return strength(images[0]).reshape(len(cells), n).double()

    return run


class WithoutHead(AttnProcessor2_0):
    """Attention as diffusers' own, of which one head is left out, in the conditional branch, at one
    of its calls.
    """

    def __init__(self, head: int, call: int) -> None:
        super().__init__()
        self.head, self.call, self.calls = head, call, 0

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs
    ):  # type: ignore[no-untyped-def]
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, attention_mask[:, None])
        if self.calls == self.call:
            z[len(z) // 2 :, self.head] = 0
        self.calls += 1
        return attn.to_out[1](attn.to_out[0](z.transpose(1, 2).flatten(2)))


def diffusers_peer(config: Config, cells: Cells) -> Callable[[], Tensor]:
    """One call of the pipeline for every cell, with a processor in the place of one attention's."""
    pipe = PixArtSigmaPipeline.from_pretrained(resolve(config.model), dtype=torch.float32).to(
        config.device
    )
    pipe.set_progress_bar_config(disable=True)
    call, before = (
        _call(HookedTextToImage.from_pipeline(pipe), config, 1),
        pipe.transformer.attn_processors,
    )

    def run() -> Tensor:
        found = []
        for cell in cells.values():
            processor = WithoutHead(int(cell.heads[0]), int(cell.steps))
            name = f"transformer_blocks.{cell.site.split('.')[1]}.attn2.processor"
            pipe.transformer.set_attn_processor({**before, name: processor})
            found.append(strength(pipe(PROMPTS, **call).images))
        pipe.transformer.set_attn_processor(dict(before))  # which diffusers empties
        return torch.stack(found).double()

    return run


if __name__ == "__main__":
    main(tyro.cli(Config))
