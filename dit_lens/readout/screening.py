"""Screening of cross-attention heads that turn a relation word into a position, from weights alone.

Source: Wang, Fan, Pan (arXiv 2601.06338), section 4.1 and appendix B.7: the position-by-word score
map of a relation head is a ramp along the relation's direction. Here the map is the part of it that
a pattern can depend on (no key bias, no mean over positions), and every number of a head has its
chance level beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.stats import beta
from scipy.stats import t as student
from torch import Tensor

from hooked_models import HookedDiT, HookedTextToImage
from hooked_models.families import FamilyModel

from ..stats import holm
from ..task import DIRECTIONS
from ..task.scene import Relation

Direction = tuple[int | float, int | float]
"""(dx, dy), y down."""

WORD_DIRECTIONS: dict[str, Direction] = {
    **{str(relation): direction for relation, direction in DIRECTIONS.items()},
    **dict.fromkeys(("up", "upper", "higher"), (0, -1)),
    **dict.fromkeys(("down", "lower"), (0, 1)),
}
"""Word → (dx, dy), y down."""

HeadScores = Float[Tensor, "layer head word"]


def ramp(direction: Direction, side: int) -> Float[Tensor, " pos"]:
    """Plane that rises along `direction` on a `side` × `side` grid over [−1, 1]², with mean zero.

    Example:
        >>> ramp((1, 0), 2).tolist()
        [-1.0, 1.0, -1.0, 1.0]
    """
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    length = (direction[0] ** 2 + direction[1] ** 2) ** 0.5
    return ((direction[0] * x + direction[1] * y) / length).flatten()


@torch.no_grad()
def word_vector(
    model: HookedTextToImage, word: str, sentence: str = "red circle is {} blue square"
) -> Float[Tensor, " d_text"]:
    """Text-encoder output at the last token of a word in a prompt.

    Args:
        model: the model whose tokenizer and text encoder read the sentence.
        word: replaces the {} of the sentence.
        sentence: the prompt, with {} in place of the word.

    Raises:
        ValueError: the sentence has no {}, or the encoder does not know the word.

    Example:
        >>> word_vector(model, "above").shape
        torch.Size([256])
    """
    if "{}" not in sentence:
        raise ValueError("sentence needs a {} where the word goes.")
    tokens = model.to_tokens(sentence.format(word))
    # the token before EOS
    position = model.to_tokens(sentence[: sentence.index("{}")] + word).shape[1] - 2
    return model.text_encoder(tokens, attention_mask=torch.ones_like(tokens))[0][0, position]


ENDS: dict[str, tuple[Relation, Relation]] = {
    "vertical": ("below", "above"),
    "horizontal": ("right", "left"),
    "falling": ("lower_right", "upper_left"),
    "rising": ("upper_right", "lower_left"),
}
"""Axis → relation at its positive end and at its negative end; y points down."""
AXES = ("vertical", "horizontal")


def half_differences(
    vectors: Mapping[str, Float[Tensor, " d_model"]], axes: Sequence[str] = AXES
) -> dict[str, Float[Tensor, " d_model"]]:
    """Axis → (vector of the relation at its positive end − vector of that at its negative end) / 2.

    Example:
        >>> half_differences(
        ...     {"below": torch.tensor([3.0]), "above": torch.tensor([1.0])}, ["vertical"]
        ... )
        {'vertical': tensor([1.])}
    """
    return {axis: (vectors[ENDS[axis][0]] - vectors[ENDS[axis][1]]) / 2 for axis in axes}


@torch.no_grad()
def phrase_contrasts(
    model: HookedTextToImage,
    pairs: Mapping[str, tuple[str, str]],
    sentence: str = "red circle is {} blue square",
) -> dict[str, Float[Tensor, " d_model"]]:
    """Half the difference of two phrases in caption space, summed over their tokens, for each axis.

    Args:
        model: source of the text encoder and the caption projection.
        pairs: axis → (phrase at its positive end, at its negative end), with equal numbers of
            tokens.
        sentence: the prompt, with {} in place of the phrase.

    Raises:
        ValueError: two phrases differ in their number of tokens, so the words behind them are at
            different positions.

    Example:
        >>> pair = {"horizontal": ("to the right of", "to the left of")}
        >>> phrase_contrasts(model, pair)["horizontal"].shape
        torch.Size([192])
    """
    found = {}
    for axis, phrases in pairs.items():
        ends = []
        for phrase in phrases:
            tokens = model.to_tokens(sentence.format(phrase))
            before = model.to_tokens(sentence[: sentence.index("{}")].strip()).shape[1] - 1
            until = model.to_tokens(sentence[: sentence.index("{}")] + phrase).shape[1] - 1
            text = model.text_encoder(tokens, attention_mask=torch.ones_like(tokens))[0]
            ends.append(model.dit.project_caption(text)[0, before:until])
        if len(ends[0]) != len(ends[1]):
            raise ValueError(
                f"{phrases[0]!r} and {phrases[1]!r} differ in their number of tokens: compare "
                "phrases of equal length."
            )
        found[axis] = (ends[0] - ends[1]).sum(0) / 2
    return found


@torch.no_grad()
def screen_axes(
    dit: HookedDiT | FamilyModel, contrasts: Mapping[str, Float[Tensor, " d_model"]]
) -> pd.DataFrame:
    """Slope of each cross-attention head's scores along an axis, for half its words' difference.

    The gain is the projection of the map Ẽ_pos W_Q · W_Kᵀ c / √d_head on the axis' unit ramp, in
    units of attention scores; c is half the difference of two words or phrases, so neither the key
    bias nor anything that both share is in it. Each axis has its own ranking, because heads divide
    the work by axis: a mean over words that are mostly vertical misses a horizontal head.

    Args:
        dit: the denoiser.
        contrasts: axis (of `ENDS`) → half the difference of its two ends in caption space
            (`half_differences`, `phrase_contrasts`). Differences mean something there only: the
            projection of text to caption space is not linear.

    Returns:
        One row a head and axis, by axis and strongest first: layer, head, axis, gain (positive: the
        head attends in the direction of the word), share (of the sum of gain² over all heads),
        cosine (of map and ramp), `p` that a gain of this size comes by chance, and `p_family`, the
        same for any head of the axis (Holm). Chance is the larger of two: c turned into a random
        direction, for which gain² / (|c|² |slope|²) has a Beta(1/2, (d − 1)/2) distribution; and
        the grid's positions permuted, for which the cosine is that of a Pearson correlation. The
        statistic is the gain in both.

    Example:
        >>> model = HookedTextToImage.from_pretrained("rte-micro")
        >>> words = {
        ...     w: model.dit.project_caption(word_vector(model, w)[None])[0]
        ...     for w in ("above", "below", "left", "right")
        ... }
        >>> table = screen_axes(model.dit, half_differences(words))
        >>> first = table[table["axis"] == "horizontal"].iloc[0]
        >>> f"L{first['layer']}H{first['head']}", round(float(first["share"]), 1)
        ('L2H2', 0.9)
    """
    side = isqrt(len(dit.W_pos))
    position = dit.W_pos.double().cpu()
    position = position - position.mean(0)
    # [layer head d_model d_head]
    queries = torch.stack([block.cross_attn.W_Q for block in dit.blocks]).double().cpu()
    keys = (
        torch.stack([block.cross_attn.W_K for block in dit.blocks]).double().cpu()
        / dit.cfg.d_head**0.5
    )
    layers, heads = np.meshgrid(
        np.arange(dit.cfg.n_layers), np.arange(dit.cfg.n_heads), indexing="ij"
    )
    tables = []
    for axis, contrast in contrasts.items():
        c = contrast.double().cpu()
        unit = F.normalize(ramp(DIRECTIONS[ENDS[axis][0]], side), dim=0)
        # gain = slope · c
        slope = torch.einsum("d,lhde,lhce->lhc", unit @ position, queries, keys)
        gain = slope @ c
        read = torch.einsum("lhce,c->lhe", keys, c)
        maps = torch.einsum("pd,lhde,lhe->lhp", position, queries, read)
        cosine = (gain / maps.norm(dim=-1).clamp(min=1e-12)).clamp(-1, 1)
        angle = (gain / (slope.norm(dim=-1) * c.norm()).clamp(min=1e-12)).square().clamp(max=1)
        p_words = beta.sf(angle.numpy(), 0.5, (len(c) - 1) / 2)
        freedom = len(position) - 2
        t = (cosine * (freedom / (1 - cosine.square()).clamp(min=1e-12)) ** 0.5).abs()
        p = np.maximum(p_words, 2 * student.sf(t.numpy(), freedom)).ravel()
        p = np.where(gain.numpy().ravel() == 0, 1.0, p)
        table = pd.DataFrame(
            {
                "layer": layers.ravel(),
                "head": heads.ravel(),
                "axis": axis,
                "gain": gain.numpy().ravel(),
                "share": (gain.square() / gain.square().sum().clamp(min=1e-30)).numpy().ravel(),
                "cosine": cosine.numpy().ravel(),
                "p": p,
                "p_family": holm(p),
            }
        )
        tables.append(table.sort_values("share", ascending=False))
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class _HeadMaps:
    """Position-by-word maps of all cross-attention heads, Ẽ_pos W_Q · W_Kᵀ c, never formed."""

    position: Float[Tensor, "pos d_model"]
    queries: Float[Tensor, "layer head d_model d_head"]
    keys: Float[Tensor, "layer head d_caption d_head"]

    @classmethod
    def of(cls, dit: HookedDiT | FamilyModel) -> _HeadMaps:
        position = dit.W_pos.double().cpu()
        queries = torch.stack([block.cross_attn.W_Q for block in dit.blocks]).double().cpu()
        keys = torch.stack([block.cross_attn.W_K for block in dit.blocks]).double().cpu()
        return cls(position - position.mean(0), queries, keys)

    def read(
        self, caption: Float[Tensor, "word d_caption"]
    ) -> Float[Tensor, "layer head word d_head"]:
        return torch.einsum("wc,lhce->lhwe", caption, self.keys)

    def projection(
        self, ramps: Float[Tensor, "word pos"], caption: Float[Tensor, "word d_caption"]
    ) -> HeadScores:
        """Projection of each word's map on its ramp."""
        read = self.read(caption)
        return torch.einsum("wp,pd,lhde,lhwe->lhw", ramps, self.position, self.queries, read)

    def energy(self, caption: Float[Tensor, "word d_caption"]) -> HeadScores:
        """Norm of each word's map."""
        read, queries = self.read(caption), self.queries
        covariance = torch.einsum("pd,pf->df", self.position, self.position)
        squares = torch.einsum(
            "lhwe,lhde,df,lhfg,lhwg->lhw", read, queries, covariance, queries, read
        )
        return squares.clamp(min=0).sqrt()

    def chance(
        self,
        ramps: Float[Tensor, "word pos"],
        caption: Float[Tensor, "word d_caption"],
        draws: int,
        seed: int,
    ) -> dict[str, Float[np.ndarray, " layer_head"]]:
        """Share of draws with as large a sum: of turned words, of permuted positions."""
        looking = torch.einsum("wp,pd,lhde->lhwe", ramps, self.position, self.queries)
        read = self.read(caption)
        size = (looking * read).sum((-1, -2)).abs()
        frame = torch.linalg.qr(caption.T).R  # the words in an orthonormal frame of their span
        generator = torch.Generator().manual_seed(seed)
        turned, permuted = [], []
        for _ in range(draws):
            noise = torch.randn(caption.T.shape, generator=generator, dtype=torch.float64)
            turned.append((torch.linalg.qr(noise).Q @ frame).T)
            permuted.append(ramps[:, torch.randperm(len(self.position), generator=generator)])
        found = {}
        for name, maps, drawn in (
            ("p_words", torch.einsum("lhwe,lhce->lhwc", looking, self.keys), turned),
            (
                "p_positions",
                torch.einsum("lhwe,lhde,pd->lhwp", read, self.queries, self.position),
                permuted,
            ),
        ):
            nulls = maps.flatten(2) @ torch.stack(drawn).flatten(1).T  # [layer head draw]
            count = (nulls.abs() >= size[..., None] * (1 - 1e-9)).sum(-1, dtype=torch.float64)
            found[name] = ((1 + count) / (1 + draws)).flatten().numpy()
        return found


