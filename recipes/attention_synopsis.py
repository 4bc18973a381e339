"""Which head's objects read which word, and when. `python -m recipes.attention_synopsis`

Paper: section 4.1, figure 3A (heads × object region → word): in RTE-DiT-B a relation head (L2H8) is
at work at the first step already, an object head (L4H3) at steps 4 to 8; in T5-DiT-B a head (L3H7)
reads the second shape word where RTE's reads the relation. Falsified by this: no head's objects
read the relation words (RTE) or the second shape word (T5) at step 0 beyond a shuffle of the words'
labels; or none reads its own shape later, or reads both shapes alike.

Differences from the paper: means over tokens instead of sums, so that words and regions of any
size compare; steps stay apart instead of their maximum; trained phrases instead of "… the …"; EOS
counts. A head is picked on one half of the scenes and measured on the other, so that being the best
of many costs nothing. Control: the words' labels of each prompt shuffled, whose expectation is the
mean over the prompt's words.

Beyond the paper: regions by colour. One claim was seen first and then made (an object head serves the
objects of one colour): its prediction is the only one here that was not stated beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
import xarray as xr
from jaxtyping import Float
from matplotlib.figure import Figure

from dit_lens import scenes, synopsis
from dit_lens.stats import Interval, clustered_mean
from dit_lens.viz import name_rows, style
from hooked_models import HookedTextToImage

from .claims import Claim, report, stage

FIRST, LATER = slice(0, 0), slice(4, 8)
"""Steps, both ends included: where the paper has the relation head, and the object head, at
work.
"""
THERE = (0.1, 1.0)
"""Attention to one token beyond the label shuffle's from which on a head counts as reading it."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    model: str = "rte-micro"
    """Expected to have a relation head."""
    comparison: str = "t5-micro"
    """Expected to read the second shape word instead; "" for none."""
    scenes: int = 96
    """One image each."""
    full: bool = False
    """Four times the scenes."""
    seed: int = 0
    out: Path = Path("results/attention_synopsis")


class Question(NamedTuple):
    """A region, the words that it reads, and the steps."""

    regions: tuple[str, ...]
    """Any of these; several as one after "+" is their mean."""
    words: str
    steps: slice


RELATION = Question(("object1", "object2"), "relation", FIRST)
SHAPE2 = Question(("object1", "object2"), "shape2", FIRST)
OWN_SHAPE = Question(("object1+object2",), "own shape", LATER)


def main(config: Config) -> None:
    claims, seen = [], {}
    for name, fused in ((config.model, False), (config.comparison, True)):
        if not name:
            continue
        model = HookedTextToImage.from_pretrained(name)
        parts = [
            stage(
                config.out,
                name.replace("/", "_"),
                model,
                reading,
                config.scenes,
                config.seed + chunk,
            )
            for chunk in range(4 if config.full else 1)
        ]
        seen[name] = by_object(labelled(parts))
        claims += fused_claims(name, seen[name]) if fused else relation_claims(name, seen[name])
        claims += shape_claims(name, seen[name])
    n = config.scenes * (4 if config.full else 1)
    basis = f"{n} images, a noise each; heads chosen on one half, numbers of the other; 1 run"
    report("Attention synopsis: " + " and ".join(seen), claims, config.out, basis, full=config.full)
    table = {name: ranking(found) for name, found in seen.items()}
    pd.concat(table, names=["model"]).reset_index("model").to_parquet(
        config.out / "heads.parquet", index=False
    )
    style.save(heads_figure(seen), config.out / "heads.png")
    style.save(steps_figure(seen), config.out / "steps.png")


# Measuring


@torch.no_grad()
def reading(model: HookedTextToImage, n: int, seed: int) -> pd.DataFrame:
    """Attention of a token of each object's region to one token of each role: a row a scene, head,
    step, region and role.

    Scenes of all combinations, each with noise of its own. Regions are those of the finished image,
    at every step (the paper's).
    """
    wanted = scenes.sample(n, seed=seed + 1, split="all", color_words="both")
    texts, noise = [scenes.caption(scene) for scene in wanted], [1000 * seed + i for i in range(n)]
    images = torch.cat([model(texts[i : i + 32], seed=noise[i : i + 32]) for i in range(0, n, 32)])
    side = model.cfg.sample_size // model.cfg.patch_size
    groups = synopsis.image_groups_from_images(images, wanted, (side, side))
    found = synopsis.attention_synopsis(
        model, texts, noise, image_groups=groups, reduce="mean", batch_size=32
    )
    found = found.sel(branch="cond", drop=True).drop_sel(text_group="pad")
    found = found.drop_vars(["image_tokens", "key_tokens", "seed", "prompt"]).assign_coords(
        prompt=np.arange(n)
    )
    found = found.assign_coords(color1=("prompt", [scene.color1 for scene in wanted]))
    return found.rename("attention").to_dataframe().reset_index()


