"""Do relation heads recur, in other sizes, seeds and with the other text encoder?

`python -m recipes.recurrence`

Paper: one head of one size, with random token embeddings (L2H8 of RTE-DiT-B, named by screening
with the relation words), and one of the T5 model, named by the relation's effect on the second
shape word (L3H7 of T5-DiT-B). Falsified by this: sizes that draw relations by many heads, or by
late ones; heads that are found and turn nothing, or no more than random heads.

By axis: heads are ranked by their share of gain² from weights, with the words that carry the axis
(relation words; in T5 models the first shape word for the vertical axis, see `text_carrier`). The
fewest that hold .9 of it are then given the word of the opposite prompt at step 0; controls are ten
random sets with as many heads of each layer, which is the unit of their interval.
`relation_circuit` chooses its sets by what they turn, and judges images.

Predictions: `recipes/PREDICTIONS.md`. Two earlier forms asked for heads of any axis by a mean over
seven words, five of them vertical; the first, which masked words, was replaced within a quarter of
an hour without an outcome in the repository. The second found 4 to 6 heads in the models with
random token embeddings, half of them idle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure

from dit_lens import scenes, screening, viz
from dit_lens.intervene.interchange import Interchange, matched_sets
from dit_lens.stats import Interval, clustered_mean, finite, paired_difference
from dit_lens.text.prompts import Role
from dit_lens.training.dynamics import axis_contrasts, layout
from hooked_models import HookedT5Encoder, HookedTextToImage

from .claims import Claim, report, stage
from .t5_fusion import CARRIER, NAMES, scenes_along

HELD = 0.9
"""Share of gain²: the fewest heads with this share are those found."""
NULL = "rte-nopos-micro"
"""A model that draws no relations."""
DRAWS = 10


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    models: tuple[str, ...] = (
        "rte-nano",
        "rte-micro",
        "rte-mini",
        "rte-trios-micro",
        "t5-micro",
        "t5-mini",
        NULL,
    )
    """Bundled models or pipeline folders."""
    looks: int = 48
    """Scenes of each axis."""
    out: Path = Path("results/recurrence")


def main(config: Config) -> None:
    claims: list[Claim] = []
    screened: dict[str, pd.DataFrame] = {}
    turned: dict[str, pd.DataFrame] = {}
    for name in config.models:
        model, label = HookedTextToImage.from_pretrained(name), Path(name).name
        screened[label] = stage(config.out, f"{label}-screening", model, screening_by_axis)
        if name != NULL:
            turned[label] = stage(config.out, f"{label}-turned", model, turns, config.looks)
            claims += [*head_claims(label, screened[label]), *turn_claims(label, turned[label])]
    if NULL in screened and "rte-micro" in screened:
        claims += null_claims(screened[NULL], screened["rte-micro"])
    report("Relation heads by axis, over sizes and text encoders", claims, config.out)
    for what, parts in {"screening": screened, "turned": turned}.items():
        table = pd.concat(parts, names=["model"]).reset_index("model")
        table.to_parquet(config.out / f"{what}.parquet", index=False)
    viz.style.save(figure(screened, turned), config.out / "recurrence.png")


def carrier(model: HookedTextToImage, axis: str) -> Role:
    """Word that carries the axis."""
    return CARRIER[axis] if isinstance(model.text_encoder, HookedT5Encoder) else "relation"


def screening_by_axis(model: HookedTextToImage) -> pd.DataFrame:
    """`screening.screen_axes` with the word that carries each axis, columns word and depth (0 … 1)
    added.
    """
    contrasts = axis_contrasts(model)
    rows = []
    for axis in screening.AXES:
        word = carrier(model, axis)
        of_word = contrasts["words" if word == "relation" else word]
        rows.append(screening.screen_axes(model.dit, {axis: of_word[axis]}).assign(word=word))
    table = pd.concat(rows, ignore_index=True)
    return table.assign(depth=table["layer"] / (model.cfg.n_layers - 1))


def found(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The fewest heads of an axis that hold `HELD` of its gain², the strongest first."""
    part = table[table["axis"] == axis].sort_values("share", ascending=False)
    enough = int((part["share"].cumsum() < HELD - 1e-9).sum()) + 1
    part = part.head(enough)
    return part.assign(name=[f"L{row.layer}H{row.head}" for row in part.itertuples()])


