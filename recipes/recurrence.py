"""Do relation heads recur, in other sizes, seeds and with the other text encoder? `python -m recipes.recurrence`

Paper: one head of one size, with random token embeddings (L2H8 of RTE-DiT-B, named by screening with the relation words), and one
of the T5 model, named by the relation's effect on the second shape word (L3H7 of T5-DiT-B); that smaller sizes, or another seed,
have them is not shown. What would falsify it: a size or seed that draws relations without such a head; heads in the late layers;
or found heads that read the opposite relation and yet draw the caption's, or do so no less than random heads.

A head is found if the maps of a word over positions are ramps, and more so than those of random vectors
(`knockouts.relation_heads`; p is not corrected for the number of heads). Causally, heads are given the keys and values that a
word has in the caption of the opposite relation (as many words, the same objects), nothing else is touched: if the relation is
read there, the layout turns round. Which word carries it is asked of all heads at the first step, by the layout predicted there
(cosine with the caption's, from 1 to −1); of the heads found, by images. Controls: as many random heads of the same layers. Where
more than half of all heads are found, the strongest half is taken. Scenes and noise are shared by all models. Of
"rte-micro/seed-1" there are no weights, but the screening of its last step.

Predictions stand below and were stated before this was measured, but for one thing: that heads of `t5-micro` have ramps for the
relation's effect on the *first* shape word was seen before. `t5-mini` was trained, and not looked at, when they were stated.
They replaced, within a quarter of an hour, predictions for masking the word in the heads found (second shape word with T5); no
outcome of those is in the repository. `relation_circuit` and `text_carrier` correct what is read here of numbers and of words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure

from dit_lens import Intervention, ablation, scenes, sweep
from dit_lens.intervene.edits import Replace
from dit_lens.readout.circuits import parse_head
from dit_lens.stats import Interval, clustered_mean, paired_difference
from dit_lens.text.prompts import Role
from dit_lens.training import dynamics
from hooked_models import HookedTextToImage
from hooked_models.pipelines.hub import ZOO

from .claims import Claim, report, stage
from .knockouts import found_heads, layout_metric, relation_heads

READ: dict[str, dict[str, Role]] = {"rte": {"words": "relation"}, "t5": {"shape2": "shape2", "shape1": "shape1"}}
"""By text encoder: what heads are screened with (`dynamics.SOURCES`) → the word whose keys and values they are given."""
NAMES = {"relation": "relation words", "shape1": "first shape word", "shape2": "second shape word"}
TURNED, NOT_TURNED = (-2.0, -1.0), (-0.2, 0.2)
"""Change of the layout's cosine."""
DRAWN, BEYOND_CONTROLS = (0.3, 1.0), (0.2, 1.0)
"""Share of images that show the opposite relation."""


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    rte: tuple[str, ...] = ("rte-nano", "rte-micro", "rte-micro/seed-1", "rte-mini")
    """Models with random token embeddings: bundled, pipeline folders, or a seed of which only the course was kept."""
    t5: tuple[str, ...] = ("t5-micro", "t5-mini")
    """Models with a T5."""
    looks: int = 64
    """Scenes whose first step is looked at, with two noises each."""
    images: int = 64
    """Scenes drawn, with one noise each."""
    full: bool = False
    """Four times both."""
    out: Path = Path("results/recurrence")


