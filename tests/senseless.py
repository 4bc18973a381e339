"""One table of public calls and their arguments, each given every kind of value, senseless ones
above all.

A call gives the right answer (that of the plain value that its argument stands for), or an error
that our own code raises and whose message names the argument. Run as a script, because the suite's
run-time type checker would refuse most values before the library sees them: `python -m
tests.senseless` prints the number of inputs and every violation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import linecache
import math
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_lens
import hooked_models
from dit_lens import (
    Intervention,
    circuits,
    detection,
    patching,
    prompts,
    scenes,
    steering,
    sweep,
    synopsis,
)
from dit_lens.intervene.edits import Add, Replace, Scale
from hooked_models import HookedTextToImage
from hooked_models.generation.model import DEFAULT_GUIDANCE

from .hooked_models.pipelines import PROMPTS, tiny_pipeline

OURS = tuple(str(Path(str(package.__file__)).parent) for package in (dit_lens, hooked_models))
REFUSED = object()
"""The value stands for nothing: the call must raise."""
LONGEST_MESSAGE = 1200

JUNK: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        -1,
        -2,
        3,
        99,
        2**63,
        2**64,
        -(2**70),
        1.0,
        1.5,
        -0.5,
        1e30,
        math.nan,
        math.inf,
        -math.inf,
    ),
    *(
        1j,
        "",
        "x",
        "0",
        "cond",
        "image",
        b"x",
        [],
        {},
        (),
        set(),
        object(),
        [None],
        [[1]],
        ["x", "y"],
        [1.5],
        [0, 0],
        {"a": 1},
    ),
    *(
        range(0),
        range(2),
        slice(None),
        slice(1),
        slice(5, 9),
        slice("a", None),
        Ellipsis,
        NotImplemented,
    ),
    *(
        np.int64(1),
        np.int8(-1),
        np.float32(1),
        np.float64("nan"),
        np.bool_(True),
        np.array([]),
        np.arange(2),
        np.array("a"),
    ),
    *(
        np.array([1.5]),
        np.zeros((2, 3)),
        np.array([None]),
        np.datetime64("2026-01-01"),
        np.array(1),
    ),
    *(
        torch.tensor(1),
        torch.tensor(1.5),
        torch.zeros(0),
        torch.tensor([0, 1]),
        torch.tensor(math.nan),
        torch.zeros(2, 2, 2),
    ),
    *(
        torch.tensor(True),
        torch.zeros(1, 4, 4, 4, dtype=torch.complex64),
        torch.device("cpu"),
        torch.float32,
        Intervention("hook_x0"),
    ),
]
VALUES = st.one_of(
    st.sampled_from(JUNK),
    st.integers(-3, 6),
    st.floats(allow_nan=True, width=32),
    st.lists(st.integers(-2, 4), max_size=3),
    st.text(max_size=4),
)


@dataclass(frozen=True)
class Row:
    """One argument of one call.

    Args:
        call: of the value.
        means: value → the plain value that it stands for, or REFUSED.
        named: pattern that a refusal's message must contain.
        values: beside `VALUES`.
        examples: how many values are tried.
    """

    call: Callable[[Any], Any]
    means: Callable[[Any], Any]
    named: str
    values: tuple[Any, ...] = ()
    examples: int = 24


# What values stand for


def as_integer(value: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    if (
        isinstance(value, torch.Tensor)
        and value.ndim == 0
        and not value.is_floating_point()
        and value.dtype != torch.bool
    ):
        value = value.item()
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iu":
        value = value.item()
    if (
        isinstance(value, (bool, np.bool_))
        or not isinstance(value, (int, np.integer))
        or not low <= value <= high
    ):
        return REFUSED
    return int(value)


def integer(
    low: float = -math.inf, high: float = math.inf, none: bool = False
) -> Callable[[Any], Any]:
    return lambda value: None if none and value is None else as_integer(value, low, high)


def number(low: float = -math.inf) -> Callable[[Any], Any]:
    def means(value: Any) -> Any:
        if (
            isinstance(value, torch.Tensor)
            and value.ndim == 0
            and value.dtype not in (torch.bool, torch.complex64)
        ):
            value = value.item()
        if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iuf":
            value = value.item()
        if isinstance(value, (bool, np.bool_)) or not isinstance(
            value, (int, float, np.integer, np.floating)
        ):
            return REFUSED
        return float(value) if math.isfinite(value) and value >= low else REFUSED

    return means


def or_default(means: Callable[[Any], Any], default: Any) -> Callable[[Any], Any]:
    """None stands for the model's own value."""
    return lambda value: default if value is None else means(value)