def labelled(parts: Sequence[pd.DataFrame]) -> xr.DataArray:
    """Tables of `reading`, scenes numbered through, as the synopsis that they were: (prompt, layer,
    head, step, image, text).
    """
    dims = ["prompt", "layer", "head", "step", "image_group", "text_group"]
    joined = xr.concat(
        [part.set_index(dims)["attention"].to_xarray() for part in parts], dim="prompt"
    )
    colors = np.concatenate([part.groupby("prompt")["color1"].first() for part in parts])
    numbers = np.arange(joined.sizes["prompt"])
    return joined.assign_coords(prompt=numbers, color1=("prompt", colors)).transpose(*dims)


def by_object(seen: Float[xr.DataArray, "..."]) -> xr.DataArray:
    """With words as each object sees them besides: own and other shape and colour.

    Regions object1, object2, and red and blue.
    """
    parts = []
    for own, other in (("1", "2"), ("2", "1")):
        names = {
            f"{word}{number}": f"{whose} {word}"
            for word in ("shape", "color")
            for number, whose in ((own, "own"), (other, "other"))
        }
        one = seen.sel(image_group=f"object{own}", drop=True)
        renamed = one.sel(text_group=list(names)).assign_coords(text_group=list(names.values()))
        parts.append(xr.concat([one, renamed], dim="text_group"))
    first, second = parts
    parts += [
        xr.where(seen["color1"] == color, first, second, keep_attrs=True) for color in scenes.COLORS
    ]
    return xr.concat(
        parts, dim=pd.Index(["object1", "object2", *scenes.COLORS], name="image_group")
    )


ROLES = ["color1", "shape1", "relation", "color2", "shape2", "filler", "eos"]
"""All parts of a prompt, among which labels are shuffled."""


def excess(seen: Float[xr.DataArray, "..."]) -> xr.DataArray:
    """Attention beyond the expected one after a shuffle of the prompt's labels: the mean over its
    words.
    """
    return seen - seen.sel(text_group=ROLES).mean("text_group")


def ask(seen: Float[xr.DataArray, "..."], question: Question) -> xr.DataArray:
    """The numbers that a question is about, mean over its steps: (prompt, image_group, layer,
    head).
    """
    chosen = seen.sel(text_group=question.words, step=question.steps).mean("step")
    parts = [
        chosen.sel(image_group=region.split("+")).mean("image_group") for region in question.regions
    ]
    return xr.concat(parts, dim=pd.Index(list(question.regions), name="image_group"))


class Picked(NamedTuple):
    """The head that a question picks on even scenes."""

    region: str
    layer: int
    head: int

    def of(self, values: Float[xr.DataArray, "..."]) -> xr.DataArray:
        """Its numbers in the other scenes."""
        return values.sel(image_group=self.region, layer=self.layer, head=self.head).isel(
            prompt=slice(1, None, 2)
        )

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


def pick(seen: Float[xr.DataArray, "..."], question: Question) -> Picked:
    """The head, and the region, that read most beyond the label shuffle on every other scene."""
    values = ask(excess(seen), question).isel(prompt=slice(0, None, 2)).mean("prompt")
    best = values.stack(at=("image_group", "layer", "head")).fillna(-1).idxmax().item()
    return Picked(best[0], int(best[1]), int(best[2]))


def interval(values: Float[xr.DataArray, " prompt"]) -> Interval:
    """Mean over scenes."""
    return clustered_mean(values.values.astype(float)[:, None])


def step_of_most(profile: Float[np.ndarray, "scene step"]) -> Interval:
    """At which step the mean over scenes is largest; the interval resamples scenes."""
    profile = profile[np.isfinite(profile).all(axis=1)]
    rng = np.random.default_rng(0)
    tops = [
        profile[rng.integers(len(profile), size=len(profile))].mean(axis=0).argmax()
        for _ in range(RESAMPLES)
    ]
    return Interval(
        float(profile.mean(axis=0).argmax()),
        *(float(bound) for bound in np.quantile(tops, [0.025, 0.975])),
    )


