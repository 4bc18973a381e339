"""Figures of the recipes on relation heads and object heads."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dit_lens import circuits, scenes, viz
from dit_lens.stats import Interval, clustered_means
from dit_lens.task import DIRECTIONS
from dit_lens.text.prompts import token_roles
from dit_lens.viz import bare
from dit_lens.viz.style import DIVERGING, INK, head_color, styled
from hooked_models import HookedTextToImage

from . import attention_synopsis as synopses
from .knockouts import SHAPE_WORDS, accuracy, change, names_of, scenes_of


@styled
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
        figsize=(9.2, 1.4 + 0.3 * len(shown)),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for ax, (verdict, label) in zip(axes[0], verdicts.items(), strict=True):
        for place, name in enumerate(shown):
            alone, control = re.match(r"L\d+H\d+", name), " | " in name
            color = INK if control else head_color(alone[0]) if alone else "tab:red"
            fill = "none" if control else color
            found = [change(rows, name, verdict)]
            viz.intervals(ax, found, [place], color=color, markerfacecolor=fill)
        ax.axvline(0, color=INK, linewidth=0.6)
        most = min(conditions, key=lambda name: change(rows, name, verdict).mean)
        ax.set_title(
            f"{label}: {accuracy(rows, 'none', verdict):.2f},\n"
            f"{most} {change(rows, most, verdict).mean:+.2f}"
        )
    viz.name_rows(
        axes[0][0], [f"– {name.split(' | ')[1]}" if " | " in name else name for name in shown]
    )
    drawn.supxlabel("change (paired), 95 %")
    return drawn


@styled
def ways_figure(ways: dict[str, pd.DataFrame], singles: pd.DataFrame) -> Figure:
    """Every head's score by each way, named heads in colour, and what its relation words cost in
    images.
    """
    labels = {
        "screening": "screening\n|projection on ramps|",
        "synopsis": "synopsis, step 0:\nattention − shuffled",
        "knock-out": "knock-out, step 0:\nlayout's cosine lost",
    }
    heads = names_of(ways["screening"].index)
    drawn, axes = plt.subplots(
        1, 4, figsize=(9.6, 1.2 + 0.22 * len(heads)), sharey=True, layout="constrained"
    )
    places = range(len(heads))
    for ax, (way, table) in zip(axes, ways.items(), strict=False):
        named = zip(heads, table["named"], strict=True)
        colors = [head_color(head) if here else (INK, 0.4) for head, here in named]
        ax.barh(places, table["score"], color=colors)
        if "low" in table:
            found = table[["score", "low", "high"]].to_numpy(float)
            viz.intervals(ax, [Interval(*row) for row in found], fmt="none", ecolor=INK)
        ax.set_title(labels[way])
    for place, head in enumerate(heads):
        viz.intervals(
            axes[3], [change(singles, head, "relation_loose")], [place], color=head_color(head)
        )
    axes[3].set_title("hidden from it alone:\nchange of the relation")
    for ax in axes:
        ax.axvline(0, color=INK, linewidth=0.6)
        ax.xaxis.set_major_locator(MaxNLocator(3))
    viz.name_rows(axes[0], heads)
    together = np.logical_and.reduce([table["named"] for table in ways.values()])
    told = ", ".join(head for head, named in zip(heads, together, strict=True) if named)
    drawn.suptitle(f"Named by all three ways: {told or 'none'} (grey: not named)")
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


@styled
def steps_figure(
    seen: Float[xr.DataArray, "..."], cumulated: pd.DataFrame, heads: Sequence[str]
) -> Figure:
    """Attention of either object to the relation words over the steps, and the layout lost at step
    0 by number of heads.
    """
    drawn, axes = plt.subplots(1, 3, figsize=(9.6, 3.8), layout="constrained")
    for ax, region in zip(axes[:2], ("object1", "object2"), strict=True):
        draw_attention(ax, seen.sel(image_group=region), heads)
        ax.set_title(f"object {region[-1]} → relation words")
    lost = {}
    for kind, color in (("found", "tab:red"), ("random", INK)):
        rows = cumulated[cumulated["kind"] == kind]
        found = [Interval(*row) for row in rows[["mean", "low", "high"]].to_numpy(float)]
        lost[kind] = found[-1].mean
        at, look = rows["heads"], {"fmt": "o-", "color": color}
        viz.intervals(axes[2], found, at, upright=True, label=kind, **look)
    axes[2].set(xlabel="number of heads", ylabel="layout's cosine lost")
    axes[2].set_title("relation words masked at step 0")
    axes[2].legend(loc="upper left")
    drawn.suptitle(
        f"Masking {len(heads)} heads at step 0 costs {lost['found']:.2f} of the layout's cosine, "
        f"random heads {lost['random']:.2f}"
    )
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=7)
    return drawn


def draw_attention(ax: Axes, seen: Float[xr.DataArray, "..."], heads: Sequence[str]) -> None:
    """Attention of one region to the relation words by step, and that to shuffled labels."""
    for head in heads:
        layer, index = circuits.parse_head(head)
        course = seen.sel(text_group="relation", layer=layer, head=index).transpose(
            "step", "prompt"
        )
        mean, low, high = clustered_means(course.values.astype(float)[:, :, None]).T
        color = head_color(head)
        ax.plot(course["step"], mean, marker=".", label=head, color=color)
        ax.fill_between(course["step"], low, high, alpha=0.2, color=color, linewidth=0)
    shuffled = seen.sel(text_group=synopses.ROLES).mean(("text_group", "prompt", "layer", "head"))
    ax.plot(shuffled["step"], shuffled, color=INK, linestyle="--", label="labels shuffled")
    ax.set(xlabel="denoising step", ylabel="attention to a token")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


@styled
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
    drawn, axes = plt.subplots(4, 5, figsize=(9.2, 8.8), layout="constrained")
    for row, text, image in zip(axes, texts, images, strict=True):
        maps = circuits.two_head_maps(model, text, before, receiver)
        places = [token_roles(model, text).index(role) for role in SHAPE_WORDS]
        bare(row[0]).imshow(image.permute(1, 2, 0).numpy())
        row[0].set_title(textwrap.fill(text, 18), fontsize=9)
        reach = float(abs(maps["composed"][places]).max())
        for column, (which, place) in enumerate(product(("alone", "composed"), places), start=1):
            picture = bare(row[column]).imshow(
                maps[which][place], cmap=DIVERGING, vmin=-reach, vmax=reach
            )
            token = str(maps["token"].values[place]).removeprefix("▁")
            row[column].set_title(f"{token}\n{which}")
        drawn.colorbar(picture, ax=row, shrink=0.8, label="logits, centred")
    written = textwrap.fill(f"composed: with the output of {', '.join(before)} added", 90)
    drawn.suptitle(
        f"{receiver}: attention logits to the shape words, by position alone;\n{written}"
    )
    return drawn


@styled
def dependence_figure(
    maps: pd.DataFrame, paths: Mapping[str, Interval], swaps: Mapping[str, Interval]
) -> Figure:
    """Spread and direction of the maps by what was added; what either path patching finds by
    path.
    """
    drawn, grid = plt.subplots(2, 2, figsize=(9.2, 6.4), layout="constrained")
    order = ["nothing", "random heads", "relation heads"]
    for ax, column, label in (
        (grid[0, 0], "spread", "spread over positions, logits"),
        (grid[0, 1], "along", "cosine with the relation's ramp"),
    ):
        ax.boxplot(
            [maps.loc[maps["written"] == name, column] for name in order],
            widths=0.6,
            showfliers=False,
        )
        ax.set_xticks(range(1, 4), ["\n".join(f"{name} added".split()) for name in order])
        ax.set_title(label)
    for ax, found, label in (
        (grid[1, 0], paths, "share of the layout's turn, by path"),
        (grid[1, 1], swaps, "shapes change places, by path"),
    ):
        for place, (path, one) in enumerate(found.items()):
            viz.intervals(ax, [one], [place], color=INK if "random" in path else "tab:red")
        viz.name_rows(ax, [path.replace(" → ", " →\n") for path in found])
        ax.axvline(0, color=INK, linewidth=0.6)
        ax.set_title(label)
    before, after = (
        maps.loc[maps["written"] == name, "along"].median() for name in ("nothing", order[-1])
    )
    drawn.suptitle(
        "Cosine of the object head's maps with the relation's ramp: median "
        f"{before:.2f}, with the relation heads' output {after:.2f}"
    )
    return drawn
