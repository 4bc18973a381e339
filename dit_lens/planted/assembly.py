"""Heads and hidden units as linear algebra, and their PixArt weights.

They are given by the features that they read and write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .geometry import ResidualSpace, Space, Terms, orthonormal

Sublayer = Literal["attn", "cross_attn"]
When = Literal["early", "late", "always"]
"""The steps at which the layout is made, at which objects are drawn into it, or both."""
SHARPNESS = 14.0
"""A unit's pre-activation per unit of its argument: GELU is 0 or linear, to 1e-3, from ±0.25."""
HALF_STEP = 3.5
COPIES = 6
"""Hidden units a logical unit is spread over: weight noise averages out."""


@dataclass
class Head:
    """Head with score Σ_r (q_r·x)(k_r·text), rows of values and their outputs."""

    q: Float[Tensor, "rank d_in"]
    k: Float[Tensor, "rank d_kv"]
    v: Float[Tensor, "rank_v d_kv"]
    o: Float[Tensor, "rank_v d_model"]

    @property
    def norms(self) -> tuple[float, ...]:
        """Frobenius norms of q, k, v and o."""
        return tuple(float(w.norm()) for w in (self.q, self.k, self.v, self.o))

    def scaled_to(self, norms: Sequence[float]) -> Head:
        """The same head with the norms of its four matrices set."""
        return Head(
            *(
                w * (n / float(w.norm()))
                for w, n in zip((self.q, self.k, self.v, self.o), norms, strict=True)
            )
        )


def balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of a product, scaled so that every row pair has equal norms."""
    ratio = (second.norm(dim=1, keepdim=True) / first.norm(dim=1, keepdim=True)).sqrt()
    return first * ratio, second / ratio


@dataclass
class Layer:
    """Heads and MLP units of one layer."""

    heads: dict[Sublayer, dict[str, Head]] = field(
        default_factory=lambda: {"attn": {}, "cross_attn": {}}
    )
    units: list[tuple[Tensor, float, Tensor]] = field(default_factory=list)
    """Input weights of an MLP unit (after LayerNorm), its bias and its output weights."""


@dataclass(frozen=True)
class Wire:
    """A component reads a feature (at `port` q, k, v or in) or writes it (out)."""

    kind: Literal["attn", "cross_attn", "mlp", "embed", "output"]
    layer: int
    head: str
    """The head's name in the circuit; empty for other parts."""
    port: Literal["q", "k", "v", "in", "out"]
    feature: str
    when: When


class Assembly:
    """Collects heads and units by the names of the features that they read and write."""

    def __init__(self, residual: ResidualSpace, caption: Space, n_layers: int, d_head: int) -> None:
        self.residual, self.caption, self.d_head = residual, caption, d_head
        self.layers = [Layer() for _ in range(n_layers)]
        self.wires: list[Wire] = []

    def head(
        self,
        sublayer: Sublayer,
        layer: int,
        name: str,
        qk: Sequence[tuple[Terms, Terms]],
        ov: Sequence[tuple[Terms, Terms]],
        when: When,
    ) -> None:
        """Add a head whose score is Σ (query terms)(key terms).

        Each (value terms) is written as (output terms).
        """
        ports: tuple[tuple[Literal["q", "k", "v", "out"], list[Terms]], ...] = (
            ("q", [q for q, _ in qk]),
            ("k", [k for _, k in qk]),
            ("v", [v for v, _ in ov]),
            ("out", [o for _, o in ov]),
        )
        self.wires += [
            Wire(sublayer, layer, name, port, f, when)
            for port, parts in ports
            for terms in parts
            for f in terms
        ]
        own = sublayer == "attn"
        keys = self.residual if own else self.caption
        # cross-attention reads the residual raw, and captions
        gain = self.residual.gain if own else 1.0
        q = torch.stack([self.residual.read(terms) for terms, _ in qk]) * self.d_head**0.5 / gain
        k = torch.stack([keys.read(terms) for _, terms in qk]) / gain
        v = torch.stack([keys.read(terms) for terms, _ in ov]) / gain
        o = torch.stack([self.residual.write(terms) for _, terms in ov])
        self.layers[layer].heads[sublayer][name] = Head(*balanced(q, k), *balanced(v, o))

    def step(self, layer: int, reads: Terms, writes: Terms, when: When = "always") -> None:
        """An MLP unit: writes in full where `reads` ≥ 0.45, nothing where it is ≤ −0.45.

        A difference of two GELUs, in COPIES.

        "clock…" features are not in the residual: adaLN's shift adds them to the MLP's input.
        """
        self.wires += [Wire("mlp", layer, "", "in", f, when) for f in reads] + [
            Wire("mlp", layer, "", "out", f, when) for f in writes
        ]
        clocks = {name: k for name, k in reads.items() if name.startswith("clock")}
        rest = {name: k for name, k in reads.items() if name not in clocks}
        row = SHARPNESS * (
            self.residual.read(rest) / self.residual.gain + self.residual.read(clocks)
        )
        column = self.residual.write(writes) / (2 * HALF_STEP * COPIES)
        self.layers[layer].units += [
            (row, sign * HALF_STEP, sign * column) for sign in (1, -1)
        ] * COPIES


def install_heads(
    attention: Any, heads: Sequence[Head], gauges: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Set a diffusers Attention's weights.

    `gauges[h]` are invertible [d_head d_head] that mix head h's QK and OV dimensions.
    """
    d_head = attention.inner_dim // attention.heads
    for h, (head, (mix_qk, mix_ov)) in enumerate(zip(heads, gauges, strict=True)):
        rows = slice(h * d_head, (h + 1) * d_head)
        attention.to_q.weight.data[rows] = (mix_qk @ _tall(head.q, d_head)).float()
        attention.to_k.weight.data[rows] = (
            torch.linalg.inv(mix_qk).T @ _tall(head.k, d_head)
        ).float()
        attention.to_v.weight.data[rows] = (mix_ov @ _tall(head.v, d_head)).float()
        attention.to_out[0].weight.data[:, rows] = (
            _tall(head.o, d_head).T @ torch.linalg.inv(mix_ov)
        ).float()
    for linear in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        linear.bias.data.zero_()


def install_units(
    feed_forward: Any, units: Sequence[tuple[Tensor, float, Tensor]], places: Sequence[int]
) -> None:
    """Set a diffusers FeedForward's weights; unit i becomes hidden unit `places[i]`."""
    read, write = feed_forward.net[0].proj, feed_forward.net[2]
    for (row, bias, column), i in zip(units, places, strict=True):
        read.weight.data[i], read.bias.data[i], write.weight.data[:, i] = (
            row.float(),
            bias,
            column.float(),
        )
    write.bias.data.zero_()


def _tall(rows: Float[Tensor, "rank d"], d_head: int) -> Float[Tensor, "d_head d"]:
    return F.pad(rows, (0, 0, 0, d_head - len(rows)))


def well_conditioned(d: int, generator: torch.Generator) -> Float[Tensor, "d d"]:
    """A random invertible matrix with singular values from 1/2 to 2."""
    stretch = 2 ** (2 * torch.rand(d, generator=generator, dtype=torch.float64) - 1)
    return orthonormal(d, d, generator) * stretch @ orthonormal(d, d, generator)
