"""Where a T5 model's relation stands, by axis: variance, masks and arithmetic.

`python -m recipes.t5_fusion`

Paper: table 1 (variance partition: the relation's partial share at T5's second shape word is .1205,
after the caption projection .2128), figure 7A (masking the relation words changes nothing, masking
the second shape word or EOS halves accuracies), masks by layer and by step, and vector arithmetic
on one prompt. Falsified by this: no amplification by the caption projection; a relation that is
lost with the relation words and not with the second shape word.

Differences: vertical and horizontal scenes apart, because a mean over axes hides that each is read
from another word; the layout, judged by colours alone, in place of relation accuracy, because a
hidden shape word also takes its shape away. Controls: the other words; a random other word; random
vectors of equal norm. Variance is partitioned over all 264 prompts, a finite population without an
interval; "known before" are its values for shape words, from an earlier form of this recipe.

Predictions: `recipes/PREDICTIONS.md`. Exchanges of the same words at step 0 are in `text_carrier`.
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
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dit_lens import ablation, scenes, steering, variance, viz
from dit_lens.readout.screening import ENDS
from dit_lens.stats import clustered_mean, finite, paired_difference, proportion
from dit_lens.task import DIRECTIONS, Scene
from dit_lens.text.prompts import Role
from dit_lens.text.variance import Space
from dit_lens.training.dynamics import layout
from hooked_models import HookedTextToImage

from .claims import Claim, report, stage

CARRIER: dict[str, Role] = {"vertical": "shape1", "horizontal": "relation"}
"""Axis → the word that carries it in `t5-micro`."""
NAMES: dict[Role, str] = {
    "relation": "relation words",
    "shape1": "first shape word",
    "shape2": "second shape word",
    "eos": "EOS",
}
PAPER_MASK = {
    "relation": "paper, relation accuracy over both axes: no change; ",
    "shape2": "paper, relation accuracy over both axes: halved; ",
    "eos": "paper, relation accuracy over both axes: halved; ",
}
AMPLIFIED: dict[Role, str] = {"shape1": ".0796 → .1884", "shape2": ".1205 → .2128"}
SIGNS: dict[str, tuple[float, float]] = {"y": (0.05, 1.0), "x": (-1.0, -0.05)}
"""Sign of a direction → predicted change of its share at the first shape word by the projection."""
EARLY = 4


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    t5: str = "t5-micro"
    rte: str = "rte-micro"
    """Control of the masks by layer."""
    looks: int = 48
    """Scenes of each axis for masks by layer, at step 0 alone."""
    images: int = 32
    """Scenes of each axis that are drawn with each mask, and with each vector."""
    out: Path = Path("results/t5_fusion")


def main(config: Config) -> None:
    claims: list[Claim] = []
    layers: dict[str, pd.DataFrame] = {}
    model = HookedTextToImage.from_pretrained(config.t5)
    shares = stage(config.out, "t5-shares", model, relation_shares)
    claims += share_claims(config.t5, shares)
    for name in (config.t5, config.rte):
        of = HookedTextToImage.from_pretrained(name)
        layers[name] = stage(config.out, f"{name}-layers", of, layer_masks, config.looks)
        claims += layer_claims(name, layers[name], name == config.t5)
    masked = stage(config.out, "t5-masks", model, masks, config.images)
    moved = stage(config.out, "t5-arithmetic", model, arithmetic, config.images)
    claims += [*mask_claims(config.t5, masked), *arithmetic_claims(config.t5, moved)]
    report(f"Where the relation of {config.t5} stands, by axis", claims, config.out)
    tables = {"shares": shares, "masks": masked, "arithmetic": moved}
    for what, table in {**tables, "layers": pd.concat(layers, names=["model"])}.items():
        table.to_parquet(config.out / f"{what}.parquet")
    viz.style.save(figure(masked, layers[config.t5]), config.out / "variance.png")


def scenes_along(axis: str, n: int, seed: int) -> list[Scene]:
    """Scenes whose relation names one axis only."""
    pool = scenes.sample(32 * n + 96, seed=seed, split="all", color_words="both")
    return [scene for scene in pool if scene.relation in ENDS[axis]][:n]


# Variance


def relation_shares(model: HookedTextToImage) -> pd.DataFrame:
    """Partial shares of the variance over the 264 prompts: columns role, at, term, share.

    Terms: relation, colour and shape of the word together (`own`), `shape` alone, `total`; and, in
    a partition with the signs of the direction in place of the relation, `x` and `y`.
    """
    rows = []
    roles: tuple[Role, ...] = ("shape1", "shape2", "relation")
    spaces: tuple[Space, ...] = ("text", "caption")
    signs = {str(relation): direction for relation, direction in DIRECTIONS.items()}
    for role in roles:
        for at in spaces:
            vectors, factors = variance.word_vectors(model, variance.factorial_prompts(), role, at)
            number = role[-1] if role.startswith("shape") else "1"
            other = "1" if number == "2" else "2"
            own = factors[f"color{number}"] + factors[f"shape{number}"]
            design = {
                "own": own,
                "other": factors[f"shape{other}"],
                "relation": factors["relation"],
            }
            table = variance.partition(vectors, design, permutations=0)
            found = table["r2_partial"][["own", "relation"]].to_dict()
            found["total"] = 1 - table["r2_sequential"]["residual"]
            parts = factors[["color1", "shape1", "shape2"]]
            alone = variance.partition(
                vectors, parts.assign(relation=factors["relation"]), permutations=0
            )
            found["shape"] = alone["r2_partial"][f"shape{number}"]
            named = pd.DataFrame(
                [signs[str(name)] for name in factors["relation"]], columns=["x", "y"]
            )
            by_sign = variance.partition(vectors, pd.concat([parts, named], axis=1), permutations=0)
            found |= by_sign["r2_partial"][["x", "y"]].to_dict()
            rows += [{"role": role, "at": at, "term": t, "share": v} for t, v in found.items()]
    return pd.DataFrame(rows)


def share_claims(name: str, shares: pd.DataFrame) -> list[Claim]:
    """Amplification of the relation, and of each axis, by the caption projection; the paper's other
    shares.
    """
    by = shares.set_index(["term", "role", "at"])["share"]
    basis = "264 prompts, all there are; 1 run"
    claims = []
    for role, paper in AMPLIFIED.items():
        before, after = (float(by["relation", role, at]) for at in ("text", "caption"))
        what = (
            f"{name}: relation's partial R² at the {NAMES[role]}, after minus before the projection"
        )
        beside = f"{before:.3f} → {after:.3f}; known before"
        claims.append(Claim(what, paper, finite(after - before), (0.01, 1.0), beside, basis=basis))
    for sign, predicted in SIGNS.items():
        change = {
            role: by[sign, role, "caption"] - by[sign, role, "text"]
            for role in NAMES
            if role != "eos"
        }
        listed = ", ".join(
            f"{NAMES[role]} {by[sign, role, 'text']:.3f} → {by[sign, role, 'caption']:.3f}"
            for role in change
        )
        what = (
            f"{name}: partial R² of the sign of {sign} at the first shape word, after minus before"
        )
        claims.append(
            Claim(what, "–", finite(float(change["shape1"])), predicted, listed, basis=basis)
        )
    for term, what, paper in (
        ("own", "colour and shape together", ".439"),
        ("shape", "shape alone", ".375"),
        ("total", "all factors", ".7486"),
    ):
        value = finite(float(by[term, "shape2", "text"]))
        label = f"{name}: R² of {what} at the second shape word, before the projection"
        claims.append(Claim(label, paper, value, None, basis=basis))
    return claims


# Masks


@torch.no_grad()
def layer_masks(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """At step 0, a word hidden from one layer, or from all (layer −1): columns axis, word, layer,
    scene, base, masked.

    The last two are the cosine of the predicted layout with the caption's, without and with the
    mask.
    """
    rows = []
    for axis in CARRIER:
        wanted = scenes_along(axis, n, seed=31)
        texts = [scenes.caption(scene) for scene in wanted]
        seeds = list(range(9000, 9000 + len(wanted)))
        view, tokens = model.at(step=0, prompts=texts, seed=seeds, guidance=1.0, returns="x0")
        base = layout(model.decode(view(tokens)), wanted)
        for word in NAMES:
            for layer in range(-1, model.cfg.n_layers):
                hide = ablation.knockout_role(word, layers=None if layer < 0 else layer, steps=0)
                hooks = [hook for one in hide for hook in one.hooks(view, texts)]
                masked = layout(model.decode(view.run_with_hooks(tokens, fwd_hooks=hooks)), wanted)
                part = {"axis": axis, "word": word, "layer": layer, "scene": np.arange(len(wanted))}
                rows.append(pd.DataFrame({**part, "base": base, "masked": masked}))
    return pd.concat(rows, ignore_index=True)


def layer_claims(name: str, rows: pd.DataFrame, is_t5: bool) -> list[Claim]:
    """The layer whose mask costs most, and the most that any late layer costs."""
    claims = []
    for axis, carrier in CARRIER.items():
        word = carrier if is_t5 else "relation"
        part = rows[(rows["axis"] == axis) & (rows["word"] == word)]
        table = part.pivot(index="scene", columns="layer", values="masked")
        base = part.drop_duplicates("scene").set_index("scene")["base"]
        lost = table.rsub(base, axis=0).mean()
        single = lost.drop(-1)
        listed = ", ".join(f"layer {layer} {value:.2f}" for layer, value in single.items())
        half = len(single) // 2
        late = single[single.index >= half].idxmax()
        basis = f"{len(table)} scenes, a noise each, 1 run"
        what = f"{name}, {axis}: {NAMES[word]} hidden at step 0"
        expected = {"vertical": (1, 1), "horizontal": (0, 2)}[axis] if is_t5 else None
        most = finite(float(np.argmax(single)))
        claims.append(
            Claim(
                f"{what}: layer whose mask costs the layout's cosine most",
                "–",
                most,
                expected,
                listed,
                basis=basis,
            )
        )
        cost = paired_difference(table[[late]].to_numpy(), base.to_numpy()[:, None])
        label = f"{what}: cosine lost by layer {late}, of the layers from {half} on the most"
        beside = f"all layers {lost[-1]:.2f}"
        claims.append(
            Claim(label, "–", cost, (-0.05, 0.05) if is_t5 else None, beside, basis=basis)
        )
    return claims


def conditions_of(
    axis: str, model: HookedTextToImage, texts: Sequence[str]
) -> dict[str, list[ablation.Intervention]]:
    """Words hidden from all heads: every word of `NAMES`, the axis' own by step too, and a random
    other word.
    """
    conditions: dict[str, list[ablation.Intervention]] = {
        "none": [],
        **{word: ablation.knockout_role(word) for word in NAMES},
    }
    own = CARRIER[axis]
    conditions["own, early"] = ablation.knockout_role(own, steps=slice(0, EARLY))
    conditions["own, late"] = ablation.knockout_role(own, steps=slice(EARLY, None))
    words = [hide for word in NAMES for hide in ablation.knockout_role(word)]
    drawn = ablation.random_tokens(model, texts, words, np.random.default_rng(0))
    conditions["random word"] = [drawn[list(NAMES).index("shape1")]]
    return conditions


@torch.no_grad()
def masks(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """A row an axis, condition and image: `asked`, the layout is the caption's; `binding`."""
    rows = []
    for axis in CARRIER:
        wanted = scenes_along(axis, n, seed=32)
        texts = [scenes.caption(scene) for scene in wanted]
        for condition, hide in conditions_of(axis, model, texts).items():
            hooks = [hook for one in hide for hook in one.hooks(model, texts)]
            images = model.run_with_hooks(
                texts, seed=list(range(9100, 9100 + len(wanted))), fwd_hooks=hooks
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


def mask_claims(name: str, rows: pd.DataFrame) -> list[Claim]:
    """Each word by axis; the axis' own word by step. The family is all of them."""
    claims = []
    told = {
        **{str(word): label for word, label in NAMES.items()},
        "own, early": f"in steps 0 to {EARLY - 1} alone",
        "own, late": f"from step {EARLY} on",
    }
    for axis, carrier in CARRIER.items():
        part = rows[rows["axis"] == axis]
        asked = part.pivot(index="scene", columns="condition", values="asked")
        binding = part.groupby("condition")["binding"].mean()
        for condition, label in told.items():
            expected = (0.8, 1.0)
            if condition == carrier:
                expected = (0.3, 0.7)
            elif condition.startswith("own"):
                label = f"{NAMES[carrier]} {label}"
                expected = (0.3, 0.75) if "early" in condition else (0.85, 1.0)
            claims.append(
                Claim(
                    f"{name}, {axis} scenes: {label} hidden from all heads, layout as asked",
                    "–",
                    proportion(asked[condition].to_numpy(float)),
                    expected,
                    f"{PAPER_MASK.get(condition, '')}none hidden {asked['none'].mean():.2f}, "
                    f"a random other word {asked['random word'].mean():.2f}; "
                    f"binding {binding['none']:.2f} → {binding[condition]:.2f}",
                    paired_difference(
                        asked[["random word"]].to_numpy(), asked[[condition]].to_numpy()
                    ),
                    f"{len(asked)} images, a noise each, 1 run",
                    questions=len(told) * len(CARRIER),
                    share=True,
                )
            )
    return claims


# Arithmetic


def random_like(
    vectors: Float[Tensor, "prompt text_pos d"], seed: int
) -> Float[Tensor, "prompt text_pos d"]:
    """Vectors of random direction and the same norms."""
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed)).to(vectors)
    return vectors.norm(dim=-1, keepdim=True) * noise / noise.norm(dim=-1, keepdim=True)


