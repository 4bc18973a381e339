"""Three objects, two relations: do the same heads serve both? `python -m recipes.three_objects`

Beyond the paper, whose images hold two objects: `rte-trios-micro` is `rte-micro` trained on, half
of its scenes being trios ("red circle is above blue square and left of red triangle"). The
prediction: one set of heads reads both relations, each from its own words. Falsified by this:
hiding the second relation's words from the heads that are found with the first relation's costs the
second relation little, or the two relations are carried by different heads at step 0.

Three looks: heads screened with relation words where the first relation stands, and where the
second does; each relation's words hidden from the heads found with the first (controls: random
heads of the same layers, random words, and all heads as the most there is to lose); and, head by
head, the share of what exchanging a relation for its opposite does to the first clean-image
prediction (control: exchanging the third object's colour).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from dit_lens import Intervention, ablation, prompts, scenes, screening, sweep, viz
from dit_lens.intervene.edits import Replace
from dit_lens.intervene.interchange import Interchange
from dit_lens.stats import Interval, clustered_mean, paired_difference, proportion
from dit_lens.task import Scene, Trio
from dit_lens.task.evaluation import score
from dit_lens.task.scene import other_color
from hooked_models import HookedTextToImage

from . import recurrence
from .claims import Claim, report, stage
from .knockouts import WORDS, relation_heads

CLAUSES = {
    "relation1": "red circle is {} blue square",
    "relation2": "red circle is above blue square and {} red triangle",
}
LOST, KEPT = (-1.0, -0.15), (-0.1, 0.1)
SERVES = 0.1
"""Share of the gain² of an axis from which on a head is expected to be needed."""
SITE = "blocks.{}.cross_attn.hook_z"


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    model: str = "rte-trios-micro"
    scenes: int = 128
    """Trios whose accuracy is measured."""
    knockouts: int = 64
    """Trios whose words are hidden."""
    shares: int = 48
    """Trios whose words are exchanged."""
    served: int = 96
    """Trios drawn with one relation's words exchanged in the heads found by axis, and in all but
    one of them.
    """
    full: bool = False
    """Four times as many of each, and three draws of controls."""
    seed: int = 0
    out: Path = Path("results/three_objects")


@torch.no_grad()
def main(config: Config) -> None:
    scale, draws = (4, 3) if config.full else (1, 1)
    model = HookedTextToImage.from_pretrained(config.model)
    drawn = stage(config.out, "accuracy", model, accuracies, config.scenes * scale)
    found = stage(config.out, "screening", model, screened)
    heads = {clause: found.loc[found["clause"] == clause, "head"].tolist() for clause in CLAUSES}
    claims = [*accuracy_claims(drawn)]
    if heads["relation1"]:
        lost = stage(
            config.out,
            "knockout",
            model,
            knockouts,
            heads["relation1"],
            config.knockouts * scale,
            draws,
            config.seed,
        )
        claims += knockout_claims(lost, heads)
        viz.style.save(knockout_figure(lost), config.out / "knockout.png")
    carried = stage(config.out, "shares", model, shares, config.shares * scale, config.seed)
    claims += share_claims(carried)
    claims += served_claims(
        stage(config.out, "served", model, served, config.served * scale), axis_heads(model)
    )
    trios, hidden, changed = (n * scale for n in (config.scenes, config.knockouts, config.shares))
    basis = (
        f"{trios} trios drawn, {hidden} with words hidden, {changed} exchanged, a noise each, 1 run"
    )
    report(
        f"Three objects: {config.model}",
        claims,
        config.out,
        basis,
        model=config.model,
        heads=heads,
        full=config.full,
    )
    viz.style.save(share_figure(carried, heads["relation1"]), config.out / "shares.png")


def accuracies(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """Verdicts on held-out trios, and on held-out scenes of two objects: columns objects, verdict,
    mean, low, high.
    """
    wanted: dict[int, Sequence[Scene | Trio]] = {
        3: scenes.sample_trios(n, seed=100, split="held_out"),
        2: scenes.sample(n, seed=100, split="held_out", color_words="both"),
    }
    rows = []
    for objects, of_kind in wanted.items():
        verdicts = score(model, of_kind)
        for verdict in (
            "color",
            "shape",
            "unique_binding",
            "relation1_loose",
            "relation2_loose",
            "relation_loose",
        ):
            if verdict in verdicts:
                hits = proportion(verdicts[verdict].values.astype(float))
                rows.append({"objects": objects, "verdict": verdict, **hits._asdict()})
    return pd.DataFrame(rows)


def screened(model: HookedTextToImage) -> pd.DataFrame:
    """Relation heads by weights, with the words as they stand in each clause: columns clause, head,
    cosine, p.
    """
    found = []
    for clause, sentence in CLAUSES.items():
        vectors = {word: screening.word_vector(model, word, sentence) for word in WORDS}
        ranking = relation_heads(screening.screen_heads(model.dit, vectors))
        found += [
            {"clause": clause, "head": f"L{row.layer}H{row.head}", "cosine": row.cosine, "p": row.p}
            for row in ranking.itertuples()
        ]
    return pd.DataFrame(found, columns=["clause", "head", "cosine", "p"])


def clause_masks(
    model: HookedTextToImage, texts: list[str]
) -> dict[str, Bool[Tensor, "prompt text_pos"]]:
    """Which tokens are the relation words before, and after, the second object."""
    relation, shape = (prompts.role_mask(model, texts, role) for role in ("relation", "shape2"))
    after = shape.cumsum(dim=1) > 0
    return {"relation1": relation & ~after, "relation2": relation & after}


def knockouts(
    model: HookedTextToImage, heads: list[str], n: int, controls: int, seed: int
) -> pd.DataFrame:
    """Effect of hiding each relation's words on each relation: columns hidden, where, control,
    relation, mean, low, high.
    """
    wanted = scenes.sample_trios(n, seed=seed + 1, split="all")
    masks = clause_masks(model, [scenes.caption(trio) for trio in wanted])
    names = {
        (hidden, where): f"{hidden} from {where}"
        for hidden in masks
        for where in ("found heads", "all heads")
    }
    conditions = {
        name: [
            replace(one, tokens=masks[hidden])
            for one in ablation.knockout_role("relation", heads if "found" in where else None)
        ]
        for (hidden, where), name in names.items()
    }
    effects = ablation.ablation_effects(
        model, wanted, conditions, seed + np.arange(n)[:, None], controls=controls, rng=seed
    )
    rows = []
    for (hidden, where), name in names.items():
        mine = (effects["condition"] == name) | (effects["control_for"] == name)
        for condition in effects["condition"].values[mine.values]:
            for relation in masks:
                before, after = (
                    effects[f"{relation}_loose"].sel(condition=c).values.astype(float)
                    for c in ("none", condition)
                )
                kind = str(effects["kind"].sel(condition=condition).item())
                labels = {"hidden": hidden, "where": where, "kind": kind, "relation": relation}
                rows.append(labels | paired_difference(before, after)._asdict())
    return pd.DataFrame(rows)


def exchanged(trio: Trio) -> dict[str, Trio]:
    """The same trio with one thing said otherwise, in as many words: either relation's opposite, or
    object 3's other colour.
    """
    first, second = trio.first, trio.second
    return {
        "relation1": Trio(replace(first, phrase=scenes.opposite(first).phrase), second),
        "relation2": Trio(first, replace(second, phrase=scenes.opposite(second).phrase)),
        "color3": Trio(first, replace(second, color2=other_color(second.color2))),
    }


def shares(model: HookedTextToImage, n: int, seed: int) -> pd.DataFrame:
    """Share of an exchange's effect on the clean-image prediction at step 0 that each head alone
    brings about.

    The head's z comes from the exchanged prompt; the share is the resulting change of x0, projected
    on the whole change and in units of it. Heads also act through one another, so shares need not
    sum to one. Columns exchange, head, prompt, share.
    """
    trios = scenes.sample_trios(n, seed=seed + 2, split="all")
    texts = [scenes.caption(trio) for trio in trios]
    rows = []
    for exchange in exchanged(trios[0]):
        others = [scenes.caption(exchanged(trio)[exchange]) for trio in trios]
        names = [f"steps.0.cond.{SITE.format(layer)}" for layer in range(model.cfg.n_layers)]
        caches = [
            model.run_with_cache(of, seed, names_filter=[*names, "steps.0.hook_x0"], steps=[0])[1]
            for of in (texts, others)
        ]
        whole = caches[1]["steps.0.hook_x0"] - caches[0]["steps.0.hook_x0"]
        cells = {}
        for layer in range(model.cfg.n_layers):
            for head in range(model.cfg.n_heads):
                cells[f"L{layer}H{head}"] = Intervention(
                    SITE.format(layer), [head], None, 0, action=Replace(caches[1])
                )
        measured = sweep.run(
            model,
            texts,
            [seed],
            cells,
            {"share": sweep.Metric(sweep.ShareOf(whole), "x0", ("baseline", "prompt"))},
        )
        table = measured["share"].isel(seed=0).to_series().rename("share").reset_index()
        rows.append(table.rename(columns={"intervention": "head"}).assign(exchange=exchange))
    return pd.concat(rows, ignore_index=True)[["exchange", "head", "prompt", "share"]]


def opposite_of(trio: Trio, relation: str) -> Trio:
    """The same trio with one relation turned."""
    first, second = trio.first, trio.second
    if relation == "relation1":
        turned = scenes.opposite(first)
        return Trio(replace(first, relation=turned.relation, phrase=turned.phrase), second)
    turned = scenes.opposite(second)
    return Trio(first, replace(second, relation=turned.relation, phrase=turned.phrase))


def axis_heads(model: HookedTextToImage) -> pd.DataFrame:
    """Heads that hold .9 of the gain² of either axis, once each, with their larger share: columns
    name, share.
    """
    table = recurrence.screening_by_axis(model)
    both = pd.concat([recurrence.found(table, axis) for axis in screening.AXES])
    return both.groupby("name", sort=False)["share"].max().reset_index()


@torch.no_grad()
def served(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """A row an exchanged relation, set of heads and trio: in the image, whether all three objects
    are there, the exchanged relation is the opposite's, and the other one is the prompt's. Heads
    get the words of the exchanged relation alone.
    """
    trios = scenes.sample_trios(n, seed=9, split="all")
    heads = axis_heads(model)["name"].tolist()
    sets = {
        "heads found": heads,
        **{f"without {head}": [other for other in heads if other != head] for head in heads},
    }
    rows = []
    for relation, other in (("relation1", "relation2"), ("relation2", "relation1")):
        turned = [opposite_of(trio, relation) for trio in trios]
        swap = Interchange(model, trios, turned)
        words = clause_masks(model, swap.texts)[relation]
        for condition, some in sets.items():
            hooks = swap.hooks(some, words)
            images = model.run_with_hooks(
                swap.texts, seed=list(range(9700, 9700 + n)), fwd_hooks=hooks
            )
            own, goal = (scenes.evaluate(images, each) for each in (trios, turned))
            judged = {
                "all_objects": own["unique_binding"],
                "opposite": goal[f"{relation}_loose"],
                "kept": own[f"{other}_loose"],
            }
            values = {name: verdict.values.astype(float) for name, verdict in judged.items()}
            rows.append(
                pd.DataFrame(
                    {"exchanged": relation, "heads": condition, "trio": np.arange(n), **values}
                )
            )
    return pd.concat(rows, ignore_index=True)


def served_claims(rows: pd.DataFrame, heads: pd.DataFrame) -> list[Claim]:
    """The same heads serve both relations, each by its own words."""
    claims = []
    n = rows["trio"].nunique()
    for relation, part in rows.groupby("exchanged", sort=False):
        whole = part[(part["heads"] == "heads found") & (part["all_objects"] == 1)]
        told = f"{relation}'s words of the opposite prompt in {', '.join(heads['name'])}"
        basis = f"{len(whole)} of {n} images, a noise each, 1 run"
        for column, what in (
            ("opposite", "opposite drawn"),
            ("kept", "other relation as prompted"),
        ):
            found = proportion(whole[column].to_numpy(float))
            claims.append(Claim(f"{told}: {what}", "–", found, (0.8, 1.0), basis=basis))
        table = part.assign(turned=part["opposite"] * part["all_objects"]).pivot(
            index="trio", columns="heads", values="turned"
        )
        for head in heads.loc[heads["share"] >= SERVES, "name"]:
            lost = paired_difference(
                table[[f"without {head}"]].to_numpy(), table[["heads found"]].to_numpy()
            )
            what = f"{relation}: share of images with its opposite that is lost without {head}"
            share = heads.set_index("name")["share"][head]
            claims.append(
                Claim(
                    what,
                    "–",
                    lost,
                    (0.1, 1.0),
                    f"share of gain² {share:.2f}",
                    basis=f"{n} images, a noise each, 1 run",
                )
            )
    return claims


def profiles(carried: pd.DataFrame) -> dict[str, Float[np.ndarray, "prompt head"]]:
    """The shares of every prompt and head, by the exchanged words."""
    return {
        str(exchange): part.pivot_table(index="prompt", columns="head", values="share").to_numpy()
        for exchange, part in carried.groupby("exchange", sort=False)
    }


def agreement(
    one: Float[np.ndarray, "prompt head"],
    other: Float[np.ndarray, "prompt head"],
    resamples: int = 2000,
) -> Interval:
    """Cosine of the two mean profiles over heads, with its bootstrap interval over prompts."""

    def cosine(rows: np.ndarray) -> float:
        a, b = one[rows].mean(axis=0), other[rows].mean(axis=0)
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    rng = np.random.default_rng(0)
    drawn = [cosine(rng.integers(len(one), size=len(one))) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(cosine(np.arange(len(one))), float(low), float(high))


def accuracy_claims(drawn: pd.DataFrame) -> list[Claim]:
    """The model must draw trios before it can be asked how."""
    of = {
        (row["objects"], row["verdict"]): Interval(row["mean"], row["low"], row["high"])
        for row in drawn.to_dict("records")
    }
    return [
        Claim(
            f"Held-out trios: {what}",
            "–",
            of[3, verdict],
            (0.5, 1.0),
            f"two objects, same model: relation {of[2, 'relation_loose']}",
        )
        for verdict, what in (
            ("unique_binding", "all three objects"),
            ("relation1_loose", "first relation"),
            ("relation2_loose", "second relation"),
            ("relation_loose", "both"),
        )
    ]


def changes(lost: pd.DataFrame, hidden: str, relation: str) -> dict[tuple[str, str], Interval]:
    """(where, kind) → the change of one relation while words of another, or its own, are hidden;
    draws of a control averaged.
    """
    rows = lost[(lost["hidden"] == hidden) & (lost["relation"] == relation)]
    means = rows.groupby(["where", "kind"])[list(Interval._fields)].mean()
    return {
        (str(where), str(kind)): Interval(*row)
        for (where, kind), row in zip(means.index, means.to_numpy().tolist(), strict=True)
    }


def knockout_claims(lost: pd.DataFrame, heads: Mapping[str, list[str]]) -> list[Claim]:
    """Each relation falls with its own words, and only with them, in the heads that the first
    relation's words found.
    """
    claims = []
    for hidden in CLAUSES:
        for relation in CLAUSES:
            of = changes(lost, hidden, relation)
            claims.append(
                Claim(
                    f"Words of {hidden} hidden from {', '.join(heads['relation1'])}: change of "
                    f"{relation}",
                    "–",
                    of["found heads", "condition"],
                    LOST if hidden == relation else KEPT,
                    f"random heads {of['found heads', 'random heads'].mean:+.3f}; random words "
                    f"{of['found heads', 'random tokens'].mean:+.3f}; all heads "
                    f"{of['all heads', 'condition'].mean:+.3f}",
                )
            )
    return claims


def share_claims(carried: pd.DataFrame) -> list[Claim]:
    """The two relations go through the heads in the same proportions; a colour does not."""
    of = profiles(carried)
    return [
        Claim(
            "Step 0: cosine of the two relations' shares over heads",
            "–",
            agreement(of["relation1"], of["relation2"]),
            (0.8, 1.0),
            f"first relation and object 3's colour {agreement(of['relation1'], of['color3'])}",
        )
    ]


@viz.style.styled
def knockout_figure(lost: pd.DataFrame) -> Figure:
    """Change of each relation, a panel a relation whose words are hidden."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6), sharex=True, layout="constrained")
    conditions = {
        ("found heads", "condition"): "relation heads",
        ("found heads", "random heads"): "random heads",
        ("found heads", "random tokens"): "random words,\nrelation heads",
        ("all heads", "condition"): "all heads",
        ("all heads", "random tokens"): "random words,\nall heads",
    }
    for ax, hidden in zip(axes, CLAUSES, strict=True):
        for shift, relation in zip((-0.1, 0.1), CLAUSES, strict=True):
            of = changes(lost, hidden, relation)
            at = np.arange(len(conditions)) + shift
            label = f"accuracy of {relation}" if ax is axes[0] else None
            viz.intervals(ax, [of[condition] for condition in conditions], at, label=label)
        ax.axvline(0, color=viz.style.INK, linewidth=0.6)
        ax.set(title=f"words of {hidden} hidden from …", xlabel="change of accuracy (paired)")
        viz.name_rows(ax, list(conditions.values()) if ax is axes[0] else [""] * len(conditions))
    own = [changes(lost, hidden, hidden)["found heads", "condition"].mean for hidden in CLAUSES]
    figure.suptitle(
        "Hidden from the relation heads, a relation's words cost it "
        + " and ".join(f"{change:+.2f}" for change in own)
    )
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@viz.style.styled
def share_figure(carried: pd.DataFrame, found_heads: list[str]) -> Figure:
    """Every head's share of the first relation against that of the second, and of the control."""
    figure, axes = plt.subplots(
        1, 2, figsize=(9.2, 4.2), sharex=True, sharey=True, layout="constrained"
    )
    means = {
        key: clustered_mean(part.to_numpy()[:, None])
        for key, part in carried.groupby(["exchange", "head"])["share"]
    }
    of = profiles(carried)
    for ax, other in zip(axes, ("relation2", "color3"), strict=True):
        for head in map(str, carried["head"].unique()):
            x, y = means["relation1", head], means[other, head]
            color = viz.style.head_color(head)
            fill = color if head in found_heads else "none"
            seen = max(abs(means[exchange, head].mean) for exchange in of) > 0.05
            label = head if seen and ax is axes[0] else None
            viz.intervals(ax, [x], [y.mean], color=color, markerfacecolor=fill, label=label)
            viz.intervals(ax, [y], [x.mean], upright=True, color=color, markerfacecolor=fill)
        ax.axline((0, 0), slope=1, color=viz.style.INK, linewidth=0.6)
        ax.set(xlabel="share of relation1's exchange", ylabel=f"share of {other}'s exchange")
    alike = agreement(of["relation1"], of["relation2"]).mean
    figure.suptitle(
        f"Layout's change at step 0 by head (filled: found by screening); cosine of both relations "
        f"{alike:.2f}"
    )
    figure.legend(loc="outside right upper")
    return figure


if __name__ == "__main__":
    main(tyro.cli(Config))
