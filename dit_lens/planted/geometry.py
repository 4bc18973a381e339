"""Named directions, by which the planted model writes numbers into a vector and reads them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Terms = Mapping[str, float | int]
"""A linear combination of named features."""


def orthonormal(
    rows: int, columns: int, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Random orthonormal columns, float64."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


class Space:
    """Orthonormal frame with named directions; features are written and read along theirs."""

    def __init__(self, frame: Float[Tensor, "d direction"], names: Sequence[str]) -> None:
        if len(names) > frame.shape[1]:
            raise ValueError(
                f"{len(names)} directions do not fit into {frame.shape[1]} dimensions."
            )
        self.d = frame.shape[0]
        self.index = {name: i for i, name in enumerate(names)}
        self.frame = frame
        self.spare = frame[:, len(names) :]
        """Directions that nothing of the circuit reads or writes."""

    def direction(self, name: str) -> Float[Tensor, " d"]:
        """The unit vector of a name."""
        return self.frame[:, self.index[name]]

    def write(self, terms: Terms) -> Float[Tensor, " d"]:
        """Σ coefficient · direction."""
        return sum(
            (k * self.direction(name) for name, k in terms.items()),
            torch.zeros(self.d, dtype=torch.float64),
        )

    def read(self, terms: Terms) -> Float[Tensor, " d"]:
        """The functional whose value is Σ coefficient · feature."""
        return self.write(terms)


class ResidualSpace(Space):
    """The residual stream, as directions that its position code leaves free.

    A frame in the orthogonal complement of the position code and of the all-ones vector. Also
    readable are "one" (the constant direction, divided by its length) and "x", "y" (token
    coordinates, read off the position code by its pseudo-inverse; origin at the image's centre, y
    down).
    """

    def __init__(
        self,
        code: Float[Tensor, "pos d"],
        names: Sequence[str],
        constant: float,
        generator: torch.Generator,
    ) -> None:
        code = code.double() - code.double().mean(dim=1, keepdim=True)  # after LayerNorm's centring
        d = code.shape[1]
        occupied = torch.linalg.svd(
            torch.cat([code, torch.ones(1, d, dtype=torch.float64)]), full_matrices=False
        )
        taken = occupied.Vh[occupied.S.gt(1e-6 * occupied.S[0])]
        random = torch.randn(d, d - len(taken), generator=generator, dtype=torch.float64)
        super().__init__(torch.linalg.qr(random - taken.T @ (taken @ random))[0], ["one", *names])
        side = int(len(code) ** 0.5)
        axis = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        functionals = torch.linalg.pinv(code, rtol=3e-3) @ torch.stack(
            [x.flatten(), y.flatten()], dim=1
        )
        self.positions = {"x": functionals[:, 0], "y": functionals[:, 1]}
        self.constant = constant
        self.gain = (d / (constant**2 + float(code.pow(2).sum(1).mean()))) ** 0.5
        """Factor of LayerNorm, nearly constant, because the constant direction dominates."""

    def read(self, terms: Terms) -> Float[Tensor, " d"]:
        """As in `Space`, with "one", "x" and "y" among the features."""
        total = torch.zeros(self.d, dtype=torch.float64)
        for name, k in terms.items():
            if name == "one":
                total += k / self.constant * self.direction(name)
            else:
                total += (
                    k * self.positions[name] if name in self.positions else k * self.direction(name)
                )
        return total
