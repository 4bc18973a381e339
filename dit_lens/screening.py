"""Find the heads that turn a relation word into a place, from weights alone.

Source: Wang, Fan, Pan (arXiv 2601.06338), section 4.1 and appendix B.7: the position-by-word score map of a relation head is
a ramp along the relation's direction.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedDiT, HookedTextToImage

from .circuits import position_word_maps
from .scenes import DIRECTIONS

Direction = tuple[int | float, int | float]
"""(dx, dy), y down."""

WORD_DIRECTIONS: dict[str, Direction] = {
    **{str(relation): direction for relation, direction in DIRECTIONS.items()},
    **dict.fromkeys(("up", "upper", "higher"), (0, -1)),
    **dict.fromkeys(("down", "lower"), (0, 1)),
}
"""Where a word points, y down."""


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


@torch.no_grad()
def screen_heads(
    dit: HookedDiT,
    vectors: Mapping[str, Float[Tensor, " d_text"]],
    directions: Mapping[str, Direction] | None = None,
    null_draws: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank every cross-attention head by how well its position-by-word maps match the words' ramps.

    Args:
        vectors: word → its vector in text-encoder space.
        directions: word → (dx, dy), y down; `WORD_DIRECTIONS` unless given.
        null_draws, seed: for the control behind `p`.

    Returns:
        One row a head, best first: layer, head, cosine (of map and ramp, mean over words), projection (of the map onto the
        unit ramp, mean over words), energy (norm of the map without its mean, mean over words), and p: the share of
        draws for which this head's mean projection is as large, where a draw replaces every word by a random vector at the words'
        mean distance from the words' mean.

    Raises:
        ValueError: a word has no direction, or there is none.
    """
    directions = WORD_DIRECTIONS if directions is None else directions
    if unknown := [word for word in vectors if word not in directions]:
        raise ValueError(f"{', '.join(unknown)} has no direction: pass directions= with one, or use {', '.join(directions)}.")
    if not vectors:
        raise ValueError("There is no word to screen with.")
    side = dit.cfg.sample_size // dit.cfg.patch_size
    ramps = torch.stack([ramp(directions[word], side) for word in vectors])
    ramps = ramps / ramps.norm(dim=1, keepdim=True)

    stacked = torch.stack(list(vectors.values())).to(dit.device, dit.dtype)
    projection, energy = _project(dit, stacked, ramps)
    exceed = torch.zeros_like(projection.mean(-1))
    generator = torch.Generator().manual_seed(seed)
    centre, spread = stacked.mean(0), (stacked - stacked.mean(0)).norm(dim=1).mean()
    for _ in range(null_draws):
        noise = torch.randn(stacked.shape, generator=generator).to(stacked)
        drawn = centre + spread * noise / noise.norm(dim=1, keepdim=True)
        exceed += _project(dit, drawn, ramps)[0].mean(-1) >= projection.mean(-1)

    layers, heads = np.meshgrid(np.arange(dit.cfg.n_layers), np.arange(dit.cfg.n_heads), indexing="ij")
    table = pd.DataFrame(
        {
            "layer": layers.ravel(),
            "head": heads.ravel(),
            "cosine": (projection / energy.clamp(min=1e-12)).mean(-1).flatten().numpy(),
            "projection": projection.mean(-1).flatten().numpy(),
            "energy": energy.mean(-1).flatten().numpy(),
            "p": ((1 + exceed) / (1 + null_draws)).flatten().numpy(),
        }
    )
    return table.sort_values("projection", ascending=False, ignore_index=True)


def _project(
    dit: HookedDiT, vectors: Float[Tensor, "word d_text"], ramps: Float[Tensor, "word pos"]
) -> tuple[Float[Tensor, "layer head word"], Float[Tensor, "layer head word"]]:
    maps = position_word_maps(dit, vectors).double().cpu()
    maps = maps - maps.mean(-1, keepdim=True)
    return torch.einsum("lhwp,wp->lhw", maps, ramps), maps.norm(dim=-1)
