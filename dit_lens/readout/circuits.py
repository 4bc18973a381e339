"""Weight readouts of cross-attention heads, and the additive terms of their attention scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import composition_scores as factored_composition_scores

from hooked_models import HookedDiT, HookedTextToImage, NotFoldedError
from hooked_models.families import FamilyModel
from hooked_models.generation.names import Head, parse_head

Sublayer = Literal["attn", "cross_attn"]


def _cross_head(dit: HookedDiT | FamilyModel, head: Head) -> tuple[int, int]:
    if isinstance(dit, FamilyModel):
        dit.check_linear()
    layer, index = parse_head(head)
    if not (layer < dit.cfg.n_layers and index < dit.cfg.n_heads):
        raise ValueError(
            f"There is no head {head}: the model has {dit.cfg.n_layers} layers of "
            f"{dit.cfg.n_heads} heads."
        )
    return layer, index


def _name(head: Head) -> str:
    layer, index = parse_head(head)
    return f"L{layer}H{index}"


def position_word_maps(
    dit: HookedDiT | FamilyModel, vectors: Float[Tensor, "word d_text"]
) -> Float[Tensor, "layer head word pos"]:
    """Attention score of each word at each image position by position code alone.

    Computes (E_pos W_Q + b_Q) · caption(word) W_K for every cross-attention head, before the
    division by √d_head. Cross-attention reads the raw residual stream, so this is an exact additive
    term of the score. The key bias adds the same map to every word, which softmax cancels: it is
    left out, unlike in the paper. Source: arXiv 2601.06338, section 4.1 and appendix B.7.

    Example:
        >>> dit = HookedTextToImage.from_pretrained("rte-nano").dit
        >>> position_word_maps(dit, torch.zeros(2, dit.cfg.d_text)).shape
        torch.Size([3, 3, 2, 64])
    """
    caption = dit.project_caption(vectors.to(dit.device, dit.dtype))  # [word d_model]
    maps = []
    for block in dit.blocks:
        attn = block.cross_attn
        queries = torch.einsum("pd,hde->hpe", dit.W_pos, attn.W_Q) + attn.b_Q[:, None]
        keys = torch.einsum("wd,hde->hwe", caption, attn.W_K)
        maps.append(torch.einsum("hpe,hwe->hwp", queries, keys))
    return torch.stack(maps)


def position_word_map(
    dit: HookedDiT | FamilyModel, head: Head, vector: Float[Tensor, " d_text"]
) -> xr.DataArray:
    """Map of one head and one word from `position_word_maps`, with dims (y, x), y down.

    Raises:
        ValueError: the model has no such head.

    Example:
        >>> dit = HookedTextToImage.from_pretrained("rte-nano").dit
        >>> dict(position_word_map(dit, "L2H1", torch.zeros(dit.cfg.d_text)).sizes)
        {'y': 8, 'x': 8}
    """
    layer, index = _cross_head(dit, head)
    side = isqrt(len(dit.W_pos))
    with torch.no_grad():
        values = position_word_maps(dit, vector[None])[layer, index, 0].reshape(side, side)
    return xr.DataArray(values.float().cpu().numpy(), dims=("y", "x"), name="position_word_score")


@torch.no_grad()
def content_word_scores(
    dit: HookedDiT | FamilyModel,
    head: Head,
    content: Mapping[str, Float[Tensor, " d_model"]],
    vectors: Mapping[str, Float[Tensor, " d_text"]],
) -> xr.DataArray:
    """Scores of residual-stream directions (queries) with words (keys) in one cross-attention head.

    Args:
        dit: a PixArt denoiser; only its weights are read.
        head: "L2H1", or (2, 1).
        content: name → direction, such as a row of another head's `ov_outputs`, as a tensor.
        vectors: word → its vector in text-encoder space.

    Returns:
        Dims (content, word), before the division by √d_head, without biases.

    Raises:
        ValueError: the model has no such head.

    Example:
        >>> dit = HookedTextToImage.from_pretrained("rte-nano").dit
        >>> content, word = torch.ones(dit.cfg.d_model), torch.ones(dit.cfg.d_text)
        >>> content_word_scores(dit, "L2H1", {"ones": content}, {"above": word}).dims
        ('content', 'word')
    """
    layer, index = _cross_head(dit, head)
    attn = dit.blocks[layer].cross_attn
    queries = torch.stack(list(content.values())).to(dit.device, dit.dtype) @ attn.W_Q[index]
    keys = (
        dit.project_caption(torch.stack(list(vectors.values())).to(dit.device, dit.dtype))
        @ attn.W_K[index]
    )
    return xr.DataArray(
        (queries @ keys.T).double().cpu().numpy(),
        dims=("content", "word"),
        coords={"content": list(content), "word": list(vectors)},
        name="content_word_score",
    )


@torch.no_grad()
def ov_outputs(
    dit: HookedDiT | FamilyModel, head: Head, vectors: Mapping[str, Float[Tensor, " d_text"]]
) -> xr.DataArray:
    """Output of one cross-attention head that attends to a single word: dims (word, d_model).

    Without biases, which are the same for all words.

    Raises:
        ValueError: the model has no such head.

    Example:
        >>> dit = HookedTextToImage.from_pretrained("rte-nano").dit
        >>> dict(ov_outputs(dit, "L2H1", {"above": torch.ones(dit.cfg.d_text)}).sizes)
        {'word': 1, 'd_model': 192}
    """
    layer, index = _cross_head(dit, head)
    attn = dit.blocks[layer].cross_attn
    caption = dit.project_caption(torch.stack(list(vectors.values())).to(dit.device, dit.dtype))
    written = caption @ attn.W_V[index] @ attn.W_O[index]
    return xr.DataArray(
        written.double().cpu().numpy(),
        dims=("word", "d_model"),
        coords={"word": list(vectors)},
        name="ov_output",
    )


@torch.no_grad()
def logit_terms(cache: ActivationCache, head: Head, expand_heads: bool = False) -> xr.DataArray:
    """Scores of one cross-attention head as a sum over parts of residual stream and keys.

    score[q, k] = scale · Σ (part_q W_Q)(part_k W_K): exact, because cross-attention reads the
    residual stream without a norm.

    Args:
        cache: of one denoiser call (`cache.at(step=…)`, or a view's), with the outputs added to the
            residual stream and `hook_caption`.
        head: "L2H1", or (2, 1).
        expand_heads: split the output of each earlier cross-attention into its heads ("cross_L1H0",
            biases apart); needs their z.

    Returns:
        Dims (prompt, query_part, key_part, image_pos, text_pos). query_part: "embed" (the latent),
        "pos_embed", "0_attn_out", …, "bias"; key_part: "text", "bias" (the pattern does not depend
        on this one). Summed over both: `hook_attn_scores` without the −10,000 on pads.

    Raises:
        ValueError: the model has no such head.
        KeyError: the output of an earlier layer is not in the cache.

    Example:
        >>> _, cache = model.run_with_cache("red circle is above blue square", num_steps=1)
        >>> terms = logit_terms(cache.at(step=0), "L1H0")
        >>> dict(terms.sizes)
        {'prompt': 1, 'query_part': 7, 'key_part': 2, 'image_pos': 64, 'text_pos': 7}
    """
    dit: HookedDiT | FamilyModel = getattr(cache.model, "dit", cache.model)
    layer, index = _cross_head(dit, head)
    attn = dit.blocks[layer].cross_attn
    parts: dict[str, Tensor] = {name: cache[f"hook_{name}"] for name in ("embed", "pos_embed")}
    for before in range(layer + 1):
        parts[f"{before}_attn_out"] = cache["attn_out", before]
        if before == layer:
            break
        if expand_heads:
            text = dit.blocks[before].cross_attn
            heads = torch.einsum("bphe,hed->hbpd", cache["z", before, "cross_attn"], text.W_O)
            parts |= {f"cross_L{before}H{number}": written for number, written in enumerate(heads)}
            parts[f"{before}_cross_bias"] = text.b_O.expand_as(heads[0])
        else:
            parts[f"{before}_cross_attn_out"] = cache["cross_attn_out", before]
        parts[f"{before}_mlp_out"] = cache["mlp_out", before]
    queries = [part @ attn.W_Q[index] for part in parts.values()]
    queries.append(attn.b_Q[index].expand_as(queries[0]))
    keys = cache["hook_caption"] @ attn.W_K[index]
    both = torch.stack([keys, attn.b_K[index].expand_as(keys)])
    terms = attn.scale * torch.einsum("abqe,cbke->bacqk", torch.stack(queries), both)
    return xr.DataArray(
        terms.cpu().numpy(),
        dims=("prompt", "query_part", "key_part", "image_pos", "text_pos"),
        coords={"query_part": [*parts, "bias"], "key_part": ["text", "bias"]},
        name=f"{_name(head)}_score",
    )


@torch.no_grad()
def two_head_maps(
    model: HookedTextToImage,
    prompt: str,
    senders: Head | Sequence[Head],
    receiver: Head,
    gain: float = 1.0,
) -> xr.Dataset:
    """Score maps of a head, with and without the output of earlier heads in the position code.

    From weights and the text of one prompt. `alone` is the receiver's score map of every token by
    position code alone; for `composed`, `gain` times the senders' outputs (each with the attention
    given by position code alone) are added to the position code. Source: arXiv 2601.06338, section
    4.2: the object head's map is flat until the relation head has tagged the positions. Control:
    other senders.

    Returns:
        `alone`, `composed`: dims (text_pos, y, x), y down, coordinate `token`; scores after the
        division by √d_head, without the key bias. Every map is
        centred: a constant over positions carries no position.

    Raises:
        ValueError: no such head, or a sender does not come before the receiver.

    Example:
        >>> maps = two_head_maps(model, "red circle is above blue square", "L1H0", "L2H1")
        >>> dict(maps["composed"].sizes)
        {'text_pos': 7, 'y': 8, 'x': 8}
    """
    dit = model.dit
    layer, index = _cross_head(dit, receiver)
    tokens = model.to_tokens(prompt)
    text = model.text_encoder(tokens, attention_mask=torch.ones_like(tokens))[0].to(dit.dtype)
    caption = dit.project_caption(text)[0]
    listed = (
        [senders]
        if isinstance(senders, str) or (senders and isinstance(senders[0], int))
        else senders
    )
    content = dit.W_pos

    def scores(head: tuple[int, int], stream: Tensor) -> Tensor:
        attn = dit.blocks[head[0]].cross_attn
        return (
            attn.scale
            * (stream @ attn.W_Q[head[1]] + attn.b_Q[head[1]])
            @ (caption @ attn.W_K[head[1]]).T
        )

    for sender in listed:
        before, number = _cross_head(dit, sender)  # type: ignore[arg-type]
        if before >= layer:
            raise ValueError(
                f"{sender} does not come before {receiver}: a sender must be in an earlier layer."
            )
        attn = dit.blocks[before].cross_attn
        written = (
            scores((before, number), dit.W_pos).softmax(-1)
            @ caption
            @ attn.W_V[number]
            @ attn.W_O[number]
        )
        content = content + gain * written
    side = isqrt(len(dit.W_pos))

    def picture(stream: Tensor) -> tuple[tuple[str, ...], np.ndarray]:
        found = scores((layer, index), stream)
        return ("text_pos", "y", "x"), (found - found.mean(0)).T.reshape(
            -1, side, side
        ).float().cpu().numpy()

    token = ("text_pos", model.to_str_tokens(prompt))
    return xr.Dataset(
        {"alone": picture(dit.W_pos), "composed": picture(content)}, coords={"token": token}
    )


@torch.no_grad()
def composition_scores(
    dit: HookedDiT | FamilyModel,
    kind: Literal["Q", "K", "V"] = "Q",
    sender: Sublayer = "cross_attn",
    receiver: Sublayer = "cross_attn",
) -> xr.DataArray:
    """Composition score of every pair of heads: ‖OV_s W_r‖ / (‖OV_s‖ ‖W_r‖).

    W_r is QK_r for queries ("Q"), QK_rᵀ for keys ("K") and OV_r for values ("V"). Cross-attention
    reads the residual stream by its queries only, so Q-composition of two cross-attention heads is
    the path relation head → object head. Source: Elhage et al. 2021, "A Mathematical Framework for
    Transformer Circuits"; `transformer_lens.utilities.composition_scores`.

    Returns:
        Dims (sender_layer, sender_head, receiver_layer, receiver_head); NaN unless the sender comes
        first.

    Raises:
        NotFoldedError: self-attention takes part, whose weights are complete only with the timestep
            folded into them.
        ValueError: keys or values of cross-attention, which come from the text alone.

    Example:
        >>> dit = HookedTextToImage.from_pretrained("rte-nano").dit
        >>> composition_scores(dit).shape
        (3, 3, 3, 3)
    """
    if receiver == "cross_attn" and kind != "Q":
        raise ValueError(
            f"{kind}-composition with cross-attention does not exist: its keys and values come "
            "from the text alone."
        )
    if "attn" in (sender, receiver) and dit.folded_timestep is None:
        raise NotFoldedError(
            "self-attention's weights lack the timestep's shift, scale and gate: use "
            "model.fold_timestep(t)"
        )
    qk, ov = (dit.QK, dit.OV) if receiver == "attn" else (dit.cross_QK, dit.cross_OV)
    reads = {"Q": qk, "K": qk.T, "V": ov}[kind]
    scores = (
        factored_composition_scores(dit.OV if sender == "attn" else dit.cross_OV, reads)
        .double()
        .cpu()
        .numpy()
    )

    order = ("attn", "cross_attn")
    layer = np.arange(dit.cfg.n_layers)
    later = 2 * layer[None, :] + order.index(receiver) > 2 * layer[:, None] + order.index(sender)
    dims = ("sender_layer", "sender_head", "receiver_layer", "receiver_head")
    return xr.DataArray(
        np.where(later[:, None, :, None], scores, np.nan), dims=dims, name=f"{kind}_composition"
    )
