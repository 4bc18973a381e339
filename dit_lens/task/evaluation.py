"""Accuracy of a model by split, relation, phrase and template, with intervals.

    rows = evaluate_model(model)  # one row an image
    accuracies(rows, ["split", "relation"])  # Wilson intervals
    template_effects(rows)  # paired with the trained template: same scenes, same noise

Source of metrics and templates: Wang, Fan, Pan (arXiv 2601.06338), sections A.5 and A.8; the judge
is `dit_lens.scenes.evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

from hooked_models import HookedTextToImage
from hooked_models.lazy_imports import renamed, renamed_arguments
from hooked_models.text_encoders.random_tokens import UNKNOWN_ID

from ..stats import Interval, clustered_mean, paired_difference, proportion
from ..store import Store, digest
from . import PHRASES, Scene, Split, evaluate, sample
from .captions import TEMPLATES, TRAINED, render_caption
from .protocol import METRICS, Task, TwoObjects

GEOMETRY = ("x1", "y1", "x2", "y2")
SPLITS: tuple[Split, ...] = ("held_out", "train")
BATCH = 64

__getattr__ = renamed(  # of `dit_lens.scenes.evaluation`
    __name__,
    {
        name: f"dit_lens.task.judge:{name}"
        for name in (
            *("COLOR_MARGIN", "COLOR_TOLERANCE", "MIN_AREA", "MIN_IOU", "MAX_SCALE", "CHUNK"),
            *("DESCRIPTIONS", "color_classes"),
        )
    },
)


@renamed_arguments(wanted="scenes")
@torch.no_grad()
def score(
    model: HookedTextToImage,
    scenes: Sequence[Any],
    num_steps: int = 14,
    guidance: float = 4.5,
    batch_size: int = BATCH,
    *,
    task: Task = TwoObjects(),  # noqa: B008  (frozen, without fields)
) -> xr.Dataset:
    """Draw and judge one image for each scene: the variables of `task.judge`, over dim scene.

    Scene i has noise seed i at each call, so two models, or two states of one, are compared in
    pairs, and a mean over scenes is also a mean over noises.

    Example:
        >>> verdict = score(model, scenes.sample(4, seed=0), num_steps=2)
        >>> dict(verdict.sizes), verdict["unique_binding"].dtype
        ({'scene': 4}, dtype('bool'))
    """
    images = []
    for start in range(0, len(scenes), batch_size):
        prompts = [task.prompt(scene) for scene in scenes[start : start + batch_size]]
        images.append(
            model(prompts, list(range(start, start + len(prompts))), num_steps, guidance)
            .float()
            .cpu()
        )
    return task.judge(torch.cat(images), scenes).rename(image="scene")


def summarise(verdict: xr.Dataset, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """One row a metric: mean, low and high end of the 95 % interval over scenes.

    Args:
        verdict: of `score`, or of a task's judge.
        metrics: variables of it, such as a task's `metrics`.

    Example:
        >>> drawn = scenes.sample(4, seed=0)
        >>> summarise(scenes.evaluate(scenes.render(drawn), drawn)).loc["shape"].round(3).tolist()
        [1.0, 0.398, 1.0]
    """
    rows = {name: clustered_mean(verdict[name].values.astype(float)[:, None]) for name in metrics}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(Interval._fields)).rename_axis(
        "metric"
    )


def known_templates(model: HookedTextToImage) -> list[str]:
    """Names of the `TEMPLATES` whose words are all in the vocabulary of the model's tokenizer.

    Example:
        >>> known_templates(HookedTextToImage.from_pretrained("rte-nano"))[:4]
        ['is', 'no is', 'no is, the second', 'the second']
    """
    scene = sample(1, seed=0, color_words="both")[0]
    unknown = getattr(model.tokenizer, "unk_token_id", UNKNOWN_ID)
    return [
        name
        for name in TEMPLATES
        if unknown not in model.tokenizer(render_caption(scene, name)).input_ids
    ]


def evaluate_model(
    model: HookedTextToImage,
    n: int = 512,
    templates: Sequence[str] | None = None,
    scene_seed: int = 100,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Draw and judge `n` held-out scenes and `n` trained ones.

    `n` // 4 more trained ones come in each other template. Scene i has noise seed i under every
    template, so templates pair; images of one condition share nothing, so their proportions have
    binomial intervals. Uses 14 steps of the model's own scheduler and guidance 4.5.

    Args:
        model: the model that draws.
        n: scenes of each split.
        templates: names of `TEMPLATES`; by default, all `known_templates`. The trained one is
            always included.
        scene_seed: seed of the sequences of scenes.
        out: a folder for finished batches, from which an interrupted call goes on when it is
            repeated.

    Returns:
        One row an image: split template prompt relation phrase shape1 color1 shape2 color2 scene
        seed, the judge's verdicts (`METRICS` as 0 or 1, `relation_given_both` NaN without both
        objects) and centres in pixels (NaN likewise).

    Raises:
        ValueError: there is no such template, the model lacks its words, `out` holds an evaluation
            with other settings, or `out` is given and hooks are attached, which its settings cannot
            record.

    Example:
        >>> rows = evaluate_model(model, n=1, templates=[])
        >>> len(rows), rows["split"].tolist()
        (2, ['held_out', 'train'])
    """
    jobs = _jobs(n, known_templates(model) if templates is None else templates, scene_seed)
    prompts = [render_caption(scene, template) for _, template, _, scene in jobs]
    columns = [*METRICS, *GEOMETRY, "n_objects"]
    if out is not None:
        model.check_no_hooks("A folder keeps the evaluation of the model as it is")
    settings = (
        {"model": model.digest(), "prompts": digest(*prompts), "batch_size": BATCH}
        if out is not None
        else {}
    )

    @torch.no_grad()
    def judge(start: int) -> Float[np.ndarray, "image column"]:
        rows = slice(start, start + BATCH)
        images = model(prompts[rows], seed=[i for _, _, i, _ in jobs[rows]])
        verdict = evaluate(images.float().cpu(), [scene for *_, scene in jobs[rows]])
        return np.stack([verdict[name].values.astype(float) for name in columns], axis=1)

    starts = track(
        range(0, len(jobs), BATCH), "evaluating", transient=True, console=Console(stderr=True)
    )
    with nullcontext() if out is None else Store(out, settings) as store:
        parts = [
            judge(i) if store is None else store.array(f"{i:08d}.npy", partial(judge, i))
            for i in starts
        ]
    values = pd.DataFrame(np.concatenate(parts), columns=columns)
    return pd.concat([_described(jobs, prompts), values], axis=1)