def ranking(seen: Float[xr.DataArray, "..."]) -> pd.DataFrame:
    """`synopsis.rank_heads` of every region and word, at the first step and on average over the
    later ones.
    """
    tables = []
    plain = seen.sel(text_group=ROLES).expand_dims(branch=["cond"])
    for steps, window in (("0", FIRST), ("4–8", LATER)):
        for region in ("object1", "object2"):
            for words in ROLES:
                ranked = synopsis.rank_heads(plain.sel(step=window), region, words, shuffles=199)
                tables.append(ranked.assign(steps=steps, region=region, words=words))
    return pd.concat(tables, ignore_index=True)


# Claims


def shuffle_control(seen: Float[xr.DataArray, "..."], question: Question, picked: Picked) -> str:
    """The picked head's attention, and the mean over shuffles of the labels, on the scenes that did
    not pick it.
    """
    here, beyond = picked.of(ask(seen, question)), picked.of(ask(excess(seen), question))
    return (
        f"{picked}: {float(here.mean()):.3f}, labels shuffled {float((here - beyond).mean()):.3f}"
    )


def reads(
    name: str,
    seen: Float[xr.DataArray, "..."],
    what: str,
    question: Question,
    paper: str,
    predicted: tuple[float, float],
) -> Claim:
    """Attention of the head that a question picks, beyond the label shuffle."""
    picked = pick(seen, question)
    found = interval(picked.of(ask(excess(seen), question)))
    return Claim(
        f"{name}: {what}, beyond shuffle",
        paper,
        found,
        predicted,
        shuffle_control(seen, question, picked),
    )


def relation_claims(name: str, seen: Float[xr.DataArray, "..."]) -> list[Claim]:
    """A head whose objects read the relation words at step 0 already, and then at least as much as
    at steps 4 to 8.
    """
    picked = pick(seen, RELATION)
    later = RELATION._replace(steps=LATER)
    change = interval(picked.of(ask(seen, RELATION)) - picked.of(ask(seen, later)))
    return [
        reads(
            name,
            seen,
            "an object → relation words, step 0",
            RELATION,
            "a relation head, L2H8",
            THERE,
        ),
        Claim(
            f"{name}: the same head, step 0 minus steps 4–8",
            "at work from the first step",
            change,
            (-0.05, 1.0),
            shuffle_control(seen, later, picked),
        ),
    ]


def fused_claims(name: str, seen: Float[xr.DataArray, "..."]) -> list[Claim]:
    """Heads whose objects read the second shape word at step 0, and none the relation words."""
    nothing = (-1.0, THERE[0])
    return [
        reads(
            name, seen, "an object → relation words, step 0", RELATION, "no relation head", nothing
        ),
        reads(
            name, seen, "an object → second shape word, step 0", SHAPE2, "L3H7 reads shape2", THERE
        ),
    ]


def shape_claims(name: str, seen: Float[xr.DataArray, "..."]) -> list[Claim]:
    """A head whose objects read their own shape, not the other, most at steps 4 to 8."""
    picked = pick(seen, OWN_SHAPE)
    own, other = (
        picked.of(ask(seen, OWN_SHAPE._replace(words=words)))
        for words in ("own shape", "other shape")
    )
    course = (
        seen.sel(text_group="own shape")
        .mean("image_group")
        .sel(layer=picked.layer, head=picked.head)
    )
    profile = course.isel(prompt=slice(1, None, 2)).transpose("prompt", "step").values
    return [
        reads(
            name, seen, "objects → own shape, steps 4–8", OWN_SHAPE, "an object head, L4H3", THERE
        ),
        Claim(
            f"{name}: the same head, own minus other shape",
            "own",
            interval(own - other),
            THERE,
            f"other {float(other.mean()):.3f}",
        ),
        one_color(name, seen),
        Claim(
            f"{name}: the same head, step of most attention to own shape",
            "4 to 8",
            step_of_most(profile),
            (LATER.start, LATER.stop),
            f"at step 0 {profile[:, 0].mean():.3f}, at its most {profile.mean(axis=0).max():.3f}",
        ),
    ]


