"""Causal sweeps: many interventions on many prompts and seeds; shared work is done once.

    heads = Intervention("blocks.*.cross_attn.hook_z")
    cells = sweep.grid(heads, layers=range(6), heads=range(3), steps=range(14))
    plan = sweep.plan(model, prompts, seeds=[0, 1], interventions=cells, metrics={"height": height})
    print(plan.explain())                    # cells, shared work, FLOPs, bytes, expected time
    found = plan.run(out="results/heads")    # killed and repeated, it goes on where it was
    found["height_effect"].set_index(intervention=["layer", "head", "step"]).unstack("intervention")

A cell is an intervention in the run of one prompt with one seed, and its value is that of the run
`model.run_with_hooks(prompts, seed=seed, fwd_hooks=intervention.hooks(model, prompts))` in this
prompt's row.

Cells share text, keys and values; the clean run up to the first step that an intervention touches;
there, the layers before the first that it touches, and the guidance branch that it leaves alone.
The rest are rows of a batch, and each touched site has one hook, which makes the edits of all rows.
Metrics that look at one step end there, and images are decoded only where a metric looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import xarray as xr
from jaxtyping import Int

from hooked_models import HookedTextToImage
from hooked_models.arguments import integer, integers, is_several, mapping, number
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.generation.names import IMAGE_HOOK

from ..runs.drawing import Planning
from .conditions import Interventions, grid, resolve
from .halves import Stability, stability
from .metrics import (
    FIRST_TOUCHED,
    Metric,
    ShareOf,
    Values,
    displacement,
    relation_metric,
    scene_metric,
)
from .plan import Plan
from .search import Missed, Search, Searching, search, two_stage

__all__ = [
    "Metric",
    "Missed",
    "Plan",
    "Search",
    "Searching",
    "ShareOf",
    "Stability",
    "displacement",
    "grid",
    "plan",
    "relation_metric",
    "run",
    "scene_metric",
    "search",
    "stability",
    "two_stage",
]

Metrics = Mapping[str, Metric | Callable[..., Values]]
NoiseSeeds = int | Sequence[int] | Sequence[Sequence[int]] | Int[np.ndarray, "..."]


def _checked_metrics(metrics: Metrics) -> dict[str, Metric]:
    """Metrics by name.

    Raises ValueError for none, or a name that the results have for something else.
    """
    if not mapping("metrics", metrics, "function of images or Metric"):
        raise ValueError(
            "metrics is empty, so that nothing is measured: give metrics={name: function of "
            "images}."
        )
    taken = {"intervention", "prompt", "seed", "layer", "head", "step", "interval", "cell", "error"}
    if clash := [
        name for name in metrics if name in taken or name.endswith(("_baseline", "_effect"))
    ]:
        raise ValueError(
            f"A metric cannot be called {clash[0]!r}, which has a meaning in the results: give it "
            "another name."
        )
    return {
        name: metric if isinstance(metric, Metric) else Metric(metric)
        for name, metric in metrics.items()
    }


def _seeds(seeds: NoiseSeeds, prompts: int) -> list[int | Sequence[int]]:
    """Seeds of a plan, each one for all prompts or one a prompt."""
    several: Any = list(seeds) if is_several(seeds) else seeds  # type: ignore[arg-type]
    own = is_several(several) and bool(several) and all(map(is_several, several))
    if own and (len(several) != prompts or len(set(map(len, several))) > 1):
        raise ValueError(
            f"seeds has rows of length {[len(row) for row in several]}: give seeds for all "
            f"prompts, [seed], or equally many for each, [{prompts} seed]."
        )
    rows = [
        list(integers("seeds", row, -(2**63), 2**64 - 1)) for row in (several if own else [several])
    ]
    for row in rows:
        if not row or len(set(row)) < len(row):
            raise ValueError(f"seeds={row}: give at least one, and each once.")
    return list(zip(*rows, strict=True)) if own else list(rows[0])


def plan(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    seeds: NoiseSeeds,
    interventions: Interventions,
    metrics: Metrics,
    **how: Unpack[Planning],
) -> Plan:
    """Plan a sweep without running it.

    `plan(…).explain()` gives its cost, `plan(…).run(out)` runs it.

    Args:
        model: the model that draws; no hooks may be attached.
        prompts: "mean" and "resample" look at all of them (with the same seed's noise).
        seeds: every prompt is run with each; or for each prompt its own, [prompt seed].
        interventions: one each, or several that are made together (none: the run without); a
            mapping names them. `grid` makes many.
        metrics: name → function of images [batch 3 height width] in [0, 1] → [batch], or a `Metric`
            on something else.
        **how: `num_steps`, `guidance`, `batch` and `rng`; see `Planning`.

    Raises:
        UnknownHookError: no such site; the nearest one is suggested.
        ValueError: an intervention or a metric has no meaning in these runs, a seed stands twice,
            or hooks are attached.

    Example:
        >>> plan = sweep.plan(
        ...     model, "red circle is above blue square", 0, cells, {"red": red}, num_steps=2
        ... )
        >>> plan.runs, plan.cells
        (1, 3)
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    num_steps, guidance, rng = (
        how.get("num_steps", DEFAULT_STEPS),
        how.get("guidance"),
        how.get("rng", 0),
    )
    guidance = number("guidance", model.default_guidance if guidance is None else guidance)
    numbers = _seeds(seeds, len(texts))
    wrapped = _checked_metrics(metrics)
    model.check_no_hooks("A sweep compares with the model as it is")
    batch = how.get("batch")
    batch = None if batch is None else integer("batch", batch, 1)
    draft = model.draft(texts, 0, num_steps, guidance)
    extent, steps = draft.extent, len(draft.solver)
    reads = {name: metric.read(extent) for name, metric in wrapped.items()}
    if model.behind_nnsight and any(read.inner != IMAGE_HOOK for read in reads.values()):
        raise ValueError("Runs behind nnsight go from noise to image: take metrics on the image.")
    conditions = resolve(model, texts, interventions, draft, rng)
    for name, read in reads.items():
        if read.step == FIRST_TOUCHED and (
            late := [one.label for one in conditions if one.first == steps]
        ):
            raise ValueError(
                f"The metric {name!r} is taken at the first step that an intervention touches, and "
                f"{late[0]!r} touches none: name a step, on='steps.0.{read.inner}'."
            )
    return Plan(
        model,
        texts,
        numbers,
        conditions,
        wrapped,
        reads,
        draft.num_steps,
        steps,
        guidance,
        extent,
        rng,
        batch,
    )


def run(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    seeds: NoiseSeeds,
    interventions: Interventions,
    metrics: Metrics,
    out: str | Path | None = None,
    executor: str = "local",
    workers: int | None = None,
    **how: Unpack[Planning],
) -> xr.Dataset:
    """Every intervention on every prompt and seed, beside the run without.

    Args:
        model: the model that draws; no hooks may be attached.
        prompts: as in `plan`.
        seeds: as in `plan`: every prompt is run with each, or [prompt seed].
        interventions: as in `plan`: a sequence, or name → one or several made together.
        metrics: as in `plan`: name → function [batch 3 height width] → [batch], or a `Metric`.
        out: a folder for results: a call that was stopped, even killed, goes on from there when it
            is repeated.
        executor: "local", this process and its device; "ray", the workers of a Ray cluster: of
            `ray.init`, RAY_ADDRESS, or a new one on this machine. Each loads the model (one that
            was not loaded from a folder or the hub is sent), onto its own device of the model's
            kind; a worker that is lost is replaced, and its cells are run again.
        workers: of "ray"; one for each of its GPUs (of its CPUs, for a model on a CPU) unless
            given.
        **how: as in `plan`.

    Returns:
        A Dataset over (intervention, prompt, seed): every metric; `{metric}_baseline`, of the same
        run without intervention (prompt, seed), or with the dims of the metric where that depends
        on the step; `{metric}_effect` (intervention, interval), the mean of their paired difference
        with its 95 % interval over prompts (over seeds, if there is one prompt), of several
        prompts with the split-half stability of the ten largest in its attrs,
        `split_half_agreement` and so on (see `stability`: few prompts rank noise); `error`, empty
        where all went well: a metric that fails in one cell is NaN there, and the rest goes on.
        Coordinates of intervention: `layer`, `head`, `step`, −1 where it has none or several.

    Raises:
        ValueError: as in `plan`; `out` holds results of another model, prompts, plan or metrics; no
            such executor; or a metric fails on every run without intervention.
        ImportError: executor="ray", and Ray is not installed.
        RuntimeError: workers are lost again and again.

    Example:
        >>> found = sweep.run(
        ...     model, "red circle is above blue square", 0, cells, {"red": red}, num_steps=2
        ... )
        >>> dict(found["red"].sizes)
        {'intervention': 3, 'prompt': 1, 'seed': 1}
    """
    return plan(model, prompts, seeds, interventions, metrics, **how).run(out, executor, workers)