_Job = tuple[Split, str, int, Scene]
"""Split, template, number of the scene and its noise, and the scene."""


def _jobs(n: int, templates: Sequence[str], seed: int) -> list[_Job]:
    """`n` scenes of each split in the trained template, and `n` // 4 trained ones in each other."""
    jobs: list[_Job] = []
    for split in SPLITS:
        scenes = sample(n, seed=seed, split=split, color_words="both")
        jobs += [(split, TRAINED, i, scene) for i, scene in enumerate(scenes)]
        others = [] if split == "held_out" else [name for name in templates if name != TRAINED]
        for template in others:
            jobs += [(split, template, i, scene) for i, scene in enumerate(scenes[: n // 4])]
    return jobs


def _described(jobs: Sequence[_Job], prompts: Sequence[str]) -> pd.DataFrame:
    """Split, template, prompt, parts of the scene and seed of each image."""
    parts = ("relation", "phrase", "shape1", "color1", "shape2", "color2")
    rows = [
        (split, template, prompt, *(getattr(scene, part) for part in parts), i, i)
        for (split, template, i, scene), prompt in zip(jobs, prompts, strict=True)
    ]
    return pd.DataFrame(rows, columns=["split", "template", "prompt", *parts, "scene", "seed"])


def accuracies(
    rows: pd.DataFrame, by: Sequence[str], metrics: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Share of images accepted by each metric, with its 95 % Wilson interval.

    One row a group and metric.

    Args:
        rows: of `evaluate_model`.
        by: columns that define the groups.
        metrics: columns of verdicts, 0, 1, or NaN where a metric does not apply.

    Returns:
        Columns: those of `by`, metric, images (those the metric applies to), mean, low, high.

    Example:
        >>> rows = pd.DataFrame({"split": ["train"] * 4, "color": [1.0, 1.0, 1.0, 0.0]})
        >>> accuracies(rows, ["split"], ["color"]).round(3).values.tolist()
        [['train', 'color', 4, 0.75, 0.301, 0.954]]
    """
    found = []
    for group, part in rows.groupby(list(by), sort=False):
        for metric in metrics:
            values = part[metric].to_numpy(float)
            found.append((*group, metric, int((~np.isnan(values)).sum()), *proportion(values)))
    return pd.DataFrame(found, columns=[*by, "metric", "images", *Interval._fields])


def template_effects(rows: pd.DataFrame, metrics: Sequence[str] = METRICS[:-1]) -> pd.DataFrame:
    """Change of each metric from the trained template to another, on the same scenes and noise.

    Args:
        rows: of `evaluate_model`.
        metrics: columns of verdicts, 0 or 1.

    Returns:
        One row a template and metric. Columns template, metric, images, mean, low, high: paired
        differences with 95 % intervals. The metrics "drift_x" and "drift_y" are the change, in
        pixels, of the first object's position relative to the second, over pairs of images that
        both have both objects.

    Example:
        >>> same = {"split": "train", "x1": 9, "x2": 9, "y1": 9, "y2": 9}
        >>> table = {"template": ["is", "is", "no is", "no is"], "scene": [0, 1, 0, 1]}
        >>> rows = pd.DataFrame(table | same | {"color": [1.0, 1.0, 1.0, 0.0]})
        >>> template_effects(rows, ["color"])[["template", "metric", "mean"]].values.tolist()
        [['no is', 'color', -0.5], ['no is', 'drift_x', 0.0], ['no is', 'drift_y', 0.0]]
    """
    trained = rows[(rows["split"] == "train") & (rows["template"] == TRAINED)].set_index("scene")
    found = []
    for template, part in rows[(rows["split"] == "train") & (rows["template"] != TRAINED)].groupby(
        "template", sort=False
    ):
        after = part.set_index("scene")
        before = trained.loc[after.index]
        pairs = [(metric, before[metric], after[metric]) for metric in metrics]
        pairs += [(f"drift_{axis}", _offset(before, axis), _offset(after, axis)) for axis in "xy"]
        for metric, old, new in pairs:
            both = (old.notna() & new.notna()).to_numpy()
            change = paired_difference(
                old.to_numpy(float)[both, None], new.to_numpy(float)[both, None]
            )
            found.append((template, metric, int(both.sum()), *change))
    return pd.DataFrame(found, columns=["template", "metric", "images", *Interval._fields])


def _offset(rows: pd.DataFrame, axis: str) -> pd.Series:
    return rows[f"{axis}1"] - rows[f"{axis}2"]


def to_markdown(rows: pd.DataFrame) -> str:
    """Tables of a model card: accuracy by split, relation, phrase and template.

    Example:
        >>> text = to_markdown(evaluate_model(model, n=1, templates=[]))
        >>> text.splitlines()[0]
        'By split: combinations that were trained, and those that never were'
    """
    plain, of_train = rows[rows["template"] == TRAINED], rows[rows["split"] == "train"]
    order = {
        phrase: i
        for i, phrase in enumerate(phrase for phrases in PHRASES.values() for phrase in phrases)
    }
    by_phrase = plain[plain["split"] == "train"].sort_values(
        "phrase", key=lambda found: found.astype(str).map(order), kind="stable"
    )
    sections = [
        ("By split: combinations that were trained, and those that never were", plain, "split"),
        ("By relation (trained combinations)", by_phrase, "relation"),
        ("By phrase (trained combinations)", by_phrase, "phrase"),
    ]
    if len(of_train) > len(by_phrase):
        sections.append(("By template (trained combinations)", of_train, "template"))
    parts = [f"{title}\n\n{wide(accuracies(part, [key]), key)}" for title, part, key in sections]
    effects = template_effects(rows)
    if len(effects):
        parts.append(
            "Against the trained template, on the same scenes and noise: change, and how many "
            "pixels the first object moves "
            f"against the second (x to the right, y down)\n\n{wide(effects, 'template')}"
        )
    return "\n\n".join(parts)


def wide(table: pd.DataFrame, key: str) -> str:
    """Markdown table: a row for each value of `key`, a column for each metric.

    Entries are "mean [low, high]".

    Example:
        >>> rows = pd.DataFrame({"split": ["train"] * 4, "color": [1.0, 1.0, 1.0, 0.0]})
        >>> print(wide(accuracies(rows, ["split"], ["color"]), "split"))
        | split | images | color |
        |---|---|---|
        | train | 4 | 0.750 [0.301, 0.954] |
    """
    metrics = list(dict.fromkeys(table["metric"]))
    lines = [f"| {key} | images | {' | '.join(metrics)} |", f"|{'---|' * (len(metrics) + 2)}"]
    for value, part in table.groupby(key, sort=False):
        cells = part.set_index("metric")
        shown = [
            _shown(Interval(*cells.loc[metric, list(Interval._fields)]), metric.startswith("drift"))
            for metric in metrics
        ]
        lines.append(f"| {value} | {cells['images'].max()} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _shown(interval: Interval, pixels: bool) -> str:
    if np.isnan(interval.mean):
        return "–"
    return "{:.1f} [{:.1f}, {:.1f}]".format(*interval) if pixels else str(interval)
