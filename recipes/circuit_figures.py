"""Figures of the recipes on relation heads and object heads."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
import xarray as xr
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dit_lens import circuits, scenes, viz
from dit_lens.stats import Interval, clustered_means
from dit_lens.task import DIRECTIONS
from dit_lens.text.prompts import token_roles
from dit_lens.viz import bare
from hooked_models import HookedTextToImage

from . import attention_synopsis as synopses
from .knockouts import SHAPE_WORDS, accuracy, change, names_of, scenes_of


def effects_figure(
    rows: pd.DataFrame, conditions: Sequence[str], verdicts: Mapping[str, str]
) -> Figure:
    """Change against no knock-out by condition, a panel a verdict (name → label); controls hollow,
    below their condition.
    """
    shown = [
        name
        for condition in conditions
        for name in (condition, f"{condition} | random heads", f"{condition} | random tokens")
        if name in set(rows["condition"])
    ]
    drawn, axes = plt.subplots(
        1,
        len(verdicts),
        figsize=(2.2 + 3.0 * len(verdicts), 1.2 + 0.3 * len(shown)),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for ax, (verdict, label) in zip(axes[0], verdicts.items(), strict=True):
        for place, name in enumerate(shown):
            found, control = change(rows, name, verdict), " | " in name
            error = [[found.mean - found.low], [found.high - found.mean]]
            color = "tab:grey" if control else "tab:red"
            ax.errorbar(
                found.mean,
                place,
                xerr=error,
                fmt="o",
                color=color,
                markerfacecolor="white" if control else color,
            )
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set_title(f"{label}: {accuracy(rows, 'none', verdict):.2f} without", fontsize=9)
        ax.set_xlabel("change (paired), 95 %", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(
        range(len(shown)),
        [f"– {name.split(' | ')[1]}" if " | " in name else name for name in shown],
        fontsize=8,
    )
    axes[0][0].invert_yaxis()
    return drawn


def ways_figure(ways: dict[str, pd.DataFrame], singles: pd.DataFrame) -> Figure:
    """Every head's score by each way, named heads in colour, and what its relation words cost in
    images.
    """
    labels = {
        "screening": "screening\n|projection on ramps|",
        "synopsis": "synopsis, step 0\nattention beyond shuffle",
        "knock-out": "knock-out, step 0\nlayout's cosine lost",
    }
    drawn, axes = plt.subplots(
        1, 4, figsize=(13, 0.9 + 0.22 * len(ways["screening"])), sharey=True, layout="constrained"
    )
    heads = names_of(ways["screening"].index)
    for ax, (way, table) in zip(axes, ways.items(), strict=False):
        error = (
            None
            if "low" not in table
            else [table["score"] - table["low"], table["high"] - table["score"]]
        )
        colors = ["tab:red" if named else "lightgrey" for named in table["named"]]
        ax.barh(heads, table["score"], xerr=error, color=colors, error_kw={"linewidth": 0.8})
        ax.set_title(labels[way], fontsize=9)
    costs = [change(singles, head, "relation_loose") for head in heads]
    reach = [[cost.mean - cost.low for cost in costs], [cost.high - cost.mean for cost in costs]]
    axes[3].errorbar(
        [cost.mean for cost in costs],
        heads,
        xerr=reach,
        fmt="o",
        color="black",
        markersize=4,
        linewidth=0.8,
    )
    axes[3].set_title(
        "masked in this head alone, all steps\nchange of relation accuracy", fontsize=9
    )
    axes[0].invert_yaxis()
    for ax in axes:
        ax.axvline(0, color="black", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    axes[0].set_xlabel("red: named by this way", fontsize=8)
    return drawn


def ramps_figure(maps: Float[xr.DataArray, "..."], heads: Sequence[str]) -> Figure:
    """The maps of the eight relations, mean over phrases, a row a head."""
    by_relation = maps.groupby("relation").mean()
    shown = {}
    for head in heads:
        layer, index = circuits.parse_head(head)
        shown[head] = {
            str(name): by_relation.sel(layer=layer, head=index, relation=name)
            for name in DIRECTIONS
        }
    return viz.ramp_gallery(
        shown, "position code × relation words, from weights alone (mean over phrases)"
    )


def steps_figure(
    seen: Float[xr.DataArray, "..."], cumulated: pd.DataFrame, heads: Sequence[str]
) -> Figure:
    """Attention of either object to the relation words over the steps, and the layout lost at step
    0 by number of heads.
    """
    drawn, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for ax, region in zip(axes[:2], ("object1", "object2"), strict=True):
        for head in heads:
            layer, index = circuits.parse_head(head)
            course = seen.sel(
                image_group=region, text_group="relation", layer=layer, head=index
            ).transpose("step", "prompt")
            mean, low, high = clustered_means(course.values.astype(float)[:, :, None]).T
            (line,) = ax.plot(course["step"], mean, marker=".", label=head)
            ax.fill_between(
                course["step"], low, high, alpha=0.2, color=line.get_color(), linewidth=0
            )
        shuffled = seen.sel(image_group=region, text_group=synopses.ROLES).mean(
            ("text_group", "prompt", "layer", "head")
        )
        ax.plot(shuffled["step"], shuffled, color="black", linestyle="--", label="labels shuffled")
        ax.set_title(f"object {region[-1]} → relation words", fontsize=10)
        ax.set_xlabel("denoising step")
        ax.set_ylabel("attention to a token")
        ax.set_ylim(0, 1.3 * ax.get_ylim()[1])
    axes[0].legend(frameon=False, fontsize=7, ncols=2, loc="upper right")
    for kind, color in (("found", "tab:red"), ("random", "tab:grey")):
        rows = cumulated[cumulated["kind"] == kind]
        error = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
        axes[2].errorbar(
            rows["heads"], rows["mean"], yerr=error, marker="o", color=color, label=kind
        )
    axes[2].set_title("relation words masked in k heads at step 0", fontsize=10)
    axes[2].set_xlabel("k (found: in order of screening)")
    axes[2].set_ylabel("layout's cosine lost")
    axes[2].legend(frameon=False, fontsize=8, loc="upper left")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return drawn


def maps_figure(
    model: HookedTextToImage, senders: Sequence[str], receiver: str, seed: int
) -> Figure:
    """For a scene of each of four relations: the image, and the receiver's maps of both shape
    words, alone and composed.
    """
    pool, noise = scenes_of(64, seed)
    chosen = [
        next(i for i, scene in enumerate(pool) if scene.relation == name)
        for name in ("above", "below", "left", "right")
    ]
    texts = [scenes.caption(pool[i]) for i in chosen]
    images = model(texts, seed=[int(noise[i]) for i in chosen])
    before = [
        head for head in senders if circuits.parse_head(head)[0] < circuits.parse_head(receiver)[0]
    ]
    drawn, axes = plt.subplots(4, 5, figsize=(8.6, 7.4), layout="constrained")
    for row, text, image in zip(axes, texts, images, strict=True):
        maps = circuits.two_head_maps(model, text, before, receiver)
        places = [token_roles(model, text).index(role) for role in SHAPE_WORDS]
        bare(row[0]).imshow(image.permute(1, 2, 0).numpy())
        row[0].set_title(textwrap.fill(text, 22), fontsize=7)
        reach = float(abs(maps["composed"][places]).max())
        for column, (which, place) in enumerate(product(("alone", "composed"), places), start=1):
            picture = bare(row[column]).imshow(
                maps[which][place], cmap="RdBu_r", vmin=-reach, vmax=reach
            )
            token = str(maps["token"].values[place]).removeprefix("▁")
            row[column].set_title(
                f"{token}, {'position alone' if which == 'alone' else '+ relation heads'}",
                fontsize=8,
            )
        drawn.colorbar(picture, ax=row, shrink=0.8, label="logits, centred")
    drawn.suptitle(
        f"{receiver}: where it looks for the shape words; added: what {', '.join(before)} write",
        fontsize=10,
    )
    return drawn


def dependence_figure(
    maps: pd.DataFrame, paths: Mapping[str, Interval], swaps: Mapping[str, Interval]
) -> Figure:
    """Spread and direction of the maps by what was added; what either path patching finds by
    path.
    """
    drawn, grid = plt.subplots(2, 2, figsize=(9.2, 6.4), layout="constrained")
    axes = grid.ravel()
    for ax, column, label in (
        (axes[0], "spread", "spread over positions, logits"),
        (axes[1], "along", "cosine with the relation's ramp"),
    ):
        order = ["nothing", "random heads", "relation heads"]
        ax.boxplot(
            [maps.loc[maps["written"] == name, column] for name in order],
            widths=0.6,
            showfliers=False,
        )
        ax.set_xticks(
            range(1, 4), ["\n".join(f"{name} added".split()) for name in order], fontsize=10
        )
        ax.set_title(label, fontsize=11)
    for ax, found, label in (
        (axes[2], paths, "share of the layout's turn, by path"),
        (axes[3], swaps, "shapes change places, by path"),
    ):
        for place, one in enumerate(found.values()):
            ax.errorbar(
                one.mean,
                place,
                xerr=[[one.mean - one.low], [one.high - one.mean]],
                fmt="o",
                color="black",
            )
        ax.set_yticks(
            range(len(found)), [path.replace(" → ", " →\n") for path in found], fontsize=9
        )
        ax.axvline(0, color="grey", linewidth=0.6)
        ax.invert_yaxis()
        ax.set_title(label, fontsize=11)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return drawn
