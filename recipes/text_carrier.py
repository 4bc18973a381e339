"""Which word carries a relation, and can the text encoder alone tell?

`python -m recipes.text_carrier --runs FOLDER`

Paper: section 5: with T5 the relation is read from the second shape word (L3H7), with random
embeddings from the relation words. Claim tested here: the carrier of an axis is the word at which
that axis is most linearly readable in the text encoder's output. It is tested on encoders that
differ in nothing but where the relation stands (docs/training.md, "Study models"): a share of the
relation words' vectors moved to the second shape word, all of it ("fused", the positive control),
or a causal T5. Falsified by this: fewer than 8 of the 10 cells (five models, two axes) with the
carrier that the encoder predicts.

Predictions: `recipes/PREDICTIONS.md`, committed before. The predicted word has the highest held-out
R² of the axis' sign (ridge, combinations held out), among words within .02 of it the one with the
largest distance between the mean vectors of the two ends. The carrier is the word whose keys and
values, taken from the opposite prompt in all heads at step 0, change the layout's cosine most, by
at least .5. Prompts of each axis alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dit_lens import scenes, variance, viz
from dit_lens.intervene.interchange import Interchange
from dit_lens.readout.screening import AXES, ENDS
from dit_lens.stats import Interval, clustered_mean, finite, paired_difference, proportion
from dit_lens.task import DIRECTIONS, PHRASES
from dit_lens.text.prompts import Role
from dit_lens.training import finished
from dit_lens.training.dynamics import layout
from hooked_models import HookedTextToImage

from .claims import Claim, report, stage

WORDS: tuple[Role, ...] = ("color1", "shape1", "relation", "color2", "shape2", "eos")
CELLS = ("dial-0.25", "dial-0.5", "dial-0.75", "fused", "causal")
"""Runs whose two axes are the ten cells of the claim."""
NORMS = "t5-norms"
"""Run with T5-XXL's norms, shown beside them: trained after the claim had fallen."""
ROUNDING = 1e-5
"""Relative size below which a component's variation is rounding, which standardising would blow
up.
"""
TIE, CARRIES = 0.02, -0.5
IMAGES_OF = "t5-micro"
EXCHANGES: dict[str, tuple[Role, list[str] | None]] = {
    "first shape word, all heads": ("shape1", None),
    "relation words, all heads": ("relation", None),
    "first shape word, L1H1 alone": ("shape1", ["L1H1"]),
}
TURNED: dict[tuple[str, str], tuple[float, float]] = {
    ("first shape word, all heads", "vertical"): (0.75, 1.0),
    ("relation words, all heads", "horizontal"): (0.65, 1.0),
    ("first shape word, L1H1 alone", "vertical"): (0.65, 1.0),
}
"""Predicted share of turned layouts; 0 … .15 of the other axis."""


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    runs: Path = Path("runs")
    """Folder with the study models' runs; those that are not there are left out."""
    bundled: tuple[str, ...] = ("rte-nano", "t5-micro", "t5-mini")
    """Models shown beside them, which are no cells: their carriers were known before."""
    scenes: int = 48
    """Scenes of each axis."""
    images: int = 24
    """Images of each axis and condition."""
    out: Path = Path("results/text_carrier")


def main(config: Config) -> None:
    tables = []
    models = {
        name: str(config.runs / name / "pipeline")
        for name in (*CELLS, NORMS)
        if finished(config.runs / name)
    }
    models |= {name: name for name in config.bundled}
    for name, source in models.items():
        model = HookedTextToImage.from_pretrained(source)
        read = stage(config.out, f"{name}-readable", model, readable)
        moved = stage(config.out, f"{name}-moved", model, exchanged, config.scenes)
        tables.append(moved.merge(read, on=["axis", "word"]).assign(model=name))
    table = pd.concat(tables, ignore_index=True)
    model = HookedTextToImage.from_pretrained(IMAGES_OF)
    images = stage(config.out, f"{IMAGES_OF}-images", model, drawn, config.images)
    claims = [*claims_of(table), *image_claims(images)]
    report(
        "Which word carries a relation",
        claims,
        config.out,
        cells=[name for name in CELLS if name in models],
    )
    images.to_parquet(config.out / "images.parquet", index=False)
    table.to_parquet(config.out / "text_carrier.parquet", index=False)
    viz.style.save(figure(table), config.out / "text_carrier.png")


