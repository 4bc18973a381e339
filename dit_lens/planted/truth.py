"""Ground truth of a planted model: the circuit that an analysis should find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..text.prompts import Role
from .assembly import Sublayer, When, Wire

Kind = Literal["two-stage", "fused", "rotated", "no-relation"]
HeadRole = Literal["relation", "object", "presence", "noise", "locator", "decoy", "idle"]


@dataclass(frozen=True)
class PlantedHead:
    """One head and its purpose.

    Example:
        >>> str(PlantedHead("cross_attn", 1, 3, "relation", "vertical word"))
        'cross_attn.L1H3'
    """

    sublayer: Sublayer
    layer: int
    head: int
    role: HeadRole
    what: str
    reads: tuple[Role, ...] = ()
    """Roles of the attended text tokens; empty for self-attention and idle heads."""
    writes: tuple[str, ...] = ()
    """Features of the residual stream (`docs/planted_circuit.md`); none for distractors."""
    steps: tuple[int, ...] = ()
    """Steps (of 14) at which its output changes the image; empty if it never does."""

    def __str__(self) -> str:
        """As a node of `dit_lens.patching`: "cross_attn.L1H3"."""
        return f"{self.sublayer}.L{self.layer}H{self.head}"


@dataclass(frozen=True)
class PlantedEdge:
    """Connection from a component to a later one.

    Both are nodes of `dit_lens.patching`, with a head's port.

    Example:
        >>> edge = PlantedEdge("text[relation]", "cross_attn.L1H3.v", ("above",), (0, 1))
        >>> edge.sender, edge.receiver
        ('text[relation]', 'cross_attn.L1H3.v')
    """

    sender: str
    receiver: str
    features: tuple[str, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class PlantedTruth:
    """Circuit of a planted model. Every head of the model is listed once.

    Example:
        >>> from dit_lens.planted import planted_circuit
        >>> _, truth = planted_circuit("two-stage", seed=0)
        >>> len(truth.heads), len(truth.relation_heads)
        (96, 4)
    """

    kind: Kind
    seed: int
    relation_heads: tuple[PlantedHead, ...]
    """All are needed for the relation; `PlantedHead.what` has each one's axis and side.

    Empty for "no-relation".
    """
    object_heads: tuple[PlantedHead, ...]
    helper_heads: tuple[PlantedHead, ...]
    """The rest of the circuit: the heads for the noise's peak, presence and locations."""
    decoy_heads: tuple[PlantedHead, ...]
    """Heads with the right QK or OV circuit alone, or whose output no later component reads."""
    idle_heads: tuple[PlantedHead, ...]
    """Random heads with the norms of others.

    In "no-relation" the ones in place of the relation heads come first.
    """
    edges: tuple[PlantedEdge, ...] = field(repr=False)
    phrases: tuple[str, ...] = field(repr=False)
    """Relation phrases that the model draws correctly."""

    @property
    def heads(self) -> tuple[PlantedHead, ...]:
        """All heads, circuit first."""
        return (
            self.relation_heads
            + self.object_heads
            + self.helper_heads
            + self.decoy_heads
            + self.idle_heads
        )


def edges_of(
    wires: Sequence[Wire],
    places: Mapping[tuple[Sublayer, int, str], int],
    roles: Mapping[str, tuple[Role, ...]],
    steps: Mapping[When, tuple[int, ...]],
) -> tuple[PlantedEdge, ...]:
    """Pairs of a writer and a later reader of the same feature.

    Args:
        wires: of all components.
        places: (sublayer, layer, name) → head number.
        roles: caption feature → roles of the tokens that have it.
        steps: steps of each phase.
    """
    writers = [wire for wire in wires if wire.port == "out"]
    found: dict[tuple[str, str, tuple[int, ...]], dict[str, None]] = {}
    for reader in (wire for wire in wires if wire.port != "out"):
        for sender, sent in _senders(reader, writers, places, roles):
            if when := tuple(step for step in steps[sent] if step in steps[reader.when]):
                edge = sender, _node(reader, places), when
                found.setdefault(edge, {})[reader.feature] = None
    return tuple(
        PlantedEdge(sender, receiver, tuple(names), when)
        for (sender, receiver, when), names in found.items()
    )


def _senders(
    reader: Wire,
    writers: Sequence[Wire],
    places: Mapping[tuple[Sublayer, int, str], int],
    roles: Mapping[str, tuple[Role, ...]],
) -> list[tuple[str, When]]:
    """Everything that a reader reads, and when it is sent."""
    if reader.kind == "cross_attn" and reader.port in "kv":
        return [(f"text[{role}]", reader.when) for role in roles.get(reader.feature, ())]
    return [
        (_node(writer, places), writer.when)
        for writer in writers
        if writer.feature == reader.feature and _depth(writer) < _depth(reader)
    ]


def _depth(wire: Wire) -> int:
    return (
        3 * wire.layer + {"embed": -1, "attn": 0, "cross_attn": 1, "mlp": 2, "output": 3}[wire.kind]
    )


def _node(wire: Wire, places: Mapping[tuple[Sublayer, int, str], int]) -> str:
    """Name of a wire's component, as in `dit_lens.patching`."""
    if wire.kind in ("embed", "output"):
        return wire.kind
    if not wire.head:
        return f"mlp.L{wire.layer}"
    port = "" if wire.port == "out" else f".{wire.port}"
    head = places[wire.kind, wire.layer, wire.head]  # type: ignore[index]
    return f"{wire.kind}.L{wire.layer}H{head}{port}"
