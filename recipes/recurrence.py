"""Do relation heads recur, in other sizes, seeds and with the other text encoder? `python -m recipes.recurrence`

Paper: one head of one size, with random token embeddings (L2H8 of RTE-DiT-B, named by screening with the relation words), and one
of the T5 model, named by the relation's effect on the second shape word (L3H7 of T5-DiT-B); that smaller sizes, or another seed,
have them is not shown. What would falsify it: a size or seed that draws relations without such a head; heads in the late layers;
or relation words masked in the heads found cost no more than in random heads.

Rules and predictions stand below, stated before the sizes were compared. A head is found if the maps of its words over
positions are ramps, and more so than those of random vectors (`relation_head.relation_heads`; p is not corrected for the number
of heads). Where more than half of all heads are found, the strongest half is knocked out, so that there are random ones to
compare with. All images share scenes and noise, across models too, so that text encoders are compared scene by scene. Of
"rte-micro/seed-1" there are no weights, but the screening of its last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from dit_lens import ablation
from dit_lens.stats import Interval, clustered_mean, paired_difference
from dit_lens.training import dynamics
from hooked_models import HookedTextToImage
from hooked_models.hub import ZOO

from .claims import Claim, report, stage
from .knockouts import Conditions, accuracy, change, knocked_out
from .relation_head import relation_heads

HARMFUL, BEYOND_CONTROLS, HARMLESS = (-1.0, -0.17), (-1.0, -0.1), (-0.1, 0.1)
FOUND, EVERYWHERE = "heads found", "all heads"
SCREENED_WITH = {"rte": "words", "t5": "shape2"}
HIDDEN = {"rte": "relation", "t5": "shape2"}
"""Which word the heads that were found read: what the screening's vectors are of."""


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    rte: tuple[str, ...] = ("rte-nano", "rte-micro", "rte-micro/seed-1", "rte-mini")
    """Models with random token embeddings: bundled, or pipeline folders; or a seed of which only the course was kept."""
    t5: tuple[str, ...] = ("t5-micro", "t5-mini")
    """Models with a T5; each is compared with the one of `rte` that has its size, in this order: `same_size`."""
    same_size: tuple[str, ...] = ("rte-micro", "rte-mini")
    pairs: int = 64
    """Images a condition."""
    full: bool = False
    """Four times the images."""
    seed: int = 0
    out: Path = Path("results/recurrence")


def main(config: Config) -> None:
    rankings: dict[str, pd.DataFrame] = {}
    drawn: dict[str, pd.DataFrame] = {}
    claims: list[Claim] = []
    images = config.pairs * (4 if config.full else 1)
    for encoder, names in (("rte", config.rte), ("t5", config.t5)):
        for name in names:
            course = ZOO / name / "dynamics.parquet"
            if not (ZOO / name / "model_index.json").exists() and course.exists():
                rankings[name] = last_screening(pd.read_parquet(course), SCREENED_WITH[encoder])
            else:
                model = HookedTextToImage.from_pretrained(name)
                label = Path(name).name
                rankings[name] = stage(config.out, f"{label}-screening", model, screening, SCREENED_WITH[encoder])
                found = found_heads(rankings[name])
                drawn[name] = stage(
                    config.out, f"{label}-knockouts", model, knockouts, found, HIDDEN[encoder], images, config.seed
                )
            claims += head_claims(name, encoder, rankings[name])
            claims += knockout_claims(name, encoder, drawn[name]) if name in drawn else []
    claims += [contrast(rte, t5, drawn) for rte, t5 in zip(config.same_size, config.t5, strict=True)]
    report("Relation heads over sizes, seeds and text encoders", claims, config.out, full=config.full)
    pd.concat(rankings, names=["model"]).reset_index("model").to_parquet(config.out / "screening.parquet", index=False)
    pd.concat(drawn, names=["model"]).reset_index("model").to_parquet(config.out / "knockouts.parquet", index=False)
    figure(rankings, drawn).savefig(config.out / "recurrence.png", dpi=150)


# Heads


def screening(model: HookedTextToImage, source: str) -> pd.DataFrame:
    """`dynamics.screen` with the relation words, or with the relation's effect on the second shape word."""
    return dynamics.screen(model)[source]


def last_screening(course: pd.DataFrame, source: str) -> pd.DataFrame:
    """The same of a run's last step, from its course."""
    last = course[(course["step"] == course["step"].max()) & (course["source"] == source)]
    wide = last.pivot_table(index=["layer", "head"], columns="quantity", values="value").reset_index()
    return wide.sort_values("projection", key=np.abs, ascending=False, ignore_index=True)