def sequence_of(
    one: Callable[[Any], Any], n: int | None = None, alone: bool = True, empty: bool = False
) -> Callable[[Any], Any]:
    """One value for all, or `n` of them (None: any number)."""

    def means(value: Any) -> Any:
        if alone and (single := one(value)) is not REFUSED:
            return single
        if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 1:
            value = list(value)
        if not isinstance(value, (list, tuple, range)):
            return REFUSED
        found = [one(each) for each in value]
        right = n is None or len(found) == n
        return (
            REFUSED
            if any(each is REFUSED for each in found) or not right or (not found and not empty)
            else found
        )

    return means


def one_of(*options: Any) -> Callable[[Any], Any]:
    return lambda value: next(
        (o for o in options if type(o) is type(value) and o == value), REFUSED
    )


def steps_of(n: int) -> Callable[[Any], Any]:
    several = sequence_of(integer(-n, n - 1))

    def means(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, slice):
            try:
                return list(range(n)[value]) or REFUSED
            except TypeError:
                return REFUSED
        found = several(value)
        if found is REFUSED:
            return REFUSED
        return sorted({step % n for step in (found if isinstance(found, list) else [found])})

    return means


def never(value: Any) -> Any:
    return REFUSED


# The calls

torch.manual_seed(0)
MODEL = HookedTextToImage.from_pipeline(tiny_pipeline())
ONE = PROMPTS[:1]
RUN = MODEL.trajectory(list(PROMPTS), num_steps=3)
CACHE = MODEL.run_with_cache(
    list(PROMPTS), num_steps=2, names_filter=lambda name: "hook_z" in name or "hook_latent" in name
)[1]
SCENES = [scenes.Scene("circle", "red", 64, 30, "square", "blue", 64, 90, "above", "above")]
LATENT = torch.randn(2, 4, 4, 4)


def draw(**arguments: Any) -> Any:
    return MODEL(**{"prompts": list(PROMPTS), "num_steps": 1, **arguments})


def cached(**arguments: Any) -> Any:
    images, cache = MODEL.run_with_cache(
        **{"prompts": ONE, "num_steps": 2, "names_filter": "blocks.0.attn.hook_z", **arguments}
    )
    return [images, *(cache[name] for name in sorted(cache.keys()))]


def look(step: Any = 0, **arguments: Any) -> Any:
    view, tokens = MODEL.at(
        **{"step": step, "prompts": ONE, "num_steps": 2, "guidance": 2.0, **arguments}
    )
    return [view(tokens), tokens]


def hooked(hook: Any) -> Any:
    return MODEL.run_with_hooks(
        ONE, num_steps=1, fwd_hooks=[("steps.0.cond.blocks.0.attn.hook_z", hook)]
    )


def intervene(site: Any = "blocks.0.cross_attn.hook_z", **arguments: Any) -> Any:
    return [
        edit.where
        for edit in Intervention(site, **arguments).resolve(MODEL, list(PROMPTS), num_steps=3)
    ]


def swept(**arguments: Any) -> Any:
    given: dict[str, Any] = {
        "prompts": list(PROMPTS),
        "seeds": [0],
        "interventions": [Intervention("hook_t_emb")],
        "num_steps": 1,
    }
    given |= {"metrics": {"mean": mean}} | arguments
    return sweep.run(MODEL, **given)["mean"].values


def mean(images: Any) -> Any:
    return images.mean(dim=(1, 2, 3))


