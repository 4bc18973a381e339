"""A model's configuration, in TransformerLens' vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformer_lens.config import TransformerLensConfig

from ..hooks.scopes import Scoped


@dataclass(kw_only=True)
class HookedConfig(TransformerLensConfig):
    """A TransformerLensConfig with two flags that TransformerLens' tools read and it lacks."""

    use_attn_in: bool = False
    use_hook_mlp_in: bool = False


@dataclass(kw_only=True)
class DiTConfig(HookedConfig):
    """TransformerLens' names for a PixArt config.

    ``n_ctx`` counts the image tokens at the training size.
    """

    d_text: int
    """Width of the text encoder's output."""
    d_caption: int
    """Width of the text as cross-attention reads it; 0 without text."""
    patch_size: int
    in_channels: int
    out_channels: int
    """Twice ``in_channels`` where the model also predicts a variance."""
    sample_size: int
    """Height and width of the training latents."""
    interpolation_scale: float
    """Position codes are divided by this: the training size over 512 px."""
    use_additional_conditions: bool
    """True if the timestep embedding encodes resolution and aspect ratio (α at 1024 px)."""

    @classmethod
    def from_transformer(cls, transformer: Any) -> DiTConfig:
        """Read from a diffusers ``PixArtTransformer2DModel``.

        Raises ValueError for an option that HookedDiT lacks.
        """
        config = transformer.config
        required = {
            "norm_type": "ada_norm_single",
            "activation_fn": "gelu-approximate",
            "attention_type": "default",
            "norm_elementwise_affine": False,
            "dropout": 0.0,
        }
        for option, value in required.items():
            if config[option] != value:
                raise ValueError(
                    f"HookedDiT needs a transformer with {option}={value!r}, not {config[option]!r}"
                )
        if config.cross_attention_dim is None:
            raise ValueError(
                "HookedDiT needs a transformer with cross-attention: cross_attention_dim is None"
            )
        d_model = config.num_attention_heads * config.attention_head_dim
        return cls(
            d_model=d_model,
            d_head=config.attention_head_dim,
            n_heads=config.num_attention_heads,
            n_layers=config.num_layers,
            n_ctx=(config.sample_size // config.patch_size) ** 2,
            d_mlp=4 * d_model,
            d_vocab=config.patch_size**2 * transformer.out_channels,  # the values of a patch
            eps=config.norm_eps,
            act_fn="gelu_new",  # TransformerLens' name of the tanh GELU
            normalization_type="LNPre",  # and of a LayerNorm without affine map
            positional_embedding_type="sincos_2d",
            # Given, because TransformerLensConfig would otherwise say "cuda" wherever there is one.
            device=str(transformer.device),
            dtype=transformer.dtype,
            d_text=config.caption_channels or config.cross_attention_dim,
            d_caption=config.cross_attention_dim,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            out_channels=transformer.out_channels,
            sample_size=config.sample_size,
            interpolation_scale=float(transformer.pos_embed.interpolation_scale),
            use_additional_conditions=transformer.use_additional_conditions,
        )


for _flag in ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"):
    _scoped = Scoped(False)  # so that a block can switch it on for its own runs alone
    _scoped.__set_name__(HookedConfig, _flag)
    setattr(HookedConfig, _flag, _scoped)
