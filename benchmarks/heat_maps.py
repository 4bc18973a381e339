"""A word's heat map of FLUX.1 and SD3 blocks, against the plain pipeline and two peers on the same
images: attention-map-diffusers 1.0, and a trace of nnsight that sums the map there.

`python -m benchmarks.heat_maps` prints seconds, the most memory that torch allocates in a call and
ratios to the plain pipeline; all maps are compared. FLUX.1 has its double blocks alone,
for attention-map-diffusers reads no others. Without that package (`pip install --no-deps
attention-map-diffusers==1.0.0`) its rows are left out.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import multiprocessing
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nnsight
import pandas as pd
import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dit_lens import prompts
from dit_lens.readout.heat_maps import heatmap
from hooked_models import HookedTextToImage

from .measuring import agree, ratio, record, turns
from .pipelines import flux_blocks, sd3_blocks

Name = Literal["flux", "sd3"]
WORD = "circle"
PLAIN, OURS, PEER, TRACE = "plain pipeline", "heatmap", "attention-map-diffusers", "nnsight"
KERNELS = {"flux": "dispatch_attention_fn_0", "sd3": "F_scaled_dot_product_attention_0"}
"""Call of the attention kernel in diffusers' processors, as nnsight names it."""


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    models: tuple[Name, ...] = ("flux", "sd3")
    layers: int = 1
    heads: int = 8
    side: int = 64
    """Side of the latents: 1,024 image positions."""
    text_tokens: int = 64
    steps: int = 2
    repeats: int = 3
    threads: int = 1
    memory: bool = True
    out: Path | None = None


class Case:
    """One pipeline, and each side's map of the word [y x]."""

    def __init__(self, config: Config, name: Name) -> None:
        build = flux_blocks if name == "flux" else sd3_blocks
        blocks = (config.layers, 0) if name == "flux" else (config.layers,)
        self.name, self.config = name, config
        self.pipe, self.prompt = build(*blocks, config.text_tokens, heads=config.heads)
        self.model: Any = HookedTextToImage.from_pipeline(self.pipe)
        pixels = {"height": 8 * config.side, "width": 8 * config.side}
        self.model.options = {**pixels, "max_sequence_length": config.text_tokens}
        self.call = {**self.model.options, "num_inference_steps": config.steps, "output_type": "pt"}
        self.n_image = (config.side // 2) ** 2
        word = prompts.word(WORD)
        mask = prompts.token_mask(self.model, [self.prompt], word, **self.model.options)
        self.places = mask[0].nonzero().flatten().tolist()

    @property
    def sides(self) -> dict[str, Callable[[], Any]]:
        found = {PLAIN: self.plain, OURS: self.ours, TRACE: self.traced}
        if importlib.util.find_spec("attention_map_diffusers") is not None:
            found[PEER] = self.peer
        return found

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def plain(self) -> Tensor:
        return self.pipe([self.prompt], generator=self.generator(), **self.call).images

    def ours(self) -> Tensor:
        found = heatmap(self.model, self.prompt, WORD, 0, self.config.steps)
        return torch.from_numpy(found.squeeze().values)

    def peer(self) -> Tensor:
        from attention_map_diffusers import AttentionCapture

        how = {"relations": "image->text", "timesteps": "all", "offload": None}
        with AttentionCapture(self.pipe, tokens=self.places, **how) as capture:
            self.plain()
        maps = [self.square(one.data) for one in capture.compute().records]
        return torch.stack(maps).mean(0)

    def square(self, found: Tensor) -> Tensor:
        """Map of the conditional row, mean over heads, sum over the word's tokens."""
        side = self.config.side // 2
        return found[-1].float().mean(0).sum(-1).reshape(side, side)

    def traced(self) -> Tensor:
        self.folder = getattr(self, "folder", None) or tempfile.mkdtemp()
        if not (path := Path(self.folder) / "model_index.json").exists():
            self.pipe.save_pretrained(self.folder)
            self.trace = nnsight.DiffusionModel(path.parent, dispatch=True, dtype=torch.float32)
        model, live = self.trace, self.trace.transformer
        kernel, first_text = KERNELS[self.name], 0 if self.name == "flux" else self.n_image
        first_image = self.config.text_tokens if self.name == "flux" else 0
        keys = [first_text + place for place in self.places]
        queries, joint = slice(first_image, first_image + self.n_image), self.name == "flux"
        with model.generate([self.prompt], generator=self.generator(), **self.call) as tracer:
            kept = nnsight.save([])
            for _ in tracer.iter[0 : self.config.steps]:
                for block in live.transformer_blocks:
                    inner = block.attn.source.self_processor_0.source
                    (q, k, *_), _ = getattr(inner, kernel).inputs
                    q, k = (x.transpose(1, 2) if joint else x for x in (q, k))
                    scores = q[-1:, :, queries] @ k[-1:].transpose(-1, -2) / q.shape[-1] ** 0.5
                    kept.append(scores.softmax(-1)[..., keys].mean(1).sum(-1))
        return torch.stack(list(kept)).mean(0).reshape(self.config.side // 2, -1)


def memory_of(config: Config, name: Name, side: str) -> float:
    """MB that torch allocates in a call, at most, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (config, name, side))


@torch.no_grad()
def _memory(config: Config, name: Name, side: str) -> float:
    torch.set_num_threads(config.threads)
    case = Case(config, name)
    run = case.sides[side]
    case.plain()
    if side == TRACE:
        run()  # the folder's own copy of the weights
    return allocated(run)


def allocated(run: Callable[[], Any]) -> float:
    """MB of tensors that a call allocates on a CPU, at most at one time.

    Counted by torch's own allocator: resident memory also depends on the memory that the C library
    keeps from earlier calls.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = [(e["ts"], e["args"]) for e in events if e.get("name") == "[memory]"]
    found.sort(key=lambda event: event[0])
    before = found[0][1]["Total Allocated"] - found[0][1]["Bytes"]
    return (max(args["Total Allocated"] for _, args in found) - before) / 2**20


@torch.no_grad()
def compared(config: Config, name: Name) -> list[dict[str, Any]]:
    """Measure one model: a row for each side."""
    case = Case(config, name)
    times, values = turns(case.sides, config.repeats)
    added = {side: memory_of(config, name, side) if config.memory else 0.0 for side in times}
    return [
        {
            "model": name,
            "side": side,
            "seconds": statistics.median(times[side]),
            "ratio to plain": ratio(times, side, PLAIN),
            "MB added": added[side],
            "memory to plain": added[side] / added[PLAIN] if config.memory else None,
            "difference": None if side == PLAIN else agree(side, values[side], values[OURS], 1e-4),
        }
        for side in times
    ]


def main(config: Config) -> None:
    warnings.filterwarnings("ignore", module="nnsight")
    torch.set_num_threads(config.threads)
    rows = [row for name in config.models for row in compared(config, name)]
    record("heat_maps", config, pd.DataFrame(rows), config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