def shown(**arguments: Any) -> Any:
    return synopsis.attention_synopsis(
        MODEL, **{"prompts": list(PROMPTS), "num_steps": 1, **arguments}
    ).values


def boxes(score: Any) -> Any:
    row = {
        "label": "cat",
        "score": score,
        "xmin": 1.0,
        "ymin": 1.0,
        "xmax": 2.0,
        "ymax": 3.0,
        "image": "a",
    }
    table = pd.DataFrame([row, {**row, "label": "dog", "score": 0.7}])
    return detection.pair_positions(table, {"a": ("cat", "dog")}).to_numpy(float)


def scene(**fields: Any) -> Any:
    return dataclasses.replace(SCENES[0], **fields)


def seeds_of_two(value: Any) -> Any:
    return sequence_of(integer(-(2**63), 2**64 - 1), 2)(value)


def latents_of(value: Any) -> Any:
    right = (
        isinstance(value, torch.Tensor)
        and value.ndim == 4
        and len(value) == 2
        and value.shape[1] == 4
    )
    real = right and value.is_floating_point() and bool(value.isfinite().all())
    return (
        value if real and all(size > 0 and size % 2 == 0 for size in value.shape[2:]) else REFUSED
    )


def prompts_of(value: Any) -> Any:
    if isinstance(value, str):
        value = [value]
    known = set(MODEL.text_encoder.config.words)
    if (
        not isinstance(value, (list, tuple))
        or not value
        or not all(isinstance(one, str) for one in value)
    ):
        return REFUSED
    return (
        list(value)
        if all(word in known for one in value for word in one.lower().split())
        else REFUSED
    )


def hooks_of(value: Any) -> Any:
    """Only no hooks at all are right, in any collection."""
    return (
        ()
        if isinstance(value, (list, tuple, set, range)) and not value
        else []
        if is_empty_array(value)
        else REFUSED
    )


def is_empty_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim > 0 and len(value) == 0


def rows_of(value: Any) -> Any:
    found = sequence_of(integer(0, 1))(value)
    return [found] if isinstance(found, int) else found


def heads_of(value: Any) -> Any:
    if value is None:
        return None
    return (
        [1]
        if isinstance(value, str) and value == "L0H1"
        else sequence_of(integer(0, 1), alone=False)(value)
    )


def cached_heads_of(value: Any) -> Any:
    if value is None or (isinstance(value, (str, tuple)) and value in ("L0H1", (0, 1))):
        return value
    found = value if isinstance(value, tuple) else sequence_of(integer(0, 1))(value)
    return REFUSED if isinstance(found, tuple) else found


def layer_of(value: Any) -> Any:
    return integer(-2, 1)(value)


def sublayer_of(value: Any) -> Any:
    return "attn" if value is None else one_of("attn", "cross_attn")(value)


def device_of(value: Any) -> Any:
    return "cpu" if isinstance(value, torch.device) else one_of(None, "cpu")(value)


def bytes_of(value: Any) -> Any:
    return None if value is None else as_integer(value, 10**4)


def action_of(value: Any) -> Any:
    return (
        value
        if isinstance(value, (Scale, Replace, Add))
        else one_of("zero", "mean", "resample")(value)
    )


def sweep_seeds_of(value: Any) -> Any:
    found = sequence_of(integer(-(2**63), 2**64 - 1))(value)
    return REFUSED if isinstance(found, list) and len(set(found)) < len(found) else found


def multiple_of_8(value: Any) -> Any:
    found = as_integer(value, 8, 10**4)
    return REFUSED if found is REFUSED or found % 8 else found


def words_of(value: Any) -> Any:
    return value if isinstance(value, str) and any(map(str.isalnum, value)) else REFUSED


def positions_of(value: Any) -> Any:
    found = sequence_of(integer(0, 6), alone=False)(value)
    return REFUSED if isinstance(value, (str, bytes)) else found


def only(kind: type) -> Callable[[Any], Any]:
    return lambda value: value if isinstance(value, kind) else REFUSED


def wrong_shape(tensor: torch.Tensor, hook: Any) -> Any:
    return tensor[:, :1]