@torch.no_grad()
def readable(model: HookedTextToImage) -> pd.DataFrame:
    """From the text encoder alone: columns axis, word, r2 (of the axis' sign, held out), distance
    (of the ends' mean vectors).

    `r2_all`, not predicted from: R² of the axis' component of the direction over the phrases of all
    eight relations.
    """
    rows = []
    everything = variance.factorial_prompts()
    for axis in AXES:
        prompts = variance.factorial_prompts(
            [phrase for relation in ENDS[axis] for phrase in PHRASES[relation]]
        )
        for word in WORDS:
            vectors, factors = variance.word_vectors(model, prompts, word)
            x = vectors.double().numpy()
            sign = np.where(factors["relation"].astype(str) == ENDS[axis][0], 1.0, -1.0)
            distance = np.linalg.norm(x[sign > 0].mean(0) - x[sign < 0].mean(0))
            row = {
                "axis": axis,
                "word": word,
                "r2": held_out_r2(x, sign, factors),
                "distance": distance,
            }
            vectors, factors = variance.word_vectors(model, everything, word)
            steps = {str(relation): step for relation, step in DIRECTIONS.items()}
            component = np.array(
                [float(steps[str(r)][axis == "vertical"]) for r in factors["relation"]]
            )
            rows.append(row | {"r2_all": held_out_r2(vectors.double().numpy(), component, factors)})
    return pd.DataFrame(rows)


def held_out_r2(
    x: Float[np.ndarray, "prompt d"], y: Float[np.ndarray, " prompt"], factors: pd.DataFrame
) -> float:
    """Ridge regression, six folds of whole combinations of shapes and colours."""
    x = np.where(x.std(axis=0) > ROUNDING * np.sqrt((x**2).mean()), x, 0.0)
    cells = (
        factors["shape1"].astype(str)
        + factors["shape2"].astype(str)
        + factors["color1"].astype(str)
    ).to_numpy()
    ridge = make_pipeline(StandardScaler(), Ridge(10.0))
    return float(r2_score(y, cross_val_predict(ridge, x, y, groups=cells, cv=GroupKFold(6))))


