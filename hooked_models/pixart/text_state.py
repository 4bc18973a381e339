"""The text of a denoiser call, computed once for all steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

MASKED_BELOW = -9000.0
"""Keys with a bias of at most this count as masked; PixArt uses -10000, which bfloat16 rounds."""
KeysValues = tuple[
    Float[Tensor, "batch text_pos head d_head"], Float[Tensor, "batch text_pos head d_head"]
]


@dataclass(frozen=True)
class TextState:
    """Everything a denoiser computes from the text alone; made by ``HookedDiT.encode_text``.

    Nothing in it has passed through a hook. It goes stale when the weights change.
    """

    text: Float[Tensor, "batch text_pos d_text"]
    caption: Float[Tensor, "batch text_pos d_caption"]
    bias: Float[Tensor, "batch _ text_pos"] | None
    """Added to the cross-attention scores."""
    keys_values: tuple[KeysValues, ...]
    """Cross-attention's keys and values by layer, before ``hook_k`` and ``hook_v``."""

    @cached_property
    def n_empty_prompts(self) -> int:
        """Number of leading rows whose prompt is empty: only the first token is unmasked."""
        if self.bias is None:
            return 0
        others_masked = (self.bias[..., 1:] <= MASKED_BELOW).flatten(1).all(dim=1)
        first_open = (self.bias[..., 0] == 0).flatten(1).all(dim=1)
        return int((others_masked & first_open).long().cumprod(dim=0).sum())

    def take(self, rows: Int[Tensor, " row"]) -> TextState:
        """Select rows of the batch."""
        bias = None if self.bias is None else self.bias[rows]
        keys_values = tuple((k[rows], v[rows]) for k, v in self.keys_values)
        return TextState(self.text[rows], self.caption[rows], bias, keys_values)

    def join(self, other: TextState) -> TextState:
        """Append the rows of `other`, which is as long and has a bias if this has."""
        keys_values = zip(self.keys_values, other.keys_values, strict=True)
        return TextState(
            torch.cat([self.text, other.text]),
            torch.cat([self.caption, other.caption]),
            None if self.bias is None or other.bias is None else torch.cat([self.bias, other.bias]),
            tuple((torch.cat([k, k2]), torch.cat([v, v2])) for (k, v), (k2, v2) in keys_values),
        )


def additive_bias(
    mask: Shaped[Tensor, "batch ... key_pos"] | None, dtype: torch.dtype
) -> Shaped[Tensor, "batch ... key_pos"] | None:
    """Turn a mask [batch key_pos] (1 = attend) into a bias [batch 1 key_pos] on the scores.

    Pass a bias on. diffusers' bias is -10000, not -∞: a row with every key masked stays finite.

    Example:
        >>> additive_bias(torch.tensor([[1, 0]]), torch.float32)
        tensor([[[    -0., -10000.]]])
    """
    if mask is None or mask.ndim == 3:
        return mask
    return (1 - mask.to(dtype))[:, None] * -10000.0
