"""The relation heads, found three independent ways, and the effect of knocking them out.

`python -m recipes.relation_heads`

Paper: sections 4.1 and 4.2, figures 3 and 4: one head of RTE-DiT-B (L2H8) is named by the attention
synopsis and by screening in weight space; its map of "above" over positions is a vertical ramp,
that of "left" a horizontal one; it is at work at the first step; masking the relation words in it
alone takes relation accuracy from .67 to .33, other heads do hardly anything. Falsified by
this: the ways name different heads; maps that point elsewhere; or relation words masked in the heads
found cost no more than in random heads, or than random words masked in the same heads.

The ways share nothing: `screening` sees weights only, the synopsis patterns of whole models only,
the knock-out what one head's relation words do to the layout that the model predicts at the first
step (`dynamics.layout`). Rules that name a head stand below, stated beforehand. Agreement is the
AUROC of one way's ranking for the heads that another names; .5 is chance. Since heads back each
other up, all that were found are also knocked out together, against as many random heads of the
same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
import xarray as xr
from jaxtyping import Float
from scipy.stats import mannwhitneyu

from dit_lens import ablation, circuits, scenes, screening, sweep, variance
from dit_lens.stats import Interval, clustered_mean, clustered_means
from dit_lens.task import DIRECTIONS, PHRASES
from dit_lens.text.prompts import Role, token_roles
from dit_lens.viz import style
from hooked_models import HookedTextToImage

from . import attention_synopsis as synopses
from .circuit_figures import effects_figure, ramps_figure, steps_figure, ways_figure
from .claims import Claim, report, stage
from .knockouts import (
    FOUND_COSINE,
    FOUND_P,
    Conditions,
    accuracy,
    change,
    knocked_out,
    layout_metric,
    names_of,
    scenes_of,
    screened,
)

READS = 0.1
"""Attention at step 0 beyond the label shuffle's from which on the synopsis names a head (and its
interval is above 0).
"""
MOVES = 0.05
"""Loss of the layout's cosine from which on the knock-out names a head (likewise)."""
HALF_OF_PAPER = (-1.0, -0.17)
"""At least half of the paper's .67 → .33."""
HARMLESS = (-0.1, 0.1)
RESAMPLES = 1000
VERDICTS = {
    "relation_loose": "relation",
    "unique_binding": "binding",
    "relation_given_both": "relation, both drawn",
}
ALL = "all found"


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    model: str = "rte-micro"
    """Bundled model, pipeline folder or hub id."""
    looked: int = 64
    """Scenes whose first look is measured, with two noises each, and whose attention is."""
    singles: int = 24
    """Scenes drawn with each single head's relation words masked."""
    pairs: int = 64
    """Scenes drawn with groups of heads knocked out."""
    full: bool = False
    """Four times the scenes, with other random controls for each quarter."""
    seed: int = 0
    out: Path = Path("results/relation_heads")


@torch.no_grad()
def main(config: Config) -> None:
    model, out = HookedTextToImage.from_pretrained(config.model), config.out
    ranking, found = screened(model)
    seen = synopses.by_object(
        synopses.labelled(measured(config, model, "reading", synopses.reading, config.looked))
    )
    looks = pd.concat(measured(config, model, "first-look", first_look, found, config.looked))
    singles = pd.concat(measured(config, model, "singles", single_knockouts, config.singles))
    groups = pd.concat(measured(config, model, "groups", group_knockouts, found, config.pairs))
    ways = {
        "screening": by_weights(ranking),
        "synopsis": by_attention(seen),
        "knock-out": by_layout(looks),
    }
    maps, others = phrase_maps(model, "relation"), phrase_maps(model, "shape2")
    claims = [unanimous(ways), *agreement_claims(ways)]
    if found:
        claims += [*ramp_claims(maps, others, found[0]), first_step_claim(seen, found[0])]
    claims += knockout_claims(groups, singles, found)
    named = {way: names_of(table.index[table["named"]]) for way, table in ways.items()}
    basis = (
        f"{config.looked} scenes looked at, {config.pairs} drawn (single heads {config.singles}), "
        "1 run"
    )
    report(
        f"Relation heads of {config.model}",
        claims,
        out,
        basis,
        model=config.model,
        named=named,
        full=config.full,
    )
    pd.concat(ways, names=["way"]).reset_index().to_parquet(out / "ways.parquet", index=False)
    drawn = pd.concat([singles.assign(kind="single"), groups.assign(kind="group")])
    drawn.to_parquet(out / "knockouts.parquet", index=False)
    cumulative(looks).to_parquet(out / "cumulative.parquet", index=False)
    figures = {"three_ways": ways_figure(ways, singles)}
    if found:
        figures |= {
            "knockouts": effects_figure(groups, list(conditions_of(found)), VERDICTS),
            "ramps": ramps_figure(maps, found[:6]),
            "steps": steps_figure(seen, cumulative(looks), found[:6]),
        }
    for what, figure in figures.items():
        style.save(figure, out / f"{what}.png")


