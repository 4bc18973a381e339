"""PixArt's diffusion transformer with a HookPoint on every tensor.

``HookedDiT`` around the live diffusers module.

Source: ``PixArtTransformer2DModel`` in diffusers/models/transformers/pixart_transformer_2d.py
(0.42); PixArt-α (arXiv 2310.00426), PixArt-Σ (arXiv 2403.04692).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.hook_points import HookPoint

from ..arguments import number
from ..hooks.errors import NotFoldedError
from ..hooks.module import has_hooks
from ..hooks.wrapping import Wrapped
from .block import Block, BlockText, LayerNorm, modulate
from .cache import DiTCache
from .config import DiTConfig
from .folding import Unembed, folded
from .patch_model import PatchModel, writable
from .text_state import TextState, additive_bias
from .views import FOLD_FIRST, DenoiserView

ONLY_FOLDED = (
    *("unembed", "W_U", "b_U", "tokens_to_residual_directions", "to_single_token"),
    *("accumulated_bias", "tl_parameters", "blocks_with"),
)


class HookedDiT(PatchModel):
    """A ``PixArtTransformer2DModel`` with a HookPoint on every tensor.

    Names are in TransformerLens' vocabulary. The leaves (Linear, Conv2d, embedders, tables) are the
    wrapped module's own: weights are shared, never copied, and training either trains both. The
    forward between them is written here. It takes the wrapped module's arguments and can stand in
    its place inside a pipeline. Shapes stand beside each HookPoint, here, in block.py and
    attention.py; aliases are ``blocks.{l}.hook_cross_{q,k,v,z,pattern,result}``,
    ``blocks.{l}.hook_{q,k,v}_input`` and ``blocks.{l}.hook_resid_mid2``.

    Args:
        transformer: a live diffusers ``PixArtTransformer2DModel``. peft adapters: fuse them, or
            wrap after loading.

    Raises:
        ValueError: for a config option that PixArt checkpoints do not use (dropout, affine norms,
            gated attention).

    Example:
        >>> dit = HookedTextToImage.from_pretrained("rte-nano").dit
        >>> latents, text = torch.randn(1, 24, 16, 16), torch.randn(1, 5, dit.cfg.d_text)
        >>> _, cache = dit.run_with_cache(latents, text, torch.tensor([900.0]))
        >>> cache["pattern", 2, "cross_attn"].shape  # [batch head query_pos key_pos]
        torch.Size([1, 3, 64, 5])
    """

    cache_class = DiTCache

    folded_timestep: float | None = None
    """The one timestep at which a folded model is right; see ``fold_timestep``."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        live: Any = transformer
        self.__dict__["wrapped"] = live
        self._cfg = cfg = DiTConfig.from_transformer(transformer)

        self.patch_embed = live.pos_embed
        self.time_proj = live.adaln_single.emb.time_proj
        self.timestep_embedder = live.adaln_single.emb.timestep_embedder
        if cfg.use_additional_conditions:
            self.resolution_embedder = live.adaln_single.emb.resolution_embedder
            self.aspect_ratio_embedder = live.adaln_single.emb.aspect_ratio_embedder
        self.t_block = live.adaln_single.linear
        self.caption_projection = live.caption_projection
        self.blocks = nn.ModuleList(Block(block, cfg) for block in live.transformer_blocks)
        self.ln_final = LayerNorm(live.norm_out.eps)
        self.scale_shift_table = live.scale_shift_table  # [2 d_model]
        self.proj_out = live.proj_out

        self.hook_embed = HookPoint()  # [batch pos d_model], without the position code
        self.hook_pos_embed = HookPoint()  # [batch pos d_model]
        self.hook_t_emb = HookPoint()  # [batch d_model]
        self.hook_t_mod = HookPoint()  # [batch 6·d_model]
        self.hook_text = HookPoint()  # [batch text_pos d_text]
        self.hook_caption = HookPoint()  # [batch text_pos d_model]

        self.setup()
        for layer in range(cfg.n_layers):
            aliases = {
                f"hook_cross_{x}": f"cross_attn.hook_{x}"
                for x in ("q", "k", "v", "z", "pattern", "result")
            }
            # TransformerLens' names
            aliases |= {f"hook_{x}_input": f"attn.hook_{x}_input" for x in "qkv"}
            aliases["hook_resid_mid2"] = "hook_resid_mid_cross"
            self.add_aliases(
                {
                    f"blocks.{layer}.{alias}": f"blocks.{layer}.{name}"
                    for alias, name in aliases.items()
                }
            )
        self.train(transformer.training)
        self.__dict__["wrapping"] = Wrapped(transformer, self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the output's table anew, as diffusers does, for TransformerLens' `reinitialized`.

        Submodules have their own.
        """
        self.scale_shift_table.normal_().div_(self._cfg.d_model**0.5)

    # The text, the same at every timestep

    def encode_text(
        self,
        text: Float[Tensor, "batch text_pos d_text"],
        mask: Shaped[Tensor, "batch ... text_pos"] | None = None,
    ) -> TextState:
        """Caption, keys and values, to be passed to every step as ``text_state``; fires no hook.

        ``mask``: 1 = attend.
        """
        caption = self.project_caption(text)
        attentions = [block.cross_attn for block in self.blocks]
        keys_values = tuple((attn.keys(caption), attn.values(caption)) for attn in attentions)
        return TextState(text, caption, additive_bias(mask, self.dtype), keys_values)

    @property
    def text_hooks_active(self) -> bool:
        """True if a hook is attached upstream of cross-attention keys and values.

        They are computed anew then.
        """
        points = [self.hook_text, self.hook_caption]
        if self._cfg.use_split_qkv_input:
            for block in self.blocks:
                points += [block.cross_attn.hook_k_input, block.cross_attn.hook_v_input]
        return any(map(has_hooks, points))

    def project_caption(
        self, text: Float[Tensor, "*batch d_text"]
    ) -> Float[Tensor, "*batch d_caption"]:
        """Project text features to the inputs of cross-attention, through no hook."""
        return text if self.caption_projection is None else self.caption_projection(text)

    # Circuits in weights

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_Kᵀ`` of self-attention, [layer head d_model d_model]; copies.

        Exact circuits need ``fold_timestep``.
        """
        return self._factored("attn", "QK")

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O`` of self-attention, [layer head d_model d_model]; copies."""
        return self._factored("attn", "OV")

    @property
    def cross_QK(self) -> FactoredMatrix:
        """``W_Q W_Kᵀ`` of cross-attention, [layer head d_model d_caption]; copies.

        Reads the raw residual stream: exact.
        """
        return self._factored("cross_attn", "QK")

    @property
    def cross_OV(self) -> FactoredMatrix:
        """``W_V W_O`` of cross-attention, [layer head d_caption d_model]; copies.

        Has no gate: exact.
        """
        return self._factored("cross_attn", "OV")

    def _factored(self, sublayer: str, circuit: Literal["QK", "OV"]) -> FactoredMatrix:
        attentions = [getattr(block, sublayer) for block in self.blocks]
        if circuit == "OV":
            return FactoredMatrix(
                torch.stack([a.W_V for a in attentions]), torch.stack([a.W_O for a in attentions])
            )
        return FactoredMatrix(
            torch.stack([a.W_Q for a in attentions]), torch.stack([a.W_K for a in attentions]).mT
        )

    def fold_timestep(
        self, timestep: float, added_cond_kwargs: Mapping[str, Tensor | None] | None = None
    ) -> FoldedDiT:
        """Make a new model with one timestep's modulation moved into its weights.

        Moved are shifts, scales and gates; this model is unchanged. At that timestep it computes
        the same output, and every ``hook_gate`` is 1: head and neuron results, direct logit
        attribution and the other tools that read weights are then exact. At any other it refuses to
        run.

        Args:
            timestep: in the scheduler's units.
            added_cond_kwargs: the size conditions [1 …], for a model that is conditioned on them.
        """
        timestep = number("timestep", timestep, 0)
        with torch.no_grad():
            t_emb = self.embed_timestep(
                torch.tensor([timestep], device=self.device), added_cond_kwargs, self.dtype
            )
        return FoldedDiT(folded(self.wrapped, t_emb), timestep).train(self.training)

    def __getattr__(self, name: str) -> Any:
        if self.folded_timestep is None and name in ONLY_FOLDED:
            raise NotFoldedError(
                f"{name} ignores the timestep's shift, scale and gate: {FOLD_FIRST}"
            )
        return super().__getattr__(name)

    # The model

    def forward(
        self,
        hidden_states: Float[Tensor, "batch in_channels height width"],
        encoder_hidden_states: Float[Tensor, "batch text_pos d_text"] | None = None,
        timestep: Shaped[Tensor, " batch"] | None = None,
        added_cond_kwargs: Mapping[str, Tensor | None] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        attention_mask: Shaped[Tensor, "batch ... pos"] | None = None,
        encoder_attention_mask: Shaped[Tensor, "batch ... text_pos"] | None = None,
        return_dict: bool = True,
        *,
        text_state: TextState | None = None,
    ) -> Transformer2DModelOutput | tuple[Float[Tensor, "batch out_channels height width"]]:
        """One denoiser call, as ``PixArtTransformer2DModel.forward``: latents in, prediction out.

        Args:
            hidden_states: latents, as the scheduler scales them.
            encoder_hidden_states: text features, before the caption projection.
            timestep: of each row.
            added_cond_kwargs: `resolution` and `aspect_ratio`, for models with size conditions.
            cross_attention_kwargs: None: PixArt has none.
            attention_mask: which image tokens may be attended to (no pipeline passes it).
            encoder_attention_mask: which text tokens may be; a mask [batch text_pos], or a bias
                [batch 1 text_pos].
            return_dict: False for a tuple.
            text_state: from ``encode_text``; then ``encoder_hidden_states`` and its mask are not
                read. Keys and values still pass through ``cross_attn.hook_k`` and ``hook_v``; while
                ``text_hooks_active`` they are computed anew from its text, so the result never
                depends on whether a state was passed.

        Raises:
            ValueError: for a missing timestep, text or size condition, a state of another batch
                size, or ``cross_attention_kwargs``, which have no meaning in PixArt; a part of the
                wrapped module that was replaced since (``Wrapped``).
        """
        if cross_attention_kwargs:
            raise ValueError(
                "HookedDiT has no use for cross_attention_kwargs: "
                f"{', '.join(cross_attention_kwargs)}"
            )
        if timestep is None:
            raise ValueError("pass timestep, one for each row of hidden_states")
        if self.folded_timestep is not None and bool((timestep != self.folded_timestep).any()):
            raise ValueError(
                f"this model was folded at timestep {self.folded_timestep:g} and is wrong at any "
                "other"
            )

        self.wrapping.check()
        x = self.embed(hidden_states)
        t_emb, t_mod = self.embed_conditions(timestep, added_cond_kwargs, x.dtype)
        texts = self.text_by_block(
            len(x), encoder_hidden_states, encoder_attention_mask, text_state
        )
        image_bias = additive_bias(attention_mask, x.dtype)

        for block, text in zip(self.blocks, texts, strict=True):
            x = block(x, t_mod, text, image_bias)

        output = self.unembed_patches(x, t_emb, hidden_states)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def embed_conditions(
        self,
        timestep: Shaped[Tensor, " batch"],
        sizes: Mapping[str, Tensor | None] | None,
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, "batch six_d_model"]]:
        """Embedding of timestep and sizes, and the blocks' shared modulation, through hooks."""
        t_emb = self.hook_t_emb(self.embed_timestep(timestep, sizes, dtype))
        return t_emb, self.hook_t_mod(self.t_block(F.silu(t_emb)))

    def unembed_patches(
        self,
        x: Float[Tensor, "batch pos d_model"],
        t_emb: Float[Tensor, "batch d_model"],
        like: Float[Tensor, "_ _ height width"],
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Output of the height and width of `like`, from the final residual stream."""
        shift, scale = (self.scale_shift_table + t_emb[:, None]).chunk(2, dim=1)  # t_emb, not t_mod
        return self.from_patches(self.proj_out(modulate(self.ln_final(x), shift, scale)), like)

    def bind(
        self,
        latents: Float[Tensor, "row in_channels height width"],
        timestep: float | Shaped[Tensor, "*row"],
        text: Float[Tensor, "row text_pos d_text"],
        text_mask: Shaped[Tensor, "row ... text_pos"] | None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor | None] | None = None,
        pos: Literal["image", "text"] = "image",
        returns: Literal["out", "patches"] = "out",
    ) -> tuple[DenoiserView, Int[Tensor, "row pos"]]:
        """Bind the inputs of one denoiser call.

        ``(view, tokens)`` for TransformerLens' tools as ``model`` and ``tokens``.

        Args:
            latents: one row an image.
            timestep: of each row, or one for all.
            text: text features, before the caption projection.
            text_mask: 1 = attend; by default all.
            added_cond_kwargs: as in `forward`.
            pos: the positions that a sweep "by position" goes over.
            returns: the tensor that metrics get: the output, or its patches [row pos d_vocab], as
                logits are.
        """
        times = torch.as_tensor(timestep, device=latents.device).expand(len(latents))
        with torch.no_grad():  # where gradients are taken, each call encodes its rows anew
            state = self.encode_text(text, text_mask)
        sizes = added_cond_kwargs or {"resolution": None, "aspect_ratio": None}
        view = DenoiserView(self, latents, times, state, sizes, pos, returns)
        return view, view.to_tokens()

    def embed_timestep(
        self,
        timestep: Shaped[Tensor, " batch"],
        sizes: Mapping[str, Tensor | None] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch d_model"]:
        """Embed the timestep and, where the model is conditioned on them, the image's sizes.

        Through no hook.
        """
        t_emb = self.timestep_embedder(self.time_proj(timestep).to(dtype))
        if self._cfg.use_additional_conditions:
            resolution, aspect_ratio = (
                (sizes or {}).get(key) for key in ("resolution", "aspect_ratio")
            )
            if resolution is None or aspect_ratio is None:
                raise ValueError(
                    "this model needs added_cond_kwargs with resolution and aspect_ratio"
                )
            height_width = self.resolution_embedder(self.time_proj(resolution.flatten()).to(dtype))
            ratio = self.aspect_ratio_embedder(self.time_proj(aspect_ratio.flatten()).to(dtype))
            t_emb = t_emb + torch.cat(
                [height_width.view(len(t_emb), -1), ratio.view(len(t_emb), -1)], dim=1
            )
        return t_emb

    def text_by_block(
        self,
        batch: int,
        text: Float[Tensor, "batch text_pos d_text"] | None = None,
        mask: Shaped[Tensor, "batch ... text_pos"] | None = None,
        state: TextState | None = None,
    ) -> list[BlockText]:
        """Text as each block reads it: from `state`, or computed anew through the hooks.

        The latter where there is no state or a hook acts on it.

        Raises:
            ValueError: neither text nor state was given, or the state has another batch size.
        """
        if state is not None and len(state.text) != batch:
            raise ValueError(f"text_state has {len(state.text)} rows, hidden_states {batch}")
        if state is not None and not self.text_hooks_active:
            return [
                BlockText(state.caption, kv, state.bias, state.n_empty_prompts)
                for kv in state.keys_values
            ]
        text, bias = (
            (text, additive_bias(mask, self.dtype)) if state is None else (state.text, state.bias)
        )
        if text is None:
            raise ValueError("pass encoder_hidden_states, or a text_state from encode_text")
        if self.text_hooks_active:
            in_graph = next(self.parameters()).requires_grad
            # this is the caller's tensor
            text = writable(text, in_graph and has_hooks(self.hook_text))
        caption = self.hook_caption(self.project_caption(self.hook_text(text)))
        return [BlockText(caption, bias=bias)] * self._cfg.n_layers


class FoldedDiT(HookedDiT):
    """A HookedDiT that is right at one timestep, for tools that read weights.

    It has the attributes that TransformerLens' weight-based tools read. Its "tokens" are output
    channels: index ``(p · patch_size + q) · out_channels + c`` of a position's patch.
    """

    def __init__(self, transformer: nn.Module, timestep: float) -> None:
        super().__init__(transformer)
        self.folded_timestep = timestep
        self.unembed = Unembed(self.proj_out)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Weights of the unembedding, with the last modulation folded in."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Bias of the unembedding, with the last modulation folded in."""
        return self.unembed.b_U

    def tokens_to_residual_directions(
        self, tokens: int | str | Int[Tensor, "*any"]
    ) -> Float[Tensor, "*any d_model"]:
        """Columns of W_U, by output channel. Raises TypeError for words: an image has none."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.T[torch.as_tensor(tokens, device=self.device)]

    def to_single_token(self, token: str) -> int:
        """Raise TypeError: an output channel has no name."""
        raise TypeError(
            f"output channels are numbers from 0 to {self._cfg.d_vocab - 1}, not words such as "
            f"{token!r}"
        )

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the biases of all writes before ``layer``, cross-attention included.

        ``mlp_input``: before its MLP.
        """
        total = torch.zeros(self._cfg.d_model, device=self.device, dtype=self.dtype)
        for block in self.blocks[:layer]:
            total = (
                total
                + block.attn.b_O
                + block.cross_attn.b_O
                + (block.mlp.b_out if include_mlp_biases else 0)
            )
        if mlp_input:
            total = total + self.blocks[layer].attn.b_O + self.blocks[layer].cross_attn.b_O
        return total

    def reset_parameters(self) -> None:
        """Raise ValueError: new weights would lose the folded timestep."""
        raise ValueError("re-initialise the model itself, then fold it again: fold_timestep(t)")

    def blocks_with(self, sublayer: str) -> list[tuple[int, nn.Module]]:
        """List (layer, block) of every block that has the sublayer."""
        return [
            (layer, block) for layer, block in enumerate(self.blocks) if hasattr(block, sublayer)
        ]

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