@torch.no_grad()
def exchanged(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """At step 0, all heads: a row an axis, word and scene: the layout's cosine without (`base`) and
    with the word exchanged.
    """
    pool = scenes.sample(16 * n, seed=21, split="all", color_words="both")
    rows = []
    for axis in AXES:
        wanted = [scene for scene in pool if scene.relation in ENDS[axis]][:n]
        swap = Interchange(model, wanted, [scenes.opposite(scene) for scene in wanted])
        seeds = list(range(7000, 7000 + n))
        view, tokens = model.at(step=0, prompts=swap.texts, seed=seeds, guidance=1.0, returns="x0")
        base = layout(model.decode(view(tokens)), wanted)
        for word in WORDS:
            out = view.run_with_hooks(tokens, fwd_hooks=swap.hooks(None, word, 0, view))
            moved = layout(model.decode(out), wanted)
            rows.append(
                pd.DataFrame(
                    {
                        "axis": axis,
                        "word": word,
                        "scene": np.arange(n),
                        "base": base,
                        "moved": moved,
                    }
                )
            )
    return pd.concat(rows, ignore_index=True)


@torch.no_grad()
def drawn(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """A row an axis, exchange and image: layout and relation, the opposite's and the prompt's
    own.
    """
    pool = scenes.sample(16 * n, seed=22, split="all", color_words="both")
    rows = []
    for axis in AXES:
        wanted = [scene for scene in pool if scene.relation in ENDS[axis]][:n]
        opposite = [scenes.opposite(scene) for scene in wanted]
        swap = Interchange(model, wanted, opposite)
        conditions = {
            "none": [],
            **{name: swap.hooks(heads, word) for name, (word, heads) in EXCHANGES.items()},
        }
        for condition, hooks in conditions.items():
            images = model.run_with_hooks(
                swap.texts, seed=list(range(8000, 8000 + len(wanted))), fwd_hooks=hooks
            )
            judged = {
                "turned": scenes.layout(images, opposite)["layout"],
                "kept": scenes.layout(images, wanted)["layout"],
                "opposite": scenes.evaluate(images, opposite)["relation_loose"],
                "binding": scenes.evaluate(images, wanted)["unique_binding"],
            }
            values = {name: value.values.astype(float) for name, value in judged.items()}
            rows.append(
                pd.DataFrame(
                    {
                        "axis": axis,
                        "condition": condition,
                        "scene": np.arange(len(wanted)),
                        **values,
                    }
                )
            )
    return pd.concat(rows, ignore_index=True)


def image_claims(images: pd.DataFrame) -> list[Claim]:
    """Which exchange turns which axis."""
    claims = []
    for (condition, axis), part in images.groupby(["condition", "axis"], sort=False):
        if condition != "none":
            beside = (
                f"kept {part['kept'].mean():.2f}; opposite relation {part['opposite'].mean():.2f}; "
            )
            beside += f"binding {part['binding'].mean():.2f}"
            what = f"{IMAGES_OF}, images: {condition}, {axis} scenes turned"
            expected = TURNED.get((str(condition), str(axis)), (0.0, 0.15))
            basis = f"{len(part)} images, a noise each, 1 run"
            claims.append(
                Claim(
                    what,
                    "–",
                    proportion(part["turned"].to_numpy(float)),
                    expected,
                    beside,
                    basis=basis,
                )
            )
    return claims


def predicted_word(part: pd.DataFrame, by: str = "r2") -> str:
    """Word that the encoder predicts to carry an axis in one model; `by="r2_all"` is
    the second rule.
    """
    by_word = part.drop_duplicates("word").set_index("word")
    near = by_word[by_word[by] >= by_word[by].max() - TIE]
    return str(near["distance"].idxmax())


def found_word(part: pd.DataFrame) -> str:
    """Word whose exchange turns the layout of one model and axis most; "none" where it changes
    too little.
    """
    change = (part["moved"] - part["base"]).groupby(part["word"]).mean()
    return str(change.idxmin()) if change.min() <= CARRIES else "none"


def claims_of(table: pd.DataFrame) -> list[Claim]:
    """A row a cell, the count of right ones, and the positive control."""
    claims, right, cells, second = [], 0, 0, []
    for (name, axis), part in table.groupby(["model", "axis"], sort=False):
        wide = part.pivot(index="scene", columns="word", values="moved")
        base = part.drop_duplicates("scene").set_index("scene")["base"]
        word, found = predicted_word(part), found_word(part)
        change = (wide.sub(base, axis=0)).mean()
        rival = change.drop(word).idxmin()
        ahead = paired_difference(wide[[rival]].to_numpy(), wide[[word]].to_numpy())
        by_word = (
            part.drop_duplicates("word").set_index("word").astype({"r2": float, "r2_all": float})
        )
        r2, r2_all = by_word["r2"], by_word["r2_all"]
        listed = ", ".join(
            f"{w} R² {r2[w]:.2f} (all phrases {r2_all[w]:.2f}), {change[w]:+.2f}" for w in WORDS
        )
        is_cell = name in CELLS
        what = (
            f"{name}, {axis}: change by {word} (predicted) minus by {rival} (next), carrier: "
            f"{found}"
        )
        basis = f"{len(wide)} scenes, 1 run"
        claims.append(
            Claim(what, "–", ahead, (-2.1, 0.0) if is_cell else None, listed, basis=basis)
        )
        right, cells = right + (is_cell and found == word), cells + is_cell
        second.append(found == predicted_word(part, "r2_all"))
        if name == "fused":
            claims += control_claims(str(axis), wide, base)
        if name == "causal":
            most = finite(float((wide["shape1"] - base).abs().max()))
            what = (
                f"causal, {axis}: largest change by shape1, which stands before the relation, in "
                "any scene"
            )
            claims.append(Claim(what, "≈ 0 (CLIP)", most, (-0.01, 0.01), basis=basis))
    whole = finite(right) if cells == 2 * len(CELLS) else Interval(*[np.nan] * 3)
    claims.append(
        Claim(
            "cells of 10 with the predicted carrier",
            "–",
            whole,
            (8, 10),
            f"{right} of the {cells} that were run",
        )
    )
    what = (
        f"of {len(second)} cells, bundled models among them, right by the second rule (R² over all "
        "phrases)"
    )
    claims.append(
        Claim(
            what,
            "–",
            finite(sum(second)),
            None,
            "stated after fused, dial-0.5 and the bundled models were seen",
        )
    )
    return claims


def control_claims(axis: str, wide: pd.DataFrame, base: pd.Series[float]) -> list[Claim]:
    """With "fused" the second shape word carries everything."""
    changes = wide.sub(base, axis=0)
    others = changes.drop(columns="shape2").mean()
    worst = others.abs().idxmax()
    return [
        Claim(
            f"fused, {axis}: change by shape2 (positive control)",
            "carries it",
            clustered_mean(changes[["shape2"]].to_numpy()),
            (-2.1, -1.5),
            contrast=paired_difference(wide[[worst]].to_numpy(), wide[["shape2"]].to_numpy()),
            basis=f"{len(wide)} scenes, 1 run",
        ),
        Claim(
            f"fused, {axis}: change by {worst}, of the other words the most",
            "≈ no change",
            clustered_mean(changes[[worst]].to_numpy()),
            (-0.1, 0.1),
            basis=f"{len(wide)} scenes, 1 run",
        ),
    ]


@viz.style.styled
def figure(table: pd.DataFrame) -> Figure:
    """A panel an axis: models by words, coloured by the change of the layout, with R² written in
    and the prediction framed.
    """
    names = list(dict.fromkeys(table["model"]))
    whole, axes = plt.subplots(
        1, len(AXES), figsize=(9.2, 0.62 * len(names) + 2.3), layout="constrained"
    )
    right = 0
    for ax, axis in zip(axes, AXES, strict=True):
        part = table[table["axis"] == axis].assign(change=table["moved"] - table["base"])
        cells = part.groupby(["model", "word"])[["change", "r2"]].mean().unstack().loc[names]
        change, r2 = (cells[value][list(WORDS)].to_numpy(float) for value in ("change", "r2"))
        shown = ax.imshow(change, cmap=viz.style.DIVERGING, vmin=-2, vmax=2, aspect="auto")
        looks = {at: viz.style.upon(shown.to_rgba(value)) for at, value in np.ndenumerate(change)}
        for (i, j), value in np.ndenumerate(r2):
            ax.text(j, i, f"{value:.2f}", **looks[i, j])
        for i, name in enumerate(names):
            cell = part[part["model"] == name]
            j = WORDS.index(predicted_word(cell))
            right += predicted_word(cell) == found_word(cell)
            frame = {"edgecolor": looks[i, j]["color"], "fill": False, "linewidth": 2}
            ax.add_patch(plt.Rectangle((j - 0.46, i - 0.44), 0.92, 0.88, **frame))
        words = ["colour\n1", "shape\n1", "rela-\ntion", "colour\n2", "shape\n2", "EOS"]
        ax.set_xticks(range(len(WORDS)), words)
        viz.name_rows(ax, names if ax is axes[0] else [""] * len(names))
        ax.set_title(f"{axis} relations")
    label = "change of the layout's cosine\nby exchanging the word (−2: turned)"
    whole.colorbar(shown, ax=axes, shrink=0.9, label=label)
    whole.suptitle(
        f"Carrier as predicted (framed) in {right} of {2 * len(names)}. "
        "Numbers: R² of the axis in the text encoder."
    )
    return whole


if __name__ == "__main__":
    main(tyro.cli(Config))
