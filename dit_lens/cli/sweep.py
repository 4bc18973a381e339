"""The command `dit-lens sweep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from .commands import Name, On, Prompts, folder_or_file, scenes_of
from .output import say, show

if TYPE_CHECKING:
    import pandas as pd

    from ..intervene.interventions import Intervention


def sweep_command(
    model: Name,
    machine: On,
    prompts: Prompts = (),
    site: str = "blocks.*.cross_attn.hook_z",
    each: tuple[Literal["layer", "head", "step"], ...] = ("layer", "head"),
    layers: tuple[int, ...] | None = None,
    heads: tuple[int, ...] | None = None,
    steps: tuple[int, ...] | None = None,
    tokens: str | None = None,
    action: Literal["zero", "mean", "resample", "knockout"] = "zero",
    branch: Literal["cond", "uncond", "both"] = "cond",
    metric: Literal["displacement", "relation", "scene"] = "displacement",
    on: str = "image",
    seeds: tuple[int, ...] = (0,),
    num_scenes: int = 8,
    scene_seed: int = 100,
    num_steps: int = 14,
    guidance: float = 4.5,
    top: int | None = None,
    sample: int = 20,
    score: Literal["step", "attribution", "none"] = "attribution",
    show_rows: Annotated[int, tyro.conf.arg(name="show")] = 20,
    explain: bool = False,
    executor: Literal["local", "ray"] = "local",
    workers: int | None = None,
    out: Path | None = None,
) -> None:
    """Rank the effects of switching off heads, layers or words, with 95 % intervals.

    One condition at a time, the strongest first: `dit-lens sweep rte-micro --metric relation --out
    cells.csv`.

    Args:
        model: bundled name (`dit-lens models`), pipeline folder, folder of a training run, or hub
            id.
        machine: device and precision, see `Machine`.
        prompts: prompts that are drawn, such as "a red cube" "a blue ball", or a text file with one
            a line; by default `num_scenes` scenes.
        site: hook that is edited; * stands for the layer.
        each: axes along which there is one condition for each value; values of the others are
            edited together.
        layers: layers that are covered, such as 1 2; all by default.
        heads: heads that are covered, such as 0 2; all by default.
        steps: denoising steps that are covered, such as 0 1 2 3; all by default.
        tokens: role of the tokens that are edited, such as relation, or a word of all prompts; all
            tokens by default.
        action: edit made there.
        branch: guidance branch that is edited.
        metric: displacement from the run without, offset along the scene's relation, or the judge's
            verdicts on scenes.
        on: tensor whose displacement is measured: image, latent, x0, out or eps.
        seeds: seeds of the noise; every prompt is drawn with each.
        num_scenes: scenes drawn where no prompts are given.
        scene_seed: seed of the scenes.
        num_steps: denoising steps.
        guidance: scale of classifier-free guidance.
        top: search for this number of the largest effects, such as 5, at the cost of 8 scenes; give
            many `num_scenes` to draw from.
        sample: conditions at most that are drawn at random, to bound how many were missed.
        score: conditions enter a search by "attribution", or by "step", exact at each condition's
            own step, which is dearer; or all of them ("none").
        show_rows: rows that are printed.
        explain: print the cost and run nothing.
        executor: this process, or the workers of a Ray cluster.
        workers: number of Ray workers, such as 4; by default one a GPU, or a core.
        out: table file, such as cells.csv (or .parquet, .json, .html), or a folder in which a
            stopped sweep continues.
    """
    from .. import sweep
    from ..intervene.interventions import Intervention

    drawn, texts = scenes_of(prompts, num_scenes, scene_seed)
    if prompts and metric != "displacement":
        raise ValueError(
            f"--metric {metric} judges scenes: leave --prompts out, or measure the displacement."
        )
    hooked = machine.load(model)
    measures: dict[str, sweep.Metric] = {
        "displacement": sweep.Metric(sweep.displacement, on=on, given=("baseline",)),
        "relation": sweep.relation_metric(drawn),
        "scene": sweep.scene_metric(drawn),
    }
    whole = Intervention(site, heads, _tokens(tokens), steps, branch, action)
    axes = {
        "layer": layers or range(hooked.cfg.n_layers),
        "head": heads or range(hooked.cfg.n_heads),
        "step": steps or range(num_steps),
    }
    cells = _cells(whole, {axis: axes[axis] for axis in each if axis != "layer" or "*" in site})
    plan = sweep.plan(
        hooked,
        texts,
        seeds,
        cells,
        {metric: measures[metric]},
        num_steps=num_steps,
        guidance=guidance,
    )
    if explain:
        say(plan.explain())
        return
    folder, file = folder_or_file(out)
    column = "scene_relation_loose" if metric == "scene" else metric
    title = (
        f"{model}, {len(texts)} prompts × {len(seeds)} seeds: effect on {metric}, after − before"
    )
    if top is not None:
        search = sweep.search(
            plan,
            column,
            top,
            folder,
            sample=sample,
            executor=executor,
            workers=workers,
            score=score,
        )
        show(search.table[search.table["drawn"] != ""], file, title, show_rows)
        say(
            f"scores against exact effects: rank correlation {search.spearman}, of sizes "
            f"{search.of_sizes}"
        )
        say(str(search))
        return
    found = plan.run(folder, executor, workers)
    show(_effects(found, column), file, title, show_rows)
    if failed := int((found["error"] != "").sum()):
        say(
            f"{failed} cells failed; the first: "
            f"{next(filter(None, found['error'].values.flatten().tolist()))}"
        )


def _tokens(text: str | None) -> Any:
    """A role, or a word."""
    from ..text.prompts import Role, word

    return text if text is None or text in get_args(Role) else word(text)


def _cells(whole: Intervention, axes: Mapping[str, Sequence[int]]) -> dict[str, Intervention]:
    """One intervention for each combination of values; an axis that is not there stays whole."""
    from .. import sweep

    heads, steps = (
        (None if "head" in axes else whole.heads),
        (None if "step" in axes else whole.steps),
    )
    one = replace(whole, heads=heads, steps=steps)
    return sweep.grid(one, **{f"{axis}s": values for axis, values in axes.items()})


def _effects(found: Any, column: str) -> pd.DataFrame:
    """Effects of a sweep, the largest first: intervention, metric, mean, low, high."""
    import pandas as pd

    parts = []
    for name in (str(name) for name in found if str(name).endswith("_effect")):
        table = (
            found[name]
            .reset_coords(drop=True)
            .to_series()
            .unstack("interval")[["mean", "low", "high"]]
        )
        parts.append(table.assign(metric=name.removesuffix("_effect")).reset_index())
    table = pd.concat(parts)[["intervention", "metric", "mean", "low", "high"]]
    size = table[table["metric"] == column].set_index("intervention")["mean"].abs()
    order = table["intervention"].map(size)
    return (
        table.assign(order=order)
        .sort_values("order", ascending=False, kind="stable")
        .drop(columns="order")
    )
