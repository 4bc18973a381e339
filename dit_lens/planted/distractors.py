"""Distractors: decoys with half of the circuit's weights, and idle heads of equal norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .assembly import Assembly, Head, Sublayer
from .circuit import AXES, OBJECTS, WORD_AXIS

Placed = tuple[Sublayer, int, str]
"""A head's sublayer, layer and name."""


def random_head(
    build: Assembly, sublayer: Sublayer, norms: Sequence[float], generator: torch.Generator
) -> Head:
    """A head that attends and reads at random, and writes to directions that nobody reads.

    Its four matrices have the norms given. Its values leave out the constant direction, so its
    output is small.
    """
    everything = torch.eye(build.residual.d, dtype=torch.float64)
    source = build.residual.frame[:, 1:] if sublayer == "attn" else build.caption.frame

    bases = (everything, source, source, build.residual.spare)
    rows = [
        torch.randn(2, basis.shape[1], generator=generator, dtype=torch.float64) @ basis.T
        for basis in bases
    ]
    return Head(*rows).scaled_to(norms)


def plant_decoys(build: Assembly, generator: torch.Generator) -> dict[Placed, str]:
    """Add the decoys; returns a description of each."""

    def unread(head: Head) -> Head:
        """The same head, with outputs along directions that nothing reads."""
        random = build.residual.spare @ torch.randn(
            build.residual.spare.shape[1], len(head.o), generator=generator, dtype=torch.float64
        )
        return Head(
            head.q,
            head.k,
            head.v,
            (random / random.norm(dim=0)).T * head.o.norm(dim=1, keepdim=True),
        )

    kinds: dict[Placed, str] = {}

    def add(sublayer: Sublayer, layer: int, name: str, head: Head, what: str) -> None:
        build.layers[layer].heads[sublayer][name] = head
        kinds[sublayer, layer, name] = what

    relation, objects = build.layers[1].heads["cross_attn"], build.layers[5].heads["cross_attn"]
    for layer, k in ((1, "1"), (2, "2")):
        for axis in AXES:
            what = f"right QK (the {WORD_AXIS[axis]} ramp of side{k}_{axis}), junk OV"
            add("cross_attn", layer, f"ramp_{axis}", unread(relation[f"side{k}_{axis}"]), what)
    for axis in AXES:
        flat = relation[f"side1_{axis}"]
        flat = Head(flat.q[1:], flat.k[1:], flat.v, flat.o)  # without its first row, the ramp
        add(
            "cross_attn",
            3,
            f"flat_{axis}",
            flat,
            f"right OV ({WORD_AXIS[axis]} word → side1_{axis}), QK without position",
        )
        signed = build.caption.read({WORD_AXIS[axis]: 1})[None] * flat.v.norm()
        moved = unread(Head(flat.q, flat.k, signed, flat.o))
        add(
            "cross_attn",
            2,
            f"moved_{axis}",
            moved,
            f"copies the {WORD_AXIS[axis]} word everywhere, unread",
        )
    for name in ("shape", "color"):
        add(
            "cross_attn",
            5,
            f"{name}_unread",
            unread(objects[name]),
            f"right QK (an object's tokens → its {name} word), junk OV",
        )
    for k in OBJECTS:
        add(
            "attn",
            5,
            f"spread{k}",
            unread(build.layers[4].heads["attn"][f"locate{k}"]),
            f"tells every token where tag {k} is, unread",
        )
    peak = build.layers[0].heads["attn"]["peak"]
    add("attn", 1, "peak_unread", unread(peak), "tells every token where the noise peaks, unread")
    return kinds


def fill(build: Assembly, n_heads: int, generator: torch.Generator) -> list[Placed]:
    """Add idle heads in all free places, each with the norms of some head of the same sublayer."""
    idle: list[Placed] = []
    for sublayer in ("attn", "cross_attn"):
        models = [head.norms for layer in build.layers for head in layer.heads[sublayer].values()]
        for number, layer in enumerate(build.layers):
            heads = layer.heads[sublayer]
            for i in range(n_heads - len(heads)):
                norms = models[int(torch.randint(len(models), (), generator=generator))]
                heads[f"idle{i}"] = random_head(build, sublayer, norms, generator)
                idle.append((sublayer, number, f"idle{i}"))
    return idle


def leak(
    build: Assembly, heads: Sequence[Placed], amount: float, generator: torch.Generator
) -> None:
    """Add random head outputs, `amount` as strong, along directions that the circuit reads."""
    features = build.residual.frame[:, 1:]
    for sublayer, layer, name in heads:
        head = build.layers[layer].heads[sublayer][name]
        stray = (
            torch.randn(len(head.o), features.shape[1], generator=generator, dtype=torch.float64)
            @ features.T
        )
        head.o = head.o + amount * head.o.norm(dim=1, keepdim=True) * stray / stray.norm(
            dim=1, keepdim=True
        )