def measured(
    config: Config,
    model: HookedTextToImage,
    what: str,
    make: Callable[..., pd.DataFrame],
    *settings: object,
) -> list[pd.DataFrame]:
    """`stage` of every quarter of the scenes, or of the only one."""
    name, quarters = Path(config.model).name, range(4 if config.full else 1)
    return [
        stage(config.out, f"{name}-{what}", model, make, *settings, config.seed + quarter)
        for quarter in quarters
    ]


# Three ways. Each gives a table by (layer, head): its score, and whether the way names the head.


def by_weights(ranking: pd.DataFrame) -> pd.DataFrame:
    """Screening: |projection| on the words' ramps; named by |cosine| and p."""
    table = ranking.set_index(["layer", "head"]).sort_index()
    named = (table["cosine"].abs() >= FOUND_COSINE) & (table["p"] <= FOUND_P)
    return pd.DataFrame({"score": table["projection"].abs(), "named": named})


def by_attention(seen: Float[xr.DataArray, "..."]) -> pd.DataFrame:
    """Synopsis: attention from an object's region to the relation words at step 0, beyond the label
    shuffle; the larger of the two.
    """
    beyond = synopses.ask(synopses.excess(seen), synopses.RELATION).stack(at=("layer", "head"))
    larger = beyond.mean("prompt").fillna(-1).argmax("image_group")
    return named_by(beyond.isel(image_group=larger).transpose("at", "prompt"), READS)


def by_layout(looks: pd.DataFrame) -> pd.DataFrame:
    """Knock-out: how much one head's relation words, masked at step 0, take from the layout that is
    predicted there.
    """
    single = looks[looks["kind"] == "single"]
    lost = single.pivot(index="condition", columns=["seed", "scene"], values="lost")
    cells = pd.MultiIndex.from_tuples(
        [circuits.parse_head(head) for head in lost.index], names=["layer", "head"]
    )
    return named_by(
        xr.DataArray(lost.to_numpy(), dims=("at", "prompt"), coords={"at": cells}), MOVES
    )


def named_by(values: Float[xr.DataArray, "at prompt"], threshold: float) -> pd.DataFrame:
    """Mean over scenes with its interval, whether it passes the threshold beyond doubt of its sign,
    and every scene's score.
    """
    by_scene, heads = values.values.astype(float), values.indexes["at"]
    found = pd.DataFrame(
        clustered_means(by_scene[:, :, None]), columns=["score", "low", "high"], index=heads
    )
    named = (found["score"] >= threshold) & (found["low"] > 0)
    return pd.concat(
        [found, named.rename("named"), pd.DataFrame(by_scene, index=heads).add_prefix("scene ")],
        axis=1,
    ).sort_index()


# Knock-outs


