"""Multi-head attention around the live Linears of a diffusers ``Attention``.

Uses ``scaled_dot_product_attention`` unless ``hook_attn_scores`` or ``hook_pattern`` has a hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformer_lens.config import TransformerLensConfig
from transformer_lens.hook_points import HookPoint

from ..hooks.module import has_hooks
from ..hooks.scopes import Scoped

FLASH = int(SDPBackend.FLASH_ATTENTION.value)
"""Torch's number of the kernel that tells a log-sum-exp."""


def weight_of(linear: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """Get the weight of a Linear.

    Raises TypeError for any other module, above all a peft adapter, whose ``.weight`` leaves the
    adapter out, and for a quantised Linear, whose weight is packed.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(
            f"{type(linear).__name__} has no single weight to view: fuse the adapter first "
            "(`fuse_lora`)"
        )
    weight = linear.weight
    plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    if not plain or weight.shape != (linear.out_features, linear.in_features):
        raise TypeError(
            f"The weight of this {type(linear).__name__} is quantised, so there is none to view: "
            "dequantise it first."
        )
    return weight


def bias_of(linear: nn.Module) -> Float[Tensor, " d_out"]:
    """Get the bias of a Linear, zeros where it has none."""
    weight = weight_of(linear)
    return weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias  # type: ignore[return-value]


def fused_attention(
    q: Float[Tensor, "batch head query_pos d_head"],
    k: Float[Tensor, "batch head key_pos d_head"],
    v: Float[Tensor, "batch head key_pos d_head"],
    mask: Shaped[Tensor, "..."] | None = None,
    causal: bool = False,
    scale: float | None = None,
    with_sums: Callable[[Tensor | None], None] | None = None,
) -> Float[Tensor, "batch head query_pos d_head"]:
    """`F.scaled_dot_product_attention`, bitwise; passes on the kernel's log-sum-exp of the scores.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: bias of the scores, or booleans, True where a query attends to a key.
        causal: a query attends to no later key.
        scale: factor of the scores; 1 / √d_head by default.
        with_sums: called with [batch head query_pos], or None: on other devices than the CPU, in a
            graph, and where torch takes another kernel or a query attends to no key.

    Example:
        >>> q = torch.randn(1, 2, 3, 4)
        >>> sums = []
        >>> fused_attention(q, q, q, with_sums=sums.append).shape, sums[0].shape
        (torch.Size([1, 2, 3, 4]), torch.Size([1, 2, 3]))
    """
    usual: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "scale": scale}
    if with_sums is None:
        return F.scaled_dot_product_attention(q, k, v, **usual)
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    flash = (
        q.device.type == "cpu"
        and not graph
        and (mask is None or mask.ndim in (2, 4))
        and torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, scale=scale) == FLASH
    )
    if not flash:
        z = F.scaled_dot_product_attention(q, k, v, **usual)
        with_sums(None)
        return z
    if mask is not None and mask.dtype == torch.bool:
        mask = q.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    z, sums = kernel(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    # the kernel says 0 of a query that attends to nothing
    dead = mask is not None and bool((mask == -torch.inf).all(dim=-1).any())
    with_sums(None if dead else sums)
    return z


class AttentionCore(nn.Module):
    """``softmax(scale · q kᵀ + bias) v`` of every head."""

    scale: float
    on_qk: Any = Scoped(None)
    """Optional callback ``(q, k, bias)``, called after the q and k hooks with tensors [batch pos
    head d_head]; lets a reducer work without materialising the pattern. It may return a callback
    ``(log_sums)``, called with the log-sum-exp of the scores [batch head query_pos] that the fused
    kernel found, or None where the kernel tells none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hook_q = HookPoint()  # [batch query_pos head d_head]
        self.hook_k = HookPoint()  # [batch key_pos head d_head]
        self.hook_v = HookPoint()  # [batch key_pos head d_head]
        self.hook_attn_scores = HookPoint()  # [batch head query_pos key_pos], bias included
        self.hook_pattern = HookPoint()  # [batch head query_pos key_pos]
        self.hook_z = HookPoint()  # [batch query_pos head d_head]

    def forward(
        self,
        q: Float[Tensor, "batch query_pos head d_head"],
        k: Float[Tensor, "batch key_pos head d_head"],
        v: Float[Tensor, "batch key_pos head d_head"],
        bias: Float[Tensor, "#batch *#heads _ key_pos"] | None = None,
    ) -> Float[Tensor, "batch query_pos head d_head"]:
        """Average the values under the pattern, for each query and head: ``z``.

        Args:
            q: queries, not yet scaled.
            k: keys.
            v: values.
            bias: added to the scores: [batch (head) query_pos key_pos], the same for every head if
                it has no such axis.
        """
        bias = bias[:, None] if bias is not None and bias.ndim == 3 else bias
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        with_sums = None if self.on_qk is None else self.on_qk(q, k, bias)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch head pos d_head] from here to z

        if has_hooks(self.hook_attn_scores) or has_hooks(self.hook_pattern):
            scores = q @ k.transpose(-1, -2) * self.scale
            scores = self.hook_attn_scores(scores if bias is None else scores + bias)
            z = self.hook_pattern(scores.softmax(dim=-1)) @ v
        else:
            z = fused_attention(q, k, v, bias, scale=self.scale, with_sums=with_sums)
        return self.hook_z(z.transpose(1, 2))


