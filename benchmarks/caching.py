"""Cost of reading z, or the pattern, of every attention at every step, against raw PyTorch hooks
and an nnsight trace.

`python -m benchmarks.caching` prints seconds of a generation that keeps these tensors of the
conditional branch, by all three, and compares the kept tensors. The raw side runs
`PixArtSigmaPipeline` with forward pre-hooks on every `to_out` (z), or with an attention processor
that forms the pattern as diffusers' own explicit one does; nnsight loops over `tracer.iter` in
`generate`.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import nnsight
import pandas as pd
import torch
import tyro
from diffusers import PixArtSigmaPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.pipelines.hub import resolve

from .measuring import agree, ratio, record, turns

PROMPT = "red circle is above blue square"
What = Literal["z", "pattern"]


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "rte-micro"
    steps: int = 14
    batch: int = 1
    repeats: int = 5
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None


class Kept:
    """Everything that passes, in order: the conditional half of each."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def z(self, module: torch.nn.Module, args: tuple[Tensor]) -> None:
        """A forward pre-hook of `to_out[0]`."""
        self.tensors.append(args[0].chunk(2)[1].clone())


class PatternProcessor(AttnProcessor2_0):
    """Attention by an explicit pattern, which is kept."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs
    ):  # type: ignore[no-untyped-def]
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        pattern = (scores if attention_mask is None else scores + attention_mask[:, None]).softmax(
            dim=-1
        )
        self.kept.tensors.append(pattern.chunk(2)[1].clone())
        return attn.to_out[1](attn.to_out[0]((pattern @ v).transpose(1, 2).flatten(2)))


@torch.no_grad()
def main(config: Config) -> None:
    warnings.filterwarnings("ignore", module="nnsight")
    torch.set_num_threads(config.threads)
    folder = resolve(config.model)
    pipe = PixArtSigmaPipeline.from_pretrained(folder, dtype=torch.float32).to(config.device)
    pipe.set_progress_bar_config(disable=True)
    model = HookedTextToImage.from_pretrained(config.model).to(config.device)
    traced = nnsight.DiffusionModel(folder, dispatch=True, dtype=torch.float32)
    traced.pipeline.to(config.device)
    traced.pipeline.set_progress_bar_config(disable=True)
    shape = (config.batch, model.cfg.in_channels, model.cfg.sample_size, model.cfg.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(config.device)
    prompts = [PROMPT] * config.batch
    call = {
        "num_inference_steps": config.steps,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        "max_sequence_length": model.to_tokens(prompts).shape[1],
        "clean_caption": False,
        "output_type": "pt",
    }
    rows = []
    for what in ("z", "pattern"):
        sides: dict[str, Callable[[], Tensor]] = {
            "hooked": partial(hooked, model, prompts, latents, config, what),
            "raw PyTorch": partial(raw, pipe, prompts, latents, call, what),
            "nnsight": partial(in_a_trace, traced, prompts, latents, call, what),
        }
        times, values = turns(sides, config.repeats, config.device)
        for side, spent in times.items():
            worst = agree(f"{what} by {side}", values[side], values["raw PyTorch"])
            seconds = statistics.median(spent)
            rows.append(
                {
                    "what": what,
                    "side": side,
                    "seconds": seconds,
                    "ratio to raw": ratio(times, side, "raw PyTorch"),
                    "difference": worst,
                }
            )
    record("caching", config, pd.DataFrame(rows), config.out)


def hooked(
    model: HookedTextToImage, prompts: list[str], latents: Tensor, config: Config, what: What
) -> Tensor:
    """Flat: every layer's self- and cross-attention, step by step."""
    ending = f"attn.hook_{what}"
    _, cache = model.run_with_cache(
        prompts,
        num_steps=config.steps,
        latents=latents,
        names_filter=lambda name: name.endswith(ending),
    )
    names = [
        f"steps.{step}.cond.blocks.{layer}.{kind}.hook_{what}"
        for step in range(config.steps)
        for layer in range(model.cfg.n_layers)
        for kind in ("attn", "cross_attn")
    ]
    return torch.cat([cache[name].flatten() for name in names])


def raw(
    pipe: PixArtSigmaPipeline, prompts: list[str], latents: Tensor, call: dict, what: What
) -> Tensor:
    """As `hooked`."""
    kept = Kept()
    blocks = pipe.transformer.transformer_blocks
    before = pipe.transformer.attn_processors
    handles = []
    if what == "z":
        outs = [attention.to_out[0] for block in blocks for attention in (block.attn1, block.attn2)]
        handles = [out.register_forward_pre_hook(kept.z) for out in outs]
    else:
        pipe.transformer.set_attn_processor(PatternProcessor(kept))
    pipe(prompts, latents=latents.clone(), **call)
    for handle in handles:
        handle.remove()
    pipe.transformer.set_attn_processor(before)
    return torch.cat([tensor.flatten() for tensor in kept.tensors])


def in_a_trace(
    model: nnsight.DiffusionModel, prompts: list[str], latents: Tensor, call: dict, what: What
) -> Tensor:
    """As `hooked`."""
    steps = call["num_inference_steps"]
    with model.generate(prompts, latents=latents.clone(), **call) as tracer:
        kept = nnsight.save([])
        for _ in tracer.iter[0:steps]:
            for block in model.transformer.transformer_blocks:
                for attention in (block.attn1, block.attn2):
                    if what == "z":
                        kept.append(attention.to_out[0].input.chunk(2)[1].clone())
                    else:
                        (q, k, _), options = (
                            attention.source.self_processor_0.source.F_scaled_dot_product_attention_0.inputs
                        )
                        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
                        if options.get("attn_mask") is not None:
                            scores = scores + options["attn_mask"]
                        kept.append(scores.softmax(-1).chunk(2)[1].clone())
    return torch.cat([tensor.flatten() for tensor in kept])


if __name__ == "__main__":
    main(tyro.cli(Config))
