"""Cost of a sweep of PixArt-Σ-XL on paper: counted operations, and GPU hours under stated
assumptions.

`python -m benchmarks.xl_cost` prints the table of docs/scaling.md, `--write` puts it there. Work is
counted as `sweep.plan(…).explain()` counts it (row-layers: a block of the denoiser for one row of a
batch), and a test compares both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
START, END = "<!-- counted: benchmarks.xl_cost -->", "<!-- end -->"


@dataclass(frozen=True)
class Config:
    """PixArt-Σ-XL at 512 px, and the assumed GPU."""

    layers: int = 28
    heads: int = 16
    steps: int = 20
    width: int = 1152
    mlp_ratio: int = 4
    image_tokens: int = 1024
    text_tokens: int = 300
    prompts: int = 1000
    top: int = 100
    """Cells of each prompt's search that are run exactly, …"""
    sample: int = 200
    """… and as many at random."""
    decode: float = 2.515e12
    """Operations of the SD-VAE's decoder for an image of 512 px (counted by torch on diffusers'
    AutoencoderKL).
    """
    peak: float = 989e12
    """Assumed: NVIDIA's figure for dense bfloat16 products of an H100 SXM, operations a second."""
    reached: float = 0.4
    """Assumed: the share of it that is reached."""
    gpus: tuple[int, ...] = (1, 8, 64)
    write: bool = False


@dataclass(frozen=True)
class Work:
    """Row-layers of one prompt, for one head at one step in every cell, in the conditional
    branch.
    """

    clean: int
    forked_step: int
    """Work of all cells, at the step that they touch: one branch, from the touched layer on."""
    later: int
    """Work of all cells, at the steps after it: both branches, all layers."""
    naive: int
    """If every cell were a whole generation."""


def count(layers: int, heads: int, steps: int) -> Work:
    """Counts of a sweep of all heads of one kind of attention, at every step."""
    # the run itself, and once more in one branch for the states that forks begin with
    clean = 2 * layers * steps + layers * steps
    forked = steps * heads * sum(layers - layer for layer in range(layers))
    later = heads * layers * 2 * layers * sum(range(steps))
    return Work(clean, forked, later, layers * heads * steps * 2 * layers * steps)


def block_flops(width: int, image_tokens: int, text_tokens: int, mlp_ratio: int = 4) -> int:
    """Operations of one block for one row; keys and values of the text are computed once for all,
    and not in here.
    """
    # self-attention, cross-attention's q and out, MLP
    products = 2 * image_tokens * width * width * (4 + 2 + 2 * mlp_ratio)
    attention = 4 * image_tokens * width * (image_tokens + text_tokens)
    return products + attention


def table(config: Config) -> str:
    """The counted part of docs/scaling.md."""
    c, work = config, count(config.layers, config.heads, config.steps)
    cells, block = (
        c.layers * c.heads * c.steps,
        block_flops(c.width, c.image_tokens, c.text_tokens, c.mlp_ratio),
    )
    share = (c.top + c.sample) / cells
    gradients = (
        2 * c.layers * c.steps * 3
    )  # forward again and backward, of the run that forks leave
    scoring = {
        "attribution": gradients,
        "one step exactly": gradients + c.layers * c.steps + work.forked_step,
    }
    rows = {
        "every cell a whole generation (the peers)": (work.naive, cells),
        "image at the end, every cell exactly": (work.clean + work.forked_step + work.later, cells),
        "latent at the end, every cell exactly": (work.clean + work.forked_step + work.later, 0),
        **{
            f"image at the end, searched by {way}: {c.top} + {c.sample} cells of each prompt exactly": (
                round(scored + work.clean + share * (work.forked_step + work.later)),
                c.top + c.sample,
            )
            for way, scored in scoring.items()
        },
        "one-step effect (x0, ε), every cell exactly": (work.clean + work.forked_step, 0),
    }
    speed = c.peak * c.reached
    lines = [
        f"{c.layers} layers × {c.heads} heads × {c.steps} steps = {cells:,} cells, × {c.prompts:,} "
        f"prompts = {cells * c.prompts:,} cells. One block for one row: {block / 1e9:.1f} GFLOP "
        f"({c.image_tokens} image tokens, {c.text_tokens} text tokens, width {c.width}). Per "
        f"prompt: {work.clean:,} row-layers for the run without intervention, {work.forked_step:,} "
        f"at the steps that are touched, {work.later:,} after them; {work.naive:,} without "
        f"sharing. A decoded image: {c.decode / 1e12:.2f} TFLOP. Assumed speed: "
        f"{c.peak / 1e12:.0f} TFLOP/s × {c.reached:.0%} = {speed / 1e12:.0f} TFLOP/s a GPU.",
        "",
        "| what is measured | row-layers a prompt | PFLOP a prompt | "
        + " | ".join(f"hours on {n} GPU" for n in c.gpus)
        + " |",
        "|---" * (3 + len(c.gpus)) + "|",
    ]
    for name, (row_layers, images) in rows.items():
        flops = row_layers * block + images * c.decode
        hours = [f"{flops * c.prompts / speed / 3600 / n:,.2f}" for n in c.gpus]
        lines.append(f"| {name} | {row_layers:,} | {flops / 1e15:,.1f} | {' | '.join(hours)} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    found = table(config)
    print(found)
    if config.write:
        text = DOCUMENT.read_text()
        DOCUMENT.write_text(
            re.sub(f"{START}.*{END}", lambda _: f"{START}\n{found}\n{END}", text, flags=re.DOTALL)
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
