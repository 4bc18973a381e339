"""Order of positions in a model's tensors, and the way from there to [image, text] and back.

A model's sequence may begin with the text or with the image, hold registers or padding, and differ
from row to row. A `Layout` labels each position of each stream; sorting by label gives the order in
which hooks see them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .streams import permute

IMAGE, TEXT, OTHER = 0, 1, 2
"""Labels of positions, in the order in which hooks see them.

OTHER: registers, padding, reference images.
"""


class LayoutError(ValueError):
    """A tensor does not have the positions that its family declares."""


@dataclass
class Layout:
    """Positions of one denoiser call.

    Example:
        >>> layout = ordered((2, 3, 1), torch.ones(1, 2, dtype=torch.bool), first="text")
        >>> layout.n_image, layout.n_text
        (6, [2])
        >>> layout.image_first(torch.arange(8)[None], ("joint",)).tolist()
        [[2, 3, 4, 5, 6, 7, 0, 1]]
    """

    grid: tuple[int, int, int]
    """Rows, columns and frames of image tokens, from the top left of the first frame."""
    text_mask: Bool[Tensor, "batch text_pos"]
    """True where a text position holds a token.

    Text position j is the j-th token of the text that the caller passed.
    """
    labels: Mapping[str, Int[Tensor, "#batch pos"]]
    """Stream ("image", "text" or "joint") → label of each position, in the model's order."""
    _orders: dict[tuple[str, ...], tuple[Tensor | None, Tensor | None]] = field(
        default_factory=dict, repr=False
    )

    @property
    def n_image(self) -> int:
        """Number of image positions, the same in each row."""
        rows, columns, frames = self.grid
        return rows * columns * frames

    @property
    def n_text(self) -> list[int]:
        """Number of text tokens in each row, padding left out."""
        return self.text_mask.sum(1).tolist()

    def length(self, *streams: str) -> int:
        """Number of positions of these streams together."""
        return sum(self.labels[stream].shape[1] for stream in streams)

    def take(self, rows: Int[Tensor, " row"]) -> Layout:
        """Layout of some rows of the call; rows may repeat."""
        labels = {
            name: one if len(one) == 1 else one[rows.to(one.device)]
            for name, one in self.labels.items()
        }
        return Layout(self.grid, self.text_mask[rows.to(self.text_mask.device)], labels)

    def order(self, streams: tuple[str, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Indices `[#batch pos]` from the model's order to [image, text, other], and back.

        None where nothing moves.
        """
        if streams not in self._orders:
            labels = [self.labels[stream] for stream in streams]
            batch = max(len(one) for one in labels)
            joined = torch.cat([one.expand(batch, -1) for one in labels], dim=1)
            there = joined.argsort(dim=1, stable=True)
            moved = bool((there != torch.arange(joined.shape[1], device=there.device)).any())
            self._orders[streams] = (there, there.argsort(dim=1)) if moved else (None, None)
        return self._orders[streams]

    def image_first(self, tensor: Tensor, streams: tuple[str, ...], dim: int = 1) -> Tensor:
        """These streams joined in the model's order, with positions as hooks see them."""
        return permute(tensor, self.order(streams)[0], dim)

    def as_model(self, tensor: Tensor, streams: tuple[str, ...], dim: int = 1) -> Tensor:
        """Inverse of `image_first`."""
        return permute(tensor, self.order(streams)[1], dim)

    def check(self, name: str, found: int, streams: tuple[str, ...]) -> None:
        """Raise LayoutError unless a tensor has as many positions as declared."""
        if found != (declared := self.length(*streams)):
            raise LayoutError(
                f"{name} has {found} positions where its family declares {declared} "
                f"({' + '.join(streams)})."
            )


def ordered(
    grid: tuple[int, int, int],
    text_mask: Bool[Tensor, "batch text_pos"],
    first: str,
    registers: int = 0,
    references: int = 0,
) -> Layout:
    """Layout of streams that are concatenated, the same way in each row.

    Args:
        grid: rows, columns and frames of image positions.
        text_mask: True at tokens that are attended to.
        first: "text" or "image", whichever begins the joint sequence.
        registers: positions before the text's own, in its stream.
        references: positions after the image's own, in its stream.
    """
    rows, columns, frames = grid
    sizes = {
        "image": [(IMAGE, rows * columns * frames), (OTHER, references)],
        "text": [(OTHER, registers), (TEXT, text_mask.shape[1])],
    }
    device = text_mask.device
    labels = {stream: _labels(spans, device) for stream, spans in sizes.items()}
    last = "image" if first == "text" else "text"
    return Layout(
        grid, text_mask, labels | {"joint": torch.cat([labels[first], labels[last]], dim=1)}
    )


def ragged(
    grid: tuple[int, int, int],
    text_mask: Bool[Tensor, "batch text_pos"],
    rows: Sequence[Sequence[tuple[int, int]]],
) -> Layout:
    """Layout of one joint sequence that differs from row to row.

    Args:
        grid: rows, columns and frames of image positions.
        text_mask: True at tokens that are attended to.
        rows: for each row, spans (label, length) in the model's order; shorter rows are padded at
            the end.
    """
    longest = max(sum(n for _, n in spans) for spans in rows)
    padded = [[*spans, (OTHER, longest - sum(n for _, n in spans))] for spans in rows]
    return Layout(
        grid,
        text_mask,
        {"joint": torch.cat([_labels(spans, text_mask.device) for spans in padded])},
    )


def _labels(spans: Sequence[tuple[int, int]], device: torch.device) -> Int[Tensor, "1 pos"]:
    return torch.tensor(
        [[label for label, n in spans for _ in range(n)]], dtype=torch.long, device=device
    )
