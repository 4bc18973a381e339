"""Cache of one denoiser call, with TransformerLens' shorthands and cross-attention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice

from ..arguments import integer, shown
from ..hooks.errors import NotFoldedError

Stack = Float[Tensor, "component *batch_and_pos d_model"]

PER_ATTENTION = (
    "q",
    "k",
    "v",
    "z",
    "attn_scores",
    "pattern",
    "result",
    "q_input",
    "k_input",
    "v_input",
)
EMBEDS = ("hook_embed", "hook_pos_embed")
MLP_AND_NORMS = ("ln1", "ln2", "mlp", "adaln")
SUBLAYERS = {
    "a": "attn",
    "attn": "attn",
    "cross_attn": "cross_attn",
    "cross": "cross_attn",
    **{n: n for n in MLP_AND_NORMS},
}

DEFAULT_SUBLAYER = {**dict.fromkeys(PER_ATTENTION, "attn"), "pre": "mlp", "post": "mlp"}
"""Name → the sublayer that it means without one, as in TransformerLens."""


def expand_shorthand(name: str, layer: int | None, sublayer: str | None, n_layers: int) -> str:
    """`("z", 2, "cross_attn")` → "blocks.2.cross_attn.hook_z"; negative layers count from the end.

    Without a sublayer, q, k, v, z, attn_scores, pattern and result mean self-attention, and pre and
    post the MLP, as in TransformerLens (whose own expansion gives self-attention for
    cross-attention too).
    """
    if not isinstance(name, str):
        raise KeyError(f"{shown(name)} is no hook name: give one such as 'z' or 'resid_pre'.")
    if name.startswith("cross_") and name.removeprefix("cross_") in PER_ATTENTION:
        name, sublayer = name.removeprefix("cross_"), "cross_attn"
    if layer is None:
        return f"{sublayer}.hook_{name}" if sublayer else f"hook_{name}"
    if sublayer is None:
        sublayer = DEFAULT_SUBLAYER.get(name)
    elif not (isinstance(sublayer, str) and sublayer in SUBLAYERS):
        raise KeyError(
            f"There is no sublayer {shown(sublayer)}: choose from "
            f"{', '.join(dict.fromkeys(SUBLAYERS.values()))}."
        )
    layer = integer("layer", layer)
    if not -n_layers <= layer < n_layers:
        raise KeyError(f"There is no layer {layer}: this model has {n_layers}, from 0.")
    name = {"resid_mid2": "resid_mid_cross"}.get(name, name)
    middle = f".{SUBLAYERS[sublayer]}" if sublayer else ""
    return f"blocks.{layer % n_layers}{middle}.hook_{name}"


def expand_compact(key: str) -> tuple[str, int, str | None] | None:
    """TransformerLens' compact keys as (name, layer, sublayer): "k1a", "pattern0", "scale1ln2".

    None for another form.
    """
    found = re.fullmatch(r"([a-z]+)(\d+)([a-z]?.*)", key)
    return None if found is None else (found[1], int(found[2]), found[3] or None)


def look_up(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A cached tensor. Raises KeyError with the likely reason."""
    try:
        return tensors[name]
    except KeyError:
        raise KeyError(
            f"{name!r} is not in this cache: it was left out by names_filter, steps or branch."
        ) from None


def as_slice(positions: Any) -> Slice:
    """Read `pos_slice` as ActivationCache's methods do: an int drops the axis."""
    return positions if isinstance(positions, Slice) else Slice(positions)


