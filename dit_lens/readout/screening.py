"""Find the heads that turn a relation word into a place, from weights alone.

Source: Wang, Fan, Pan (arXiv 2601.06338), section 4.1 and appendix B.7: the position-by-word score map of a relation head is
a ramp along the relation's direction. Here the map is the part of it that a pattern can depend on (no key bias, no mean over
positions), and every number of a head stands beside what chance gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedDiT, HookedTextToImage

from ..task import DIRECTIONS

Direction = tuple[int | float, int | float]
"""(dx, dy), y down."""

WORD_DIRECTIONS: dict[str, Direction] = {
    **{str(relation): direction for relation, direction in DIRECTIONS.items()},
    **dict.fromkeys(("up", "upper", "higher"), (0, -1)),
    **dict.fromkeys(("down", "lower"), (0, 1)),
}
"""Where a word points, y down."""

Heads = Float[Tensor, "layer head word"]


def ramp(direction: Direction, side: int) -> Float[Tensor, " pos"]:
    """A plane that rises along `direction` over a `side` × `side` grid on [−1, 1]², row-major, mean zero."""
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    length = (direction[0] ** 2 + direction[1] ** 2) ** 0.5
    return ((direction[0] * x + direction[1] * y) / length).flatten()


@torch.no_grad()
def word_vector(model: HookedTextToImage, word: str, sentence: str = "red circle is {} blue square") -> Float[Tensor, " d_text"]:
    """A word's vector as the text encoder gives it inside a sentence (the last token of the word).

    Raises:
        ValueError: the sentence has no place for the word, or the encoder does not know it.
    """
    if "{}" not in sentence:
        raise ValueError("sentence needs a {} where the word goes.")
    tokens = model.to_tokens(sentence.format(word))
    position = model.to_tokens(sentence[: sentence.index("{}")] + word).shape[1] - 2  # the token before EOS
    return model.text_encoder(tokens, attention_mask=torch.ones_like(tokens))[0][0, position]


AXES: dict[str, tuple[str, str, Direction]] = {"vertical": ("below", "above", (0, 1)), "horizontal": ("right", "left", (1, 0))}
"""Axis → (relation at its positive end, at its negative end, direction), y down."""


@torch.no_grad()
def axis_gains(dit: HookedDiT, vectors: Mapping[str, Float[Tensor, " d_model"]]) -> pd.DataFrame:
    """How steeply each cross-attention head's scores rise along an axis when its word turns from one end to the other.

    The gain is the projection of the map Ẽ_pos W_Q · W_Kᵀ (c₊ − c₋)/2 / √d_head on the axis' unit ramp, in units of attention
    scores. The centred difference holds neither the key bias nor anything that both words share.

    Args:
        dit: the denoiser.
        vectors: relation → vector in caption space, as cross-attention reads it; the four names in `AXES`.

    Returns:
        One row a head and axis: layer, head, axis, gain (positive: the head looks where the word points), share (of the sum of
        gain² over all heads, by axis), cosine (of map and ramp).

    Example:
        >>> from hooked_models import HookedTextToImage
        >>> model = HookedTextToImage.from_pretrained("rte-micro")
        >>> words = {w: model.dit.project_caption(word_vector(model, w)[None])[0] for w in ("above", "below", "left", "right")}
        >>> gains = axis_gains(model.dit, words)
        >>> first = gains[gains["axis"] == "horizontal"].nlargest(1, "share").iloc[0]
        >>> (int(first["layer"]), int(first["head"])), round(float(first["share"]), 1)
        ((2, 2), 0.9)
    """
    side = dit.cfg.sample_size // dit.cfg.patch_size
    position = dit.W_pos.double().cpu()
    position = position - position.mean(0)
    tables = []
    for axis, (plus, minus, direction) in AXES.items():
        contrast = (vectors[plus] - vectors[minus]).double().cpu() / 2
        unit = F.normalize(ramp(direction, side), dim=0)
        for layer, block in enumerate(dit.blocks):
            queries, keys = block.cross_attn.W_Q.double().cpu(), block.cross_attn.W_K.double().cpu()  # [head d_model d_head]
            read = torch.einsum("c,hce->he", contrast, keys) / dit.cfg.d_head**0.5
            maps = torch.einsum("pd,hde,he->hp", position, queries, read)
            gain = maps @ unit
            cosine = gain / maps.norm(dim=1).clamp(min=1e-12)
            of_head = {"layer": layer, "head": range(len(gain)), "axis": axis, "gain": gain.numpy(), "cosine": cosine.numpy()}
            tables.append(pd.DataFrame(of_head))
    table = pd.concat(tables, ignore_index=True)
    squares = table["gain"] ** 2
    table["share"] = squares / squares.groupby(table["axis"]).transform("sum")
    return table[["layer", "head", "axis", "gain", "share", "cosine"]]


@torch.no_grad()
def screen_heads(
    dit: HookedDiT,
    vectors: Mapping[str, Float[Tensor, " d"]],
    directions: Mapping[str, Direction] | None = None,
    *,
    at: Literal["text", "caption"] = "text",
    null_draws: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank every cross-attention head by how well its position-by-word maps match the words' ramps.

    The map of a head and a word is Ẽ_pos W_Q · W_Kᵀ c: Ẽ_pos the position code without its mean over positions, c the word's
    caption vector. The key bias gives every word the same map, which softmax cannot see, and is left out.

    Args:
        vectors: word → its vector, in text-encoder space or, with `at="caption"`, as cross-attention reads it. Differences of
            vectors, such as effect vectors of a variance partition, are meaningful in caption space only: the projection to it
            is not linear.
        directions: word → (dx, dy), y down; `WORD_DIRECTIONS` unless given.
        null_draws, seed: for the two controls behind `p`.

    Returns:
        One row a head, strongest first: layer, head, cosine (of map and ramp, mean over words; negative: the head looks away from
        where the word points), projection (of the map onto the unit ramp, mean over words), energy (norm of the map, mean over
        words), and how often chance does as well. For this the words are first averaged by direction and centred, so that a ramp
        which all of them share counts for nothing; then it is the share of draws in which |projection| is as large:
        `p_words`, the words' caption vectors turned together into random directions (their lengths and angles stay);
        `p_positions`, the positions of the grid permuted; `p`, the larger of the two. Not corrected for the number of heads.

    Raises:
        ValueError: a word has no direction, or there is none.
    """
    directions = WORD_DIRECTIONS if directions is None else directions
    if unknown := [word for word in vectors if word not in directions]:
        raise ValueError(f"{', '.join(unknown)} has no direction: pass directions= with one, or use {', '.join(directions)}.")
    if not vectors:
        raise ValueError("There is no word to screen with.")
    side = dit.cfg.sample_size // dit.cfg.patch_size
    position = dit.W_pos.double().cpu()
    position = position - position.mean(0)
    queries = torch.stack([block.cross_attn.W_Q for block in dit.blocks]).double().cpu()  # [layer head d_model d_head]
    keys = torch.stack([block.cross_attn.W_K for block in dit.blocks]).double().cpu()

    words = torch.stack(list(vectors.values())).to(dit.device, dit.dtype)
    caption = (dit.project_caption(words) if at == "text" else words).double().cpu()
    ramps = F.normalize(torch.stack([ramp(directions[word], side) for word in vectors]), dim=1)
    given = torch.einsum("wc,lhce->lhwe", caption, keys)
    projection: Heads = torch.einsum("wp,pd,lhde,lhwe->lhw", ramps, position, queries, given)  # no map is ever formed
    covariance = torch.einsum("pd,pf->df", position, position)
    energy: Heads = torch.einsum("lhwe,lhde,df,lhfg,lhwg->lhw", given, queries, covariance, queries, given).clamp(min=0).sqrt()

    pointing = list(dict.fromkeys(directions[word] for word in vectors))
    of_direction = torch.stack([caption[[directions[word] == d for word in vectors]].mean(0) for d in pointing])
    if len(pointing) > 1:
        of_direction = of_direction - of_direction.mean(0)
    ramps = F.normalize(torch.stack([ramp(d, side) for d in pointing]), dim=1)
    looking = torch.einsum("wp,pd,lhde->lhwe", ramps, position, queries)
    read = torch.einsum("wc,lhce->lhwe", of_direction, keys)
    size = (looking * read).sum((-1, -2)).abs()
    frame = torch.linalg.qr(of_direction.T).R  # the words in an orthonormal frame of their span
    generator = torch.Generator().manual_seed(seed)
    turned, permuted = [], []
    for _ in range(null_draws):
        turned.append((torch.linalg.qr(torch.randn(of_direction.T.shape, generator=generator, dtype=torch.float64)).Q @ frame).T)
        permuted.append(ramps[:, torch.randperm(len(position), generator=generator)])
    exceeds = {}
    for name, maps, draws in (
        ("p_words", torch.einsum("lhwe,lhce->lhwc", looking, keys), turned),
        ("p_positions", torch.einsum("lhwe,lhde,pd->lhwp", read, queries, position), permuted),
    ):
        nulls = maps.flatten(2) @ torch.stack(draws).flatten(1).T  # [layer head draw]
        exceeds[name] = (nulls.abs() >= size[..., None] * (1 - 1e-9)).sum(-1, dtype=torch.float64)
    p = {name: ((1 + count) / (1 + null_draws)).flatten().numpy() for name, count in exceeds.items()}

    layers, heads = np.meshgrid(np.arange(dit.cfg.n_layers), np.arange(dit.cfg.n_heads), indexing="ij")
    table = pd.DataFrame(
        {
            "layer": layers.ravel(),
            "head": heads.ravel(),
            "cosine": (projection / energy.clamp(min=1e-12)).mean(-1).flatten().numpy(),
            "projection": projection.mean(-1).flatten().numpy(),
            "energy": energy.mean(-1).flatten().numpy(),
            "p": np.max(list(p.values()), axis=0),
            **p,
        }
    )
    return table.sort_values("projection", key=abs, ascending=False, ignore_index=True)
