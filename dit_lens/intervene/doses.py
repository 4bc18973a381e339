"""Dose and response: images of a relation moved by k · (V_to − V_from), judged, beside controls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.arguments import integer
from hooked_models.lazy_imports import renamed_arguments

from ..runs.drawing import Drawing, Experiment, Keeping
from ..stats import clustered_mean
from ..task import DIRECTIONS, OPPOSITE, Scene, caption, evaluate
from ..task.scene import Relation
from ..text.prompts import role_mask
from ..text.variance import Space
from .interventions import Add, Intervention
from .swap_vectors import Target, swap_vectors
from .verdicts import verdicts

SITES: dict[Space, str] = {"text": "hook_text", "caption": "hook_caption"}
JUDGED = {
    f"{goal}_{how}": (goal, f"relation_{how}")
    for goal in ("target", "original")
    for how in ("strict", "loose")
}
METRICS = (*JUDGED, "offset", "color", "shape", "unique_binding")
BATCH = 32


class Swap(Drawing, Keeping, total=False):
    """Keyword arguments of `dose_response`.

    Those of drawing, of keeping results, and two of `swap_vectors`.

    Example:
        >>> Swap(tokens="relation", num_steps=2)
        {'tokens': 'relation', 'num_steps': 2}
    """

    tokens: Target
    at: Space


@renamed_arguments(wanted="scenes", ks="doses")
def dose_response(
    model: HookedTextToImage,
    scenes: Sequence[Scene],
    to: Relation | Mapping[Relation, Relation] | None = None,
    doses: Sequence[int | float] = (0, 0.5, 1, 1.5, 2),
    seeds: Sequence[int] = (0,),
    draws: int = 2,
    control_seed: int = 0,
    **how: Unpack[Swap],
) -> xr.Dataset:
    """Dose–response of adding k · (V_to − V_from) to the relation of captions, with controls.

    All conditions of a scene and seed start from the same noise. Controls are drawn `draws` times,
    anew for every scene:

    - "random_vector": at the same tokens, vectors of random direction and the same norm;
    - "wrong_token": the same vectors at as many other tokens of the prompt (EOS included).

    Args:
        model: the model that draws, with words of the two-object task.
        scenes: scenes to draw.
        to: a relation, a relation for each of the scenes' relations, or None for each one's
            opposite.
        doses: factors k.
        seeds: of the noise; every scene is drawn with each.
        draws: controls of each kind.
        control_seed: of the controls.
        **how: `tokens` and `at` as in `swap_vectors`; `num_steps`, `guidance` and `batch_size` as
            in `runs.drawing.Drawing`; `out`, `executor` and `workers` as in `sweep.run`.

    Returns:
        Dims (condition, k, scene, seed), with `kind` as a coordinate of conditions: "steered" or a
        control's name. Variables: `{target,original}_{strict,loose}` (`evaluate`'s relation, for
        the target relation and for the caption's own; a diagonal layout loosely satisfies two
        cardinal relations, so use the strict ones unless `to` is the opposite), `offset` (px from
        object 2 to object 1 along the target direction; NaN without unique binding), `color`,
        `shape`, `unique_binding`.

    Raises:
        ValueError: as in `swap_vectors`; or a scene already has the target relation.

    Example:
        >>> model, drawn = HookedTextToImage.from_pretrained("rte-nano"), scenes.sample(2, seed=0)
        >>> found = dose_response(model, drawn, doses=(0, 1), draws=1, num_steps=1)
        >>> found["condition"].values.tolist(), found["k"].values.tolist()
        (['steered', 'random_vector 0', 'wrong_token 0'], [0, 1])
    """
    tokens, at = how.get("tokens", "phrase"), how.get("at", "text")
    others: Any = {key: value for key, value in how.items() if key in Experiment.__annotations__}
    batch_size = integer("batch_size", how.get("batch_size", BATCH), 1)
    goals = _goals(scenes, to)
    texts = [caption(scene) for scene in scenes]
    steered = swap_vectors(model, texts, goals, tokens, at)
    conditions = {
        "steered": steered,
        **_controls(steered, role_mask(model, texts, "pad"), draws, control_seed),
    }

    def judge(images: Tensor, prompt: np.ndarray) -> dict[str, np.ndarray]:
        return _judge(images, [scenes[row] for row in prompt], [goals[row] for row in prompt])

    added = {
        f"{name} × {k} ({place})": [Intervention(SITES[at], action=Add(k * vectors))] if k else []
        for name, vectors in conditions.items()
        for place, k in enumerate(doses)
    }
    values = verdicts(model, texts, seeds, added, judge, batch=batch_size, **others)
    dims, shape = ("condition", "k", "scene", "seed"), (len(conditions), len(doses))
    return xr.Dataset(
        {name: (dims, v.reshape(*shape, *v.shape[1:])) for name, v in values.items()},
        {"k": list(doses), "seed": list(seeds), **_labels(conditions, scenes, goals)},
    )


def _labels(
    conditions: Iterable[str], scenes: Sequence[Scene], goals: Sequence[Relation]
) -> dict[str, Any]:
    names = list(conditions)
    return {
        "condition": names,
        "kind": ("condition", [name.rpartition(" ")[0] or name for name in names]),
        "relation": ("scene", [str(scene.relation) for scene in scenes]),
        "to": ("scene", [str(goal) for goal in goals]),
        "caption": ("scene", [caption(scene) for scene in scenes]),
    }


def _goals(
    scenes: Sequence[Scene], to: Relation | Mapping[Relation, Relation] | None
) -> list[Relation]:
    """The relation to go to, for each scene. Raises ValueError for a scene that has it already."""
    of_relation = OPPOSITE if to is None else to
    if isinstance(of_relation, str):
        of_relation = dict.fromkeys(DIRECTIONS, of_relation)
    goals = [of_relation[scene.relation] for scene in scenes]
    if still := [
        scene.relation for scene, goal in zip(scenes, goals, strict=True) if scene.relation == goal
    ]:
        raise ValueError(
            f"A scene is {still[0]!r} already: leave out the scenes whose relation is the one to "
            "go to."
        )
    return goals


def _controls(
    steered: Float[Tensor, "prompt text_pos d"], pads: Tensor, draws: int, seed: int
) -> dict[str, Float[Tensor, "prompt text_pos d"]]:
    norm = steered.norm(dim=-1, keepdim=True).cpu()
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    controls = {}
    for draw in range(draws):
        noise = torch.randn(steered.shape, generator=generator)
        controls[f"random_vector {draw}"] = (norm * noise / noise.norm(dim=-1, keepdim=True)).to(
            steered
        )
    for draw in range(draws):
        moved = torch.zeros_like(steered)
        for row, vectors, size, pad in zip(moved, steered, norm[..., 0], pads, strict=True):
            here = size.nonzero().flatten()
            others = ((size == 0) & ~pad).nonzero().flatten()
            chosen = rng.choice(others.numpy(), len(here), replace=len(here) > len(others))
            row.index_add_(0, torch.from_numpy(chosen).to(row.device), vectors[here.to(row.device)])
        controls[f"wrong_token {draw}"] = moved
    return controls


def _judge(
    images: Float[Tensor, "image 3 height width"], drawn: Sequence[Scene], goals: Sequence[Relation]
) -> dict[str, np.ndarray]:
    own = evaluate(images, drawn)
    gone_to = evaluate(
        images, [replace(scene, relation=goal) for scene, goal in zip(drawn, goals, strict=True)]
    )
    verdicts = {"target": gone_to, "original": own}
    direction = np.array([DIRECTIONS[goal] for goal in goals])
    direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    offset = np.stack([own.x1 - own.x2, own.y1 - own.y2], axis=1)
    return {
        **{name: verdicts[goal][metric].values for name, (goal, metric) in JUDGED.items()},
        "offset": (offset * direction).sum(axis=1),
        **{name: own[name].values for name in ("color", "shape", "unique_binding")},
    }


def summarise(doses: xr.Dataset) -> pd.DataFrame:
    """Means of `dose_response` and their 95 % intervals: columns kind, k, metric, mean, low, high.

    Rows "steered − random_vector" and "steered − wrong_token" are paired differences: same scene,
    same noise, control averaged over its draws. Intervals treat scenes as clusters.

    Example:
        >>> model, drawn = HookedTextToImage.from_pretrained("rte-nano"), scenes.sample(2, seed=0)
        >>> table = summarise(dose_response(model, drawn, doses=(0, 1), draws=1, num_steps=1))
        >>> table["kind"].unique().tolist()[:3]
        ['steered', 'random_vector', 'wrong_token']
    """
    rows = []
    for metric, k in itertools.product(METRICS, range(doses.sizes["k"])):
        values = doses[metric].isel(k=k).astype(float)
        of_kind = {
            kind: values.sel(condition=doses.kind == kind)
            for kind in dict.fromkeys(doses.kind.values.tolist())
        }
        own = of_kind["steered"].isel(condition=0)
        differences = {
            f"steered − {n}": own - c.mean("condition")
            for n, c in of_kind.items()
            if n != "steered"
        }
        for kind, part in {**of_kind, **differences}.items():
            table = part.transpose("scene", ...).values.reshape(doses.sizes["scene"], -1)
            rows.append(
                {
                    "kind": kind,
                    "k": float(doses.k[k]),
                    "metric": metric,
                    **clustered_mean(table)._asdict(),
                }
            )
    return pd.DataFrame(rows)
