"""The view of one denoiser call of any family, for TransformerLens' tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..generation.loops import rows_of
from ..hooks.texts import text_parts
from ..pixart.views import HookList, Tokens, View, with_gradient


class FamilyView(View):
    """One denoiser call for each row of a table of inputs; made by `FamilyModel.bind`."""

    def __init__(self, dit: Any, given: Mapping[str, Any], pos: str, positions: int) -> None:
        self.given = dict(given)
        """Arguments of the transformer's forward, by name."""
        self.n_rows = len(given[dit.family.image])
        super().__init__(dit, self.n_rows, positions, "text" if pos == "text" else "image")

    def forward(self, tokens: Tokens) -> Tensor:
        """The prediction, as the transformer gives it; rows of a list are stacked."""
        rows, family = self.rows(tokens), self.dit.family
        some = {name: rows_of(value, rows, self.n_rows) for name, value in self.given.items()}
        if torch.is_grad_enabled():  # a graph of its own, so that every call can be differentiated
            for name in (family.image, *text_parts(some, family.text)):
                some[name] = _opened(some[name])
        found = self.dit(**some, return_dict=False)[0]
        return torch.stack(list(found)) if isinstance(found, (list, tuple)) else found

    @contextmanager
    def hooks(
        self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), **kwargs: Any
    ) -> Iterator[View]:
        """`FamilyModel.hooks`."""
        with self.dit.hooks(fwd_hooks, bwd_hooks, **kwargs):
            yield self


def _opened(value: Any) -> Any:
    return with_gradient(value) if isinstance(value, Tensor) else [with_gradient(x) for x in value]
