"""Fillers, a dropped "is", inverted order, colour synonyms: RTE against T5. `python -m recipes.robustness`

Paper: section A.8, figure 26B and the template table of its evaluation (T5-DiT-B, 264 prompts × 49 images); RTE "remains stable".
What would falsify it: "the" before the second object costs the T5 model no relation accuracy, or the RTE model much; or objects
drift elsewhere than the "the" shift of the second shape word's vector points.

All differences are paired (same scenes, same noise). What differs: `t5-scenes` read fillers and synonyms in its pre-training, as
T5-XXL did, but nothing beyond them; the DiTs, there and here, were trained on the plain captions alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

from dit_lens import evaluation, scenes, variance
from dit_lens.stats import Interval, clustered_mean
from dit_lens.task import DIRECTIONS
from dit_lens.task.captions import TRAINED
from dit_lens.task.scene import Relation
from hooked_models import HookedTextToImage

from .claims import Claim, evaluation_of, report

PAPER_T5 = {  # template → relation loose, of the trained one .808
    "no is": ".608",
    "the second": ".498",
    "the both": ".529",
    "no is, the second": ".400",
    "inverted": ".353",
    "inverted, the first": ".422",
    "inverted, the second": ".373",
    "crimson": ".494",
    "navy": ".539",
}
PAPER_DRIFT = {"the second": "(−34, −25) px; lower left, upper left", "the both": "(−18, −21) px; lower left, upper left"}
STABLE, LOST = 0.1, -0.1
"""A template that changes relation accuracy by less is harmless, one that costs more is not."""


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    rte: str = "rte-micro"
    t5: str = "t5-micro"
    scenes: int = 256
    """A split, of models that bring no evaluation of their own."""
    out: Path = Path("results/robustness")


def main(config: Config) -> None:
    rows = {name: evaluation_of(name, config.scenes, config.out) for name in (config.rte, config.t5)}
    effects = {name: evaluation.template_effects(of_model) for name, of_model in rows.items()}
    claims = [*fillers(config.rte, effects[config.rte], (-STABLE, STABLE)), *fillers(config.t5, effects[config.t5], (-1.0, LOST))]
    claims += drift(config.t5, rows[config.t5])
    report(f"Robustness: {config.rte} and {config.t5}", claims, config.out)
    pd.concat(effects, names=["model"]).reset_index("model").to_parquet(config.out / "effects.parquet", index=False)
    figure(effects).savefig(config.out / "robustness.png", dpi=150)


def change(effects: pd.DataFrame, template: str, metric: str) -> Interval:
    """Of one metric under one template."""
    found = effects[(effects["template"] == template) & (effects["metric"] == metric)]
    return Interval(*(found[["mean", "low", "high"]].iloc[0] if len(found) else [np.nan] * 3))


def fillers(model: str, effects: pd.DataFrame, predicted: tuple[float, float]) -> list[Claim]:
    """What each template does to relation accuracy, beside what it does to binding."""
    is_t5 = predicted[1] < 0
    return [
        Claim(
            f"{model}: {template!r}, change of relation (loose)",
            f".808 → {PAPER_T5[template]}" if is_t5 else "stable" if "inverted" not in template else "–",
            change(effects, template, "relation_loose"),
            predicted,
            f"unique binding {change(effects, template, 'unique_binding')}",
        )
        for template in PAPER_T5
        if template in set(effects["template"])
    ]


def drift(name: str, rows: pd.DataFrame) -> list[Claim]:
    """Whether objects move where the "the" shift of the second shape word points.

    The prediction: cosines of that shift, after the caption projection, with the relations' effect vectors (the paper's), each
    as a direction, summed.
    """
    model = HookedTextToImage.from_pretrained(name)
    plain = variance.factorial_prompts()
    vectors, factors = variance.word_vectors(model, plain, "shape2", at="caption")
    relations = variance.effect_vectors(vectors, factors[["shape1", "color1", "shape2", "relation"]])["relation"]
    names: list[Relation] = list(relations["relation"].values)
    claims = []
    for template, opening in (("the second", ""), ("the both", "the ")):
        with_the = [opening + the_second(prompt) for prompt in plain]
        shift = (variance.word_vectors(model, with_the, "shape2", at="caption")[0] - vectors).mean(dim=0)
        cosines = F.cosine_similarity(torch.tensor(relations.values), shift.double()[None]).numpy()
        strongest = [f"{names[i]} {cosines[i]:+.2f}" for i in np.argsort(-abs(cosines))[:3]]
        direction = cosines @ np.array([DIRECTIONS[relation] for relation in names], float)
        direction /= np.linalg.norm(direction)
        claims.append(
            Claim(
                f"{name}: {template!r}, px that object 1 moves along the predicted ({direction[0]:+.2f}, {direction[1]:+.2f})",
                PAPER_DRIFT[template],
                moved_along(rows, template, direction),
                (2.0, 128.0),
                f"cosines of the shift: {', '.join(strongest)}",
            )
        )
    return claims


def moved_along(rows: pd.DataFrame, template: str, direction: np.ndarray) -> Interval:
    """Pixels that object 1 moves against object 2, along a unit vector, where both images have both."""
    by_scene = rows[rows["split"] == "train"].set_index("scene")
    after, before = (by_scene[by_scene["template"] == name] for name in (template, TRAINED))
    before = before.loc[after.index]
    moved = [(after[f"{axis}1"] - after[f"{axis}2"]) - (before[f"{axis}1"] - before[f"{axis}2"]) for axis in "xy"]
    along = np.stack(moved, axis=1).astype(float) @ direction
    return clustered_mean(along[:, None])


def the_second(text: str) -> str:
    """ "red circle is above blue square" with "the" before the second object."""
    words = text.split()
    at = len(words) - 2 if words[-2] in scenes.COLORS else len(words) - 1
    return " ".join([*words[:at], "the", *words[at:]])


def figure(effects: dict[str, pd.DataFrame]) -> Figure:
    """Change of relation accuracy and of binding by template, a panel a model."""
    drawn, axes = plt.subplots(
        1, len(effects), figsize=(5 * len(effects), 4), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    templates = list(PAPER_T5)
    for ax, (model, table) in zip(axes[0], effects.items(), strict=True):
        for shift, (metric, label) in enumerate((("relation_loose", "relation, loose"), ("unique_binding", "unique binding"))):
            found = [change(table, template, metric) for template in templates]
            x = [f.mean for f in found]
            error = [[f.mean - f.low for f in found], [f.high - f.mean for f in found]]
            ax.errorbar(x, np.arange(len(templates)) + 0.2 * shift - 0.1, xerr=error, fmt="o", label=label)
        ax.axvline(0, color="grey", linewidth=0.6)
        ax.set_title(model)
        ax.set_xlabel("change against the trained template (paired)")
        ax.set_yticks(range(len(templates)), templates)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(frameon=False, fontsize=8, loc="lower left")
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Config))