def first_look(model: HookedTextToImage, found: Sequence[str], n: int, seed: int) -> pd.DataFrame:
    """Loss of the layout's cosine predicted at step 0 when relation words are masked there: a row a
    condition and scene.

    Conditions: every head alone ("single"); the first k heads found ("found"), and as many random
    heads of the same layers ("random"). Two noises a scene, averaged: columns condition, kind,
    heads, scene, seed, lost.
    """
    wanted, _ = scenes_of(n, seed)
    texts, rng = [scenes.caption(scene) for scene in wanted], np.random.default_rng(seed)
    cells = {
        f"L{layer}H{head}": ("single", 1)
        for layer in range(model.cfg.n_layers)
        for head in range(model.cfg.n_heads)
    }
    conditions = {head: ablation.knockout_role("relation", head, steps=0) for head in cells}
    for k in range(1, len(found) + 1):
        group = ablation.knockout_role("relation", found[:k], steps=0)
        conditions |= {
            f"first {k}": group,
            f"random {k}": ablation.random_heads(model, group, rng, exclude=found),
        }
        cells |= {f"first {k}": ("found", k), f"random {k}": ("random", k)}

    seen = sweep.run(
        model, texts, [2 * seed, 2 * seed + 1], conditions, {"layout": layout_metric(model, wanted)}
    )
    lost = (
        (seen["layout_baseline"] - seen["layout"])
        .transpose("intervention", "prompt", "seed")
        .mean("seed")
        .values
    )
    return pd.DataFrame(
        {"condition": name, "kind": kind, "heads": k, "scene": scene, "seed": seed, "lost": value}
        for (name, (kind, k)), values in zip(cells.items(), lost, strict=True)
        for scene, value in enumerate(values)
    )


def cumulative(looks: pd.DataFrame) -> pd.DataFrame:
    """By number of heads and kind: what the layout loses, with its interval over scenes."""
    rows = []
    for (kind, k), part in looks[looks["kind"] != "single"].groupby(["kind", "heads"]):
        rows.append(
            {"kind": kind, "heads": k, **clustered_mean(part["lost"].to_numpy()[:, None])._asdict()}
        )
    return pd.DataFrame(rows, columns=["kind", "heads", *Interval._fields])