def without_hook(tensor: torch.Tensor) -> None:
    pass


def to_numpy(tensor: torch.Tensor, hook: Any) -> Any:
    return tensor.numpy()


LATENTS = (
    LATENT,
    LATENT[:1],
    LATENT[:, :3],
    torch.zeros(2, 4, 3, 4),
    torch.zeros(2, 4, 0, 4),
    torch.zeros(2, 4, 8, 2),
    LATENT.int(),
)
LATENTS += (
    LATENT.double(),
    LATENT.tolist(),
    LATENT.numpy(),
    LATENT * math.nan,
    torch.zeros(0, 4, 4, 4),
    torch.zeros(2, 4, 4),
)
SITES = (
    "hook_text",
    "blocks.9.attn.hook_z",
    "blocks.0.attn.hook_zz",
    "blocks.*.attn.hook_z",
    "steps.0.hook_x0",
    "blocks.0",
    "*",
)
HEADS = ("L0H1", "L1H0", "L9H9", "LxH1", (0, 1), [5], ["L0H1"])
TOKENS = (
    "relation",
    ["shape1", "color2"],
    "above",
    ["relation", 1],
    prompts.word("is"),
    prompts.word("zebra"),
    [[1] * 8] * 2,
)
TOKENS += (
    [[0] * 8] * 2,
    torch.ones(2, 8),
    torch.ones(2, 8).bool(),
    np.eye(2, 8, dtype=int),
    [[True], [False, True]],
    [[2] * 8] * 2,
)
N_TOKENS = MODEL.to_tokens(list(PROMPTS)).shape[1]


