"""adaLN folded into the weights at one timestep: a DiT becomes an ordinary pre-norm transformer.

adaLN-single depends on the timestep (and size conditions), never on prompt or position. At one
timestep its shifts, scales and gates are constants, so they can be moved into the neighbouring
weights, exactly: the DiT's fold_ln. On the folded model a head adds exactly ``z W_O`` to the
residual stream, and circuits read off weights are right.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..lazy_imports import renamed
from .attention import weight_of

__getattr__ = renamed(
    __name__,
    {
        "FoldedDiT": "hooked_models.pixart.dit:FoldedDiT",
        "fold_timestep": "hooked_models.pixart.dit:HookedDiT.fold_timestep",
    },
)


class Unembed(nn.Module):
    """``x W_U + b_U``: normalised residual stream → values of a patch (the "vocabulary")."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Weights, applied from the right."""
        return weight_of(self.linear).T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Bias of each output."""
        return self.linear.bias

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """``x W_U + b_U``."""
        return self.linear(x)


@torch.no_grad()
def folded(transformer: nn.Module, t_emb: Float[Tensor, "1 d_model"]) -> nn.Module:
    """Copy a diffusers ``PixArtTransformer2DModel``, one timestep's modulation in its weights.

    ``t_emb``: the timestep, embedded. With W as Linears store it, [out in]: a Linear that reads ``x
    (1 + scale) + shift`` gets ``W (1 + scale)`` and ``b + W shift``; one whose output is gated gets
    ``gate W`` and ``gate b``. The timestep's path is left with shift 0, scale 0 and gate 1 at every
    input.
    """
    live: Any = copy.deepcopy(transformer)
    # the shift needs biases, and a folder has them everywhere or nowhere
    live.register_to_config(attention_bias=True)
    for block in live.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            for linear in (attention.to_q, attention.to_k, attention.to_v):
                if linear.bias is None:
                    linear.bias = nn.Parameter(weight_of(linear).new_zeros(linear.out_features))

    t_emb = t_emb.double()
    t_mod = F.linear(
        F.silu(t_emb),
        live.adaln_single.linear.weight.double(),
        live.adaln_single.linear.bias.double(),
    )
    for block in live.transformer_blocks:
        rows = block.scale_shift_table.double() + t_mod.view(6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            _fold_input(linear, shift_msa, scale_msa)
        _fold_output(block.attn1.to_out[0], gate_msa)
        _fold_input(block.ff.net[0].proj, shift_mlp, scale_mlp)
        _fold_output(block.ff.net[2], gate_mlp)
        block.scale_shift_table.zero_()
        block.scale_shift_table[[2, 5]] = 1  # the two gates
    shift, scale = live.scale_shift_table.double() + t_emb
    _fold_input(live.proj_out, shift, scale)
    live.scale_shift_table.zero_()

    embeddings = live.adaln_single.emb
    for name in ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder"):
        if hasattr(embeddings, name):
            _zero(getattr(embeddings, name).linear_2)
    _zero(live.adaln_single.linear)
    return live


def _fold_input(linear: nn.Linear, shift: Tensor, scale: Tensor) -> None:
    weight = weight_of(linear).double()
    linear.bias.copy_(linear.bias.double() + weight @ shift)
    linear.weight.copy_(weight * (1 + scale))


def _fold_output(linear: nn.Linear, gate: Tensor) -> None:
    linear.weight.copy_(gate[:, None] * weight_of(linear).double())
    linear.bias.copy_(gate * linear.bias.double())


def _zero(linear: nn.Linear) -> None:
    linear.weight.zero_()
    linear.bias.zero_()