@torch.no_grad()
def screen_heads(
    dit: HookedDiT | FamilyModel,
    vectors: Mapping[str, Float[Tensor, " d"]],
    directions: Mapping[str, Direction] | None = None,
    *,
    at: Literal["text", "caption"] = "text",
    null_draws: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank cross-attention heads by the match of their position-by-word maps to the words' ramps.

    The map of a head and a word is Ẽ_pos W_Q · W_Kᵀ c: Ẽ_pos is the position code without its mean
    over positions, c the word's caption vector. The key bias gives every word the same map, which
    softmax cancels, and is left out.

    Args:
        dit: a denoiser with cross-attention and additive position codes; only weights are read.
        vectors: word → its vector, in text-encoder space or, with `at="caption"`, after the caption
            projection. Differences of vectors, such as effect vectors of a variance partition, are
            meaningful in caption space only: the projection to it is not linear.
        directions: word → (dx, dy), y down; by default, `WORD_DIRECTIONS`.
        at: space of `vectors`, "text" or "caption".
        null_draws: draws of each of the two controls behind `p`.
        seed: seed of these draws.

    Returns:
        One row a head, largest |projection| first: layer, head, cosine (of map and ramp, mean over
        words; negative: the head attends opposite to the word's direction), projection (of the map
        onto the unit ramp, mean over words), energy (norm of the map, mean over words), and the
        chance levels. For these the words are first averaged by direction and centred, so that a
        ramp common to all of them does not count; each is the share of draws with a |projection| at
        least as large: `p_words`, with the words' caption vectors turned together into random
        directions (their lengths and angles stay); `p_positions`, with the positions of the grid
        permuted; `p`, the larger of the two. Not corrected for the number of heads.

    Raises:
        ValueError: a word has no direction, or there is no word.

    Example:
        >>> vectors = {word: word_vector(model, word) for word in ("above", "below", "left")}
        >>> table = screen_heads(model.dit, vectors, null_draws=99)
        >>> list(table.columns)[:5], len(table) == model.cfg.n_layers * model.cfg.n_heads
        (['layer', 'head', 'cosine', 'projection', 'energy'], True)
    """
    directions = WORD_DIRECTIONS if directions is None else directions
    if unknown := [word for word in vectors if word not in directions]:
        raise ValueError(
            f"{', '.join(unknown)} has no direction: pass directions= with one, or use "
            f"{', '.join(directions)}."
        )
    if not vectors:
        raise ValueError("There is no word to screen with.")
    side = isqrt(len(dit.W_pos))
    words = torch.stack(list(vectors.values())).to(dit.device, dit.dtype)
    caption = (dit.project_caption(words) if at == "text" else words).double().cpu()
    maps = _HeadMaps.of(dit)
    ramps = F.normalize(torch.stack([ramp(directions[word], side) for word in vectors]), dim=1)
    projection, energy = maps.projection(ramps, caption), maps.energy(caption)

    pointing = list(dict.fromkeys(directions[word] for word in vectors))
    of_direction = torch.stack(
        [caption[[directions[word] == d for word in vectors]].mean(0) for d in pointing]
    )
    if len(pointing) > 1:
        of_direction = of_direction - of_direction.mean(0)
    ramps = F.normalize(torch.stack([ramp(d, side) for d in pointing]), dim=1)
    p = maps.chance(ramps, of_direction, null_draws, seed)

    layers, heads = np.meshgrid(
        np.arange(dit.cfg.n_layers), np.arange(dit.cfg.n_heads), indexing="ij"
    )
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
