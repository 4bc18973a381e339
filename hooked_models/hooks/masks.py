"""Masks of attention, and patterns of queries that attend to no key.

As in `streams`, this arithmetic also runs on a server without hooked_models.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor


@no_type_check
def as_bias(mask: Any, causal: bool, query: Tensor, keys: int) -> Any:
    """Mask as a bias of the scores [#batch #head #query_pos key_pos], or None where there is none.

    Args:
        mask: bias, or booleans, True where a query attends to a key; up to four axes.
        causal: whether a query attends to no later key.
        query: queries [… query_pos d_head], for their number and type.
        keys: number of key positions.

    Example:
        >>> as_bias(None, True, torch.zeros(1, 1, 2, 4), keys=2)
        tensor([[[[0., -inf],
                  [0., 0.]]]])
    """
    if causal:
        mask = torch.ones(query.shape[-2], keys, dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)


@no_type_check
def finite_bias(bias: Any) -> Any:
    """A bias with zeros for a query that attends to no key, so that sums over keys are no NaN.

    Example:
        >>> finite_bias(torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]]))
        tensor([[0., -inf],
                [0., 0.]])
    """
    if bias is None:
        return None
    return bias.masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0.0)


@no_type_check
def pattern_of(scores: Tensor) -> Tensor:
    """Softmax over keys; as in torch's kernel, zeros for a query that attends to no key.

    Example:
        >>> pattern_of(torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]))
        tensor([[0.5000, 0.5000],
                [0.0000, 0.0000]])
    """
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)
