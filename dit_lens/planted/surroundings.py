"""Parts around the blocks: the caption MLP, the clock, the codec, patches in and out."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_models import PatchCodec

from ..task import COLORS, SHAPES
from ..task.rendering import BACKGROUND, PIXELS, shape_mask
from ..task.scene import IMAGE_SIZE, RADIUS
from .assembly import HALF_STEP
from .circuit import QUADRANTS
from .geometry import ResidualSpace, Space, Terms, orthonormal

PATCH = 8
LATENT_CHANNELS = 3 * PATCH**2
TOKEN = 16
"""Pixels along a side of an image token."""

VERTICAL = {
    **dict.fromkeys(("above", "higher", "up", "upper"), -1),
    **dict.fromkeys(("below", "lower", "down"), 1),
}
HORIZONTAL = {"left": -1, "right": 1}
FIRST_OBJECT_ENDS = 2
SECOND_OBJECT_STARTS = 4
"""Positions of words: "red circle" stands before 2, the second object at 4 or later."""
CAPTION_SHARPNESS = 16.0
"""As SHARPNESS; higher, because large queries amplify the leak of a unit."""

LATE_BELOW, FINAL_BELOW = 606.0, 107.0
"""Timesteps at which the layout is settled, and after which it is no longer marked (14 steps: from
step 6, at step 13).
"""


def caption_mlp(
    projection: Any,
    caption: Space,
    words: Mapping[str, Tensor],
    positions: Float[Tensor, "position d_text"],
    order: Tensor,
) -> None:
    """Features of a single word: its meaning and (AND with its position) its object.

    `order`: of the hidden units.
    """
    names = list(words)
    table = torch.cat([torch.stack([words[name] for name in names]), positions]).double()
    targets = torch.zeros(len(table), len(names) + 1, dtype=torch.float64)
    targets[: len(names), :-1] = torch.eye(len(names), dtype=torch.float64)
    targets[len(names) : len(names) + FIRST_OBJECT_ENDS, -1] = 1
    asked = torch.ones(len(table), dtype=torch.bool)
    asked[len(names) + FIRST_OBJECT_ENDS : len(names) + SECOND_OBJECT_STARTS] = False
    # Each column reads one word at any position, the last one the position for any word.
    duals = torch.linalg.pinv(table[asked], rtol=1e-3) @ targets[asked]
    says, first = dict(zip(names, duals.T, strict=False)), duals[:, -1]

    units: list[tuple[Tensor, float, Tensor]] = []

    def step(row: Tensor, threshold: float, writes: Terms) -> None:
        for sign in (1, -1):
            column = caption.write({name: sign * k / (2 * HALF_STEP) for name, k in writes.items()})
            units.append(
                (CAPTION_SHARPNESS * row, sign * HALF_STEP - CAPTION_SHARPNESS * threshold, column)
            )

    for axis, meanings in (("vertical", VERTICAL), ("horizontal", HORIZONTAL)):
        for side in (-1, 1):
            row = sum(
                (says[word] for word, to in meanings.items() if to == side), torch.zeros_like(first)
            )
            step(row, 0.5, {axis: side, f"is_{axis}": 1})
    for part, vocabulary in (("shape", SHAPES), ("color", COLORS)):
        for word in vocabulary:
            step(says[word] + first, 1.5, {word: 1, f"{part}1": 1})
            step(says[word] - first, 0.5, {word: 1, f"{part}2": 1})
    step(says["</s>"], 0.5, {"eos": 1})

    read, write = projection.linear_1, projection.linear_2
    for (row, bias, column), i in zip(units, order.tolist(), strict=False):
        read.weight.data[i], read.bias.data[i], write.weight.data[:, i] = (
            row.float(),
            bias,
            column.float(),
        )
    write.bias.data.zero_()


def clock(transformer: Any, residual: ResidualSpace) -> None:
    """Let adaLN shift every MLP's input by "clock_late" and "clock_final" below their timesteps.

    Gates are 1, all else is 0.
    """
    conditioner = transformer.adaln_single
    embedder = conditioner.emb.timestep_embedder
    times = torch.arange(1000)
    features = conditioner.emb.time_proj(times).double()
    # reads the timestep off its sinusoids
    ramp = torch.linalg.pinv(features, rtol=1e-3) @ (times.double() / 1000)
    for linear in (embedder.linear_1, embedder.linear_2, conditioner.linear):
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    # small: the final layer's shift and scale see this embedding too
    slope, half, small = 240.0, 4.0, 0.02
    shift_mlp = slice(3 * residual.d, 4 * residual.d)
    for i, (name, below) in enumerate((("late", LATE_BELOW), ("final", FINAL_BELOW))):
        code = residual.direction(f"time_{name}")
        for j, sign in enumerate((1, -1)):
            embedder.linear_1.weight.data[2 * i + j] = -(slope * ramp).float()
            embedder.linear_1.bias.data[2 * i + j] = slope * below / 1000 + sign * half
            embedder.linear_2.weight.data[:, 2 * i + j] = (sign * small / (2 * half) * code).float()
        # silu(z) ≈ z/2 for small z
        conditioner.linear.weight.data[shift_mlp] += torch.outer(
            residual.direction(f"clock_{name}"), 2 / small * code
        ).float()
    for block in transformer.transformer_blocks:
        block.scale_shift_table.data.zero_()
        block.scale_shift_table.data[[2, 5]] = 1
    transformer.scale_shift_table.data.zero_()


def codec(generator: torch.Generator | None) -> PatchCodec:
    """A lossless codec, an orthogonal map of 8 × 8 patches.

    At random or (without a generator) pixel for pixel.
    """
    identity = torch.eye(LATENT_CHANNELS, dtype=torch.float64)
    rows = (
        identity if generator is None else orthonormal(LATENT_CHANNELS, LATENT_CHANNELS, generator)
    )
    made = PatchCodec(LATENT_CHANNELS, PATCH)
    made.components.copy_(rows.view(LATENT_CHANNELS, 3, PATCH, PATCH))
    made.mean.copy_(torch.tensor(BACKGROUND).view(3, 1, 1) / 127.5 - 1)
    return made.eval()


def patches_in_and_out(
    transformer: Any, codec: PatchCodec, residual: ResidualSpace, generator: torch.Generator
) -> None:
    """Patch input: the mark and one direction of the noise.

    Patch output: quarters of objects, and marks.
    """
    background = torch.tensor(BACKGROUND).double() / 127.5 - 1
    colors = {
        name: torch.tensor(pixel).double() / 127.5 - 1 - background
        for name, pixel in PIXELS.items()
    }
    neither = torch.linalg.cross(colors["red"], colors["blue"])  # so no object looks like a mark
    neither = (neither / neither.abs().max())[:, None, None]
    mark = neither.expand(3, TOKEN, TOKEN)
    grain = torch.randn(TOKEN, TOKEN, generator=generator, dtype=torch.float64)
    noise = neither * (grain - grain.mean())

    def latent(patch: Tensor) -> Float[Tensor, "channel row column"]:
        return F.conv2d(patch[None], codec.components.double(), stride=PATCH)[0]

    def read(patch: Tensor) -> Tensor:
        return latent(patch) / patch.norm()

    embed = transformer.pos_embed.proj
    weight = torch.einsum("d,crs->dcrs", 0.1 * residual.direction("mark"), read(mark))
    weight += torch.einsum("d,crs->dcrs", residual.direction("noise"), read(noise))
    embed.weight.data.copy_(weight)
    embed.bias.data.copy_(residual.constant * residual.direction("one"))

    out = torch.zeros(transformer.proj_out.weight.shape, dtype=torch.float64)

    def draw(name: str, patch: Tensor) -> None:
        out.add_(
            torch.outer(
                latent(patch).permute(1, 2, 0).flatten(), residual.direction(name) / residual.gain
            )
        )

    for shape, (color, delta), (right, lower) in product(SHAPES, colors.items(), QUADRANTS):
        quarter = drawing(shape)[TOKEN * lower :, TOKEN * right :][:TOKEN, :TOKEN]
        draw(f"{shape}_{color}_{right}{lower}", delta[:, None, None] * quarter)
    draw("paint1", mark)
    draw("paint2", -mark)
    transformer.proj_out.weight.data.copy_(out)
    transformer.proj_out.bias.data.zero_()


def drawing(shape: Any) -> Float[Tensor, "32 32"]:
    """A shape in the middle of its 2 × 2 tokens.

    Its bounding box is a pixel wider, and that pixel is lost.
    """
    mask = torch.from_numpy(shape_mask(shape).copy()).double()
    canvas = torch.zeros(2 * TOKEN + 1, 2 * TOKEN + 1, dtype=torch.float64)
    top, left = RADIUS - mask.shape[0] // 2, RADIUS - mask.shape[1] // 2
    canvas[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return canvas[:-1, :-1]


assert (IMAGE_SIZE, RADIUS) == (8 * TOKEN, TOKEN)  # the grid of tokens on which all of this stands