def main(config: Config) -> None:
    screened: dict[str, pd.DataFrame] = {}
    rankings: dict[tuple[str, str], pd.DataFrame] = {}
    looks: dict[str, pd.DataFrame] = {}
    drawn: dict[str, pd.DataFrame] = {}
    claims: list[Claim] = []
    looked, images = (n * (4 if config.full else 1) for n in (config.looks, config.images))
    for encoder, names in (("rte", config.rte), ("t5", config.t5)):
        for name in names:
            label = Path(name).name
            if kept_course_only(name):
                model, screened[name] = None, last_screening(pd.read_parquet(ZOO / name / "dynamics.parquet"))
            else:
                model = HookedTextToImage.from_pretrained(name)
                screened[name] = stage(config.out, f"{label}-screening", model, screening)
            for source in READ[encoder]:
                rankings[name, source] = screened[name].query("source == @source").reset_index(drop=True)
                claims += head_claims(name, source, rankings[name, source])
            if model is not None:
                found = {
                    role: heads for source, role in READ[encoder].items() if (heads := strongest_half(rankings[name, source]))
                }
                looks[name] = stage(config.out, f"{label}-looks", model, first_looks, looked)
                ramps = {role: found_heads(rankings[name, source]) for source, role in READ[encoder].items()}
                drawn[name] = stage(config.out, f"{label}-images", model, drawn_images, found, ramps, images)
                claims += [*carrier_claims(name, encoder, looks[name]), *turned_claims(name, encoder, drawn[name])]
    report("Relation heads over sizes, seeds and text encoders", claims, config.out, full=config.full)
    for what, parts in {"screening": screened, "looks": looks, "images": drawn}.items():
        pd.concat(parts, names=["model"]).reset_index("model").to_parquet(config.out / f"{what}.parquet", index=False)
    figure(rankings, looks, drawn).savefig(config.out / "recurrence.png", dpi=150)


# Heads


def kept_course_only(name: str) -> bool:
    """Whether a bundled run has no weights."""
    return (ZOO / name / "dynamics.parquet").exists() and not (ZOO / name / "model_index.json").exists()


def screening(model: HookedTextToImage) -> pd.DataFrame:
    """`dynamics.screen`: a row a source and head, the strongest first."""
    return pd.concat(dynamics.screen(model), names=["source"]).reset_index("source")


def last_screening(course: pd.DataFrame) -> pd.DataFrame:
    """The same of a run's last step, from its course."""
    found = {source: dynamics.last_screening(course, source) for source in dynamics.SOURCES}
    return pd.concat(found, names=["source"]).reset_index("source")