class DiTCache(ActivationCache):
    """Cache of one denoiser (or encoder) call.

    `cache["z", 2, "cross_attn"]` is cross-attention, `cache["cross_z", 2]` too.

    TransformerLens' decompositions have self-attention and MLP only; here they include the writes
    of cross-attention, and so sum to the residual stream. Methods that read W_O or W_out need a
    folded model, whose weights include the timestep's gate.

    Example:
        >>> dit = HookedTextToImage.from_pretrained("rte-nano").dit
        >>> latents, text = torch.randn(1, 24, 16, 16), torch.randn(1, 5, dit.cfg.d_text)
        >>> _, cache = dit.run_with_cache(latents, text, torch.tensor([900.0]))
        >>> parts = cache.decompose_resid(layer=2)
        >>> torch.allclose(parts.sum(0), cache["resid_pre", 2], atol=1e-4)
        True
    """

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        if isinstance(key, str) and key not in self.model.mod_dict:
            key = expand_compact(key) or key
        if isinstance(key, tuple):
            name, layer, sublayer = (*key, None, None)[:3]
            full = expand_shorthand(name, layer, sublayer, self.model.cfg.n_layers)
        else:
            full = (
                str(self.model.mod_dict[key].name) if key in self.model.mod_dict else f"hook_{key}"
            )
        return look_up(self.cache_dict, full)

    @property
    def attentions(self) -> tuple[str, ...]:
        """The attention sublayers of a block, in the order in which they write."""
        return tuple(
            kind
            for kind in ("attn", "cross_attn")
            if f"blocks.0.{kind}.hook_z" in self.model.hook_dict
        )

    def _layer(self, layer: int | None) -> int:
        return self.model.cfg.n_layers if layer in (None, -1) else int(layer)

    def _require_folded(self, what: str) -> None:
        if getattr(self.model, "folded_timestep", 0.0) is None:
            raise NotFoldedError(
                f"{what} would ignore the timestep's gate: use the cache of model.fold_timestep(t)."
            )

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> DiTCache:
        """As in TransformerLens, whose cache would lack cross-attention's shorthands."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return DiTCache(sliced.cache_dict, self.model, sliced.has_batch_dim)

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream before every layer up to `layer`, [component batch pos d_model].

        None: up to the end. `incl_mid` adds the points between sublayers: "0_mid" after
        self-attention, "0_mid_cross" after cross-attention (unless it was not cached:
        TransformerLens' `logit_lens` does not ask for it). `mlp_input` adds those of the last
        layer. The rest as in TransformerLens.
        """
        layer = self._layer(layer)
        places = []
        for index in range(min(layer + 1, self.model.cfg.n_layers)):
            places.append(("resid_pre", index, f"{index}_pre"))
            if index == layer:
                places += self._between(index, required=True) if mlp_input else []
            elif incl_mid:
                places += self._between(index, required=False)
        if layer == self.model.cfg.n_layers:
            places.append(("resid_post", layer - 1, "final_post"))
        positions = as_slice(pos_slice)
        stack = torch.stack(
            [positions.apply(self[name, index], dim=-2) for name, index, _ in places]
        )
        if apply_ln:
            final = layer == self.model.cfg.n_layers
            stack = self.apply_ln_to_stack(
                stack,
                layer,
                mlp_input,
                positions,
                has_batch_dim=self.has_batch_dim,
                recompute_ln=final,
            )
        return (stack, [label for *_, label in places]) if return_labels else stack

    def _between(self, layer: int, required: bool) -> list[tuple[str, int, str]]:
        """(name, layer, label) of the stream between sublayers, cached ones unless required."""
        mids = ("mid", "mid_cross")[: len(self.attentions)]
        if not required:
            mids = tuple(
                mid
                for mid in mids
                if mid == "mid" or f"blocks.{layer}.hook_resid_{mid}" in self.cache_dict
            )
        return [(f"resid_{mid}", layer, f"{layer}_{mid}") for mid in mids]

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """Stack the writes of each sublayer before `layer`, [component batch pos d_model].

        They sum to the residual stream there. Self- and cross-attention are "attn" to `mode`. The
        rest as in TransformerLens.
        """
        layer = self._layer(layer)
        embeds = [name for name in EMBEDS if name in self.cache_dict] if incl_embeds else []
        writes = self._writes(layer, mlp_input, mode)
        positions = as_slice(pos_slice)
        parts = [positions.apply(self[name], dim=-2) for name in [*embeds, *writes]]
        stack = torch.stack(parts)
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack, layer, mlp_input, positions, has_batch_dim=self.has_batch_dim
            )
        labels = [name.removeprefix("hook_") for name in embeds] + [
            f"{index}_{name}" for name, index in writes
        ]
        return (stack, labels) if return_labels else stack

    def _writes(
        self, layer: int, mlp_input: bool, mode: Literal["all", "mlp", "attn"]
    ) -> list[tuple[str, int]]:
        """(name, layer) of each sublayer's write before `layer`, or before its MLP."""
        attention = [f"{kind}_out" for kind in self.attentions] if mode != "mlp" else []
        sublayers = attention + (["mlp_out"] if mode != "attn" else [])
        writes = [(name, index) for index in range(layer) for name in sublayers]
        return writes + ([(name, layer) for name in attention] if mlp_input else [])

    def _ensure_head_results(self) -> bool:
        """Fill in `hook_result` of every attention from z and W_O; True if all were there."""
        found = True
        for layer in range(self.model.cfg.n_layers):
            for kind in self.attentions:
                name = f"blocks.{layer}.{kind}.hook_result"
                if name not in self.cache_dict:
                    found = False
                    if kind == "attn":  # cross-attention has no gate
                        self._require_folded("A head's result from z and W_O")
                    w_o = getattr(self.model.blocks[layer], kind).W_O
                    self.cache_dict[name] = torch.einsum(
                        "...hd,hdm->...hm", self["z", layer, kind].to(w_o.dtype), w_o
                    )
        return found

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Any:
        """Stack the writes of each head before `layer`, [component batch pos d_model].

        In the order of writing. Labels are "L0H0" … for self-attention, "cross_L0H0" … for
        cross-attention. `incl_remainder` adds the rest of the residual stream. Raises
        NotFoldedError on an unfolded model, unless it ran with `use_attn_result`.
        """
        layer = self._layer(layer)
        self._ensure_head_results()
        positions = as_slice(pos_slice)
        parts: list[Tensor] = []
        labels: list[str] = []
        for index in range(layer):
            for kind in self.attentions:
                # [… pos head d_model]
                result = positions.apply(self["result", index, kind], dim=-3)
                parts += result.unbind(-2)
                prefix = "cross_" if kind == "cross_attn" else ""
                labels += [f"{prefix}L{index}H{head}" for head in range(result.shape[-2])]
        like = positions.apply(self["hook_embed"], dim=-2)
        stack = torch.stack(parts) if parts else like.new_zeros(0, *like.shape)
        if incl_remainder:
            target = self["resid_post", layer - 1] if layer else self["resid_pre", 0]
            stack = torch.cat([stack, (positions.apply(target, dim=-2) - stack.sum(0))[None]])
            labels.append("remainder")
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack, layer, pos_slice=positions, has_batch_dim=self.has_batch_dim
            )
        return (stack, labels) if return_labels else stack

    def get_neuron_results(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in TransformerLens. Raises NotFoldedError on an unfolded model."""
        self._require_folded("A neuron's result from its activation and W_out")
        return super().get_neuron_results(layer, *args, **kwargs)

    def stack_neuron_results(
        self,
        layer: int,
        *args: Any,
        mlp_input: bool = False,
        incl_remainder: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in TransformerLens, with cross-attention before the MLP's input.

        At layer 0, too, the remainder is its input.

        Raises:
            NotFoldedError: on an unfolded model.
        """
        self._require_folded("A neuron's result from its activation and W_out")
        inputs = {}
        # TransformerLens takes the remainder up to resid_mid
        if mlp_input and "cross_attn" in self.attentions:
            inputs[f"blocks.{layer}.hook_resid_mid"] = self["resid_mid_cross", layer]
        # TransformerLens reads layer −1, the last one
        if layer == 0 and incl_remainder and not mlp_input:
            inputs[f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"] = self["resid_pre", 0]
        cache = (
            DiTCache({**self.cache_dict, **inputs}, self.model, self.has_batch_dim)
            if inputs
            else self
        )
        return super(DiTCache, cache).stack_neuron_results(
            layer, *args, mlp_input=mlp_input, incl_remainder=incl_remainder, **kwargs
        )
