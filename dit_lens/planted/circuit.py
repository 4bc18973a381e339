"""The circuit, layer by layer. `docs/planted_circuit.md` has the algebra."""

from __future__ import annotations

from itertools import product
from typing import Literal

from ..task import COLORS, SHAPES
from .assembly import Assembly, When, Wire
from .geometry import Terms

OBJECTS = ("1", "2")
AXES = ("x", "y")
WORD_AXIS = {"x": "horizontal", "y": "vertical"}
QUADRANTS = tuple(product((0, 1), (0, 1)))
"""(right, lower): which quarter of its object a token shows."""

PATCHES = tuple(
    f"{shape}_{color}_{right}{lower}"
    for shape, color, (right, lower) in product(SHAPES, COLORS, QUADRANTS)
)

N_LAYERS = 6
RESIDUAL_FEATURES = (
    *("clock_late", "clock_final", "time_late", "time_final"),
    *("mark", "noise", "peak_x", "peak_y", "shift_x", "shift_y", "low_peak", "late"),
    *(f"side{k}_{axis}" for k in OBJECTS for axis in AXES),
    *("present", "miss1", "miss2", "tag1", "tag2"),
    *(
        f"{what}{k}"
        for k in OBJECTS
        for what in ("at_x", "at_y", "seen", "found", "outside", "paint")
    ),
    *(f"not_{axis}{k}_{i}" for k in OBJECTS for axis in AXES for i in (0, 1)),
    *SHAPES,
    *COLORS,
    *PATCHES,
)
CAPTION_FEATURES = (
    *("vertical", "is_vertical", "horizontal", "is_horizontal", "eos"),
    *("shape1", "shape2", "color1", "color2"),
    *SHAPES,
    *COLORS,
)

# Features read from the latents, and features drawn (`surroundings.patches_in_and_out`)
SEEN_WHEN: tuple[tuple[str, When], ...] = (("mark", "late"), ("noise", "early"))
SEEN = tuple(Wire("embed", 0, "", "out", name, when) for name, when in SEEN_WHEN)
DRAWN = tuple(
    [Wire("output", N_LAYERS - 1, "", "in", name, "late") for name in PATCHES]
    + [Wire("output", N_LAYERS - 1, "", "in", f"paint{k}", "always") for k in OBJECTS]
)

# Attention scores
SINK = 40.0
RAMP = 16.0
"""Logits per token along the relation's direction, in horizontal heads."""
STEEPNESS = {"x": 1.0, "y": 4.0}
"""Slope of a relation head's scores, by axis.

They differ so that methods which pool the axes find the steeper one alone.
"""
VETO = 160.0
"""Score lead of EOS at steps at which a head is idle."""
OBJECT = 60.0
TAGGED = 60.0
PEAK = 3000.0
"""Logits per standard deviation of the noise: two tokens that come within a few thousandths of a
tie still spoil a layout.
"""

FORBID = 7.0
"""Negative weight large enough to veto any positive evidence from coordinates."""


def on_lattice(axis: str, sign: int = 1) -> dict[str, float]:
    """The coordinate on which anchors lie at −2, 0 and 2.

    A whole number at every token, shifted with the noise. An object's anchor is its upper left
    token; shift features hold 0, 1 or 2.
    """
    return {axis: float(sign), "one": 1.5 * sign, f"shift_{axis}": -float(sign)}


def plus(*terms: Terms) -> dict[str, float]:
    """Sum of linear combinations.

    Example:
        >>> plus({"one": 1.0, "x": 2.0}, {"one": 0.5})
        {'one': 1.5, 'x': 2.0}
    """
    total: dict[str, float] = {}
    for part in terms:
        for name, k in part.items():
            total[name] = total.get(name, 0.0) + k
    return total


def plant(build: Assembly) -> None:
    """All heads and units of the circuit, the relation heads among them."""
    read_latents(build)
    relation_heads(build)
    default_layout(build)
    anchors(build)
    locators(build)
    objects(build)


def read_latents(build: Assembly) -> None:
    """Layer 0: the noise's peak shifts the layout. MLP 1: marks in the latents become tags."""
    build.head(
        "attn",
        0,
        "peak",
        [({"one": 1}, {"noise": PEAK})],
        [({axis: 1}, {f"peak_{axis}": 1}) for axis in AXES],
        "early",
    )
    build.step(0, {"clock_late": 1, "one": -0.5}, {"late": 1})
    for axis in AXES:
        for edge in (-1, 1):
            build.step(0, {f"peak_{axis}": 1, "one": -edge}, {f"shift_{axis}": 1}, "early")
    build.step(0, {"peak_y": 1}, {"low_peak": 1}, "early")
    for k, sign in zip(OBJECTS, (1, -1), strict=True):
        build.step(1, {"mark": sign, "one": -0.5 - 5, "late": 5}, {f"tag{k}": 1}, "late")


