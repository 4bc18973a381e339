"""The heads that grow the objects, and how they depend on the relation heads.

`python -m recipes.object_heads`

Paper: section 4.2, figure 5: in RTE-DiT-B one head (L4H3) reads an object's own shape where that
object grows, at steps 4 to 8; by position code alone its map of a shape word is flat, and selective
once what the relation head writes (its OV output, weighted by its attention) has been added;
masking the shape words in it alone takes shape accuracy from .90 to .76. Falsified by this:
maps that are as steep without the relation heads' writing, or as steep with other heads' writing;
shape words masked in it that cost no more than in random heads; or no effect of the relation heads
on the layout by way of the object heads' queries.

Differences: object heads are found by the synopsis, relation heads by screening
(`knockouts.screened`), all of them; a head that is both is an object head, because it is seen to
read shapes. Path patching, which is not in the paper, replaces what the relation heads write by
what they write under the opposite relation (same scene, same noise), as far as the object heads'
queries see it. Controls: random heads of the same layers as senders, receivers and knock-outs, and
random words. The layout (where either colour is) was predicted to turn by this path and did not;
whether the shapes change places was asked after that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from dit_lens import ablation, circuits, patching, scenes, screening
from dit_lens.stats import Interval, clustered_mean
from dit_lens.task import DIRECTIONS
from dit_lens.text.prompts import token_roles
from dit_lens.training.dynamics import layout
from dit_lens.viz import style
from hooked_models import HookedTextToImage

from . import attention_synopsis as synopses
from .circuit_figures import dependence_figure, effects_figure, maps_figure
from .claims import Claim, report, stage
from .knockouts import (
    SHAPE_WORDS,
    Conditions,
    accuracy,
    change,
    knocked_out,
    names_of,
    scenes_of,
    screened,
)

READS = 0.1
"""Attention to the own shape at steps 4–8, beyond the label shuffle, from which on a head is an
object head.
"""
HALF_OF_PAPER = (-1.0, -0.07)
"""At least half of the paper's .90 → .76."""
STEPS = slice(4, 9)
TO_OBJECTS = "relation heads → object heads' queries"


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    model: str = "rte-micro"
    """Bundled model, pipeline folder or hub id."""
    scenes: int = 64
    """Scenes whose attention is seen, and drawn with knock-outs."""
    patched: int = 24
    """Scenes in which paths are patched."""
    full: bool = False
    """Four times the scenes, with other random controls for each quarter."""
    seed: int = 0
    out: Path = Path("results/object_heads")


@torch.no_grad()
def main(config: Config) -> None:
    model = HookedTextToImage.from_pretrained(config.model)
    out, name, chunks = config.out, Path(config.model).name, range(4 if config.full else 1)

    def measured(what: str, make: Callable[..., pd.DataFrame], *settings: object) -> pd.DataFrame:
        parts = [
            stage(out, f"{name}-{what}", model, make, *settings, config.seed + chunk)
            for chunk in chunks
        ]
        return pd.concat(parts, ignore_index=True)

    reading = [
        stage(out, f"{name}-reading", model, synopses.reading, config.scenes, config.seed + chunk)
        for chunk in chunks
    ]
    seen = synopses.by_object(synopses.labelled(reading))
    objects = object_heads(seen)
    relation_heads = [head for head in screened(model)[1] if head not in objects]
    if not objects or not relation_heads:
        raise SystemExit(
            f"{name} has {'no object' if relation_heads else 'no relation'} head by these rules: "
            "nothing to ask."
        )
    maps = measured("maps", selectivity, relation_heads, objects[0], config.scenes)
    paths = measured("paths", path_effects, relation_heads, objects, config.patched)
    swaps = measured("swaps", swap_effects, relation_heads, objects, config.patched)
    drawn = measured("knockouts", shape_knockouts, objects, config.scenes)
    claims = [
        *synopses.shape_claims(name, seen),
        *map_claims(maps, objects[0]),
        *knockout_claims(drawn, objects),
        *path_claims(paths),
        swap_claim(swaps),
    ]
    facts = {
        "model": config.model,
        "object_heads": objects,
        "relation_heads": relation_heads,
        "full": config.full,
    }
    basis = f"{config.scenes} scenes, {config.patched} with paths patched, a noise each, 1 run"
    report(f"Object heads of {name}", claims, out, basis, False, **facts)
    for table, values in {"maps": maps, "knockouts": drawn, "paths": paths, "swaps": swaps}.items():
        values.to_parquet(out / f"{table}.parquet", index=False)
    verdicts = {
        "shape": "shapes",
        "unique_binding": "binding",
        "relation_given_both": "relation, both drawn",
    }
    figures = {
        "knockouts": effects_figure(drawn, list(conditions_of(objects)), verdicts),
        "maps": maps_figure(model, relation_heads, objects[0], config.seed),
        "dependence": dependence_figure(maps, shares_of_paths(paths), swapped(swaps)),
    }
    for what, figure in figures.items():
        style.save(figure, out / f"{what}.png")


