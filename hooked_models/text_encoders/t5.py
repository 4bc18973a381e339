"""T5 encoder with a HookPoint on every tensor.

``HookedT5Encoder`` around the live transformers module.

Source: ``T5EncoderModel`` in transformers/models/t5/modeling_t5.py (5.23); Raffel et al. (arXiv
1910.10683); T5 v1.1, which PixArt reads, has the gated MLP of Shazeer (arXiv 2002.05202). Three
traps: attention is not divided by √d_head, all layers share the position bias of the first, and the
norms take their variance in float32 whatever the model's precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.hook_points import HookPoint
from transformers import T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput

from ..hooks.module import HookedModule, has_hooks
from ..hooks.wrapping import Wrapped
from ..pixart.attention import Attention, weight_of
from ..pixart.block import LayerNorm
from ..pixart.config import HookedConfig


@dataclass(kw_only=True)
class T5EncoderConfig(HookedConfig):
    """TransformerLens' names for a T5 config.

    ``n_ctx`` is the length of T5's training; any length can be read.
    """

    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    """From this distance on, in tokens, all distances share a bucket."""

    @classmethod
    def from_encoder(cls, encoder: Any) -> T5EncoderConfig:
        """Read from a ``T5EncoderModel``."""
        config = encoder.config
        return cls(
            d_model=config.d_model,
            d_head=config.d_kv,
            n_heads=config.num_heads,
            n_layers=config.num_layers,
            n_ctx=512,
            d_mlp=config.d_ff,
            d_vocab=encoder.encoder.embed_tokens.num_embeddings,
            eps=config.layer_norm_epsilon,
            act_fn=config.dense_act_fn,
            gated_mlp=config.is_gated_act,
            normalization_type="RMS",
            uses_rms_norm=True,
            final_rms=True,
            positional_embedding_type="relative_positional_bias",
            device=str(encoder.device),
            dtype=encoder.dtype,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
        )


class RMSNorm(LayerNorm):
    """``weight · x / √(mean(x²) + eps)``.

    ``hook_normalized`` is before the weight, as in TransformerLens. The inverse of the root is
    taken in float32, as in transformers: a float64 model is as exact as that, and no more.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__(norm.variance_epsilon)
        self.weight: nn.Parameter = norm.weight  # [d_model]

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)

    def _fused(self, x: Tensor) -> Tensor:
        return self.weight * (x * self._inverse(x)).to(self.weight.dtype)

    def _explicit(self, x: Tensor) -> Tensor:
        scale = self.hook_scale(
            1 / self._inverse(x).to(torch.promote_types(x.dtype, torch.float32))
        )
        return self.weight * self.hook_normalized((x / scale).to(self.weight.dtype))


class MLP(nn.Module):
    """``act(x W_in) W_out``, or gated ``(act(x W_gate) · x W_in) W_out``; without biases."""

    def __init__(self, feed_forward: Any, gated: bool) -> None:
        super().__init__()
        self.proj_gate: nn.Module | None = feed_forward.wi_0 if gated else None
        self.proj_in: nn.Module = feed_forward.wi_1 if gated else feed_forward.wi
        self.act: nn.Module = feed_forward.act
        self.proj_out: nn.Module = feed_forward.wo
        self.hook_pre = HookPoint()  # [batch pos d_mlp], before the activation
        if gated:
            self.hook_pre_linear = HookPoint()  # [batch pos d_mlp], multiplied by the activation
        self.hook_post = HookPoint()  # [batch pos d_mlp]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Apply the MLP, gated or not, at each position."""
        if self.proj_gate is None:
            post = self.act(self.hook_pre(self.proj_in(x)))
        else:
            post = self.act(self.hook_pre(self.proj_gate(x))) * self.hook_pre_linear(
                self.proj_in(x)
            )
        post = self.hook_post(post)
        # transformers keeps this Linear in float32 where it loads the others in float16.
        dtype: Any = self.proj_out.weight.dtype
        return self.proj_out(post.to(dtype) if dtype.is_floating_point else post)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights of the first Linear, applied from the right."""
        return weight_of(self.proj_in).T

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"] | None:
        """None where the MLP is not gated."""
        return None if self.proj_gate is None else weight_of(self.proj_gate).T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Weights of the last Linear, applied from the right."""
        return weight_of(self.proj_out).T


