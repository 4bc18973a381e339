"""The class-conditional DiT, with a name for every tensor.

PixArt's block without text, modulated by timestep and class.

Source: `DiTTransformer2DModel` and `BasicTransformerBlock` with `norm_type="ada_norm_zero"`
(diffusers 0.42); Peebles and Xie (arXiv 2212.09748). Traps: every block embeds timestep and class
anew, with weights of its own; the norm before the MLP has another epsilon than the one before
attention; the last layer is modulated by the first block's embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from ..hooks.wrapping import Wrapped
from ..pixart.attention import Attention
from ..pixart.block import MLP, Block, LayerNorm, Modulation, ModulationHooks, modulate
from ..pixart.cache import DiTCache
from ..pixart.config import DiTConfig
from ..pixart.patch_model import PatchModel
from .samples import random


class ClassAdaLN(ModulationHooks):
    """`Linear(SiLU(embedding of timestep and class))`, in six parts."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.emb = norm.emb
        self.linear = norm.linear
        self.hook_cond = HookPoint()  # [batch d_model]

    def forward(
        self, timestep: Shaped[Tensor, " batch"], labels: Int[Tensor, " batch"], dtype: torch.dtype
    ) -> Modulation:
        """The modulation of one block, from timestep and class label."""
        cond = self.hook_cond(self.emb(timestep, labels, hidden_dtype=dtype))
        return self.split(self.linear(F.silu(cond)).unflatten(1, (6, -1)))


class ClassBlock(Block):
    """``x += gate · attn(adaLN(x)); x += gate · mlp(adaLN(x))``."""

    def __init__(self, block: Any, cfg: DiTConfig) -> None:
        nn.Module.__init__(self)  # not Block's: there is no text, and the modulation is another
        self.cfg = cfg
        self.adaln: Any = ClassAdaLN(block.norm1)
        self.ln1 = LayerNorm(block.norm1.norm.eps)
        self.attn = Attention(block.attn1, cfg)
        self.ln2 = LayerNorm(block.norm3.eps)
        self.mlp = MLP(block.ff)
        self.hook_attn_in = HookPoint()
        self.hook_mlp_in = HookPoint()
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out_pre_gate = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out_pre_gate = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch pos d_model"],
        timestep: Shaped[Tensor, " batch"],
        labels: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the block; see the class."""
        mod = self.adaln(timestep, labels, x.dtype)
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.self_attention(x, mod)))
        return self.hook_resid_post(x + self.hook_mlp_out(self.gated_mlp(x, mod)))


class HookedClassDiT(PatchModel):
    """A `DiTTransformer2DModel` with a HookPoint on every tensor.

    Names as in `HookedDiT`, less those of the text. `blocks.{l}.adaln.hook_cond` is the embedding
    of timestep and class that the block makes for itself.
    """

    cache_class = DiTCache

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        if not isinstance(transformer, DiTTransformer2DModel):
            raise TypeError(
                "HookedClassDiT needs a diffusers DiTTransformer2DModel, not "
                f"{type(transformer).__name__}."
            )
        live: Any = transformer
        config = live.config
        if (
            config.activation_fn != "gelu-approximate"
            or config.norm_elementwise_affine
            or config.dropout
        ):
            raise ValueError(
                "HookedClassDiT needs activation_fn='gelu-approximate', no affine norms and no "
                "dropout."
            )
        self.__dict__["wrapped"] = live
        d_model = config.num_attention_heads * config.attention_head_dim
        self._cfg = cfg = DiTConfig(
            d_model=d_model,
            d_head=config.attention_head_dim,
            n_heads=config.num_attention_heads,
            n_layers=config.num_layers,
            n_ctx=(config.sample_size // config.patch_size) ** 2,
            d_mlp=4 * d_model,
            d_vocab=config.patch_size**2 * live.out_channels,
            eps=1e-6,
            act_fn="gelu_new",
            normalization_type="LNPre",
            positional_embedding_type="sincos_2d",
            device=str(live.device),
            dtype=live.dtype,
            d_text=0,
            d_caption=0,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            out_channels=live.out_channels,
            sample_size=config.sample_size,
            interpolation_scale=1.0,
            use_additional_conditions=False,
        )
        self.patch_embed = live.pos_embed
        self.blocks = nn.ModuleList(ClassBlock(block, cfg) for block in live.transformer_blocks)
        self.ln_final = LayerNorm(live.norm_out.eps)
        self.proj_cond: nn.Module = live.proj_out_1
        self.proj_out: nn.Module = live.proj_out_2
        self.hook_embed = HookPoint()  # [batch pos d_model]
        self.hook_pos_embed = HookPoint()  # [batch pos d_model]
        self.hook_final_cond = HookPoint()  # [batch d_model]
        self.setup()
        self.train(transformer.training)
        self.__dict__["wrapping"] = Wrapped(transformer, self)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch in_channels side side"],
        timestep: Shaped[Tensor, " batch"] | None = None,
        class_labels: Int[Tensor, " batch"] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Float[Tensor, "batch out_channels side side"]]:
        """One denoiser call, as `DiTTransformer2DModel.forward`.

        Raises:
            ValueError: for a part of the wrapped module that was replaced since, a missing timestep
                or class, `cross_attention_kwargs`, or in training mode (classes are dropped at
                random then).
        """
        if timestep is None or class_labels is None:
            raise ValueError("pass timestep and class_labels, one for each row of hidden_states")
        if self.training:
            raise ValueError("HookedClassDiT drops no classes at random: call .eval() on it")
        if cross_attention_kwargs:
            raise ValueError(
                "HookedClassDiT has no use for cross_attention_kwargs: "
                f"{', '.join(cross_attention_kwargs)}"
            )
        self.wrapping.check()
        x = self.embed(hidden_states)
        for block in self.blocks:
            x = block(x, timestep, class_labels)
        cond = self.hook_final_cond(
            self.blocks[0].adaln.emb(timestep, class_labels, hidden_dtype=x.dtype)
        )
        shift, scale = (part[:, None] for part in self.proj_cond(F.silu(cond)).chunk(2, dim=1))
        output = self.from_patches(
            self.proj_out(modulate(self.ln_final(x), shift, scale)), hidden_states
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def inputs(transformer: Any) -> dict[str, Any]:
    """Small random inputs for any model of the family, on which it is checked."""
    config, device = transformer.config, transformer.device
    side = 2 * config.patch_size
    return {
        "hidden_states": random(2, config.in_channels, side, side).to(device, transformer.dtype),
        "timestep": torch.tensor([901, 17], device=device),
        "class_labels": torch.tensor([0, 1], device=device),
    }