def object_heads(seen: Float[xr.DataArray, "..."]) -> list[str]:
    """Heads in which either colour's objects read their own shape at steps 4–8, strongest first."""
    question = synopses.OWN_SHAPE._replace(regions=scenes.COLORS)
    beyond = (
        synopses.ask(synopses.excess(seen), question)
        .mean("prompt")
        .max("image_group")
        .stack(at=("layer", "head"))
    )
    strongest = beyond[beyond >= READS].sortby(beyond[beyond >= READS], ascending=False)
    return [f"L{layer}H{head}" for layer, head in strongest["at"].values]


# Selectivity


def selectivity(
    model: HookedTextToImage, senders: Sequence[str], receiver: str, n: int, seed: int
) -> pd.DataFrame:
    """How a head's score maps of the shape words vary over positions: alone, and with what other
    heads write (`two_head_maps`).

    Columns scene, written ("nothing", "relation heads", "random heads"), spread (standard deviation
    over positions, in logits, mean of both shape words), along (cosine of the map of shape 1 minus
    that of shape 2 with the ramp of the relation).
    """
    wanted, _ = scenes_of(n, seed)
    rng, layer = np.random.default_rng(seed), circuits.parse_head(receiver)[0]
    before = [head for head in senders if circuits.parse_head(head)[0] < layer]
    side = model.cfg.sample_size // model.cfg.patch_size
    rows = []
    for number, scene in enumerate(wanted):
        text = scenes.caption(scene)
        places = [token_roles(model, text).index(role) for role in SHAPE_WORDS]
        target = screening.ramp(DIRECTIONS[scene.relation], side).numpy()
        sets = {"relation heads": before, "random heads": others_before(model, before, layer, rng)}
        found = {
            name: circuits.two_head_maps(model, text, heads, receiver)
            for name, heads in sets.items()
        }
        maps = {
            "nothing": found["relation heads"]["alone"],
            **{name: each["composed"] for name, each in found.items()},
        }
        for name, each in maps.items():
            first, second = (each.values[place].ravel().astype(float) for place in places)
            apart = first - second
            along = float(apart @ target / (np.linalg.norm(apart) * np.linalg.norm(target) + 1e-12))
            rows.append(
                {
                    "seed": seed,
                    "scene": number,
                    "written": name,
                    "spread": (first.std() + second.std()) / 2,
                    "along": along,
                }
            )
    return pd.DataFrame(rows)


def others_before(
    model: HookedTextToImage, used: Sequence[str], layer: int, rng: np.random.Generator
) -> list[str]:
    """As many other heads of the layers before `layer`; all there are, if they are fewer."""
    free = [
        f"L{at}H{head}"
        for at in range(layer)
        for head in range(model.cfg.n_heads)
        if f"L{at}H{head}" not in used
    ]
    return [free[pick] for pick in rng.permutation(len(free))[: len(used)]]


# Effects


def conditions_of(objects: Sequence[str]) -> Conditions:
    """Both shape words masked in the first object head, and in all of them: at all steps, and at
    steps 4–8.
    """
    mask = partial(ablation.knockout_role, SHAPE_WORDS)
    return {
        f"{objects[0]} alone": (mask(objects[0]), ["heads", "tokens"]),
        f"all {len(objects)} object heads": (mask(objects), ["heads", "tokens"]),
        f"all {len(objects)}, steps 4–8": (mask(objects, steps=STEPS), ["heads"]),
    }


def shape_knockouts(
    model: HookedTextToImage, objects: Sequence[str], n: int, seed: int
) -> pd.DataFrame:
    """`knocked_out` of `conditions_of`."""
    return knocked_out(model, conditions_of(objects), n, seed, objects)