def tokens_of(value: Any) -> Any:
    """As positions and roles of the two prompts, which have 7 and 8 tokens."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, prompts.Word):
        return REFUSED if value.text == "zebra" else value
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = value.tolist()
    if not isinstance(value, (list, tuple, range)) or len(value) == 0:
        return REFUSED
    if all(isinstance(one, str) for one in value):
        # the longer prompt has no pad
        roles = ("color1", "shape1", "relation", "color2", "shape2", "filler", "eos")
        return list(value) if all(one in roles for one in value) else REFUSED
    if all(isinstance(one, (list, tuple)) for one in value):
        flat = [entry for row in value for entry in row]
        right = (
            len(value) == 2
            and {len(row) for row in value} == {N_TOKENS}
            and all(entry in (0, 1) for entry in flat)
        )
        return (
            [[bool(entry) for entry in row] for row in value]
            if right and all(any(row) for row in value)
            else REFUSED
        )
    found = [as_integer(one, 0, N_TOKENS - 1) for one in value]
    return REFUSED if any(one is REFUSED for one in found) else found


ACTIONS = (
    "zero",
    "mean",
    "resample",
    "knockout",
    Scale(2.0),
    Scale,
    2.0,
    torch.zeros(1),
    Replace(torch.zeros(1)),
    Add(torch.zeros(3)),
)
PAIRS = ((2, -1), (0, 1), "L0H1", (9, 0), (0.5, 1))
NODES = ("L9H0", "text[99]", "mlp9", "text[above]")
SITE = Intervention("hook_t_emb")


def tokens_or_none_of(value: Any) -> Any:
    return None if value is None else tokens_of(value)


def mean_text(images: Any) -> str:
    return "x"


def whole_images(images: Any) -> Any:
    return images


Z = "steps.0.cond.blocks.0.attn.hook_z"
V = "blocks.0.cross_attn.hook_v"
VECTOR = torch.ones(16)

TABLE: dict[str, Row] = {
    "model(seed)": Row(lambda v: draw(seed=v), seeds_of_two, "seed"),
    "model(num_steps)": Row(
        lambda v: draw(num_steps=v), integer(1, 999), "num_steps", (1500, 5_000_000, 0)
    ),
    "model(guidance)": Row(
        lambda v: draw(guidance=v), or_default(number(), DEFAULT_GUIDANCE), "guidance"
    ),
    "model(latents)": Row(
        lambda v: draw(latents=v),
        lambda v: None if v is None else latents_of(v),
        "latents",
        LATENTS,
    ),
    "model(prompts)": Row(
        lambda v: MODEL(v, num_steps=1),
        prompts_of,
        "prompt|no vector for",
        ("red", ("red", "blue circle"), "zebra"),
    ),
    "to_tokens(length)": Row(
        lambda v: MODEL.to_tokens(ONE, v),
        integer(7, 2**16, none=True),
        "length|longest",
        (7, 9, 6, 21),
    ),
    "noise(seed)": Row(lambda v: MODEL.noise(v, 2), seeds_of_two, "seed"),
    "noise(batch)": Row(lambda v: MODEL.noise(0, v), integer(1, 10**4), "batch"),
    "noise(height)": Row(
        lambda v: MODEL.noise(0, height=v, width=16, binning=False),
        multiple_of_8,
        "height",
        (8, 16, 12),
    ),
    "trajectory(until)": Row(
        lambda v: MODEL.trajectory(ONE, num_steps=2, until=v).latent,
        integer(0, 2, none=True),
        "until",
    ),
    "fork(step)": Row(lambda v: RUN.fork(v).latent, integer(-3, 2), "step"),
    "fork(until)": Row(lambda v: RUN.fork(0, until=v).latent, integer(1, 3, none=True), "until"),
    "fork(hooks)": Row(lambda v: RUN.fork(0, v).latent, hooks_of, "fwd_hooks|hook"),
    "run.take(rows)": Row(lambda v: RUN.take(v).latent, rows_of, "rows"),
    "run.repeat(times)": Row(lambda v: RUN.repeat(v).latent, integer(1, 999), "times"),
    "at(step)": Row(look, integer(-2, 1), "step"),
    "at(branch)": Row(lambda v: look(branch=v), one_of("cond", "uncond"), "branch", ("uncond",)),
    "at(pos)": Row(lambda v: look(pos=v), one_of("image", "text"), "pos", ("text",)),
    "at(returns)": Row(
        lambda v: look(returns=v), one_of("images", "x0", "out"), "returns", ("x0", "out")
    ),
    "cache(names)": Row(
        lambda v: cached(names_filter=[v]), never, "hook", ("blocks.9.attn.hook_z", "hook_zz")
    ),
    "cache(steps)": Row(lambda v: cached(steps=v), steps_of(2), "steps"),
    "cache(branch)": Row(
        lambda v: cached(branch=v), one_of("cond", "uncond", "both"), "branch", ("both", "uncond")
    ),
    "cache(heads)": Row(
        lambda v: cached(heads=v),
        cached_heads_of,
        "head|layer",
        ((9, 9), "L9H1", [99], (0, 1), "L0H1"),
    ),
    "cache(patterns)": Row(
        lambda v: cached(patterns=v), one_of("whole", "entropy", "largest", "received"), "patterns"
    ),
    "cache(max_bytes)": Row(lambda v: cached(max_bytes=v), bytes_of, "max_bytes|cache", (10**9,)),
    "cache(device)": Row(lambda v: cached(device=v), device_of, "device"),
    "cache[name]": Row(
        lambda v: CACHE[v], never, "cache|hook|step", ("steps.9.hook_latent", Z.replace("_z", "_q"))
    ),
    "cache[…, layer, …]": Row(lambda v: CACHE["z", v, "cross_attn", 0], layer_of, "layer|no hook"),
    "cache[…, sublayer, …]": Row(
        lambda v: CACHE["z", 0, v, 0],
        sublayer_of,
        "sublayer|no hook|not in this cache",
        ("attn", "mlp"),
    ),
    "cache[…, step]": Row(lambda v: CACHE["z", 0, "attn", v], integer(-2, 1), "step"),
    "cache.at(step)": Row(lambda v: CACHE.at(v)["z", 0], integer(-2, 1), "step"),
    "cache.at(branch)": Row(
        lambda v: CACHE.at(0, v)["z", 0], one_of("cond"), "branch", ("uncond",)
    ),
    "cache.stack(name)": Row(
        lambda v: CACHE.stack(v, 0, "attn"), one_of("z"), "hook|cache|name", ("z", "patern", "q")
    ),
    "hooks": Row(
        lambda v: (
            draw(num_steps=1) if MODEL.run_with_hooks(ONE, num_steps=1, fwd_hooks=v) is None else 0
        ),
        hooks_of,
        "hook",
    ),
    "a hook": Row(hooked, never, "hook", (without_hook, to_numpy, wrong_shape, lambda t, hook: 3)),
    "a hook's name": Row(
        lambda v: MODEL.run_with_hooks(ONE, num_steps=1, fwd_hooks=[(v, wrong_shape)]),
        never,
        "hook",
        (Z,),
    ),
    "Intervention(site)": Row(
        intervene, one_of("hook_text", "blocks.*.attn.hook_z"), "site|hook|token", SITES
    ),
    "Intervention(heads)": Row(lambda v: intervene(heads=v), heads_of, "head", HEADS),
    "Intervention(tokens)": Row(
        lambda v: intervene(V, tokens=v), tokens_or_none_of, "token|has no|position|mask", TOKENS
    ),
    "Intervention(steps)": Row(lambda v: intervene(steps=v), steps_of(3), "steps"),
    "Intervention(branch)": Row(
        lambda v: intervene(branch=v), one_of("cond", "uncond", "both"), "branch", ("both",)
    ),
    "Intervention(action)": Row(
        lambda v: intervene(action=v), action_of, "action|value|pattern", ACTIONS
    ),
    "Intervention(missing)": Row(
        lambda v: intervene(missing=v), one_of("error", "ignore"), "missing", ("ignore",)
    ),
    "Scale": Row(lambda v: Scale(v).factor, number(), "factor"),
    "resolve(num_steps)": Row(
        lambda v: len(SITE.resolve(MODEL, ONE, num_steps=v)), integer(1, 999), "num_steps"
    ),
    "prompts.word(nth)": Row(lambda v: prompts.word("is", v).nth, integer(1, none=True), "nth"),
    "prompts.word(text)": Row(lambda v: prompts.word(v).text, words_of, "text", ("a b",), 12),
    "sweep(seeds)": Row(lambda v: swept(seeds=v), sweep_seeds_of, "seed", examples=16),
    "sweep(batch)": Row(lambda v: swept(batch=v), integer(1, none=True), "batch", (0,), 16),
    "sweep(interventions)": Row(
        lambda v: swept(interventions=v), only(Intervention), "intervention|hook", ([], [3]), 16
    ),
    "sweep(metrics)": Row(
        lambda v: swept(metrics=v), never, "metric", ({"m": mean_text}, {"m": whole_images}), 16
    ),
    "sweep(guidance)": Row(
        lambda v: swept(guidance=v), or_default(number(), DEFAULT_GUIDANCE), "guidance", examples=12
    ),
    "synopsis(batch_size)": Row(
        lambda v: shown(batch_size=v), integer(1), "batch_size", examples=16
    ),
    "synopsis(sublayer)": Row(
        lambda v: shown(sublayer=v), one_of("attn", "cross_attn"), "sublayer", ("attn",), 12
    ),
    "synopsis(reduce)": Row(
        lambda v: shown(reduce=v), one_of("sum", "mass", "mean", "max"), "reduce", ("max",), 12
    ),
    "synopsis(text_groups)": Row(
        lambda v: shown(text_groups=v), one_of(None), "group|token", ({"a": "x"}, {"a": 3}), 16
    ),
    "steer(k)": Row(
        lambda v: steering.steer(MODEL, ONE, VECTOR, "relation", k=v, num_steps=1),
        number(),
        "k=",
        examples=16,
    ),
    "steer(tokens)": Row(
        lambda v: steering.steer(MODEL, ONE, VECTOR, v, num_steps=1),
        positions_of,
        "token|position|has no",
        ("above",),
        12,
    ),
    "circuits(head)": Row(
        lambda v: circuits.position_word_map(MODEL.dit, v, VECTOR).values,
        one_of("L0H1", (0, 1)),
        "head|layer",
        PAIRS,
    ),
    "Scene(shape1)": Row(
        lambda v: scene(shape1=v), one_of("circle", "triangle", "square"), "shape1", ("star",), 12
    ),
    "Scene(relation)": Row(
        lambda v: scene(relation=v), one_of("above", "left"), "relation", ("inside", "left"), 12
    ),
    "Scene(x1)": Row(lambda v: scene(x1=v), integer(0, 128), "x1", (10**6,), 12),
    "sample(n)": Row(lambda v: scenes.sample(v, seed=0), integer(0, 10**4), "n=", examples=16),
    "sample(seed)": Row(
        lambda v: scenes.sample(2, seed=v), integer(0, 2**64 - 1), "seed", (2**64, -1), 16
    ),
    "sample(split)": Row(
        lambda v: scenes.sample(2, seed=0, split=v),
        one_of("train", "held_out", "all"),
        "split",
        ("all",),
        10,
    ),
    "sample_trios(seed)": Row(
        lambda v: scenes.sample_trios(2, seed=v), integer(0, 2**64 - 1), "seed", (2**64, -1), 12
    ),
    "boxes(score)": Row(boxes, number(), "score", ("surest", math.nan), 16),
    "path_patch(sender)": Row(
        lambda v: patching.path_patch(RUN, RUN, v, "L1H0", mean),
        never,
        "node|head|L|empty",
        NODES,
        16,
    ),
    "fold_timestep": Row(
        lambda v: MODEL.dit.fold_timestep(v).folded_timestep, number(0), "timestep", examples=12
    ),
}


# The test


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.shape == other.shape
            and torch.allclose(one, other, 0, 0, equal_nan=True)
        )
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def complaint(row: Row, value: Any) -> str | None:
    """Fault of the call's answer to a value; None if it is right."""
    meant = row.means(value)
    try:
        found = row.call(value)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said, line = str(error), linecache.getline(frame.filename, frame.lineno or 0).strip()
        if not frame.filename.startswith(OURS) or not line.startswith("raise"):
            return f"raised {type(error).__name__} in {frame.filename}:{frame.lineno}: {said[:200]}"
        if meant is not REFUSED:
            return f"refused, and means {meant!r}: {said[:300]}"
        if not re.search(row.named, said):
            return f"the message does not name it ({row.named}): {said[:300]}"
        return f"the message has {len(said)} characters" if len(said) > LONGEST_MESSAGE else None
    if meant is REFUSED:
        return f"was accepted: {str(found)[:80]!r}"
    return None if same(found, row.call(meant)) else f"differs from that of {meant!r}"