def found_heads(ranking: pd.DataFrame) -> list[str]:
    """Names of the heads found, strongest first, at most half of all."""
    return [f"L{row.layer}H{row.head}" for row in relation_heads(ranking).itertuples()][: len(ranking) // 2]


def knockouts(model: HookedTextToImage, found: Sequence[str], hidden: str, n: int, seed: int) -> pd.DataFrame:
    """`knocked_out`: the word masked in the heads found, and the relation words in all heads."""
    conditions: Conditions = {EVERYWHERE: (ablation.knockout_role("relation"), [])}
    if found:
        conditions = {FOUND: (ablation.knockout_role(hidden, found), ["heads"]), **conditions}
    return knocked_out(model, conditions, n, seed)


# Claims


def head_claims(name: str, encoder: str, ranking: pd.DataFrame) -> list[Claim]:
    """At least one head, in the first half of the layers. A count is exact; depths are of the heads found, and vary over them."""
    found = relation_heads(ranking)
    signs = ", ".join(f"L{row.layer}H{row.head} {row.cosine:+.2f}" for row in found.head(6).itertuples())
    paper = {"rte": "one of 144, L2H8, +.93 to +.98", "t5": "one of 144, L3H7, −.98"}[encoder]
    with_what = {"words": "relation words", "shape2": "the relation's effect on the second shape word"}[SCREENED_WITH[encoder]]
    claims = [
        Claim(
            f"{name}: heads of {len(ranking)} whose maps of {with_what} are ramps",
            paper if "seed" not in name else "–",
            Interval(*[float(len(found))] * 3),
            (1.0, float(len(ranking))),
            signs + (" …" if len(found) > 6 else ""),
        )
    ]
    if len(found):
        depth = found["layer"].to_numpy(float) / max(int(ranking["layer"].max()), 1)
        claims.append(
            Claim(
                f"{name}: their layers, 0 first to 1 last",
                {"rte": ".18", "t5": ".27"}[encoder],
                clustered_mean(depth[:, None]),
                (0, 0.5),
            )
        )
    return claims


def knockout_claims(name: str, encoder: str, rows: pd.DataFrame) -> list[Claim]:
    """Change of relation accuracy (loose), paired by scene and noise."""
    loose, random, word = "relation_loose", f"{FOUND} | random heads", HIDDEN[encoder].replace("shape2", "second shape word")
    word = word.replace("relation", "relation words")
    before = accuracy(rows, "none", loose)
    claims = []
    if FOUND in set(rows["condition"]):
        beside = f"{before:.2f} → {accuracy(rows, FOUND, loose):.2f}, binding {change(rows, FOUND, 'unique_binding').mean:+.3f}"
        claims += [
            Claim(f"{name}: {word} masked in the heads found", "–", change(rows, FOUND, loose), HARMFUL, beside),
            Claim(
                f"{name}: the same, against random heads",
                "–",
                change(rows, FOUND, loose, against=random),
                BEYOND_CONTROLS,
                f"random heads {change(rows, random, loose).mean:+.3f}",
            ),
        ]
    claims.append(
        Claim(
            f"{name}: relation words masked in all heads",
            {"rte": "critical", "t5": "≈ no change"}[encoder],
            change(rows, EVERYWHERE, loose),
            {"rte": HARMFUL, "t5": HARMLESS}[encoder],
            f"{before:.2f} → {accuracy(rows, EVERYWHERE, loose):.2f}",
        )
    )
    return claims


def contrast(rte: str, t5: str, drawn: dict[str, pd.DataFrame]) -> Claim:
    """How much more relation words cost with random token embeddings than with T5, in all heads, scene by scene."""
    lost = [losses(drawn[name]) for name in (t5, rte)]
    return Claim(
        f"relation words masked in all heads: {rte} minus {t5}",
        "critical against ≈ no change",
        paired_difference(*(each.to_numpy()[:, None] for each in lost)),
        BEYOND_CONTROLS,
    )


def losses(rows: pd.DataFrame) -> pd.Series:
    """Change of the relation by scene, of the words masked in all heads."""
    by_scene = rows.set_index(["condition", "scene"])["relation_loose"]
    return by_scene[EVERYWHERE] - by_scene["none"]


# Figure


def figure(rankings: dict[str, pd.DataFrame], drawn: dict[str, pd.DataFrame]) -> Figure:
    """A column a model: every head's cosine, those found in frames, and below what knock-outs cost."""
    whole, axes = plt.subplots(2, len(rankings), figsize=(2.3 * len(rankings), 4.2), layout="constrained", squeeze=False)
    for (maps, costs), (name, ranking) in zip(axes.T, rankings.items(), strict=True):
        grid = ranking.pivot_table(index="layer", columns="head", values="cosine")
        shown = maps.imshow(grid.to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        for row in relation_heads(ranking).itertuples():
            maps.add_patch(plt.Rectangle((row.head - 0.45, row.layer - 0.45), 0.9, 0.9, fill=False, linewidth=1.5))
        maps.set(title=name, xlabel="head", ylabel="layer", xticks=range(grid.shape[1]), yticks=range(grid.shape[0]))
        conditions = {"found": FOUND, "random": f"{FOUND} | random heads", "all": EVERYWHERE}
        rows = drawn.get(name)
        for place, condition in enumerate(conditions.values() if rows is not None else ()):
            cost = change(rows, condition, "relation_loose")
            color = "tab:grey" if "random" in condition else "tab:red"
            costs.errorbar(place, cost.mean, yerr=[[cost.mean - cost.low], [cost.high - cost.mean]], fmt="o", color=color)
        costs.set(ylim=(-1.05, 0.15), xlim=(-0.5, 2.5), xticks=range(3), xticklabels=conditions)
        costs.axhline(0, color="black", linewidth=0.6)
        costs.spines[["top", "right"]].set_visible(False)
        if rows is None:
            costs.text(1, -0.5, "no weights", ha="center", fontsize=8)
    axes[1][0].set_ylabel("change of relation, 95 %")
    whole.colorbar(shown, ax=axes[0].tolist(), label="cosine with the ramps", shrink=0.8)
    return whole


if __name__ == "__main__":
    main(tyro.cli(Config))