class Attention(AttentionCore):
    """``softmax(scale · q kᵀ + bias) v``, then ``W_O``.

    One class for image ↔ image, image ← text and text ↔ text. ``scale`` is 1 / √d_head unless
    given.

    The three stages are separate (``queries``/``keys``/``values``, ``forward``, ``output``),
    because the keys and values of a prompt can be computed once for all steps, and because a gate
    may stand between heads and residual stream.

    Source: ``AttnProcessor2_0`` in diffusers/models/attention_processor.py.
    """

    def __init__(
        self, attention: Any, cfg: TransformerLensConfig, scale: float | None = None
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.scale = cfg.d_head**-0.5 if scale is None else scale
        self.to_q: nn.Module = attention.to_q
        self.to_k: nn.Module = attention.to_k
        self.to_v: nn.Module = attention.to_v
        # [1] is a dropout, which DiTConfig requires to be 0
        self.to_out: nn.Module = attention.to_out[0]
        # [batch pos head d_in]; these three only with cfg.use_split_qkv_input
        self.hook_q_input = HookPoint()
        self.hook_k_input = HookPoint()
        self.hook_v_input = HookPoint()
        # [batch query_pos head d_model]; only with cfg.use_attn_result
        self.hook_result = HookPoint()

    def copy_per_head(
        self, x: Float[Tensor, "batch pos d_in"]
    ) -> Float[Tensor, "batch pos head d_in"]:
        """Copy `x` once for each head."""
        return x[:, :, None].repeat(1, 1, self.cfg.n_heads, 1)

    def q_input(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos *head d_in"]:
        """Input of the queries: `x`, or a copy per head through ``hook_q_input``.

        The latter with cfg.use_split_qkv_input.
        """
        return self.hook_q_input(self.copy_per_head(x)) if self.cfg.use_split_qkv_input else x

    def k_input(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos *head d_in"]:
        """Input of the keys, as `q_input`."""
        return self.hook_k_input(self.copy_per_head(x)) if self.cfg.use_split_qkv_input else x

    def v_input(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos *head d_in"]:
        """Input of the values, as `q_input`."""
        return self.hook_v_input(self.copy_per_head(x)) if self.cfg.use_split_qkv_input else x

    def qkv_inputs(
        self,
        x: Float[Tensor, "batch pos d_in"],
        attn_in: HookPoint,
        norm: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed inputs of queries, keys and values, in attention within one stream.

        One tensor serves all three by default. With cfg.use_attn_in it is copied per head, through
        ``attn_in``; with cfg.use_split_qkv_input per head and for each of the three. Copies are
        made before the norm.
        """
        if self.cfg.use_split_qkv_input:
            return norm(self.q_input(x)), norm(self.k_input(x)), norm(self.v_input(x))
        shared = norm(attn_in(self.copy_per_head(x)) if self.cfg.use_attn_in else x)
        return shared, shared, shared

    def queries(
        self, x: Float[Tensor, "batch pos *head d_in"]
    ) -> Float[Tensor, "batch pos head_ d_head"]:
        """Before ``hook_q``. ``x`` has a head axis where it was copied per head."""
        return self._project(self.to_q, x)

    def keys(
        self, x: Float[Tensor, "batch pos *head d_in"]
    ) -> Float[Tensor, "batch pos head_ d_head"]:
        """Before ``hook_k``."""
        return self._project(self.to_k, x)

    def values(
        self, x: Float[Tensor, "batch pos *head d_in"]
    ) -> Float[Tensor, "batch pos head_ d_head"]:
        """Before ``hook_v``."""
        return self._project(self.to_v, x)

    def _project(self, linear: nn.Module, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return linear(x).view(*x.shape[:2], self.cfg.n_heads, self.cfg.d_head)
        projected = einsum(
            x,
            self._read_weight(linear),
            "batch pos head d_in, head d_in d_head -> batch pos head d_head",
        )
        return projected + self._read_bias(linear)

    def output(
        self,
        z: Float[Tensor, "batch pos head d_head"],
        gate: Float[Tensor, "batch 1 d_model"] | None = None,
        pre_gate: Callable[[Tensor], Tensor] = lambda out: out,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Write to the residual stream: ``gate · pre_gate(Σ_h z_h W_O[h] + b_O)``.

        With cfg.use_attn_result the same sum is taken head by head. ``hook_result`` is ``gate · z_h
        W_O[h]``: a head's result is its residual contribution. The rest, ``b_O`` and any change by
        a hook on ``pre_gate``, is gated and added once. Edits at both points therefore add up: a
        hook on ``pre_gate`` that returns ``a`` gives ``gate · a`` plus the edits made to the
        results.
        """
        if not self.cfg.use_attn_result:
            out = pre_gate(self.to_out(z.flatten(2)))
            return out if gate is None else gate * out

        heads = einsum(
            z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model"
        )
        total = heads.sum(2)
        rest = pre_gate(total + self.b_O) - total
        if gate is not None:
            heads, rest = gate[:, :, None] * heads, gate * rest
        return self.hook_result(heads).sum(2) + rest

    @property
    def is_hooked(self) -> bool:
        """True if a hook or flag needs this attention's intermediate tensors."""
        points = (
            self.hook_q,
            self.hook_k,
            self.hook_v,
            self.hook_attn_scores,
            self.hook_pattern,
            self.hook_z,
        )
        flags = self.cfg.use_attn_in or self.cfg.use_split_qkv_input or self.cfg.use_attn_result
        hooked = any(
            linear._forward_hooks or linear._forward_pre_hooks
            for linear in (self.to_q, self.to_out)
        )
        return bool(flags or hooked or any(map(has_hooks, points)))

    # Views of the Linears in TransformerLens' layout: writing to one writes to the wrapped model.

    def _read_weight(self, linear: nn.Module) -> Tensor:
        return rearrange(
            weight_of(linear), "(head d_head) d_in -> head d_in d_head", head=self.cfg.n_heads
        )

    def _read_bias(self, linear: nn.Module) -> Tensor:
        return rearrange(bias_of(linear), "(head d_head) -> head d_head", head=self.cfg.n_heads)

    @property
    def W_Q(self) -> Float[Tensor, "head d_in d_head"]:
        """Weights of the queries, one matrix a head."""
        return self._read_weight(self.to_q)

    @property
    def W_K(self) -> Float[Tensor, "head d_in d_head"]:
        """Weights of the keys, one matrix a head."""
        return self._read_weight(self.to_k)

    @property
    def W_V(self) -> Float[Tensor, "head d_in d_head"]:
        """Weights of the values, one matrix a head."""
        return self._read_weight(self.to_v)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Weights of the output projection, one matrix a head."""
        return rearrange(
            weight_of(self.to_out),
            "d_model (head d_head) -> head d_head d_model",
            head=self.cfg.n_heads,
        )

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Zeros where the model has ``attention_bias=False``; so too b_K and b_V."""
        return self._read_bias(self.to_q)

    @property
    def b_K(self) -> Float[Tensor, "head d_head"]:
        """Bias of the keys."""
        return self._read_bias(self.to_k)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        """Bias of the values."""
        return self._read_bias(self.to_v)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Bias of the output projection."""
        return bias_of(self.to_out)