def path_effects(
    model: HookedTextToImage, senders: Sequence[str], objects: Sequence[str], n: int, seed: int
) -> pd.DataFrame:
    """Effect of the opposite relation on the layout by way of relation heads and object heads, at
    all steps.

    A row a path and scene; moved: cosine of the layout lost (2 if it turns round); total: the
    effect of the whole opposite prompt.
    """
    wanted, _ = scenes_of(n, seed)
    paths = matched_paths(model, senders, objects, seed)
    paths = {"relation heads → image": (nodes(senders), ["image"]), **paths}
    paths[f"{senders[0]} → {objects[0]}'s queries"] = (nodes(senders[:1]), nodes(objects[:1], ".q"))
    found = patched_paths(
        model, paths, n, seed, lambda images: torch.from_numpy(layout(images, wanted))
    )
    return found.assign(
        moved=found["original"] - found["patched"], total=found["original"] - found["source"]
    )


def swap_effects(
    model: HookedTextToImage, senders: Sequence[str], objects: Sequence[str], n: int, seed: int
) -> pd.DataFrame:
    """Exchange of the shapes, colours staying where they are, when object heads see the opposite
    relation's tags.

    A row a path and scene: 1 where each colour has the other's shape, in the runs original, source
    and patched.
    """
    exchanged = [
        replace(scene, shape1=scene.shape2, shape2=scene.shape1) for scene in scenes_of(n, seed)[0]
    ]

    def judge(images: Tensor) -> Tensor:
        return torch.from_numpy(
            scenes.evaluate(images, exchanged)["unique_binding"].values.astype(float)
        )

    return patched_paths(model, matched_paths(model, senders, objects, seed), n, seed, judge)


Paths = dict[str, tuple[list[str], list[str]]]
"""Name → nodes that send and that receive."""


def nodes(heads: Sequence[str], part: str = "") -> list[str]:
    """Heads as nodes of `patching`."""
    return [f"cross_attn.{head}{part}" for head in heads]


def matched_paths(
    model: HookedTextToImage, senders: Sequence[str], objects: Sequence[str], seed: int
) -> Paths:
    """From relation heads to object heads' queries; and the same from, and to, random heads of the
    nearest layers.
    """
    rng, used = np.random.default_rng(seed), {*senders, *objects}
    everyone = names_of(
        (layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)
    )
    free = [head for head in everyone if head not in used]

    def matched(heads: Sequence[str]) -> list[str]:
        left, found = list(rng.permutation(free)), []
        for head in heads[: len(free)]:
            layer = circuits.parse_head(head)[0]
            near = min(left, key=lambda other: abs(circuits.parse_head(other)[0] - layer))
            left.remove(near)
            found.append(str(near))
        return found

    return {
        TO_OBJECTS: (nodes(senders), nodes(objects, ".q")),
        "relation heads → random heads' queries": (nodes(senders), nodes(matched(objects), ".q")),
        "random heads → object heads' queries": (nodes(matched(senders)), nodes(objects, ".q")),
    }


def patched_paths(
    model: HookedTextToImage, paths: Paths, n: int, seed: int, metric: Callable[[Tensor], Tensor]
) -> pd.DataFrame:
    """A metric of each prompt's image (original), of its opposite's (source), and with the latter
    on each path (patched).
    """
    wanted, noise = scenes_of(n, seed)
    original = model.trajectory([scenes.caption(scene) for scene in wanted], noise.tolist())
    source = model.trajectory(
        [scenes.caption(scenes.opposite(scene)) for scene in wanted], noise.tolist()
    )
    parts = []
    for path, (from_, to) in paths.items():
        found = patching.path_patch(original, source, from_, to, metric, "exact")
        values = {which: found[which].values for which in ("original", "source", "patched")}
        parts.append(pd.DataFrame({"path": path, "seed": seed, "scene": np.arange(n), **values}))
    return pd.concat(parts, ignore_index=True)


# Claims