def strongest_half(ranking: pd.DataFrame) -> list[str]:
    """`knockouts.found_heads`, at most half of all."""
    return found_heads(ranking)[: len(ranking) // 2]


# Exchanges


class Exchange:
    """Scenes, and interventions that give heads a word's keys and values from the captions of the opposite relations."""

    def __init__(self, model: HookedTextToImage, n: int, seed: int) -> None:
        self.wanted = scenes.sample(n, seed=seed, split="all", color_words="both")
        self.opposite = [scenes.opposite(scene) for scene in self.wanted]
        self.texts, others = ([scenes.caption(scene) for scene in each] for each in (self.wanted, self.opposite))
        parts = [f"blocks.{layer}.cross_attn.hook_{part}" for layer in range(model.cfg.n_layers) for part in "kv"]
        names = [f"steps.0.cond.{part}" for part in parts]
        _, cache = model.run_with_cache(others, seed=0, names_filter=names, num_steps=1)
        self.values = {part: cache[name] for part, name in zip(parts, names, strict=True)}  # the same at every step

    def of(self, role: Role, heads: Sequence[str] | None = None, steps: int | None = None) -> list[Intervention]:
        """In all heads unless some are given."""
        action = Replace(self.values)
        if heads is None:
            return [Intervention(site, None, role, steps, action=action) for site in self.values]
        return [
            Intervention(f"blocks.{parse_head(head)[0]}.cross_attn.hook_{part}", head, role, steps, action=action)
            for head in heads
            for part in "kv"
        ]


@torch.no_grad()
def first_looks(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """By word, exchanged in all heads at the first step: the layout's cosine predicted there, and without; mean of two noises."""
    exchange = Exchange(model, n, seed=5)

    conditions = {role: exchange.of(role, steps=0) for role in NAMES}  # type: ignore[arg-type]
    seen = sweep.run(model, exchange.texts, [0, 1], conditions, {"layout": layout_metric(model, exchange.wanted)})
    return seen[["layout", "layout_baseline"]].mean("seed").to_dataframe().reset_index()


@torch.no_grad()
def drawn_images(model: HookedTextToImage, found: dict[Role, list[str]], ramps: dict[Role, list[str]], n: int) -> pd.DataFrame:
    """By word and heads, exchanged at all steps: whether the image shows the opposite relation (loose), the caption's, and both
    objects as named; condition "none" without. Every scene has its own noise. `ramps` are all heads found: no controls."""
    exchange, rng = Exchange(model, n, seed=6), np.random.default_rng(0)
    conditions = {"none": list[Intervention]()}
    for role, heads in found.items():
        conditions[role] = exchange.of(role, heads)
        conditions[f"{role} | random heads"] = ablation.random_heads(model, conditions[role], rng, exclude=ramps[role])
    rows = []
    for condition, interventions in conditions.items():
        hooks = [hook for one in interventions for hook in one.hooks(model, exchange.texts)]
        images = model.run_with_hooks(exchange.texts, seed=list(range(n)), fwd_hooks=hooks)
        opposite, own = (scenes.evaluate(images, each) for each in (exchange.opposite, exchange.wanted))
        rows.append(
            pd.DataFrame(
                {
                    "condition": condition,
                    "scene": np.arange(n),
                    "opposite": opposite["relation_loose"].values.astype(float),
                    "own": own["relation_loose"].values.astype(float),
                    "binding": own["unique_binding"].values.astype(float),
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


# Claims


def head_claims(name: str, source: str, ranking: pd.DataFrame) -> list[Claim]:
    """At least one head, in the first half of the layers. A count is exact; depths vary over the heads found."""
    found = relation_heads(ranking)
    paper = {"words": "one of 144, L2H8, +.93 to +.98", "shape2": "one of 144, L3H7, −.98"}.get(source, "–")
    what = "relation words" if source == "words" else f"the relation's effect on the {NAMES[source]}"
    strongest = ", ".join(f"L{row.layer}H{row.head} {row.cosine:+.2f}" for row in found.head(6).itertuples())
    claims = [
        Claim(
            f"{name}: heads of {len(ranking)} whose maps of {what} are ramps",
            paper,
            Interval(*[float(len(found))] * 3),
            (1.0, float(len(ranking))),
            strongest + (" …" if len(found) > 6 else ""),
        )
    ]
    if len(found):
        depth = found["layer"].to_numpy(float) / max(int(ranking["layer"].max()), 1)
        layer = {"words": ".18", "shape2": ".27"}.get(source, "–")
        claims.append(Claim(f"{name}: their layers, first 0, last 1", layer, clustered_mean(depth[:, None]), (0.0, 0.5)))
    return claims


def carrier_claims(name: str, encoder: str, looks: pd.DataFrame) -> list[Claim]:
    """Which word of the opposite caption turns the layout round, read by all heads at the first step."""
    expected = {"rte": {"relation": TURNED}, "t5": {"shape1": TURNED, "shape2": TURNED}}[encoder]
    paper = {"rte": {"relation": "critical"}, "t5": {"relation": "≈ no change", "shape2": "carries it"}}[encoder]
    claims = []
    for role, word in NAMES.items():
        rows = looks[looks["intervention"] == role]
        change = paired_difference(rows[["layout_baseline"]].to_numpy(float), rows[["layout"]].to_numpy(float))
        claims.append(
            Claim(
                f"{name}: change of the layout's cosine at step 0, {word} from the opposite caption",
                paper.get(role, "–"),
                change,
                expected.get(role, NOT_TURNED),
                f"{rows['layout_baseline'].mean():+.2f} without",
            )
        )
    return claims


def turned_claims(name: str, encoder: str, rows: pd.DataFrame) -> list[Claim]:
    """How many more images show the opposite relation, once the heads found have read it, than without; than by random heads."""
    claims = []
    for role in READ[encoder].values():
        random = f"{role} | random heads"
        if role not in set(rows["condition"]):
            continue
        binding = rows.groupby("condition")["binding"].mean()
        what = f"{name}: opposite relation drawn, heads found given the opposite caption's {NAMES[role]}"
        beside = f"binding {binding['none']:.2f} → {binding[role]:.2f}"
        others = f"random heads {more(rows, random, 'none').mean:.3f}"
        claims += [
            Claim(what, "–", more(rows, role, "none"), DRAWN, beside),
            Claim(f"{name}: the same, beyond random heads", "–", more(rows, role, random), BEYOND_CONTROLS, others),
        ]
    return claims


def more(rows: pd.DataFrame, condition: str, than: str) -> Interval:
    """Difference of the share of images that show the opposite relation, paired by scene."""
    by_scene = rows.pivot(index="scene", columns="condition", values="opposite")
    return paired_difference(by_scene[[than]].to_numpy(), by_scene[[condition]].to_numpy())


# Figure


def figure(
    rankings: dict[tuple[str, str], pd.DataFrame], looks: dict[str, pd.DataFrame], drawn: dict[str, pd.DataFrame]
) -> Figure:
    """A column a model and screening: every head's cosine, those found in frames; below, what the heads found make it draw."""
    whole, axes = plt.subplots(3, len(rankings), figsize=(2.1 * len(rankings), 6.2), layout="constrained", squeeze=False)
    roles = {source: role for some in READ.values() for source, role in some.items()}
    for (maps, first, costs), ((name, source), ranking) in zip(axes.T, rankings.items(), strict=True):
        grid = ranking.pivot_table(index="layer", columns="head", values="cosine")
        shown = maps.imshow(grid.to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        for layer, head in relation_heads(ranking)[["layer", "head"]].to_numpy(int):
            maps.add_patch(plt.Rectangle((head - 0.45, layer - 0.45), 0.9, 0.9, fill=False, linewidth=1.5))
        maps.set(xlabel="head", ylabel="layer", xticks=range(grid.shape[1]), yticks=range(grid.shape[0]))
        maps.set_title(f"{name}\n{NAMES[roles[source]]}", fontsize=8)
        if name in looks:
            changes = looks[name].assign(change=looks[name]["layout"] - looks[name]["layout_baseline"])
            for place, role in enumerate(NAMES):
                point(first, place, clustered_mean(changes[changes["intervention"] == role][["change"]].to_numpy(float)))
            first.set(ylim=(-2.1, 0.3), xlim=(-0.5, 2.5), xticks=range(3))
            first.set_xticklabels(["relation", "shape 1", "shape 2"], fontsize=7)
            conditions = {"none": "none", "found": roles[source], "random": f"{roles[source]} | random heads"}
            for place, condition in enumerate(conditions.values()):
                values = drawn[name][drawn[name]["condition"] == condition][["opposite"]].to_numpy()
                if len(values):
                    point(costs, place, clustered_mean(values))
            costs.set(ylim=(-0.05, 1.05), xlim=(-0.5, 2.5), xticks=range(3))
            costs.set_xticklabels(conditions, fontsize=7)
        for ax in (first, costs):
            ax.axhline(0, color="black", linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
            if name not in looks:
                ax.set_axis_off()
    axes[1][0].set_ylabel("change of layout at step 0,\nword exchanged in all heads", fontsize=8)
    axes[2][0].set_ylabel("opposite relation drawn,\nword exchanged in heads found", fontsize=8)
    whole.colorbar(shown, ax=axes[0].tolist(), label="cosine with the ramps", shrink=0.8)
    return whole


def point(ax: plt.Axes, place: float, found: Interval) -> None:
    """A mean with its interval."""
    ax.errorbar(place, found.mean, yerr=[[found.mean - found.low], [found.high - found.mean]], fmt="o", color="tab:red")


if __name__ == "__main__":
    main(tyro.cli(Config))
