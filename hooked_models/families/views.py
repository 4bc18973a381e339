"""The view of one denoiser call of any family, for TransformerLens' tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from ..generation.loops import rows_of
from ..hooks.texts import text_parts
from ..pixart.views import (
    Positions,
    Tokens,
    View,
    number_of_positions,
    text_places,
    with_gradient,
)

TIMES = ("timestep", "timesteps", "t")
"""Names of the argument that holds the timestep."""
PositionsOrBoth = Literal["image", "text", "joint"]


class FamilyView(View):
    """One denoiser call for each row of a table of inputs; made by `FamilyModel.bind`."""

    def __init__(self, dit: Any, given: Mapping[str, Any], pos: PositionsOrBoth) -> None:
        self.given = dit.family.by_row(dit.wrapped, given)
        """Arguments of the transformer's forward, by name; rows are every first axis."""
        self.n_rows = len(given[dit.family.image])
        layout = dit.layout_of(**given)
        self.text_mask: Bool[Tensor, "row text_pos"] = layout.text_mask
        """True where a text position holds a token."""
        positions = number_of_positions(dit, layout, pos)
        self.asked: PositionsOrBoth = pos
        kind: Positions = "text" if pos == "text" else "image"
        super().__init__(dit, self.n_rows, positions, kind, text_places(dit, layout, pos))

    @property
    def conditions(self) -> dict[str, Any]:
        """Inputs of gates that no text enters: timestep and guidance."""
        return {name: x for name, x in self.given.items() if name in (*TIMES, "guidance")}

    @property
    def opened(self) -> tuple[str, ...]:
        """Arguments that hold latents and text."""
        return (self.dit.family.image, *text_parts(self.given, self.dit.family.text))

    def between(self, other: FamilyView, alpha: float) -> FamilyView:
        """The call whose text and latents lie at self + α · (other − self)."""

        def mixed(a: Any, b: Any) -> Any:
            if isinstance(a, Tensor):
                return torch.lerp(a, b, alpha)
            return [torch.lerp(x, y, alpha) for x, y in zip(a, b, strict=True)]

        new = {name: mixed(self.given[name], other.given[name]) for name in self.opened}
        return FamilyView(self.dit, self._as_called({**self.given, **new}), self.asked)

    def _as_called(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        return self.dit.family.as_called(self.dit.wrapped, rows)

    def forward(self, tokens: Tokens) -> Tensor:
        """The prediction, as the transformer gives it; rows of a list are stacked."""
        rows = self.rows(tokens)
        some = {name: rows_of(value, rows, self.n_rows) for name, value in self.given.items()}
        if torch.is_grad_enabled():  # a graph of its own, so that every call can be differentiated
            for name in self.opened:
                some[name] = _opened(some[name])
        found = self.dit(**self._as_called(some))[0]  # some give no tuple for return_dict=False
        return torch.stack(list(found)) if isinstance(found, (list, tuple)) else found


def _opened(value: Any) -> Any:
    return with_gradient(value) if isinstance(value, Tensor) else [with_gradient(x) for x in value]