class Block(nn.Module):
    """``x += attn(ln1(x)); x += mlp(ln2(x))``."""

    def __init__(self, block: Any, cfg: T5EncoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        (attention, feed_forward), linears = block.layer, block.layer[0].SelfAttention
        self.ln1 = RMSNorm(attention.layer_norm)
        in_diffusers_names = SimpleNamespace(
            to_q=linears.q, to_k=linears.k, to_v=linears.v, to_out=[linears.o]
        )
        self.attn = Attention(in_diffusers_names, cfg, scale=1.0)
        self.ln2 = RMSNorm(feed_forward.layer_norm)
        self.mlp = MLP(feed_forward.DenseReluDense, cfg.gated_mlp)
        self.hook_attn_in = HookPoint()  # [batch pos head d_model]; only with cfg.use_attn_in
        self.hook_mlp_in = HookPoint()  # [batch pos d_model]; only with cfg.use_hook_mlp_in
        self.hook_resid_pre = HookPoint()  # all [batch pos d_model]
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], bias: Float[Tensor, "#batch head pos pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """``bias``, of positions and mask, is added to the attention scores."""
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(finite(x + self.hook_attn_out(self._attend(x, bias))))
        mlp_in = self.hook_mlp_in(x.clone()) if self.cfg.use_hook_mlp_in else x
        return self.hook_resid_post(finite(x + self.hook_mlp_out(self.mlp(self.ln2(mlp_in)))))

    def _attend(self, x: Tensor, bias: Tensor) -> Tensor:
        attn = self.attn
        q_in, k_in, v_in = attn.qkv_inputs(x, self.hook_attn_in, self.ln1)
        return attn.output(attn(attn.queries(q_in), attn.keys(k_in), attn.values(v_in), bias))


def finite(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clamp infinities of float16 into its range, as ``T5Block`` does; leave other types alone."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(x.dtype).max - 1000
    return torch.where(x.isinf().any(), x.clamp(-limit, limit), x)


def position_buckets(
    length: int, n_buckets: int, max_distance: int, device: torch.device
) -> Int[Tensor, "query_pos key_pos"]:
    """Bucket of each key's distance from each query.

    Half of the buckets are for later keys. Near distances have a bucket each, farther ones share
    buckets on a logarithmic scale, and all from ``max_distance`` on share the last.

    Source: ``T5Attention._relative_position_bucket``, in its order of operations.

    Example:
        >>> position_buckets(3, n_buckets=8, max_distance=16, device=torch.device("cpu"))
        tensor([[0, 5, 6],
                [1, 0, 5],
                [2, 1, 0]])
    """
    position = torch.arange(length, device=device)
    ahead = position - position[:, None]
    n_each, distance = n_buckets // 2, ahead.abs()
    n_near = n_each // 2
    log_ratio = torch.log(distance.float() / n_near) / math.log(max_distance / n_near)
    far = (n_near + (log_ratio * (n_each - n_near)).long()).clamp(max=n_each - 1)
    return n_each * (ahead > 0) + torch.where(distance < n_near, distance, far)


class HookedT5Encoder(HookedModule):
    """A ``T5EncoderModel`` with a HookPoint on every tensor, in TransformerLens' vocabulary.

    The leaves (Linear, Embedding, norm weights) are the wrapped module's own: weights are shared,
    never copied. The forward between them is written here, with the wrapped module's arguments and
    output, so it can stand in its place inside a pipeline. Its cache is TransformerLens' own, whose
    decompositions are exact here: there is no bias anywhere, and ``hook_attn_out`` and
    ``hook_mlp_out`` are exactly the tensors added. (In float16 alone transformers then clips
    infinities.)

    Args:
        encoder: a live ``T5EncoderModel``, in evaluation mode when it is run: the forward has no
            dropout.

    Raises:
        TypeError: for another encoder, such as UMT5, in which every layer has a position bias of
            its own.

    Example:
        >>> model = HookedTextToImage.from_pretrained("t5-micro")
        >>> tokens = model.to_tokens("red circle above blue square")
        >>> _, cache = model.text_encoder.run_with_cache(tokens)
        >>> cache["pattern", 0].shape == (
        ...     1,
        ...     model.text_encoder.cfg.n_heads,
        ...     tokens.shape[1],
        ...     tokens.shape[1],
        ... )
        True
    """

    hook_part = "text_encoder"

    blocks: Any
    """ModuleList of `Block`."""

    wrapped: Any
    """The transformers module; not registered as a child, because its leaves are, once each."""

    wrapping: Wrapped
    """Refuses, at each call, a wrapped module with changes that this one would ignore."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        if not isinstance(encoder, T5EncoderModel):
            raise TypeError(
                f"HookedT5Encoder needs a transformers T5EncoderModel, not {type(encoder).__name__}"
            )
        live: Any = encoder
        self.__dict__["wrapped"] = live
        self._cfg = cfg = T5EncoderConfig.from_encoder(encoder)

        # not `shared`: that one is tied to it, but never called
        self.embed_tokens: nn.Embedding = live.encoder.embed_tokens
        self.relative_attention_bias: nn.Embedding = (
            live.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        )
        self.blocks = nn.ModuleList(Block(block, cfg) for block in live.encoder.block)
        self.ln_final = RMSNorm(live.encoder.final_layer_norm)

        self.hook_embed = HookPoint()  # [batch pos d_model]
        # [batch head query_pos key_pos], the same in all layers; the mask comes after it
        self.hook_rel_pos_bias = HookPoint()
        self.hook_out = HookPoint()  # [batch pos d_model], after the final norm

        self.setup()
        self.train(encoder.training)
        self.__dict__["wrapping"] = Wrapped(encoder, self)

    # Attributes that pipelines and TransformerLens read; taken from the live weights, which may
    # move.

    @property
    def cfg(self) -> T5EncoderConfig:
        """Sizes and flags, with the current device and dtype."""
        self._cfg.device, self._cfg.dtype = str(self.device), self.dtype
        return self._cfg

    @property
    def config(self) -> Any:
        """The wrapped module's transformers config."""
        return self.wrapped.config

    @property
    def device(self) -> torch.device:
        """Device of the embedding."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the embedding's weights."""
        return self.embed_tokens.weight.dtype

    # The model

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> BaseModelOutput | tuple[Float[Tensor, "batch pos d_model"]]:
        """Text features, as ``T5EncoderModel.forward``.

        Args:
            input_ids: tokens, or None with `inputs_embeds`.
            attention_mask: 1 = attend.
            inputs_embeds: embeddings, or None with `input_ids`.
            return_dict: False for a tuple; by default as in the wrapped module's config.
            unsupported: further arguments of transformers; any but None or False is refused.

        Raises:
            ValueError: for a part of the wrapped module that was replaced since, in training mode,
                for both inputs or none, for a mask of another shape, and for ``output_attentions``
                or ``output_hidden_states``: use the cache.
        """
        self.wrapping.check()
        if self.training and self.config.dropout_rate > 0:
            raise ValueError(
                "HookedT5Encoder has no dropout: call .eval() on it (gradients flow in evaluation "
                "mode too)"
            )
        if names := [name for name, value in unsupported.items() if value]:
            raise ValueError(
                f"HookedT5Encoder has no {', '.join(names)}: states and patterns are in "
                "run_with_cache"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass input_ids or inputs_embeds, one of the two")
        # (cloned, because a hook may write in place)
        x = self.hook_embed(
            self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds.clone()
        )
        if attention_mask is not None and attention_mask.shape != x.shape[:2]:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, the text "
                f"{tuple(x.shape[:2])}"
            )

        bias = self._position_bias(*x.shape[:2])
        if attention_mask is not None:
            bias = torch.where(
                attention_mask[:, None, None] != 0, bias, torch.finfo(bias.dtype).min
            )
        for block in self.blocks:
            x = block(x, bias)
        x = self.hook_out(self.ln_final(x))
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return BaseModelOutput(last_hidden_state=x) if return_dict else (x,)

    def _position_bias(self, batch: int, length: int) -> Tensor:
        """[batch head query_pos key_pos]; one row for all unless the point has a hook."""
        n_buckets, max_distance = (
            self._cfg.relative_attention_num_buckets,
            self._cfg.relative_attention_max_distance,
        )
        buckets = position_buckets(length, n_buckets, max_distance, self.device)
        bias = rearrange(
            self.relative_attention_bias(buckets), "query key head -> 1 head query key"
        ).contiguous()
        if has_hooks(self.hook_rel_pos_bias):
            bias = self.hook_rel_pos_bias(bias.repeat(batch, 1, 1, 1))
        return bias

    # Weights

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding."""
        return self.embed_tokens.weight

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_Kᵀ`` of every head, [layer head d_model d_model], without ``ln1``'s weight."""
        return FactoredMatrix(self._stack("W_Q"), self._stack("W_K").transpose(-1, -2))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O`` of every head, [layer head d_model d_model], without ``ln1``'s weight."""
        return FactoredMatrix(self._stack("W_V"), self._stack("W_O"))

    def _stack(self, weight: str) -> Float[Tensor, "layer head rows columns"]:
        return torch.stack([getattr(block.attn, weight) for block in self.blocks])

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the biases written so far: zero. Read by ``get_full_resid_decomposition``."""
        return self.W_E.new_zeros(self._cfg.d_model)
