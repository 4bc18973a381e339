"""One denoiser call whose rows begin at different layers; those below are computed once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..block import BlockText
from ..dit import HookedDiT
from ..text_state import TextState


def denoise_from(
    dit: HookedDiT,
    hidden_states: Float[Tensor, "first in_channels height width"],
    residuals: Mapping[int, Float[Tensor, "_ pos d_model"]],
    timestep: Shaped[Tensor, " batch"],
    added_cond_kwargs: Mapping[str, Tensor | None],
    text_state: TextState,
) -> Float[Tensor, "batch out_channels height width"]:
    """`HookedDiT.forward` of rows that enter at given layers, with precomputed residual streams.

    Rows are those of `hidden_states` (possibly none), then those of `residuals`, in ascending order
    of their layers.

    Args:
        dit: denoiser, whose hooks do not act.
        hidden_states: latents of rows that enter at the first layer.
        residuals: layer → input of that block in rows that begin there; n_layers: output of the
            last block.
        timestep: of all rows.
        added_cond_kwargs: of all rows, as in `HookedDiT.forward`.
        text_state: of all rows.

    Example:
        >>> dit = HookedTextToImage.from_pretrained("rte-nano").dit.requires_grad_(False)
        >>> latents, t = torch.randn(1, 24, 16, 16), torch.tensor([900.0])
        >>> state = dit.encode_text(torch.randn(1, 5, dit.cfg.d_text))
        >>> (out,), cache = dit.run_with_cache(
        ...     latents, timestep=t, text_state=state, return_dict=False
        ... )
        >>> again = denoise_from(dit, latents[:0], {1: cache["resid_pre", 1]}, t, {}, state)
        >>> torch.allclose(again, out, atol=1e-5)
        True
    """
    x = dit.embed(hidden_states)
    t_emb, t_mod = dit.embed_conditions(timestep, added_cond_kwargs, x.dtype)
    texts = dit.text_by_block(len(t_emb), state=text_state)
    for layer, (block, text) in enumerate(zip(dit.blocks, texts, strict=True)):
        x = torch.cat([x, residuals[layer]]) if layer in residuals else x
        if len(x):  # else no row has begun yet
            x = block(x, t_mod[: len(x)], _first(text, len(x)))
    if dit.cfg.n_layers in residuals:
        x = torch.cat([x, residuals[dit.cfg.n_layers]])
    return dit.unembed_patches(x, t_emb, hidden_states)


def _first(text: BlockText, n: int) -> BlockText:
    """The first n rows; none count as empty, for empty prompts do not lead in a sweep."""
    keys_values = (
        None if text.keys_values is None else (text.keys_values[0][:n], text.keys_values[1][:n])
    )
    return BlockText(text.caption[:n], keys_values, None if text.bias is None else text.bias[:n])