def one_color(name: str, seen: Float[xr.DataArray, "..."]) -> Claim:
    """The heads that read most of the red and of the blue object's own shape: each one's own colour
    minus the other.
    """
    values = ask(seen, OWN_SHAPE._replace(regions=scenes.COLORS))
    apart, heads = [], []
    for color in scenes.COLORS:
        head = pick(seen, OWN_SHAPE._replace(regions=(color,)))
        apart.append(
            (head.of(values) - head._replace(region=scenes.other_color(color)).of(values)).values
        )
        heads.append(f"{color} {head} {np.nanmean(apart[-1]):+.2f}")
    found = clustered_mean(np.stack(apart, axis=1).astype(float))
    return Claim(
        f"{name}: own shape, the head of either colour, its colour minus the other",
        "–",
        found,
        THERE,
        ", ".join(heads),
    )


# Figures

COLUMNS = {
    "obj. 1 →\nrelation": ("object1", "relation"),
    "obj. 2 →\nrelation": ("object2", "relation"),
    "red →\nown shape": ("red", "own shape"),
    "blue →\nown shape": ("blue", "own shape"),
    "other\nshape": ("object1+object2", "other shape"),
    "own\ncolour": ("object1+object2", "own color"),
    "other\ncolour": ("object1+object2", "other color"),
    "fillers": ("object1+object2", "filler"),
    "EOS": ("object1+object2", "eos"),
}
"""Label → region, words."""


@style.styled
def heads_figure(seen: Mapping[str, Float[xr.DataArray, "..."]]) -> Figure:
    """Heads × what objects read, beyond the label shuffle, at step 0 and over steps 4–8: a row of
    panels a model.
    """
    drawn, axes = plt.subplots(
        len(seen), 2, figsize=(10, 0.6 + 4.6 * len(seen)), layout="constrained", squeeze=False
    )
    for row, (name, found) in zip(axes, seen.items(), strict=True):
        beyond = excess(found).mean("prompt")
        for ax, (title, window) in zip(row, (("step 0", FIRST), ("steps 4–8", LATER)), strict=True):
            values = np.stack(
                [
                    ask(beyond, Question((region,), words, window)).values.reshape(-1)
                    for region, words in COLUMNS.values()
                ],
                axis=1,
            )
            image = ax.imshow(values, aspect="auto", cmap=style.DIVERGING, vmin=-0.8, vmax=0.8)
            for (y, x), value in np.ndenumerate(values):
                if value >= THERE[0]:
                    told = f"{value:.2f}".removeprefix("0")
                    ax.text(x, y, told, fontsize=9, **style.upon(image.to_rgba(value)))
            ax.set_xticks(range(len(COLUMNS)), list(COLUMNS), rotation=90)
            name_rows(ax, names_of(found))
            words = values[:, : list(COLUMNS).index("fillers")]
            y, x = np.unravel_index(words.argmax(), words.shape)
            most = f"{names_of(found)[y]}, {list(COLUMNS)[x]}".replace("\n", " ")
            ax.set_title(f"{name}, {title}; most to a word:\n{most}")
        drawn.colorbar(
            image, ax=row, label="attention to a token, minus labels shuffled", shrink=0.8
        )
    return drawn


@style.styled
def steps_figure(seen: Mapping[str, Float[xr.DataArray, "..."]]) -> Figure:
    """Attention over the steps, heads × steps, a panel for each thing that objects read, a row a
    model.
    """
    shown = list(COLUMNS.items())[:7]
    drawn, axes = plt.subplots(
        len(seen),
        len(shown),
        figsize=(10, 0.8 + 4 * len(seen)),
        layout="constrained",
        squeeze=False,
    )
    for row, (name, found) in zip(axes, seen.items(), strict=True):
        mean = found.mean("prompt")
        for ax, (label, (region, words)) in zip(row, shown, strict=True):
            course = (
                mean.sel(text_group=words, image_group=region.split("+"))
                .mean("image_group")
                .transpose("layer", "head", "step")
            )
            image = ax.imshow(
                course.values.reshape(len(names_of(found)), -1),
                aspect="auto",
                cmap=style.SEQUENTIAL,
                vmin=0,
                vmax=0.9,
            )
            ax.set_title(label)
            ax.set_xticks(range(0, course.sizes["step"], 4))
            name_rows(ax, [name if ax is row[0] else "" for name in names_of(found)])
        row[0].set_ylabel(name)
        drawn.colorbar(image, ax=row, label="attention to a token")
    drawn.supxlabel("denoising step")
    return drawn


def names_of(found: Float[xr.DataArray, "..."]) -> list[str]:
    """Every head ("L2H1"), as the dims layer and head name them."""
    return [f"L{layer}H{head}" for layer in found["layer"].values for head in found["head"].values]


if __name__ == "__main__":
    main(tyro.cli(Config))
