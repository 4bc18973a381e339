"""Abilities and heads of a model while it learns.

Accuracies, the layout dipole and weight-space screening.

Source: Wang, Fan, Pan (arXiv 2601.06338) measure accuracies of checkpoints; the heads' screening
scores over training are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.lazy_imports import renamed_arguments

from ..readout import screening
from ..stats import clustered_mean
from ..task import DIRECTIONS, Scene, caption
from ..task.evaluation import score, summarise
from ..task.protocol import Task, TwoObjects
from ..text import variance
from ..text.prompts import Role

SCREENED_WORDS = ("above", "below", "left", "right", "upper", "lower", "higher")
SOURCES = ("words", "shape1", "shape2")
"""Vectors that heads are screened with; see `measure`."""
NULL_DRAWS, SIGNIFICANT = 200, 0.05
ROUNDING = 1e-6
"""Relative size below which an effect, or a head's map, is rounding."""
COLUMNS = ("step", "samples", "quantity", "source", "layer", "head", "value", "low", "high")


def record_points(steps: int, points: int) -> list[int]:
    """At most `points` steps, log-spaced from `steps` // 160 to `steps`."""
    return (
        sorted({round(step) for step in np.geomspace(steps, max(1, steps // 160), points)})
        if points
        else []
    )


@renamed_arguments(wanted="scenes")
@torch.no_grad()
def measure(
    model: HookedTextToImage,
    scenes: Sequence[Any],
    step: int,
    samples: int,
    task: Task | None = None,
) -> pd.DataFrame:
    """One row a number, columns `COLUMNS`.

    Accuracies of one image a scene, and `dipole` (see there), with 95 % intervals over scenes, each
    with a noise of its own that is the same at every call; for every head `cosine`, `projection`,
    `energy` and `p` of `screening.screen_heads`, by the vectors it was screened with (`source`):
    "words", the relation words' own vectors; "shape1" and "shape2", the effect vectors of the
    relation on a shape word, after the caption projection; and its `gain_vertical` and
    `gain_horizontal` of `screening.screen_axes`. For a task of another kind, its accuracies alone.
    """
    rows: list[dict[Any, Any]] = []
    task = task or TwoObjects()
    for metric, (mean, low, high) in summarise(
        score(model, scenes, task=task), task.metrics
    ).iterrows():
        rows.append({"quantity": metric, "value": mean, "low": low, "high": high})
    if not isinstance(task, TwoObjects):
        return _as_table(rows, step, samples)
    mean, low, high = clustered_mean(dipole(model, scenes)[:, None])
    rows.append({"quantity": "dipole", "value": mean, "low": low, "high": high})
    for source, table in screen(model).items():
        long = table.melt(
            id_vars=["layer", "head"],
            value_vars=["cosine", "projection", "energy", "p"],
            var_name="quantity",
        )
        rows += long.assign(source=source).to_dict("records")
    for source, contrasts in axis_contrasts(model).items():
        gains = screening.screen_axes(model.dit, contrasts)
        gains = gains.assign(source=source, quantity="gain_" + gains["axis"], value=gains["gain"])
        rows += gains[["layer", "head", "source", "quantity", "value"]].to_dict("records")
    return _as_table(rows, step, samples)


def _as_table(rows: Sequence[dict[Any, Any]], step: int, samples: int) -> pd.DataFrame:
    return pd.DataFrame(
        [{"step": step, "samples": samples, **row} for row in rows], columns=list(COLUMNS)
    ).astype({"layer": "Int64", "head": "Int64", "value": float, "low": float, "high": float})


@renamed_arguments(wanted="scenes")
@torch.no_grad()
def dipole(model: HookedTextToImage, scenes: Sequence[Scene]) -> Float[np.ndarray, " scene"]:
    """Cosine between the layout of the caption and that of one look at pure noise.

    A layout is where the first object is, seen from the second. The latter is `color_moment` of the
    clean image predicted at step 0, without guidance. It costs one forward pass and moves long
    before any accuracy does: it is 0 until word order, relation and colours are put together,
    however much the network has learnt of places. Scene i is looked at in noise i.
    """
    prompts, noises = [caption(scene) for scene in scenes], list(range(len(scenes)))
    view, tokens = model.at(step=0, prompts=prompts, seed=noises, guidance=1.0, returns="x0")
    return layout(model.decode(view(tokens)), scenes)


@renamed_arguments(wanted="scenes")
def layout(
    images: Float[Tensor, "scene 3 height width"], scenes: Sequence[Scene]
) -> Float[np.ndarray, " scene"]:
    """Cosine between the layout of the caption and that of an image (`color_moment`).

    A layout is where the first object is, seen from the second.
    """
    moment = color_moment(images.double().cpu().numpy())
    moment *= np.array([1 if scene.color1 == "red" else -1 for scene in scenes])[:, None]
    named = np.array([DIRECTIONS[scene.relation] for scene in scenes], float)
    return (moment * named).sum(axis=1) / (
        np.linalg.norm(moment, axis=1) * np.linalg.norm(named, axis=1) + 1e-12
    )


def color_moment(images: Float[np.ndarray, "image 3 height width"]) -> Float[np.ndarray, "image 2"]:
    """(x, y) of the dipole moment of red minus blue about the centre, y down."""
    redness = images[:, 0] - images[:, 2]
    y, x = np.mgrid[: images.shape[2], : images.shape[3]]
    return np.stack([(redness * (axis - axis.mean())).sum(axis=(1, 2)) for axis in (x, y)], axis=1)


def screen(model: HookedTextToImage) -> dict[str, pd.DataFrame]:
    """Screening of every head with the relation words' vectors, and with effects.

    These are the relation's effect on either shape word.
    """
    words = {word: screening.word_vector(model, word) for word in SCREENED_WORDS}
    found = {"words": screening.screen_heads(model.dit, words, null_draws=NULL_DRAWS)}
    for role in ("shape1", "shape2"):
        found[role] = screening.screen_heads(
            model.dit, relation_vectors(model, role), at="caption", null_draws=NULL_DRAWS
        )
    return found


def axis_contrasts(model: HookedTextToImage) -> dict[str, dict[str, Float[Tensor, " d_model"]]]:
    """Half the difference of the ends of each axis in caption space, by source (`SOURCES`).

    Axes are the vertical and the horizontal one.
    """
    words = screening.phrase_contrasts(
        model, {axis: screening.ENDS[axis] for axis in screening.AXES}
    )
    roles: tuple[Role, ...] = ("shape1", "shape2")
    return {
        "words": words,
        **{role: screening.half_differences(relation_vectors(model, role)) for role in roles},
    }


def relation_vectors(
    model: HookedTextToImage, carrier: Role
) -> dict[str, Float[Tensor, " d_model"]]:
    """Contribution of each relation to the mean caption vector of its words.

    Over the paper's 264 prompts. Exactly zero where it is rounding, as of words that an encoder
    does not mix: screening knows no scale, and would find heads.
    """
    vectors, factors = variance.word_vectors(
        model, variance.factorial_prompts(), carrier, at="caption", pool="mean"
    )
    effects = variance.effect_vectors(vectors, factors[["shape1", "color1", "shape2", "relation"]])[
        "relation"
    ]
    smallest = ROUNDING * float(vectors.norm(dim=1).mean())
    found = {str(of.relation.item()): torch.from_numpy(of.values).float() for of in effects}
    return {
        name: vector if vector.norm() > smallest else torch.zeros_like(vector)
        for name, vector in found.items()
    }


def last_screening(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Heads that `screen` found at the last step of a run, by |projection|; or no rows.

    The heads are one source's, from `dynamics.parquet`.
    """
    last = table[(table["step"] == table["step"].max()) & (table["source"] == source)]
    wide = last.pivot_table(
        index=["layer", "head"], columns="quantity", values="value"
    ).reset_index()
    columns = ["layer", "head", "cosine", "projection", "energy", "p"]
    return wide.reindex(columns=columns).sort_values(
        "projection", key=abs, ascending=False, ignore_index=True
    )


def strongest_heads(table: pd.DataFrame, source: str, n: int = 4) -> list[tuple[int, int]]:
    """(layer, head) of at most `n` heads whose maps project most on the ramps at the end.

    Those with p ≤ .05 only. None of a run that was not screened so.
    """
    last, of_words = last_screening(table, source), last_screening(table, "words")
    found = last[
        (last["p"] <= SIGNIFICANT) & ~(last["energy"] < ROUNDING * of_words["energy"].max())
    ].head(n)
    return [
        (int(layer), int(head)) for layer, head in zip(found["layer"], found["head"], strict=True)
    ]


def emergence(table: pd.DataFrame, level: float = 0.5) -> pd.DataFrame:
    """Steps at which abilities and heads came.

    The accuracies, the dipole, and by source the |cosine| of `strongest_heads`. Columns what,
    samples (seen at the first point at which it is at least `level`; NA where it never is), before
    (at the point before that one, 0 if there is none: it came in between) and stays (at the first
    point from which on it never falls below again; NA if it is below at the end).
    """
    accuracies = table[table["layer"].isna()]
    courses = {
        str(name): part.set_index("samples")["value"]
        for name, part in accuracies.groupby("quantity", sort=False)
    }
    for source in SOURCES:
        for layer, head in strongest_heads(table, source):
            rows = (table["source"] == source) & (table["layer"] == layer) & (table["head"] == head)
            of_head = table[rows & (table["quantity"] == "cosine")]
            courses[f"L{layer}H{head} ({source})"] = of_head.set_index("samples")["value"].abs()
    found: list[tuple[object, ...]] = []
    for what, course in courses.items():
        there = course.fillna(0).sort_index() >= level
        stays = there[::-1].cummin()[::-1]
        points = [0, *there.index]
        first = int(np.argmax(there.to_numpy()))
        came = (points[first + 1], points[first]) if there.any() else (pd.NA, pd.NA)
        found.append((what, *came, stays.idxmax() if stays.any() else pd.NA))
    columns = ["what", "samples", "before", "stays"]
    return pd.DataFrame(found, columns=columns).astype(dict.fromkeys(columns[1:], "Int64"))