@torch.no_grad()
def turns(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """Cosine of the layout at step 0: columns axis, heads ("none", "found", "random 0", …), scene,
    cosine.
    """
    table, rng = screening_by_axis(model), np.random.default_rng(0)
    rows = []
    for axis in screening.AXES:
        names = found(table, axis)["name"].tolist()
        wanted = scenes_along(axis, n, seed=41)
        swap = Interchange(model, wanted, [scenes.opposite(scene) for scene in wanted])
        seeds = list(range(9400, 9400 + len(wanted)))
        view, tokens = model.at(step=0, prompts=swap.texts, seed=seeds, guidance=1.0, returns="x0")
        sets = {"none": [], "found": names}
        if 2 * len(names) <= len(table) // 2:
            sets |= {
                f"random {i}": one for i, one in enumerate(matched_sets(model, names, DRAWS, rng))
            }
        for label, heads in sets.items():
            hooks = swap.hooks(heads, carrier(model, axis), 0, view) if heads else []
            cosine = layout(model.decode(view.run_with_hooks(tokens, fwd_hooks=hooks)), wanted)
            rows.append(
                pd.DataFrame(
                    {
                        "axis": axis,
                        "heads": label,
                        "scene": np.arange(len(wanted)),
                        "cosine": cosine,
                    }
                )
            )
    return pd.concat(rows, ignore_index=True)


# Claims


def head_claims(name: str, table: pd.DataFrame) -> list[Claim]:
    """Few heads, in the first half of the layers; counts of a finite population."""
    claims = []
    for axis in screening.AXES:
        heads = found(table, axis)
        word = NAMES[heads["word"].iloc[0]]
        listed = ", ".join(
            f"{n} {s:.2f}" for n, s in zip(heads["name"], heads["share"], strict=True)
        )
        total = int((table["axis"] == axis).sum())
        what = f"{name}, {axis}: heads of {total} that hold {HELD:.0%} of the gain² of the {word}"
        claims.append(
            Claim(
                what,
                "–",
                finite(len(heads)),
                (1, 4),
                f"{listed}; paper: one of 144",
                basis="weights of 1 run",
            )
        )
        depth = finite(float(heads["depth"].mean()))
        what = f"{name}, {axis}: their mean depth, first layer 0, last 1"
        claims.append(
            Claim(what, "–", depth, (0.0, 0.5), "paper: .18, T5 .27", basis="weights of 1 run")
        )
    return claims


def turn_claims(name: str, table: pd.DataFrame) -> list[Claim]:
    """Change of the layout's cosine by the heads found, and by random sets."""
    claims = []
    for axis, part in table.groupby("axis", sort=False):
        wide = part.pivot(index="scene", columns="heads", values="cosine")
        change = paired_difference(wide[["none"]].to_numpy(), wide[["found"]].to_numpy())
        random = wide.filter(like="random").sub(wide["none"], axis=0).mean()
        of_sets = (
            clustered_mean(random.to_numpy()[:, None]) if len(random) else Interval(*[np.nan] * 3)
        )
        basis = f"{len(wide)} scenes, a noise each, 1 run"
        what = (
            f"{name}, {axis}: change of the layout's cosine at step 0, these heads alone given the "
            "opposite word"
        )
        beside = f"{wide['none'].mean():+.2f} without"
        claims.append(Claim(what, "–", change, (-2.1, -1.0), beside, basis=basis))
        basis = f"{len(random)} sets, {len(wide)} scenes each, 1 run"
        claims.append(
            Claim(
                f"{name}, {axis}: the same of random sets", "–", of_sets, (-0.2, 0.2), basis=basis
            )
        )
    return claims


def null_claims(nothing: pd.DataFrame, some: pd.DataFrame) -> list[Claim]:
    """The model without positions has no gain to speak of."""
    rows = []
    for axis in screening.AXES:
        size, reference = (
            float(t.loc[t["axis"] == axis, "gain"].pow(2).sum()) for t in (nothing, some)
        )
        what = f"{NULL}, {axis}: sum of gain², in that of rte-micro"
        beside = f"{size:.3g} against {reference:.3g}"
        rows.append(
            Claim(
                what,
                "–",
                finite(size / reference),
                (0.0, 0.01),
                beside,
                basis="weights of 1 run each",
            )
        )
    return rows


# Figure


@viz.style.styled
def figure(screened: dict[str, pd.DataFrame], turned: dict[str, pd.DataFrame]) -> Figure:
    """Shares of gain² by head, a panel an axis; below, change of the layout by the heads found and
    by random sets.
    """
    drawn, axes = plt.subplots(2, 2, figsize=(9.2, 6.8), sharex=True, layout="constrained")
    names, sizes, moved = list(screened), [], []
    for (above, below), axis in zip(axes.T, screening.AXES, strict=True):
        for x, name in enumerate(names):
            heads = found(screened[name], axis)
            bottom = 0.0
            for label, share in zip(heads["name"], heads["share"], strict=True):
                color = viz.style.head_color(label)
                above.bar(x, share, 0.8, bottom=bottom, color=color)
                if share > 0.08 and len(heads) < 8:
                    above.text(x, bottom + share / 2, label, fontsize=9, **viz.style.upon(color))
                bottom += share
            if name in turned:
                sizes.append(len(heads))
                part = turned[name][turned[name]["axis"] == axis]
                wide = part.pivot(index="scene", columns="heads", values="cosine")
                changes = wide.sub(wide["none"], axis=0).drop(columns="none")
                sets = {"tab:red": changes[["found"]]}
                if len(random := changes.filter(like="random").mean()):
                    sets[viz.style.INK] = random.to_frame()
                for shift, (color, values) in zip((0, 0.25), sets.items(), strict=False):
                    seen = clustered_mean(values.to_numpy())
                    moved += [seen.mean] if color == "tab:red" else []
                    viz.intervals(below, [seen], [x + shift], upright=True, color=color)
        above.set(title=f"{axis} axis", ylim=(0, 1))
        below.set(ylim=(-2.1, 0.4))
        below.axhline(0, color=viz.style.INK, linewidth=0.6)
        below.set_xticks(range(len(names)), names, rotation=90)
    axes[0][0].set_ylabel("share of gain², heads\nthat hold .9 of it")
    axes[1][0].set_ylabel("change of the layout's cosine\n(red: these heads, grey: random sets)")
    drawn.suptitle(
        f"{min(sizes)} to {max(sizes)} heads hold .9 of an axis' gain²; reading the opposite word, "
        f"they change the cosine by {max(moved):.2f} to {min(moved):.2f}"
    )
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Config))
