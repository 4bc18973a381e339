"""Tensor edits and sums over patterns: arithmetic that also runs on a server without dit_lens.

`dit_lens.remote` sends these functions along, as source. Therefore they refer to torch alone (in
annotations too) and to each other, and must not be decorated otherwise: `no_type_check` keeps
run-time type checkers away.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -10000.0
"""Score of a masked key, as PixArt adds for a pad. Finite, so that no row can become NaN."""


@no_type_check
def edited(
    tensor: Tensor,
    hook: Any = None,
    *,
    kind: str,
    where: Tensor,
    factor: float = 1.0,
    values: Tensor | None = None,
    ordered_axis: int | None = None,
    donors: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """`tensor` [row …] with the entries in `where` changed.

    Arguments are those of `intervene.edits.Edit`, which makes them.

    Args:
        tensor: the activation; it is not written to.
        hook: not read; every hook function is given one.
        kind: "zero", "mean", "resample", "knockout", "scale", "replace" or "add".
        where: booleans, broadcast to `tensor`.
        factor: of "scale".
        values: new entries of "replace" or addend of "add", broadcast to `tensor`.
        ordered_axis: axis of tokens that correspond in order, for "mean" and "resample"; None where
            positions correspond by number.
        donors: for "resample", the row that each row takes its values from; and the position along
            the axis `ordered_axis`, where tokens correspond in order.
    """
    where = where.to(tensor.device)
    if kind == "zero":
        new = torch.zeros_like(tensor)
    elif kind == "knockout":
        new = torch.full_like(tensor, MASKED)
    elif kind == "mean" and ordered_axis is None:
        new = tensor.mean(dim=0, keepdim=True)
    elif kind == "mean":
        over = (0, ordered_axis)
        new = (tensor * where).sum(over, keepdim=True) / where.sum(over, keepdim=True).clamp(min=1)
    elif kind == "resample":
        rows, positions = donors
        new = tensor[rows.to(tensor.device)]
        new = (
            new
            if ordered_axis is None
            else new.take_along_dim(positions.to(tensor.device), ordered_axis)
        )
    elif kind == "scale":
        new = factor * tensor
    elif kind == "replace":
        new = values.to(tensor)
    elif kind == "add":
        new = tensor + values.to(tensor)
    else:
        raise ValueError(f"There is no edit {kind!r}.")
    return torch.where(where, new, tensor)


@no_type_check
def sums_of_pattern(pattern: Tensor, queries: Tensor, keys: Tensor, reduce: str) -> Tensor:
    """Sum a pattern [batch head pos key_pos] between groups of positions.

    Groups are [batch pos group]; the sums are [batch head group key_group].

    Args:
        pattern: weights that sum to 1 over key_pos.
        queries: weight of each query position in each group [batch pos group].
        keys: weight of each key position in each group [batch key_pos key_group].
        reduce: "sum" over pairs of positions, or the "max" among pairs of non-zero weights.
    """
    if reduce == "max":
        return _largest(pattern, queries, keys)
    return _add_up(pattern @ keys.to(pattern.dtype)[:, None], queries)


@no_type_check
def sums_of_attention(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    queries: Tensor | None,
    keys: Tensor,
    reduce: str,
) -> Tensor:
    """Apply `sums_of_pattern` to the pattern of q and k [batch pos head d_head].

    The pattern is made in chunks no larger than `q`. `bias` broadcasts to the pattern. Without
    `queries`, under "sum", each query is a group of its own: [batch head pos key_group].
    """
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if reduce == "sum" and k.shape[2] <= k.shape[3] and q.dtype in (torch.float32, torch.float64):
        # A short text: the whole pattern is no larger than the queries, and faster made with keys
        # before queries. Queries are summed first: their groups are the fewer.
        pattern = (k.flatten(0, 1) @ q.flatten(0, 1).mT).unflatten(0, q.shape[:2]).mul_(scale)
        pattern = (pattern if bias is None else pattern.add_(bias.mT)).softmax(dim=2)
        if queries is None:
            return pattern.mT @ keys.to(pattern.dtype)[:, None]
        found = pattern.to(queries.dtype).flatten(1, 2) @ queries
        return found.unflatten(1, pattern.shape[1:3]).mT @ keys.to(queries.dtype)[:, None]
    if reduce == "sum":
        # at 1024 px a few heads at a time, on small images all
        size = max(1, 2**20 // (q.shape[0] * q.shape[2] * q.shape[3]))
        found = []
        for start in range(0, q.shape[1], size):
            own = bias if bias is None or bias.shape[1] == 1 else bias[:, start : start + size]
            mass = _group_mass(
                q[:, start : start + size], k[:, start : start + size], own, scale, keys
            )
            found.append(_add_up(mass, queries))
        return torch.cat(found, dim=1)
    found = None
    for rows in torch.arange(q.shape[2], device=q.device).split(
        max(1, q.shape[2] * q.shape[3] // k.shape[2])
    ):
        scores = q[:, :, rows] @ k.mT * scale
        part = _largest(
            (scores if bias is None else scores + bias).softmax(dim=-1), queries[:, rows], keys
        )
        found = part if found is None else torch.maximum(found, part)
    return found


@no_type_check
def _group_mass(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, keys: Tensor) -> Tensor:
    d_head, n_groups = q.shape[-1], keys.shape[-1]
    # Filled up to a head's width: fused kernels take no other, and without them the whole pattern
    # is computed.
    values = (
        F.pad(keys, (0, -n_groups % d_head)).to(q.dtype)[:, None].expand(-1, q.shape[1], -1, -1)
    )
    parts = [
        F.scaled_dot_product_attention(q, k, part, attn_mask=bias, scale=scale)
        for part in values.split(d_head, dim=-1)
    ]
    return torch.cat(parts, dim=-1)[..., :n_groups]


@no_type_check
def _add_up(mass: Tensor, queries: Tensor | None) -> Tensor:
    if queries is None:
        return mass
    return torch.einsum("bpi,bhpk->bhik", queries, mass.to(queries.dtype))


@no_type_check
def _largest(pattern: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    columns = []
    for query in queries.bool().unbind(dim=-1):
        pairs = [query[:, None, :, None] & key[:, None, None] for key in keys.bool().unbind(dim=-1)]
        columns.append(
            torch.stack(
                [pattern.masked_fill(~inside, 0).amax(dim=(2, 3)) for inside in pairs], dim=-1
            )
        )
    return torch.stack(columns, dim=2).to(queries.dtype)  # no pattern has an entry below 0
