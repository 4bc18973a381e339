"""Changes of finished weights for the "rotated" kind: gauges, and noise of small effect."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

NOISE = 0.001
"""Relative standard deviation of every weight and bias."""
LEAK = 0.01


def stretch(d: int, generator: torch.Generator) -> Float[Tensor, " d"]:
    """Factors between 1/√2 and √2."""
    return 2 ** (torch.rand(d, generator=generator) - 0.5)


@torch.no_grad()
def modulate_at_random(transformer: Any, generator: torch.Generator) -> None:
    """Set adaLN shifts, scales and gates at random, undone in the adjacent weights.

    The function of the network is the same. Scales and shifts are in the modulation that all blocks
    share, gates in each block's own table.
    """
    d = transformer.inner_dim
    shared = transformer.adaln_single.linear
    shifts, scales = (
        [0.3 * torch.randn(d, generator=generator) for _ in range(3)],
        [stretch(d, generator) for _ in range(3)],
    )
    for i in range(2):  # before self-attention, before the MLP
        rows = slice(3 * i * d, (3 * i + 1) * d)
        shared.weight[rows].mul_(scales[i][:, None])
        shared.bias[rows].add_(shifts[i])
        shared.bias[(3 * i + 1) * d : (3 * i + 2) * d].add_(scales[i] - 1)
    for block in transformer.transformer_blocks:
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            undo(linear, shifts[0], scales[0])
        undo(block.ff.net[0].proj, shifts[1], scales[1])
        for row, linear in ((2, block.attn1.to_out[0]), (5, block.ff.net[2])):
            gate = stretch(d, generator)
            block.scale_shift_table[row] = gate
            linear.weight.div_(gate[:, None])
            linear.bias.div_(gate)
    transformer.scale_shift_table[0] = shifts[2]
    transformer.scale_shift_table[1] = scales[2] - 1
    undo(transformer.proj_out, shifts[2], scales[2])


def undo(linear: nn.Linear, shift: Float[Tensor, " d"], scale: Float[Tensor, " d"]) -> None:
    """Change `linear` so that its output for scale · x + shift is the former one for x."""
    linear.weight.div_(scale)
    linear.bias.sub_(linear.weight @ shift)


@torch.no_grad()
def perturb(transformer: nn.Module, generator: torch.Generator) -> None:
    """Multiply every weight by 1 + NOISE · a standard normal number."""
    for parameter in transformer.parameters():
        parameter.mul_(1 + NOISE * torch.randn(parameter.shape, generator=generator))
