"""One PixArt block: image ↔ image, image ← text, MLP.

The first and last modulated by the timestep (adaLN-single).

Source: ``BasicTransformerBlock`` with ``norm_type="ada_norm_single"`` in
diffusers/models/attention.py; PixArt-α (arXiv 2310.00426), section 2.3. Two traps: cross-attention
reads the raw residual stream and has no gate, and the module that diffusers calls ``norm2`` is the
MLP's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.config import TransformerLensConfig
from transformer_lens.hook_points import HookPoint

from ..hooks.module import has_hooks
from .attention import Attention, bias_of, weight_of


class LayerNorm(nn.Module):
    """``(x - mean) / √(var + eps)``, no affine map; fused until one of its points has a hook.

    Its hooks never see a head axis: forks of the residual stream [batch pos head d_model] are
    normalised head by head, so that a hook which freezes the scale works on them as it does on the
    stream.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.hook_scale = HookPoint()  # [batch pos 1]
        self.hook_normalized = HookPoint()  # [batch pos d_model]

    def forward(
        self, x: Float[Tensor, "batch pos *head d_model"]
    ) -> Float[Tensor, "batch pos *head d_model"]:
        """Normalise over the last axis."""
        if not (has_hooks(self.hook_scale) or has_hooks(self.hook_normalized)):
            return self._fused(x)
        if x.ndim == 4:
            return torch.stack([self(x[:, :, head]) for head in range(x.shape[2])], dim=2)
        return self._explicit(x)

    def _fused(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def _explicit(self, x: Tensor) -> Tensor:
        # Half precision is normalised in float32, as the fused kernel does.
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        wide = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized((wide / scale).to(x.dtype))


def modulate(
    x: Float[Tensor, "batch pos *head d_model"],
    shift: Float[Tensor, "batch 1 d_model"],
    scale: Float[Tensor, "batch 1 d_model"],
) -> Float[Tensor, "batch pos *head d_model"]:
    """``x (1 + scale) + shift``, the same for every position and head."""
    if x.ndim == 4:
        shift, scale = shift[:, :, None], scale[:, :, None]
    return x * (1 + scale) + shift


class Modulation(NamedTuple):
    """Shifts, scales and gates of one block, ``[batch 1 d_model]`` each, in diffusers' order."""

    shift_msa: Tensor
    scale_msa: Tensor
    gate_msa: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class ModulationHooks(nn.Module):
    """The six vectors of a block's modulation, each through its hook."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_shift_msa = HookPoint()  # each [batch 1 d_model]
        self.hook_scale_msa = HookPoint()
        self.hook_gate_msa = HookPoint()
        self.hook_shift_mlp = HookPoint()
        self.hook_scale_mlp = HookPoint()
        self.hook_gate_mlp = HookPoint()

    def split(self, rows: Float[Tensor, "batch 6 d_model"]) -> Modulation:
        """Pass the six rows through their hooks."""
        # Sliced one by one: autograd forbids a hook to write in place into a view that chunk()
        # made.
        return Modulation(
            shift_msa=self.hook_shift_msa(rows[:, 0:1]),
            scale_msa=self.hook_scale_msa(rows[:, 1:2]),
            gate_msa=self.hook_gate_msa(rows[:, 2:3]),
            shift_mlp=self.hook_shift_mlp(rows[:, 3:4]),
            scale_mlp=self.hook_scale_mlp(rows[:, 4:5]),
            gate_mlp=self.hook_gate_mlp(rows[:, 5:6]),
        )


class AdaLN(ModulationHooks):
    """adaLN-single: all blocks' modulation plus this block's table (PixArt-α, equation 1)."""

    def __init__(self, scale_shift_table: nn.Parameter) -> None:
        super().__init__()
        self.scale_shift_table = scale_shift_table  # [6 d_model]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the table anew, as diffusers does."""
        self.scale_shift_table.normal_().div_(self.scale_shift_table.shape[1] ** 0.5)

    def forward(self, t_mod: Float[Tensor, "batch six_d_model"]) -> Modulation:
        """The modulation of one block, from that of all."""
        return self.split(self.scale_shift_table + t_mod.view(t_mod.shape[0], 6, -1))


class MLP(nn.Module):
    """``GELU(x W_in + b_in) W_out + b_out``, GELU by tanh.

    Around the live Linears of a diffusers ``FeedForward``.
    """

    def __init__(self, feed_forward: Any) -> None:
        super().__init__()
        self.proj_in: nn.Module = feed_forward.net[0].proj
        # net[1] is a dropout, which DiTConfig requires to be 0
        self.proj_out: nn.Module = feed_forward.net[2]
        self.hook_pre = HookPoint()  # [batch pos d_mlp]
        self.hook_post = HookPoint()  # [batch pos d_mlp]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Apply the MLP at each position."""
        pre = self.hook_pre(self.proj_in(x))
        return self.proj_out(self.hook_post(F.gelu(pre, approximate="tanh")))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights of the first Linear, applied from the right."""
        return weight_of(self.proj_in).T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Bias of the first Linear."""
        return bias_of(self.proj_in)

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Weights of the last Linear, applied from the right."""
        return weight_of(self.proj_out).T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Bias of the last Linear."""
        return bias_of(self.proj_out)


class BlockText(NamedTuple):
    """The text as one block reads it."""

    caption: Float[Tensor, "batch text_pos d_caption"]
    keys_values: tuple[Tensor, Tensor] | None = None
    """Keys and values of `caption`, each [batch text_pos head d_head], computed earlier; None: the
    block computes them.
    """
    bias: Float[Tensor, "batch _ text_pos"] | None = None
    """Added to the attention scores."""
    n_empty_prompts: int = 0
    """Number of leading rows whose prompt is empty (`TextState.n_empty_prompts`); read by
    `fast.empty_prompts` alone.
    """


class Block(nn.Module):
    """``x += gate · attn(adaLN(x)); x += cross_attn(x, text); x += gate · mlp(adaLN(x))``.

    ``hook_attn_out``, ``hook_cross_attn_out`` and ``hook_mlp_out`` are exactly the terms added:
    post-gate.

    Example:
        >>> block = HookedTextToImage.from_pretrained("rte-nano").dit.blocks[0]
        >>> block.cross_attn.W_Q.shape
        torch.Size([3, 192, 64])
    """

    hook_out_is_single_residual_stream = True  # read by TransformerLens' logit lens

    def __init__(self, block: Any, cfg: TransformerLensConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.adaln = AdaLN(block.scale_shift_table)
        self.ln1 = LayerNorm(cfg.eps)
        self.attn = Attention(block.attn1, cfg)
        self.cross_attn = Attention(block.attn2, cfg)
        self.ln2 = LayerNorm(cfg.eps)
        self.mlp = MLP(block.ff)
        # [batch pos head d_model]; these two only with cfg.use_attn_in
        self.hook_attn_in = HookPoint()
        self.hook_cross_attn_in = HookPoint()
        self.hook_mlp_in = HookPoint()  # [batch pos d_model]; only with cfg.use_hook_mlp_in
        self.hook_resid_pre = HookPoint()  # all [batch pos d_model]
        self.hook_attn_out_pre_gate = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_cross_attn_out = HookPoint()
        self.hook_resid_mid_cross = HookPoint()
        self.hook_mlp_out_pre_gate = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        t_mod: Float[Tensor, "batch six_d_model"],
        text: BlockText,
        image_bias: Float[Tensor, "batch _ pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """One block; ``image_bias`` is added to the scores of self-attention."""
        mod = self.adaln(t_mod)
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.self_attention(x, mod, image_bias)))
        x = self.hook_resid_mid_cross(x + self.hook_cross_attn_out(self.cross_attention(x, text)))
        return self.hook_resid_post(x + self.hook_mlp_out(self.gated_mlp(x, mod)))

    def self_attention(
        self, x: Float[Tensor, "batch pos d_model"], mod: Modulation, bias: Tensor | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """``gate · attn(adaLN(x))``."""

        def norm(residual: Tensor) -> Tensor:
            return modulate(self.ln1(residual), mod.shift_msa, mod.scale_msa)

        q_in, k_in, v_in = self.attn.qkv_inputs(x, self.hook_attn_in, norm)
        z = self.attn(self.attn.queries(q_in), self.attn.keys(k_in), self.attn.values(v_in), bias)
        return self.attn.output(z, mod.gate_msa, self.hook_attn_out_pre_gate)

    def cross_attention(
        self, x: Float[Tensor, "batch pos d_model"], text: BlockText
    ) -> Float[Tensor, "batch pos d_model"]:
        """``cross_attn(x, text)``: reads the raw residual stream, and has no gate."""
        attn = self.cross_attn
        q = attn.queries(
            self.hook_cross_attn_in(attn.copy_per_head(x))
            if self.cfg.use_attn_in
            else attn.q_input(x)
        )
        if text.keys_values is None:
            k, v = attn.keys(attn.k_input(text.caption)), attn.values(attn.v_input(text.caption))
        else:  # copied where a hook may write in place: these tensors serve the steps to come
            k, v = text.keys_values
            k, v = (
                k.clone() if has_hooks(attn.hook_k) else k,
                v.clone() if has_hooks(attn.hook_v) else v,
            )
        return attn.output(attn(q, k, v, text.bias))

    def gated_mlp(
        self, x: Float[Tensor, "batch pos d_model"], mod: Modulation
    ) -> Float[Tensor, "batch pos d_model"]:
        """``gate · mlp(adaLN(x))``."""
        # a copy: `x` goes on unchanged
        mlp_in = self.hook_mlp_in(x.clone()) if self.cfg.use_hook_mlp_in else x
        mlp_out = self.mlp(modulate(self.ln2(mlp_in), mod.shift_mlp, mod.scale_mlp))
        return mod.gate_mlp * self.hook_mlp_out_pre_gate(mlp_out)
