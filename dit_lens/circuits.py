"""What a head computes, read off its weights."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import composition_scores as factored_composition_scores

from hooked_models import HookedDiT, NotFoldedError

Sublayer = Literal["attn", "cross_attn"]


def parse_head(head: str | tuple[int, int]) -> tuple[int, int]:
    """ "L2H8" or (2, 8) → (layer 2, head 8), both from 0.

    Raises:
        ValueError: the text has another form.
    """
    if isinstance(head, tuple):
        return head
    match = re.fullmatch(r"[Ll](\d+)[Hh](\d+)", head)
    if match is None:
        raise ValueError(f"{head!r} names no head: write a layer and a head from 0, such as 'L2H8'.")
    return int(match[1]), int(match[2])


def position_word_maps(dit: HookedDiT, vectors: Float[Tensor, "word d_text"]) -> Float[Tensor, "layer head word pos"]:
    """How much each image position asks for each word, by position code alone: Q_h(E_pos)·K_h(caption(word)).

    Cross-attention reads the raw residual stream, so this is an exact additive term of the attention score (before the
    division by √d_head). Biases are included. Source: arXiv 2601.06338, section 4.1 and appendix B.7.
    """
    caption = dit.project_caption(vectors.to(dit.device, dit.dtype))  # [word d_model]
    maps = []
    for block in dit.blocks:
        attn = block.cross_attn
        queries = torch.einsum("pd,hde->hpe", dit.W_pos, attn.W_Q) + attn.b_Q[:, None]
        keys = torch.einsum("wd,hde->hwe", caption, attn.W_K) + attn.b_K[:, None]
        maps.append(torch.einsum("hpe,hwe->hwp", queries, keys))
    return torch.stack(maps)


def position_word_map(dit: HookedDiT, head: str | tuple[int, int], vector: Float[Tensor, " d_text"]) -> xr.DataArray:
    """`position_word_maps` for one head and one word, as a picture with dims (y, x), y down.

    Raises:
        ValueError: the model has no such head.
    """
    layer, index = parse_head(head)
    if not (layer < dit.cfg.n_layers and index < dit.cfg.n_heads):
        raise ValueError(f"There is no head {head}: the model has {dit.cfg.n_layers} layers of {dit.cfg.n_heads} heads.")
    side = dit.cfg.sample_size // dit.cfg.patch_size
    with torch.no_grad():
        values = position_word_maps(dit, vector[None])[layer, index, 0].reshape(side, side)
    return xr.DataArray(values.float().cpu().numpy(), dims=("y", "x"), name="position_word_score")


@torch.no_grad()
def composition_scores(
    dit: HookedDiT, kind: Literal["Q", "K", "V"] = "Q", sender: Sublayer = "cross_attn", receiver: Sublayer = "cross_attn"
) -> xr.DataArray:
    """How much of what a head writes can be what a later head reads: ‖OV_s W_r‖ / (‖OV_s‖ ‖W_r‖), for all pairs.

    W_r is QK_r for queries ("Q"), QK_rᵀ for keys ("K") and OV_r for values ("V"). Cross-attention reads the residual stream by
    its queries only, so Q-composition of two cross-attention heads is the path relation head → object head. Source: Elhage et al.
    2021, "A Mathematical Framework for Transformer Circuits"; `transformer_lens.utilities.composition_scores`.

    Returns:
        dims (sender_layer, sender_head, receiver_layer, receiver_head); NaN where the sender does not come first.

    Raises:
        NotFoldedError: self-attention takes part, whose weights are complete only with the timestep folded into them.
        ValueError: keys or values of cross-attention, which come from the text alone.
    """
    if receiver == "cross_attn" and kind != "Q":
        raise ValueError(f"{kind}-composition with cross-attention does not exist: its keys and values come from the text alone.")
    if "attn" in (sender, receiver) and dit.folded_timestep is None:
        raise NotFoldedError("self-attention's weights lack the timestep's shift, scale and gate: use model.fold_timestep(t)")
    qk, ov = (dit.QK, dit.OV) if receiver == "attn" else (dit.cross_QK, dit.cross_OV)
    reads = {"Q": qk, "K": qk.T, "V": ov}[kind]
    scores = factored_composition_scores(dit.OV if sender == "attn" else dit.cross_OV, reads).double().cpu().numpy()

    order = ("attn", "cross_attn")
    layer = np.arange(dit.cfg.n_layers)
    later = 2 * layer[None, :] + order.index(receiver) > 2 * layer[:, None] + order.index(sender)
    dims = ("sender_layer", "sender_head", "receiver_layer", "receiver_head")
    return xr.DataArray(np.where(later[:, None, :, None], scores, np.nan), dims=dims, name=f"{kind}_composition")
