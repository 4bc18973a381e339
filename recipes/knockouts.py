"""Words masked in some heads, and the effect on images: functions that the recipes on relation heads
and object heads share.

rows = knocked_out(model, {"L2H2": (knockout_role("relation", "L2H2"), ("heads", "tokens"))}, n=64,
seed=0) change(rows, "L2H2", "relation_loose"), change(rows, "L2H2", "relation_loose", against="L2H2
| random heads")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from dit_lens import Intervention, ablation, scenes, screening, sweep
from dit_lens.stats import Interval, paired_difference
from dit_lens.text.prompts import Role
from dit_lens.training.dynamics import layout
from hooked_models import HookedTextToImage

SHAPE_WORDS: list[Role] = ["shape1", "shape2"]

WORDS = ("above", "below", "left", "right", "upper", "lower", "higher")
"""Words that heads are screened with, of either axis together; `screening.screen_axes` keeps them
apart.
"""
FOUND_COSINE, FOUND_P = 0.5, 0.01
"""A head is found if its maps are ramps, and more so than random vectors'."""

Control = Literal["heads", "tokens"]
Conditions = Mapping[str, tuple[Sequence[Intervention], Sequence[Control]]]
"""Name → interventions, and their random repetition."""


def scenes_of(n: int, seed: int) -> tuple[list[scenes.Scene], np.ndarray]:
    """The scenes of a seed, all combinations and both colours named, and a seed of noise for each,
    [scene].
    """
    return scenes.sample(
        n, seed=seed + 1, split="all", color_words="both"
    ), 1000 * seed + np.arange(n)


def knocked_out(
    model: HookedTextToImage, conditions: Conditions, n: int, seed: int, exclude: Sequence[str] = ()
) -> pd.DataFrame:
    """Verdicts of every condition, of its controls ("{name} | random heads"), and of none, on the
    same scenes and noise.

    `exclude`: heads that are no control, as in `ablation.random_heads`.
    Columns condition, seed, scene, and `ablation.VERDICTS` as numbers (NaN where one does not
    apply).
    """
    wanted, noise = scenes_of(n, seed)
    texts, rng = [scenes.caption(scene) for scene in wanted], np.random.default_rng(seed)
    whole: dict[str, Sequence[Intervention]] = {}
    for name, (interventions, controls) in conditions.items():
        whole[name] = interventions
        if "heads" in controls:
            whole[f"{name} | random heads"] = ablation.random_heads(
                model, interventions, rng, exclude
            )
        if "tokens" in controls:
            whole[f"{name} | random tokens"] = ablation.random_tokens(
                model, texts, interventions, rng
            )
    effects = ablation.ablation_effects(model, wanted, whole, noise[:, None], controls=0, rng=seed)
    rows = effects[list(ablation.VERDICTS)].isel(seed=0, drop=True).astype(float)
    kept = rows.to_dataframe().reset_index()[["condition", "scene", *ablation.VERDICTS]]
    return kept.assign(seed=seed)


def layout_metric(model: HookedTextToImage, wanted: Sequence[scenes.Scene]) -> sweep.Metric:
    """Metric of a sweep over the scenes' captions: the layout's cosine predicted at the first step
    touched (`layout`).
    """

    def placed(latents: Tensor, prompt: np.ndarray) -> np.ndarray:
        return layout(model.decode(latents), [wanted[row] for row in prompt])

    return sweep.Metric(placed, on="x0", given=("prompt",))


def names_of(cells: Iterable[Any]) -> list[str]:
    """ "L2H1" of (2, 1)."""
    return [f"L{layer}H{head}" for layer, head in sorted(cells)]


def accuracy(rows: pd.DataFrame, condition: str, verdict: str) -> float:
    """Share of images."""
    return float(rows.loc[rows["condition"] == condition, verdict].mean())


def change(rows: pd.DataFrame, condition: str, verdict: str, against: str = "none") -> Interval:
    """Change of a verdict from one condition to another, paired by scene and noise; NaN if either was
    not run.
    """
    by_scene = rows.set_index(["condition", "seed", "scene"])[verdict]
    if not {condition, against} <= set(rows["condition"]):
        return Interval(np.nan, np.nan, np.nan)
    before, after = by_scene[against], by_scene[condition]
    return paired_difference(
        before.to_numpy()[:, None], after.loc[before.index].to_numpy()[:, None]
    )


# Heads by weights


def relation_heads(ranking: pd.DataFrame) -> pd.DataFrame:
    """Rows of `screening.screen_heads` whose maps are ramps, and more so than random vectors'."""
    return ranking[(ranking["cosine"].abs() >= FOUND_COSINE) & (ranking["p"] <= FOUND_P)]


def found_heads(ranking: pd.DataFrame) -> list[str]:
    """Their names ("L2H2"), strongest first."""
    return [f"L{row.layer}H{row.head}" for row in relation_heads(ranking).itertuples()]


def screened(model: HookedTextToImage) -> tuple[pd.DataFrame, list[str]]:
    """`screening.screen_heads` with the relation words, and the heads that it names ("L2H2"),
    strongest first.
    """
    ranking = screening.screen_heads(
        model.dit, {word: screening.word_vector(model, word) for word in WORDS}
    )
    return ranking, found_heads(ranking)