def relation_heads(build: Assembly) -> None:
    """Layer 1: positions on the side that a word names attend to the word; others to EOS."""
    for axis in AXES:
        word, steep = WORD_AXIS[axis], STEEPNESS[axis]
        sink: tuple[Terms, Terms] = ({"one": SINK * steep, "late": VETO}, {"eos": 1})
        for k, sign in zip(OBJECTS, (1, -1), strict=True):
            ramp: tuple[Terms, Terms] = (
                {name: steep * RAMP * c for name, c in on_lattice(axis, sign).items()},
                {word: 1},
            )
            offset: tuple[Terms, Terms] = ({"one": steep * (SINK + 1.5 * RAMP)}, {f"is_{word}": 1})
            build.head(
                "cross_attn",
                1,
                f"side{k}_{axis}",
                [ramp, offset, sink],
                [({f"is_{word}": 1}, {f"side{k}_{axis}": 1})],
                "early",
            )
    shapes = {"shape1": 1.0, "shape2": 1.0}
    gate: tuple[Terms, Terms] = ({"one": SINK / 2, "late": VETO}, {"eos": 1})
    build.head(
        "cross_attn",
        1,
        "presence",
        [({"one": SINK}, shapes), gate],
        [(shapes, {"present": 1})],
        "early",
    )


def default_layout(build: Assembly) -> None:
    """MLP 1: without a word on either axis, the noise decides the object on the left."""
    silent = {
        **{f"side{k}_{axis}": -FORBID for k in OBJECTS for axis in AXES},
        "late": -FORBID,
        "one": 1.5,
    }
    for k, sign in zip(OBJECTS, (1, -1), strict=True):
        build.step(
            1,
            plus(silent, on_lattice("x", -sign), {"low_peak": -FORBID}),
            {f"side{k}_x": 1},
            "early",
        )
        build.step(
            1,
            plus(silent, on_lattice("x", sign), {"low_peak": FORBID, "one": -FORBID}),
            {f"side{k}_x": 1},
            "early",
        )


def anchors(build: Assembly) -> None:
    """Anchors' tokens: on one axis in MLP 2, on both (AND) in MLP 3.

    In a prompt with objects, at early steps.
    """
    for k, other in (OBJECTS, OBJECTS[::-1]):
        for axis, sign in product(AXES, (1, -1)):
            beyond = {"one": -0.5, f"side{k}_{axis}": -2.0, f"side{other}_{axis}": 4.0}
            build.step(2, plus(on_lattice(axis, sign), beyond), {f"miss{k}": 1}, "early")
        build.step(
            3, {"one": -0.5, "present": 1, "late": -1, f"miss{k}": -1}, {f"tag{k}": 1}, "early"
        )


def locators(build: Assembly) -> None:
    """Layer 4: tokens get the tag's position; MLP 4 compares it with theirs, by halves."""
    for k in OBJECTS:
        values: list[tuple[Terms, Terms]] = [({axis: 1}, {f"at_{axis}{k}": 1}) for axis in AXES]
        seen: tuple[Terms, Terms] = ({f"tag{k}": 1}, {f"seen{k}": 1})
        build.head(
            "attn", 4, f"locate{k}", [({"one": 1}, {f"tag{k}": TAGGED})], [*values, seen], "late"
        )
        build.step(4, {f"seen{k}": 1, "one": -0.5}, {f"found{k}": 1}, "late")
        for axis, half in product(AXES, (0, 1)):
            behind = {axis: 1.0, f"at_{axis}{k}": -1.0}
            before = {axis: -1.0, f"at_{axis}{k}": 1.0}
            wrong = {f"not_{axis}{k}_{half}": 1.0}
            outside = {f"outside{k}": 1.0}
            build.step(
                4, plus(before, {"one": half - 0.5}), wrong | (outside if half == 0 else {}), "late"
            )
            build.step(
                4,
                plus(behind, {"one": -half - 0.5}),
                wrong | (outside if half == 1 else {}),
                "late",
            )


def objects(build: Assembly) -> None:
    """Layer 5: tokens of object k read its shape and color; MLP 5 draws the patch."""
    sink: tuple[Terms, Terms] = ({"one": 10 + VETO, "late": -VETO}, {"eos": 1})
    part: Literal["shape", "color"]
    for part, words in (("shape", SHAPES), ("color", COLORS)):
        inside: list[tuple[Terms, Terms]] = [
            (
                {f"found{k}": 2 * OBJECT, "one": -1.5 * OBJECT, f"outside{k}": -2 * OBJECT},
                {f"{part}{k}": 1},
            )
            for k in OBJECTS
        ]
        build.head(
            "cross_attn",
            5,
            part,
            [*inside, sink],
            [({word: 1}, {word: 1}) for word in words],
            "late",
        )
    for k in OBJECTS:
        for shape, color, (right, lower) in product(SHAPES, COLORS, QUADRANTS):
            quarter = {f"not_x{k}_{right}": -1.0, f"not_y{k}_{lower}": -1.0}
            whole = {shape: 1.0, color: 1.0, f"found{k}": 1.0, "one": -2.5}
            build.step(5, whole | quarter, {f"{shape}_{color}_{right}{lower}": 1}, "late")
        build.step(5, {f"tag{k}": 1, "one": -0.5, "clock_final": -1}, {f"paint{k}": 1})