@torch.no_grad()
def arithmetic(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """V_from → V_to (k = 1, text space): a row an axis, word, kind (steered, random) and image:
    `turned`, `kept`, `binding`.
    """
    rows = []
    words: tuple[Role, ...] = ("shape1", "relation", "shape2")
    for axis in CARRIER:
        wanted = scenes_along(axis, n, seed=33)
        turned = [scenes.opposite(scene) for scene in wanted]
        texts, to = (
            [scenes.caption(scene) for scene in wanted],
            [scene.relation for scene in turned],
        )
        for word in words:
            vectors = steering.swap_vectors(model, texts, to, word)
            for kind, added in (("steered", vectors), ("random", random_like(vectors, seed=0))):
                images = steering.steer(
                    model, texts, added, seed=list(range(9200, 9200 + len(wanted)))
                )
                judged = {
                    "turned": scenes.layout(images, turned)["layout"],
                    "kept": scenes.layout(images, wanted)["layout"],
                    "binding": scenes.evaluate(images, wanted)["unique_binding"],
                }
                values = {what: verdict.values.astype(float) for what, verdict in judged.items()}
                rows.append(
                    pd.DataFrame(
                        {
                            "axis": axis,
                            "word": word,
                            "kind": kind,
                            "scene": np.arange(len(wanted)),
                            **values,
                        }
                    )
                )
    return pd.concat(rows, ignore_index=True)


def arithmetic_claims(name: str, rows: pd.DataFrame) -> list[Claim]:
    """Which word's vectors turn which axis."""
    claims = []
    for (axis, word), part in rows.groupby(["axis", "word"], sort=False):
        steered, random = (
            part[part["kind"] == kind].set_index("scene") for kind in ("steered", "random")
        )
        expected = (
            (0.0, 0.15)
            if CARRIER[str(axis)] != word
            else (0.7, 1.0)
            if axis == "vertical"
            else (0.6, 1.0)
        )
        beside = "paper: turns the one prompt shown; " if word == "shape2" else ""
        beside += f"kept {steered['kept'].mean():.2f}; binding {steered['binding'].mean():.2f}; "
        claims.append(
            Claim(
                f"{name}, {axis} scenes: arithmetic on the {NAMES[word]} (k = 1), layout turned",  # type: ignore[index]
                "–",
                proportion(steered["turned"].to_numpy(float)),
                expected,
                beside + f"random vectors {proportion(random['turned'].to_numpy(float))}",
                paired_difference(random[["turned"]].to_numpy(), steered[["turned"]].to_numpy()),
                f"{len(steered)} images, a noise each, 1 run",
                questions=rows.groupby(["axis", "word"]).ngroups,
                share=True,
            )
        )
    return claims


# Figure


@viz.style.styled
def figure(masked: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    """Layouts as asked by hidden word and axis; cosine lost at step 0 by layer, of each axis' own
    word.
    """
    drawn, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8), layout="constrained")
    shown = {
        **{str(word): label for word, label in NAMES.items()},
        "own, early": "own word, steps 0–3",
        "own, late": "own word, steps 4–13",
        "none": "nothing",
    }
    told = []
    for number, (axis, color) in enumerate(zip(CARRIER, ("tab:orange", "tab:blue"), strict=True)):
        asked = masked[masked["axis"] == axis].groupby("condition")["asked"]
        found = {name: proportion(asked.get_group(name).to_numpy(float)) for name in shown}
        at = np.arange(len(shown)) + 0.24 * number - 0.12
        viz.intervals(left, found.values(), at, color=color)
        told.append(f"{axis} {found['none'].mean:.2f} → {found[CARRIER[axis]].mean:.2f}")
        own = layers[
            (layers["axis"] == axis) & (layers["word"] == CARRIER[axis]) & (layers["layer"] >= 0)
        ]
        lost = [
            clustered_mean((part["base"] - part["masked"]).to_numpy()[:, None])
            for _, part in own.groupby("layer")
        ]
        at = np.arange(len(lost)) + 0.16 * number - 0.08
        label = f"{axis} scenes; own word: {NAMES[CARRIER[axis]]}"
        viz.intervals(right, lost, at, upright=True, color=color, label=label)
    left.axvline(0.5, color=viz.style.INK, linestyle="--", linewidth=0.8)
    viz.name_rows(left, list(shown.values()))
    left.set(
        xlim=(-0.03, 1.03),
        xlabel="layout as asked (dashed: chance)",
        title="word hidden from all heads",
    )
    right.set(xlabel="layer", ylabel="cosine lost", title="own word hidden from one layer, step 0")
    right.set_xticks(range(int(layers["layer"].max()) + 1))
    drawn.suptitle(f"Layouts as asked, plain → own word hidden: {'; '.join(told)}")
    drawn.legend(loc="outside lower center", ncols=2)
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Config))