def map_claims(maps: pd.DataFrame, head: str) -> list[Claim]:
    """Flat alone; steeper, and in the direction of the relation, with what the relation heads
    write, not what others do.
    """
    by_scene = maps.pivot(index=["seed", "scene"], columns="written", values=["spread", "along"])
    spread, along = by_scene["spread"], by_scene["along"]

    def mean(values: pd.Series[float]) -> Interval:
        return clustered_mean(values.to_numpy(float)[:, None])

    ratio = {name: spread[name] / spread["nothing"] for name in ("relation heads", "random heads")}
    return [
        Claim(
            f"{head}: spread over positions of its shape words' scores, position code alone, "
            "logits",
            "flat",
            mean(spread["nothing"]),
            (0, 0.5),
        ),
        Claim(
            f"{head}: the same, times as much with what the relation heads write",
            "selective",
            mean(ratio["relation heads"]),
            (1.5, np.inf),
            f"random heads write: × {ratio['random heads'].mean():.2f}",
        ),
        Claim(
            f"{head}: score of shape 1 minus shape 2 along the relation (cosine), relation heads' "
            "writing added",
            "where the object grows",
            mean(along["relation heads"]),
            (0.2, 1.0),
            f"nothing added {mean(along['nothing'])}; random heads {mean(along['random heads'])}",
        ),
    ]


def knockout_claims(drawn: pd.DataFrame, objects: Sequence[str]) -> list[Claim]:
    """Shape accuracy before and after."""
    claims = []
    for condition, paper in zip(conditions_of(objects), (".90 → .76", "–", "–"), strict=True):
        said = [
            f"{accuracy(drawn, 'none', 'shape'):.2f} → {accuracy(drawn, condition, 'shape'):.2f}"
        ]
        for control in ("random heads", "random tokens"):
            if f"{condition} | {control}" in set(drawn["condition"]):
                said.append(
                    f"{control} {change(drawn, f'{condition} | {control}', 'shape').mean:+.3f}"
                )
        said.append(
            f"relation of those drawn {change(drawn, condition, 'relation_given_both').mean:+.3f}"
        )
        claims.append(
            Claim(
                f"shape words masked in {condition}, change of shape accuracy",
                paper,
                change(drawn, condition, "shape"),
                HALF_OF_PAPER,
                ", ".join(said),
            )
        )
    against = f"all {len(objects)} object heads"
    claims += [
        Claim(
            f"the same in {against}, against {control}",
            "–",
            change(drawn, against, "shape", f"{against} | {control}"),
            (-1.0, -0.05),
        )
        for control in ("random heads", "random tokens")
    ]
    return claims


def path_claims(paths: pd.DataFrame) -> list[Claim]:
    """The share of what the opposite prompt does to the layout that goes through each path."""
    found = shares_of_paths(paths)
    predicted = {"relation heads → image": (0.3, 1.2), TO_OBJECTS: (0.1, 1.2)}
    rows = [
        Claim(
            f"{path}: share of the layout's turn",
            "object head depends on relation head" if "object" in path else "–",
            found[path],
            predicted[path],
            "",
        )
        for path in predicted
    ]
    others = {path: str(value) for path, value in found.items() if path not in predicted}
    return [
        rows[0],
        replace(rows[1], control="; ".join(f"{path} {value}" for path, value in others.items())),
    ]


def swap_claim(swaps: pd.DataFrame) -> Claim:
    """Shapes change places in at least one image of ten."""
    found = swapped(swaps)
    others = "; ".join(f"{path} {value}" for path, value in found.items() if path != TO_OBJECTS)
    return Claim(
        f"{TO_OBJECTS}: share of images whose shapes change places",
        "–",
        found[TO_OBJECTS],
        (0.1, 1.0),
        others,
    )


def swapped(swaps: pd.DataFrame) -> dict[str, Interval]:
    """By path the share of images whose shapes change places, beyond those that have them so
    anyway.
    """
    by_path = swaps.assign(change=swaps["patched"] - swaps["original"]).groupby("path", sort=False)[
        "change"
    ]
    return {str(path): clustered_mean(change.to_numpy(float)[:, None]) for path, change in by_path}


def shares_of_paths(paths: pd.DataFrame) -> dict[str, Interval]:
    """`share_of_total` of every path."""
    return {
        str(path): share_of_total(paths[paths["path"] == path]) for path in paths["path"].unique()
    }


def share_of_total(part: pd.DataFrame) -> Interval:
    """Σ moved / Σ total, with its bootstrap interval over scenes."""
    moved, total = part["moved"].to_numpy(float), part["total"].to_numpy(float)
    picks = np.random.default_rng(0).integers(len(part), size=(2000, len(part)))
    low, high = np.quantile(moved[picks].sum(axis=1) / total[picks].sum(axis=1), [0.025, 0.975])
    return Interval(float(moved.sum() / total.sum()), float(low), float(high))


if __name__ == "__main__":
    main(tyro.cli(Config))
