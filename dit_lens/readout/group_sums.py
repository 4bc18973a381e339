"""Attention of one denoiser call, added up between groups of positions, several layers at a time.

A small batch's attentions are so small that most of the time goes into starting operations; their
queries and keys wait until they are added up together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from ..intervene.portable_ops import sums_of_attention, sums_of_pattern

MOST_WAITING = 2**17
"""Entries of queries that wait; an attention with more is added up at once."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Weight of each position in each group, in the rows of a call.

    Attributes:
        reduce: "sum" over pairs of positions, or the "max" among pairs of non-zero weights.
    """

    queries: Float[Tensor, "batch pos group"]
    keys: Float[Tensor, "batch key_pos key_group"]
    reduce: Literal["sum", "max"]
    _known: dict[Any, Any] = field(default_factory=dict)
    """Results that no layer or step changes."""

    def on_first_key(self, n: int) -> Float[Tensor, "{n} 1 group key_group"]:
        """Reduced attention of the first n rows, if all of it is on the first key."""
        if n not in self._known:
            # [row pos group 1], [row 1 1 key_group]
            queries, first = self.queries[:n, :, :, None], self.keys[:n, :1, None]
            self._known[n] = (
                (queries * first).sum(1)
                if self.reduce == "sum"
                else ((queries != 0) & (first != 0)).any(1)
            ).to(self.queries.dtype)[:, None]
        return self._known[n]

    def repeated(self, start: int, times: int) -> tuple[Tensor, Tensor]:
        """Weights of queries and of keys in the rows from `start` on, `times` times over."""
        if (start, times) not in self._known:
            self._known[start, times] = (
                self.queries[start:].repeat(times, 1, 1),
                self.keys[start:].repeat(times, 1, 1),
            )
        return self._known[start, times]


class CallSums:
    """Accumulates the group attention of some attentions in one call.

    Args:
        attentions: each gets a reader, in `readers`, to be attached for the time of the call.

    Example:
        >>> from hooked_models.pixart.attention import AttentionCore
        >>> attention = AttentionCore()
        >>> attention.scale = 1.0
        >>> groups = Groups(torch.ones(1, 4, 2), torch.ones(1, 3, 5), "sum")
        >>> sums = CallSums(groups, [attention], n_heads=1)
        >>> sums.readers[attention].read(torch.randn(1, 4, 1, 8), torch.randn(1, 3, 1, 8), None)
        >>> torch.allclose(sums.taken(), torch.tensor(4.0))  # 4 queries, an attention of 1 each
        True
    """

    def __init__(self, groups: Groups, attentions: Sequence[Any], n_heads: int) -> None:
        q, k = groups.queries, groups.keys
        self.groups = groups
        self.sums = q.new_zeros(len(attentions), len(q), n_heads, q.shape[-1], k.shape[-1])
        self.readers = {one: _Reader(self, i, one) for i, one in enumerate(attentions)}
        self.waiting: list[tuple[_Reader, Tensor, Tensor, Tensor | None]] = []

    def taken(self) -> Float[Tensor, "attention batch head group key_group"]:
        """The sums, after the call."""
        self.add_up()
        return self.sums

    def add(self, reader: _Reader, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
        """Put an attention to those that wait, if it is like them."""
        if self.waiting:
            first, *known = self.waiting[0]
            same = [None if x is None else x.shape for x in known] == [
                None if x is None else x.shape for x in (q, k, bias)
            ]
            if not same or first.attention.scale != reader.attention.scale:
                self.add_up()
        self.waiting.append((reader, q, k, bias))
        if (len(self.waiting) + 1) * q.numel() > MOST_WAITING:
            self.add_up()

    def add_up(self) -> None:
        """Add up the attentions that wait."""
        if not self.waiting:
            return
        readers, qs, ks, biases = zip(*self.waiting, strict=True)
        self.waiting = []
        start, q, k, bias = self.sums.shape[1] - len(qs[0]), qs[0], ks[0], biases[0]
        if len(qs) > 1:
            q, k = torch.cat(qs), torch.cat(ks)
            wide = [each.expand(len(qs[0]), -1, -1, -1) for each in biases if each is not None]
            bias = torch.cat(wide) if wide else None
        numbers, scale = [each.number for each in readers], readers[0].attention.scale
        weights = self.groups.repeated(start, len(qs))
        found = sums_of_attention(q, k, bias, scale, *weights, self.groups.reduce)
        self.sums[numbers, start:] = found.unflatten(0, (len(qs), -1))
        if start:
            self.sums[numbers, :start] = self.groups.on_first_key(start)


@dataclass(repr=False, eq=False)  # TransformerLens calls repr of hooks, which would print tensors
class _Reader:
    """Reads one attention in one call."""

    sums: CallSums
    number: int
    attention: Any

    def read(
        self,
        q: Float[Tensor, "row pos head d_head"],
        k: Float[Tensor, "row key_pos head d_head"],
        bias: Float[Tensor, " _ #head _ key_pos"] | None,
    ) -> None:
        """Read the last rows of the batch, whose prompts are not empty.

        In the rows before them, all attention is on the first key (`TextState.n_empty_prompts`).
        """
        self.sums.add(self, q, k, bias)

    def read_pattern(
        self, pattern: Float[Tensor, "batch head pos key_pos"], hook: HookPoint
    ) -> None:
        groups = self.sums.groups
        found = sums_of_pattern(pattern, groups.queries, groups.keys, groups.reduce)
        self.sums.sums[self.number] = found
