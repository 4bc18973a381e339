"""adaLN folded into the weights at one timestep: a DiT becomes an ordinary pre-norm transformer.

adaLN-single depends on the timestep (and size conditions), never on prompt or position. At one timestep its shifts,
scales and gates are constants, so they can be moved into the neighbouring weights, exactly: the DiT's fold_ln. On the
folded model a head adds exactly ``z W_O`` to the residual stream, and circuits read off weights are right.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..arguments import number
from .attention import weight_of
from .dit import HookedDiT


class Unembed(nn.Module):
    """``x W_U + b_U``: normalised residual stream → the values of a position's patch (the "vocabulary")."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return weight_of(self.linear).T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.linear.bias

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return self.linear(x)


class FoldedDiT(HookedDiT):
    """A HookedDiT that is right at one timestep, with the attributes that TransformerLens' weight-based tools read.

    Its "tokens" are output channels: index ``(p · patch_size + q) · out_channels + c`` of a position's patch.
    """

    def __init__(self, transformer: nn.Module, timestep: float) -> None:
        super().__init__(transformer)
        self.folded_timestep = timestep
        self.unembed = Unembed(self.proj_out)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.unembed.b_U

    def tokens_to_residual_directions(self, tokens: int | str | Int[Tensor, "*any"]) -> Float[Tensor, "*any d_model"]:
        """Columns of W_U, by output channel. Raises TypeError for words: an image has none."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.T[torch.as_tensor(tokens, device=self.device)]

    def to_single_token(self, token: str) -> int:
        """Raise TypeError: an output channel has no name."""
        raise TypeError(f"output channels are numbers from 0 to {self._cfg.d_vocab - 1}, not words such as {token!r}")

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Float[Tensor, " d_model"]:
        """Sum of the biases of all writes before ``layer`` (``mlp_input``: before its MLP), cross-attention included."""
        total = torch.zeros(self._cfg.d_model, device=self.device, dtype=self.dtype)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O + block.cross_attn.b_O + (block.mlp.b_out if include_mlp_biases else 0)
        if mlp_input:
            total = total + self.blocks[layer].attn.b_O + self.blocks[layer].cross_attn.b_O
        return total

    def reset_parameters(self) -> None:
        """Raise ValueError: new weights would lose the folded timestep."""
        raise ValueError("re-initialise the model itself, then fold it again: fold_timestep(t)")

    def blocks_with(self, sublayer: str) -> list[tuple[int, nn.Module]]:
        """List (layer, block) of every block that has the sublayer."""
        return [(layer, block) for layer, block in enumerate(self.blocks) if hasattr(block, sublayer)]

    def tl_parameters(self) -> dict[str, Tensor]:
        """Map TransformerLens' name of each weight to its tensor (views)."""
        named: dict[str, Tensor] = {"unembed.W_U": self.W_U, "unembed.b_U": self.b_U}
        for layer, block in enumerate(self.blocks):
            for kind, attn in (("attn", block.attn), ("cross_attn", block.cross_attn)):
                for weight in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
                    named[f"blocks.{layer}.{kind}.{weight}"] = getattr(attn, weight)
            for weight in ("W_in", "b_in", "W_out", "b_out"):
                named[f"blocks.{layer}.mlp.{weight}"] = getattr(block.mlp, weight)
        return named


@torch.no_grad()
def fold_timestep(dit: HookedDiT, timestep: float, sizes: Mapping[str, Tensor | None] | None = None) -> FoldedDiT:
    """Make a model that equals ``dit`` at ``timestep`` and has the modulation in its weights; see ``HookedDiT.fold_timestep``.

    With W as Linears store it, [out in]: a Linear that reads ``x (1 + scale) + shift`` gets ``W (1 + scale)`` and
    ``b + W shift``; one whose output is gated gets ``gate W`` and ``gate b``. The timestep's path is left with shift 0,
    scale 0 and gate 1 at every input.
    """
    timestep = number("timestep", timestep, 0)
    live: Any = copy.deepcopy(dit.wrapped)
    live.register_to_config(attention_bias=True)  # the shift needs biases, and a folder has them everywhere or nowhere
    for block in live.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            for linear in (attention.to_q, attention.to_k, attention.to_v):
                if linear.bias is None:
                    linear.bias = nn.Parameter(weight_of(linear).new_zeros(linear.out_features))

    t_emb = dit.embed_timestep(torch.tensor([timestep], device=dit.device), sizes, dit.dtype).double()
    t_mod = F.linear(F.silu(t_emb), live.adaln_single.linear.weight.double(), live.adaln_single.linear.bias.double())
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
    return FoldedDiT(live, timestep).train(dit.training)


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
