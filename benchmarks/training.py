"""How fast `dit-lens train` trains, against a plain diffusers training loop on the same model,
objective and batch, in one run.

`python -m benchmarks.training --size micro` prints samples a second of each side, their ratio, and
which fraction of the machine's measured rate of matrix products each reaches; JSON with --out.

The plain loop is that of diffusers' own example scripts: accelerate, AdamW, EMA, images and
captions encoded in every step, no compilation; once in float32 and, where the machine multiplies in
bfloat16, once under bfloat16 autocast. Ours is the command's own `train()` at its own choice of
precision, timed by its own log.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from dit_lens import scenes
from dit_lens.training import PRESETS, TrainConfig, build_pipeline, train
from dit_lens.training.data import StepData
from dit_lens.training.objectives import OBJECTIVES
from dit_lens.training.precision import resolve_precision

NO_CONDITIONS = {"resolution": None, "aspect_ratio": None}


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    size: Literal["nano", "micro", "mini", "B"] = "micro"
    encoder: str = "rte"
    batch_size: int = 64
    """Samples a step, of both sides."""
    plain_steps: int = 12
    """Timed steps of the plain loop, before and after ours; the median is reported."""
    our_steps: int = 150
    """Steps of ours, at least 25."""
    warm_steps: int = 50
    """Steps of ours before the reported median, so that compilation does not count."""
    compile: bool = True
    """True to compile ours."""
    threads: int = 1
    device: str = "cpu"
    """The device that accelerate finds; "cuda" without one is an error."""
    out: Path | None = None


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    pipe = build_pipeline(PRESETS[config.size], config.encoder)
    device = Accelerator().device
    if device.type != config.device:
        raise SystemExit(
            f"accelerate runs on {device.type}, not on {config.device}: set ACCELERATE_USE_CPU."
        )
    flops = flops_per_sample(pipe, config)
    chosen = resolve_precision("auto", device)
    dtypes = {"no": "float32"} | ({"bf16": "bfloat16"} if chosen == "bf16" else {})
    rates = {dtype: matmul_rate(dtype, device) for dtype in dtypes.values()}

    seconds: dict[str, list[float]] = {f"plain, {dtype}": [] for dtype in dtypes.values()}
    losses: dict[str, float] = {}

    def plain() -> None:
        for precision, dtype in dtypes.items():
            times, losses[f"plain, {dtype}"] = plain_loop(config, precision, 2 + config.plain_steps)
            seconds[f"plain, {dtype}"] += times

    plain()
    losses["dit-lens train"] = plain_loop(config, chosen, 1, as_ours=True)[1]
    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory() as folder:
        ours = TrainConfig(
            Path(folder) / "run",
            size=config.size,
            encoder=config.encoder,
            steps=config.our_steps,
            batch_size=config.batch_size,
            compile=config.compile,
            dynamics_points=0,
            evaluate_every=10**6,
            evaluation_scenes=1,
        )
        train(ours)
        log = [json.loads(line) for line in (ours.out / "metrics.jsonl").read_text().splitlines()]
    entries = [
        entry
        for entry in log
        if "samples_per_second" in entry and entry["step"] > config.warm_steps
    ]
    seconds["dit-lens train"] = [
        config.batch_size / entry["samples_per_second"] for entry in entries
    ]
    plain()

    rows = []
    for name, times in seconds.items():
        dtype = name.removeprefix("plain, ") if name.startswith("plain") else dtypes[chosen]
        speed = config.batch_size / statistics.median(times)
        rows.append(
            (
                name,
                dtype,
                config.batch_size,
                speed,
                flops * speed / 1e9,
                flops * speed / rates[dtype],
            )
        )
    columns = ["loop", "dtype", "batch", "samples/s", "GFLOP/s", "of matmul rate"]
    table = pd.DataFrame(rows, columns=columns)
    for reference in (f"plain, {dtype}" for dtype in dtypes.values()):
        table[f"× {reference}"] = (
            table["samples/s"] / table.loc[table["loop"] == reference, "samples/s"].item()
        )
    machine = (
        f"{platform.processor() or platform.machine()}, {config.threads} thread(s), {device.type}, "
        f"torch {torch.__version__}"
    )
    print(
        f"{config.size}, {machine}; {flops / 1e9:.2f} GFLOP a sample (forward and backward, "
        "counted)"
    )
    print(", ".join(f"{dtype} products {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in rates.items()))
    print(
        "loss of the same weights, scenes and noise: "
        f"{', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())}"
    )
    if max(losses.values()) > 1.02 * min(losses.values()):
        raise SystemExit("The sides do not compute the same loss.")
    print(table.round(3).to_string(index=False))
    if config.out is not None:
        facts = {
            "config": {k: str(v) for k, v in asdict(config).items()},
            "machine": machine,
            "matmul": rates,
            "losses": losses,
        }
        config.out.write_text(json.dumps(facts | {"rows": table.to_dict("records")}, indent=1))


def plain_loop(
    config: Config, precision: str, steps: int, as_ours: bool = False
) -> tuple[list[float], float]:
    """Seconds of every step after the first two, and the loss of the first one.

    `as_ours`: with the network as `train()` sets it up, for comparing losses.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision)
    torch.manual_seed(0)
    pipe = build_pipeline(PRESETS[config.size], config.encoder).to(accelerator.device)
    # without this the model starts by predicting 0, and first losses would agree whatever is
    # computed
    torch.nn.init.normal_(
        pipe.transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(1)
    )
    transformer = pipe.transformer.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-4)
    ema = EMAModel(transformer.parameters(), 0.9999)
    if as_ours:
        transformer.set_attn_processor(AttnProcessor())
        if config.compile:
            transformer.compile()
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    objective, generator = OBJECTIVES["x0"](), torch.Generator(accelerator.device).manual_seed(0)
    times, first = [], 0.0
    for step in range(steps):
        start = time.perf_counter()
        batch = scenes.sample(config.batch_size, seed=0, start=step * config.batch_size)
        with torch.no_grad():
            images = scenes.render(batch).to(accelerator.device)
            clean = (
                pipe.vae.encode(images * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
            )
            tokens = pipe.tokenizer(
                [scenes.caption(scene) for scene in batch], padding="longest", return_tensors="pt"
            )
            tokens = tokens.to(accelerator.device)
            text = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[
                0
            ].float()
        loss = objective.loss(predictor(transformer, text, tokens.attention_mask), clean, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(transformer.parameters())
        if step == 0:
            first = loss.item()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        if step >= 2:
            times.append(time.perf_counter() - start)
    return times, first


def predictor(transformer: PixArtTransformer2DModel, text: torch.Tensor, mask: torch.Tensor):  # type: ignore[no-untyped-def]
    """`predict(noisy, timestep)` of an objective."""

    def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        out = transformer(
            noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=timestep,
            added_cond_kwargs=NO_CONDITIONS,
            return_dict=False,
        )
        return out[0].float()

    return predict


def flops_per_sample(pipe: PixArtSigmaPipeline, config: Config) -> float:
    """Floating-point operations of one forward and backward pass for each sample, counted by torch;
    encoders apart.
    """
    data = StepData(
        pipe,
        TrainConfig(Path(), batch_size=config.batch_size, encoder=config.encoder),
        Accelerator(cpu=True),
    )
    clean, text, mask, generator = data(0)
    transformer = pipe.transformer.train().requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        OBJECTIVES["x0"]().loss(predictor(transformer, text, mask), clean, generator).backward()
    return counter.get_total_flops() / config.batch_size


def matmul_rate(dtype: str, device: torch.device, rows: int = 4096, width: int = 1024) -> float:
    """Operations a second of one large matrix product, the best of several."""
    a = torch.randn(rows, width, device=device, dtype=getattr(torch, dtype))
    b = torch.randn(width, width, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * rows * width * width / best


if __name__ == "__main__":
    main(tyro.cli(Config))