def single_knockouts(model: HookedTextToImage, n: int, seed: int) -> pd.DataFrame:
    """`knocked_out` of every head, one at a time, at all steps."""
    heads = names_of(
        [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    )
    return knocked_out(
        model, {head: (ablation.knockout_role("relation", head), ()) for head in heads}, n, seed
    )


def conditions_of(found: Sequence[str]) -> Conditions:
    """Relation words masked in the first head found, and in all of them: at all steps, at the first
    four, at the first.
    """
    mask = ablation.knockout_role
    return {
        f"{found[0]} alone": (mask("relation", found[0]), ["heads"]),
        ALL: (mask("relation", found), ["heads", "tokens"]),
        f"{ALL}, steps 0–3": (mask("relation", found, steps=slice(4)), ["heads"]),
        f"{ALL}, step 0": (mask("relation", found, steps=0), ["heads"]),
    }


def group_knockouts(
    model: HookedTextToImage, found: Sequence[str], n: int, seed: int
) -> pd.DataFrame:
    """`knocked_out` of `conditions_of`; nothing but the plain images where no head was found."""
    return knocked_out(model, conditions_of(found) if found else {}, n, seed, found)


# Maps


@torch.no_grad()
def phrase_maps(model: HookedTextToImage, role: Role) -> xr.DataArray:
    """Position-by-word maps of a role's words in the 22 phrases, mean over a phrase's: (layer,
    head, phrase, y, x).

    Coordinate `relation` of each phrase.
    """
    phrases = [(phrase, str(relation)) for relation, some in PHRASES.items() for phrase in some]
    vectors = []
    for phrase, _ in phrases:
        text = f"red circle is {phrase} blue square"
        chosen = [found == role for found in token_roles(model, text)]
        vectors.append(variance.encode(model, model.to_tokens(text), "text")[0, chosen])
    maps = circuits.position_word_maps(model.dit, torch.cat(vectors)).split(
        [len(words) for words in vectors], dim=2
    )
    side = model.cfg.sample_size // model.cfg.patch_size
    values = (
        torch.stack([part.mean(dim=2) for part in maps], dim=2)
        .unflatten(-1, (side, side))
        .double()
        .cpu()
        .numpy()
    )
    names, relations = zip(*phrases, strict=True)
    coords = {"phrase": list(names), "relation": ("phrase", list(relations))}
    return xr.DataArray(values, dims=("layer", "head", "phrase", "y", "x"), coords=coords)


def degrees_off(maps: Float[xr.DataArray, "phrase y x"]) -> np.ndarray:
    """Angle between the axis of each phrase's relation and the slope of its map (up or down it:
    0 to 90), [phrase].
    """
    side = maps.sizes["x"]
    flat = maps.transpose("phrase", "y", "x").values.reshape(-1, side * side)
    slope = np.stack(
        [flat @ screening.ramp(direction, side).numpy() for direction in ((1, 0), (0, 1))], axis=1
    )
    named = np.array([DIRECTIONS[relation] for relation in maps["relation"].values], float)
    cosine = (slope * named).sum(axis=1) / (
        np.linalg.norm(slope, axis=1) * np.linalg.norm(named, axis=1) + 1e-12
    )
    return np.degrees(np.arccos(np.clip(np.abs(cosine), 0, 1)))


# Claims


def agreement_claims(ways: dict[str, pd.DataFrame]) -> list[Claim]:
    """Agreement of each pair of ways: does the one's ranking put first the heads that the other names?"""
    claims = []
    for judge, way in (
        ("screening", "synopsis"),
        ("screening", "knock-out"),
        ("synopsis", "knock-out"),
    ):
        theirs, ours = (ways[each].index[ways[each]["named"]] for each in (judge, way))
        both = names_of(set(theirs) & set(ours))
        claims.append(
            Claim(
                f"{way}'s ranking, AUROC for the {len(theirs)} heads that the {judge} names",
                "the same head, L2H8",
                agreement(ways[way], set(theirs)),
                (0.8, 1.0),
                f"chance .5; both name {', '.join(both) or 'none'}",
            )
        )
    return claims


def unanimous(ways: dict[str, pd.DataFrame]) -> Claim:
    """How many heads all ways name; the interval resamples the scenes of those that see some."""
    rng = np.random.default_rng(0)
    named = np.logical_and.reduce([table["named"] for table in ways.values()])
    draws = np.tile(ways["screening"]["named"].to_numpy(), (RESAMPLES, 1))
    for way, threshold in (("synopsis", READS), ("knock-out", MOVES)):
        by_scene = ways[way].filter(like="scene ").to_numpy()
        for draw in draws:
            draw &= (
                np.nanmean(
                    by_scene[:, rng.integers(by_scene.shape[1], size=by_scene.shape[1])], axis=1
                )
                >= threshold
            )
    low, high = np.quantile(draws.sum(axis=1), [0.025, 0.975])
    said = [
        f"{way}: {', '.join(names_of(table.index[table['named']])) or 'none'}"
        for way, table in ways.items()
    ]
    found = Interval(float(named.sum()), float(low), float(high))
    return Claim(
        "heads that all three ways name", "one, L2H8", found, (1, len(named)), "; ".join(said)
    )


def agreement(table: pd.DataFrame, positive: set[tuple[int, int]]) -> Interval:
    """AUROC of a way's scores for some heads (Mann and Whitney's U over all pairs); the interval
    resamples scenes.
    """
    labels = np.array([cell in positive for cell in table.index])
    pairs = labels.sum() * (~labels).sum()
    if not pairs:
        return Interval(np.nan, np.nan, np.nan)
    by_scene, rng = table.filter(like="scene ").to_numpy(), np.random.default_rng(0)
    draws = [rng.integers(by_scene.shape[1], size=by_scene.shape[1]) for _ in range(RESAMPLES)]
    scores = np.stack(
        [table["score"].to_numpy(), *(np.nanmean(by_scene[:, draw], axis=1) for draw in draws)]
    )
    found = (
        mannwhitneyu(scores[:, labels], scores[:, ~labels], axis=1, method="asymptotic").statistic
        / pairs
    )
    return Interval(
        float(found[0]), *(float(bound) for bound in np.quantile(found[1:], [0.025, 0.975]))
    )


def ramp_claims(
    maps: Float[xr.DataArray, "..."], others: Float[xr.DataArray, "..."], head: str
) -> list[Claim]:
    """Maps of relation words slope along their relation; those of the second shape word (control)
    anywhere: 45° on average.
    """
    layer, index = circuits.parse_head(head)
    axes = {"vertical": ("above", "below"), "horizontal": ("left", "right")}
    axes["diagonal"] = tuple(str(relation) for relation in DIRECTIONS if "_" in relation)  # type: ignore[assignment]
    claims = []
    for axis, relations in axes.items():
        off, control = (
            degrees_off(
                each.sel(phrase=each["relation"].isin(relations)).sel(layer=layer, head=index)
            )
            for each in (maps, others)
        )
        claims.append(
            Claim(
                f"{head}: slope of the maps of {axis} relations, degrees off their axis "
                f"({len(off)} phrases)",
                {"vertical": "vertical", "horizontal": "horizontal"}.get(axis, "both"),
                clustered_mean(off[:, None]),
                (0.0, 20.0),
                f"second shape word {control.mean():.0f}°",
            )
        )
    return claims


def first_step_claim(seen: Float[xr.DataArray, "..."], head: str) -> Claim:
    """The region is chosen on half of the scenes, the number is of the other."""
    layer, index = circuits.parse_head(head)
    picked = synopses.pick(seen.sel(layer=[layer], head=[index]), synopses.RELATION)
    found = synopses.interval(picked.of(synopses.ask(synopses.excess(seen), synopses.RELATION)))
    control = f"{picked.region}; {synopses.shuffle_control(seen, synopses.RELATION, picked)}"
    return Claim(
        f"{head}: attention to relation words at step 0, beyond shuffle",
        "at work from the first step",
        found,
        (READS, 1.0),
        control,
    )


def knockout_claims(
    groups: pd.DataFrame, singles: pd.DataFrame, found: Sequence[str]
) -> list[Claim]:
    """Relation accuracy (loose), before and after; what happens to binding stands beside."""
    loose = "relation_loose"
    before = accuracy(groups, "none", loose)

    def beside(condition: str) -> str:
        said = [
            f"{before:.2f} → {accuracy(groups, condition, loose):.2f}",
            f"binding {change(groups, condition, 'unique_binding').mean:+.3f}",
        ]
        for control in ("random heads", "random tokens"):
            if f"{condition} | {control}" in set(groups["condition"]):
                said.append(
                    f"{control} {change(groups, f'{condition} | {control}', loose).mean:+.3f}"
                )
        return ", ".join(said)

    if not found:
        return [
            Claim(
                "relation words masked in the heads found",
                ".67 → .33",
                Interval(*[np.nan] * 3),
                HALF_OF_PAPER,
            )
        ]
    others = [
        head for head in singles["condition"].unique() if head not in found and head != "none"
    ]
    of_others = np.stack(
        [singles.loc[singles["condition"] == head, loose].to_numpy(float) for head in others]
    )
    plain = singles.loc[singles["condition"] == "none", loose].to_numpy(float)
    worst = min(found, key=lambda head: change(singles, head, loose).mean)
    alone, (whole, early, first) = (
        f"{found[0]} alone",
        [name for name in conditions_of(found) if name.startswith(ALL)],
    )
    return [
        Claim(
            f"relation words masked in {alone}, change of relation",
            ".67 → .33",
            change(groups, alone, loose),
            HALF_OF_PAPER,
            beside(alone),
        ),
        Claim(
            f"the same in each other head alone ({len(others)} not found), mean",
            "≈ no effect",
            clustered_mean((of_others - plain).T),
            HARMLESS,
            f"of those found, alone, {worst} costs most: {change(singles, worst, loose)}",
        ),
        Claim(
            f"in all {len(found)} heads found, all steps",
            "–",
            change(groups, whole, loose),
            HALF_OF_PAPER,
            beside(whole),
        ),
        Claim(
            f"in all {len(found)}, steps 0–3",
            "–",
            change(groups, early, loose),
            HALF_OF_PAPER,
            beside(early),
        ),
        Claim(
            f"in all {len(found)}, step 0 only",
            "–",
            change(groups, first, loose),
            (HALF_OF_PAPER[1], 0.05),
            beside(first),
        ),
        *(
            Claim(
                f"in all {len(found)}, against {control} instead",
                "–",
                change(groups, whole, loose, f"{whole} | {control}"),
                (-1.0, -0.1),
                f"{control} {accuracy(groups, f'{whole} | {control}', loose):.2f}",
            )
            for control in ("random heads", "random tokens")
        ),
    ]


if __name__ == "__main__":
    main(tyro.cli(Config))