class Tally:
    """The inputs tried so far, and what was wrong with each kind of answer."""

    def __init__(self) -> None:
        self.tried = 0
        self.wrong: dict[tuple[str, str], Any] = {}

    def put(self, name: str, value: Any) -> None:
        self.tried += 1
        with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            if (found := complaint(TABLE[name], value)) is not None:
                self.wrong.setdefault((name, found), value)


def main(chosen: str = "") -> int:
    tally, started = Tally(), time.process_time()
    for name in [name for name in TABLE if chosen in name]:
        row = TABLE[name]

        @settings(max_examples=row.examples, database=None, deadline=None, derandomize=True)
        @given(value=VALUES)
        def every(value: Any) -> None:
            tally.put(name, value)  # noqa: B023

        every()
        if chosen:
            print(name, round(time.process_time() - started, 1), flush=True)
        for value in (*row.values, *JUNK[:: max(1, len(JUNK) // row.examples)]):
            tally.put(name, value)
    for (name, found), value in tally.wrong.items():
        print(f"{name}: {str(value)[:60]!r} ({type(value).__name__}) {found}")
    print(f"{tally.tried} inputs, {len(TABLE)} arguments, {len(tally.wrong)} wrong")
    return len(tally.wrong)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(1 if main(*sys.argv[1:]) else 0)
