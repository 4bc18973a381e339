"""Fillers, a dropped "is", inverted order, colour synonyms: RTE against T5.

`python -m recipes.robustness`

Paper: section A.8, figure 26B and the template table of its evaluation (T5-DiT-B, 264 prompts × 49
images); RTE "remains stable". Falsified by this: "the" before the second object costs the T5
model no relation accuracy, or the RTE model as much.

Beyond the paper: what "the" does to each axis (the layout, judged by colours alone, so that a lost
shape is no lost relation), and its repair: "the" moves the vectors of other words, so their mean
shift, over other prompts, is subtracted again at the words that carry the axes (first shape word,
relation words; see `text_carrier`). Control: the same at the second shape word, which carries
nothing. Predictions: `recipes/PREDICTIONS.md`.

All differences are paired (same scenes, same noise). The contrast of a template is the T5 model's
change minus the RTE model's. Templates of a model are one family of questions. Differences from
the paper: `t5-scenes` read fillers and synonyms in its pre-training, as T5-XXL did, but nothing
beyond them; the DiTs, there and here, were trained on the plain captions alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dit_lens import scenes, steering, variance, viz
from dit_lens.intervene.ablation import knockout_role
from dit_lens.intervene.edits import Add
from dit_lens.intervene.interventions import Intervention
from dit_lens.stats import Interval, clustered_mean, paired_difference
from dit_lens.task.captions import TRAINED, render_caption
from dit_lens.text.prompts import Role, role_mask
from dit_lens.training.dynamics import layout
from hooked_models import HookedTextToImage
from hooked_models.generation.views import StepView
from hooked_models.hooks.module import HookFunction

from .claims import Claim, evaluation_of, independent, report, stage
from .t5_fusion import scenes_along

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
STABLE, LOST = 0.1, -0.1
"""A template that changes relation accuracy by less is harmless, one that costs more is not."""
THE = "the second"
REPAIRS: dict[str, tuple[Role, ...]] = {
    "first shape word and relation words": ("shape1", "relation"),
    "first shape word": ("shape1",),
    "relation words": ("relation",),
    "second shape word": ("shape2",),
}
CARRIERS, NOTHING = "first shape word and relation words", "second shape word"
EVERYWHERE, HIDDEN = "all words but “the”, phrase by phrase", "“the” hidden from all heads"
WORDS: tuple[Role, ...] = ("color1", "shape1", "relation", "filler", "color2", "shape2", "eos")
"""Not predicted: added once three scenes had shown that none of `REPAIRS` brings anything back."""


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    rte: str = "rte-micro"
    t5: str = "t5-micro"
    scenes: int = 256
    """A split, of models that bring no evaluation of their own."""
    looks: int = 48
    """Scenes of each axis that are repaired at step 0."""
    images: int = 24
    """Scenes of each axis that are drawn, plain, with "the" and repaired."""
    out: Path = Path("results/robustness")


def main(config: Config) -> None:
    rows = {
        name: evaluation_of(name, config.scenes, config.out) for name in (config.rte, config.t5)
    }
    model = HookedTextToImage.from_pretrained(config.t5)
    looks = stage(config.out, "looks", model, repaired_looks, config.looks)
    drawn = stage(config.out, "images", model, repaired_images, config.images)
    claims = [
        *template_claims(config.rte, rows[config.rte], rows[config.t5], (-STABLE, STABLE)),
        *template_claims(config.t5, rows[config.t5], rows[config.rte], (-1.0, LOST)),
        *axis_claims(config.t5, looks, drawn),
        *side_claims(config.t5, looks),
        *repair_claims(config.t5, looks, drawn),
    ]
    report(f"Robustness: {config.rte} and {config.t5}", claims, config.out)
    looks.to_parquet(config.out / "looks.parquet", index=False)
    drawn.to_parquet(config.out / "images.parquet", index=False)
    viz.style.save(figure(rows, looks), config.out / "robustness.png")


# Templates


def changes(rows: pd.DataFrame, template: str, metric: str) -> pd.Series[float]:
    """By scene, a metric under a template minus under the trained one; of a template not evaluated,
    no rows.
    """
    by_template = {
        name: part.set_index("scene")[metric]
        for name, part in rows[rows["split"] == "train"].groupby("template")
    }
    if template not in by_template:
        return pd.Series(dtype=float)
    return (by_template[template] - by_template[TRAINED]).dropna().astype(float)


def change(rows: pd.DataFrame, template: str, metric: str) -> Interval:
    """Mean of `changes`."""
    return clustered_mean(changes(rows, template, metric).to_numpy()[:, None], signed=True)


def template_claims(
    model: str, rows: pd.DataFrame, others: pd.DataFrame, predicted: tuple[float, float]
) -> list[Claim]:
    """Change of relation accuracy by each template; contrast: minus that of the other model."""
    is_t5 = predicted[1] < 0
    known = [name for name in PAPER_T5 if name in set(rows["template"])]
    claims = []
    for template in known:
        own, other = (changes(table, template, "relation_loose") for table in (rows, others))
        both = (own - other).dropna()
        contrast = clustered_mean(both.to_numpy()[:, None]) if len(both) else None
        given = rows[(rows["split"] == "train") & rows["template"].isin([TRAINED, template])]
        kept = given.groupby("template", observed=True)["relation_given_both"].mean()
        paper = (
            f".808 → {PAPER_T5[template]}"
            if is_t5
            else "stable"
            if "inverted" not in template
            else "–"
        )
        beside = f"unique binding {change(rows, template, 'unique_binding')}; "
        beside += f"relation of those that bind {kept[TRAINED]:.2f} → {kept[template]:.2f}"
        claims.append(
            Claim(
                f"{model}: {template!r}, change of relation (loose)",
                paper,
                change(rows, template, "relation_loose"),
                predicted,
                beside + (f"; minus the other model's {contrast}" if contrast else ""),
                contrast,
                f"{len(own)} scenes, a noise each, 1 run",
                questions=len(known),
            )
        )
    return claims


# By axis, and repair


def the_second(text: str) -> str:
    """Prompt with "the" before its second object.

    Example:
        >>> the_second("red circle is above blue square")
        'red circle is above the blue square'
    """
    words = text.split()
    at = len(words) - 2 if words[-2] in scenes.COLORS else len(words) - 1
    return " ".join([*words[:at], "the", *words[at:]])


@functools.lru_cache(maxsize=8)
@torch.no_grad()
def shift(model: HookedTextToImage, role: Role) -> Float[Tensor, " d"]:
    """Mean change, over the 264 prompts, of a word's vector by "the" before the second object (text
    space).
    """
    plain = variance.factorial_prompts()
    with_the, without = (
        variance.word_vectors(model, prompts, role, pool="mean")[0]
        for prompts in ([the_second(p) for p in plain], plain)
    )
    return (with_the - without).mean(dim=0)


@torch.no_grad()
def shift_everywhere(
    model: HookedTextToImage, wanted: list[scenes.Scene]
) -> Float[Tensor, "prompt text_pos d"]:
    """Mean change of every word's vector by "the", over the 12 prompts with a scene's phrase; 0 at
    "the" itself.
    """
    rows = []
    for scene in wanted:
        plain = variance.factorial_prompts([scene.phrase])
        before = variance.encode(model, model.to_tokens(plain), "text").mean(dim=0)
        after = variance.encode(
            model, model.to_tokens([the_second(text) for text in plain]), "text"
        ).mean(dim=0)
        at = len(the_second(plain[0]).split()) - 3
        change = torch.cat(
            [after[:at] - before[:at], torch.zeros_like(after[:1]), after[at + 1 :] - before[at:]]
        )
        rows.append(change)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def repairs(
    model: HookedTextToImage, texts: list[str]
) -> dict[str, Float[Tensor, "prompt text_pos d"]]:
    """Name → vectors added to the words of prompts with "the"."""
    parts = {}
    roles_moved: tuple[Role, ...] = ("shape1", "relation", "shape2")
    for role in roles_moved:
        moved = shift(model, role)
        parts[role] = role_mask(model, texts, role)[..., None].to(moved) * moved
    return {
        name: -torch.stack([parts[role] for role in roles]).sum(dim=0)
        for name, roles in REPAIRS.items()
    }


@torch.no_grad()
def repaired_looks(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """A row an axis, condition and scene: cosine of the layout at step 0; conditions "plain", "the"
    and `REPAIRS`.
    """
    rows = []
    for axis in ("vertical", "horizontal"):
        wanted = scenes_along(axis, n, seed=51)
        seeds = list(range(9500, 9500 + len(wanted)))
        for condition, texts, added in conditions(model, wanted):
            view, tokens = model.at(step=0, prompts=texts, seed=seeds, guidance=1.0, returns="x0")
            hooks = (
                []
                if added is None
                else Intervention("hook_text", action=Add(added)).hooks(view, texts)
            )
            cosine = layout(model.decode(view.run_with_hooks(tokens, fwd_hooks=hooks)), wanted)
            row = {
                "axis": axis,
                "scene": np.arange(len(wanted)),
                "left": [scene.relation == "left" for scene in wanted],
            }
            rows.append(pd.DataFrame({**row, "condition": condition, "cosine": cosine}))
            if condition == "the":
                cosine = layout(
                    model.decode(view.run_with_hooks(tokens, fwd_hooks=hide_the(texts, view))),
                    wanted,
                )
                rows.append(pd.DataFrame({**row, "condition": HIDDEN, "cosine": cosine}))
    return pd.concat(rows, ignore_index=True)


def conditions(
    model: HookedTextToImage, wanted: list[scenes.Scene]
) -> list[tuple[str, list[str], Float[Tensor, "prompt text_pos d"] | None]]:
    """Name, prompts and the vectors added to their words."""
    plain, with_the = (
        [render_caption(scene, template) for scene in wanted] for template in (TRAINED, THE)
    )
    mended = [(name, with_the, added) for name, added in repairs(model, with_the).items()]
    everywhere = -shift_everywhere(model, wanted)
    mended.append((EVERYWHERE, with_the, everywhere))
    for role in WORDS:
        mended.append(
            (f"{role} alone", with_the, everywhere * role_mask(model, with_the, role)[..., None])
        )
    return [("plain", plain, None), ("the", with_the, None), *mended]


def hide_the(
    texts: list[str], view: StepView | HookedTextToImage
) -> list[tuple[str, HookFunction]]:
    """Hooks that hide the token before the second object."""
    width = max(len(text.split()) for text in texts) + 1  # EOS
    where = torch.tensor([[i == len(text.split()) - 3 for i in range(width)] for text in texts])
    return [hook for one in knockout_role(where) for hook in one.hooks(view, texts)]


@torch.no_grad()
def repaired_images(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """The same in images, of "plain", "the", the carriers' repair and the control's: `asked`
    (layout), `binding`.
    """
    rows = []
    for axis in ("vertical", "horizontal"):
        wanted = scenes_along(axis, n, seed=52)
        seeds = list(range(9600, 9600 + len(wanted)))
        for condition, texts, added in conditions(model, wanted):
            if condition not in ("plain", "the", CARRIERS, NOTHING, EVERYWHERE):
                continue
            images = (
                model(texts, seeds)
                if added is None
                else steering.steer(model, texts, added, seed=seeds)
            )
            judged = {
                "asked": scenes.layout(images, wanted)["layout"].values.astype(float),
                "binding": scenes.evaluate(images, wanted)["unique_binding"].values.astype(float),
            }
            rows.append(
                pd.DataFrame(
                    {
                        "axis": axis,
                        "condition": condition,
                        "scene": np.arange(len(wanted)),
                        **judged,
                    }
                )
            )
    return pd.concat(rows, ignore_index=True)


def wide(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """A column a condition, a row a scene of either axis."""
    return rows.pivot(index=["axis", "scene"], columns="condition", values=value)


def axis_claims(name: str, looks: pd.DataFrame, drawn: pd.DataFrame) -> list[Claim]:
    """Cost of "the" to vertical scenes, more than to horizontal ones: at step 0, and in images."""
    claims = []
    for rows, value, what in (
        (looks, "cosine", "cosine of the layout at step 0"),
        (drawn, "asked", "layout as asked in images"),
    ):
        table = wide(rows, value)
        lost = {
            str(axis): paired_difference(part[["the"]].to_numpy(), part[["plain"]].to_numpy())
            for axis, part in table.groupby("axis", sort=False)
        }
        beside = "; ".join(f"{axis} {found}" for axis, found in lost.items())
        n = len(table) // len(lost)
        claims.append(
            Claim(
                f'{name}: {what} lost by "the" before the second object, vertical minus horizontal scenes',
                "–",
                independent(lost["vertical"], lost["horizontal"]),
                (0.05, 2.0),
                beside,
                basis=f"{n} scenes each, a noise each, 1 run",
                questions=2,
            )
        )
    return claims


def side_claims(name: str, looks: pd.DataFrame) -> list[Claim]:
    """Cost of "the" to "left" and "right" apart: not predicted."""
    claims = []
    for side in ("left", "right"):
        part = looks[(looks["axis"] == "horizontal") & (looks["left"] == (side == "left"))]
        table = wide(part, "cosine")
        lost = paired_difference(table[["the"]].to_numpy(), table[["plain"]].to_numpy())
        beside = f"{table['plain'].mean():+.2f} → {table['the'].mean():+.2f}"
        what = f'{name}: cosine of the layout at step 0 lost by "the", "{side}" scenes'
        claims.append(
            Claim(
                what,
                "Dx −34 px",
                lost,
                None,
                beside,
                basis=f"{len(table)} scenes, a noise each, 1 run",
            )
        )
    return claims


def share_of(gained: Float[np.ndarray, " scene"], lost: Float[np.ndarray, " scene"]) -> Interval:
    """Ratio of two means over the same scenes; t interval of the linearised ratio (Cochran 1977, §
    6.3).
    """
    if lost.mean() == 0:
        return Interval(*[np.nan] * 3)
    share = gained.mean() / lost.mean()
    spread = clustered_mean(((gained - share * lost) / lost.mean())[:, None])
    half = (spread.high - spread.low) / 2
    return Interval(float(share), float(share - half), float(share + half))


def repair_claims(name: str, looks: pd.DataFrame, drawn: pd.DataFrame) -> list[Claim]:
    """Share of the loss that comes back by each repair."""
    predicted = {CARRIERS: (0.5, 2.0), NOTHING: (-0.1, 0.1)}
    claims = []
    for rows, value, what in (
        (looks, "cosine", "cosine lost at step 0"),
        (drawn, "asked", "layouts lost in images"),
    ):
        table = wide(rows, value)
        lost = (table["plain"] - table["the"]).to_numpy(float)
        for repair in [repair for repair in (*REPAIRS, EVERYWHERE, HIDDEN) if repair in table]:
            found = share_of((table[repair] - table["the"]).to_numpy(float), lost)
            means = table.groupby("axis", sort=False)[["plain", "the", repair]].mean()
            beside = "; ".join(
                f"{axis} plain {row.iloc[0]:.2f}, the {row.iloc[1]:.2f}, repaired {row.iloc[2]:.2f}"
                for axis, row in means.iterrows()
            )
            if repair == EVERYWHERE and value == "cosine":
                single = {
                    word: share_of(
                        (table[f"{word} alone"] - table["the"]).to_numpy(float), lost
                    ).mean
                    for word in WORDS
                }
                beside += "; of it by one word: " + ", ".join(
                    f"{word} {share:.2f}" for word, share in single.items()
                )
            claims.append(
                Claim(
                    f"{name}: share of the {what} that comes back, repaired: {repair}",
                    "–",
                    found,
                    predicted.get(repair) if value == "cosine" or repair == CARRIERS else None,
                    beside,
                    basis=f"{len(table)} scenes, a noise each, 1 run",
                )
            )
    return claims


# Figure


@viz.style.styled
def figure(rows: dict[str, pd.DataFrame], looks: pd.DataFrame) -> Figure:
    """Change of relation accuracy and of binding by template, a panel a model; layout at step 0 by
    repair and axis.
    """
    drawn, axes = plt.subplots(1, 3, figsize=(9.6, 4.4), layout="constrained")
    templates, the = list(PAPER_T5), []
    for ax, (model, table) in zip(axes, rows.items(), strict=False):
        metrics = {"relation": "relation_loose", "binding": "unique_binding"}
        for shift, (label, metric) in zip((-0.1, 0.1), metrics.items(), strict=True):
            found = [change(table, template, metric) for template in templates]
            places = np.arange(len(templates)) + shift
            viz.intervals(ax, found, places, label=label)
        ax.axvline(0, color=viz.style.INK, linewidth=0.6)
        ax.set(title=model, xlabel="change (paired)", xlim=(-1.05, 0.25))
        viz.name_rows(ax, templates if ax is axes[0] else [""] * len(templates))
        the.append(f"{model} {change(table, 'the both', 'relation_loose').mean:+.2f}")
    axes[0].legend(loc="lower left")
    names = {"plain": "plain", "the": "“the”", **{repair: f"at {repair}" for repair in REPAIRS}}
    names |= {
        CARRIERS: "at both carriers",
        EVERYWHERE: "at all words but “the”",
        HIDDEN: "“the” hidden",
    }
    for axis, shift, color in (("vertical", -0.12, "tab:orange"), ("horizontal", 0.12, "tab:blue")):
        wide = looks[looks["axis"] == axis].groupby("condition")["cosine"]
        seen = [clustered_mean(wide.get_group(name).to_numpy()[:, None]) for name in names]
        viz.intervals(axes[2], seen, np.arange(len(names)) + shift, color=color, label=axis)
    viz.name_rows(axes[2], list(names.values()))
    axes[2].set(title="“the” and its repair", xlabel="cosine of the layout, step 0")
    axes[2].legend()
    drawn.suptitle(f"“the” before both objects, change of the relation: {', '.join(the)}")
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Config))
