"""Tensors of streams, between a model's order of positions and that of hooks.

This arithmetic also runs on a server without hooked_models: `dit_lens.remote` sends the functions
along as source. Therefore they refer to torch and to each other alone, and must not be decorated
otherwise: `no_type_check` keeps run-time type checkers away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, no_type_check

import torch
from torch import Tensor

Axes = Literal["batch pos d", "pos batch d", "batch d row column"]
"""Axes of a tensor of one stream."""


@no_type_check
def permute(tensor: Tensor, order: Tensor | None, dim: int) -> Tensor:
    """Reorder one axis by `order` [#batch pos]: one for all rows, or one for each row (axis 0).

    Example:
        >>> permute(torch.tensor([[5, 6, 7]]), torch.tensor([[2, 0, 1]]), dim=1).tolist()
        [[7, 5, 6]]
    """
    if order is None:
        return tensor
    order = order.to(tensor.device)
    if len(order) == 1:
        return tensor.index_select(dim, order[0])
    rows = tensor.expand(len(order), *tensor.shape[1:])  # a mask may be shared by the rows
    dim %= rows.ndim
    index = order.reshape(len(order), *(-1 if axis == dim else 1 for axis in range(1, rows.ndim)))
    return rows.gather(
        dim,
        index.expand(
            *(order.shape[1] if axis == dim else size for axis, size in enumerate(rows.shape))
        ),
    )


@no_type_check
def batch_first(x: Tensor, axes: Axes, like: Tensor | None = None) -> Tensor:
    """A tensor with these axes as [batch pos d]; with `like`, the inverse, in the shape of `like`.

    Example:
        >>> batch_first(torch.zeros(5, 2, 3), "pos batch d").shape
        torch.Size([2, 5, 3])
    """
    if axes == "pos batch d":
        return x.transpose(0, 1)
    if axes == "batch d row column":
        return (
            x.flatten(2).transpose(1, 2) if like is None else x.transpose(1, 2).reshape(like.shape)
        )
    return x


@no_type_check
def joined(tensors: Sequence[Tensor], axes: Axes, order: Tensor | None) -> Tensor:
    """Tensors of several streams as one [batch pos d], its positions in `order`.

    Example:
        >>> image, text = torch.zeros(2, 6, 4), torch.ones(1, 3, 4)  # one text serves all rows
        >>> joined([image, text], "batch pos d", None).shape
        torch.Size([2, 9, 4])
    """
    parts = [batch_first(x, axes) for x in tensors]
    batch = max(len(part) for part in parts)
    return permute(torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1), order, 1)


@no_type_check
def parted(whole: Tensor, tensors: Sequence[Tensor], axes: Axes, order: Tensor | None) -> Any:
    """Inverse of `joined`, by the inverse order: a list of tensors like those that were joined.

    Example:
        >>> image, text = torch.zeros(1, 6, 4), torch.ones(1, 3, 4)
        >>> whole = joined([image, text], "batch pos d", None)
        >>> [tuple(part.shape) for part in parted(whole, [image, text], "batch pos d", None)]
        [(1, 6, 4), (1, 3, 4)]
    """
    sizes = [batch_first(x, axes).shape[1] for x in tensors]
    parts = permute(whole, order, 1).split(sizes, dim=1)
    return [
        batch_first(part, axes, like=x).contiguous() for part, x in zip(parts, tensors, strict=True)
    ]
