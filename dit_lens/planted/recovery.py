"""Recovery of a planted circuit: methods rank heads blindly and are scored against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import permutation_test
from sklearn.metrics import roc_auc_score
from torch import Tensor

from hooked_models import HookedTextToImage

from .. import task as scenes
from ..graph import path_patching as patching
from ..intervene import ablation, steering
from ..readout import screening, synopsis
from ..task import DIRECTIONS, Scene
from ..task.scene import IMAGE_SIZE
from ..text import variance
from ..text.prompts import Role
from .truth import PlantedTruth

CARDINALS = ("above", "below", "left", "right")
PHRASES = ("directly above", "directly below", "left of", "right of")
"""One of each relation, all of two tokens, so that later positions are the same."""
EARLY = range(6)


def ramp_heads(truth: PlantedTruth) -> set[tuple[int, int]]:
    """Relation heads, and decoys that differ from them in their outputs only."""
    return {
        (head.layer, head.head)
        for head in truth.heads
        if head.role == "relation" or "ramp" in head.what
    }


def relation_heads(truth: PlantedTruth) -> set[tuple[int, int]]:
    """Heads that turn a relation into a place."""
    return {(head.layer, head.head) for head in truth.relation_heads}


def auroc(scores: pd.Series[float], positive: set[tuple[int, int]]) -> float:
    """Area under the ROC curve of scores by (layer, head); NaN without true heads."""
    labels = [place in positive for place in scores.index]
    return float(roc_auc_score(labels, scores)) if 0 < sum(labels) < len(labels) else np.nan


def relation_role(truth: PlantedTruth) -> Role:
    """Role of the word with the relation: the second shape in "fused", else the relation word."""
    return "shape2" if truth.kind == "fused" else "relation"


# Methods. Each gives scores by (layer, head), and p-values where it has any.


def by_axes(
    model: HookedTextToImage, truth: PlantedTruth, axes: Sequence[str] = screening.AXES
) -> pd.DataFrame:
    """Screening by axis: a head's larger share of gain², and its smaller family-wise p."""
    if relation_role(truth) == "relation":
        contrasts = screening.phrase_contrasts(model, {axis: screening.ENDS[axis] for axis in axes})
    else:
        contrasts = screening.half_differences(effects_at_the_second_shape(model), axes)
    table = screening.screen_axes(model.dit, contrasts)
    by_head = table.groupby(["layer", "head"])
    p = (by_head["p_family"].min() * len(contrasts)).clip(upper=1)
    return pd.DataFrame({"score": by_head["share"].max(), "p": p})


def effects_at_the_second_shape(model: HookedTextToImage) -> dict[str, Float[Tensor, " d_model"]]:
    """Relation → its effect vector at the second shape word, in caption space."""
    found, factors = variance.word_vectors(
        model, variance.factorial_prompts(PHRASES), "shape2", at="caption"
    )
    effects = variance.effect_vectors(found, factors[["shape1", "color1", "shape2", "relation"]])[
        "relation"
    ]
    return {
        str(name): torch.tensor(effects.sel(relation=name).values, dtype=found.dtype)
        for name in effects.relation.values
    }


def by_screening(model: HookedTextToImage, truth: PlantedTruth) -> pd.DataFrame:
    """Weight-space screening, pooled over axes.

    Screens word vectors, or the relation's effects at the second shape word.
    """
    if relation_role(truth) == "relation":
        words = ("above", "below", "left", "right", "up", "down", "upper", "lower")
        vectors = {word: screening.word_vector(model, word) for word in words}
        table = screening.screen_heads(model.dit, vectors, null_draws=200)
    else:
        vectors = effects_at_the_second_shape(model)
        table = screening.screen_heads(model.dit, vectors, at="caption", null_draws=200)
    return (
        table.assign(score=table["projection"].abs())
        .set_index(["layer", "head"])[["score", "p"]]
        .sort_index()
    )


def by_synopsis(model: HookedTextToImage, truth: PlantedTruth) -> pd.DataFrame:
    """Attention synopsis at step 0.

    Difference in attention to the word between the two halves of the image along its direction. p:
    scipy's sign-flip test over prompts, two-sided.
    """
    drawn = cardinal_scenes(3)
    side = model.cfg.sample_size // model.cfg.patch_size
    halves = {name: (screening.ramp(DIRECTIONS[name], side) > 0) for name in CARDINALS}  # type: ignore[index]
    texts = [f"{s.color1} {s.shape1} is {phrase} {s.color2} {s.shape2}" for s, phrase in drawn]
    seen = synopsis.attention_synopsis(
        model, texts, seed=range(len(texts)), image_groups=halves, reduce="mean", num_steps=1
    )
    seen = seen.sel(step=0, branch="cond", text_group=relation_role(truth))
    opposite = dict(zip(CARDINALS, ("below", "above", "right", "left"), strict=True))
    there = np.stack([seen[i].sel(image_group=s.relation).values for i, (s, _) in enumerate(drawn)])
    elsewhere = np.stack(
        [seen[i].sel(image_group=opposite[s.relation]).values for i, (s, _) in enumerate(drawn)]
    )
    difference = there - elsewhere  # [prompt layer head]
    rows = []
    for layer, head in np.ndindex(difference.shape[1:]):
        values = difference[:, layer, head]
        test = permutation_test(
            (values,),
            np.mean,
            permutation_type="samples",
            n_resamples=999,
            rng=np.random.default_rng(0),
        )
        rows.append(
            {"layer": layer, "head": head, "score": abs(values.mean()), "p": float(test.pvalue)}
        )
    return pd.DataFrame(rows).set_index(["layer", "head"])


def by_knockout(
    model: HookedTextToImage, truth: PlantedTruth, heads: Sequence[tuple[int, int]] | None = None
) -> pd.DataFrame:
    """Drop in relation accuracy with the word masked in one head, at the early steps."""
    drawn = [scene for scene, _ in cardinal_scenes(1)]
    names = {
        f"L{layer}H{head}": (layer, head)
        for layer, head in heads or np.ndindex(model.cfg.n_layers, model.cfg.n_heads)
    }
    conditions = {
        name: ablation.knockout_role(relation_role(truth), name, steps=list(EARLY))
        for name in names
    }
    effects = ablation.ablation_effects(model, drawn, conditions, range(1), controls=0)
    base = effects["relation_loose"].sel(condition="none").astype(float)
    drops = {
        place: float((base - effects["relation_loose"].sel(condition=name)).mean())
        for name, place in names.items()
    }
    return pd.DataFrame({"score": drops}).rename_axis(["layer", "head"])


def by_path_patching(
    model: HookedTextToImage, truth: PlantedTruth, heads: Sequence[tuple[int, int]] | None = None
) -> pd.DataFrame:
    """Path patching word → head.

    Displacement of objects when one head reads the word of the opposite relation. The unit is the
    displacement between the two rendered scenes, and not the model's own between the two prompts
    (`effect`): this is rounding where no head reads the word, and a share of it then says nothing.

    Args:
        model: planted model.
        truth: its circuit, which names the word that carries the relation.
        heads: (layer, head) of those that are scored; all by default.

    Returns:
        Column score, the sum over both axes of the image, by layer and head.
    """
    heads = list(heads or np.ndindex(model.cfg.n_layers, model.cfg.n_heads))
    total = dict.fromkeys(heads, 0.0)
    for words, relation in ((PHRASES[:2], "above"), (PHRASES[2:], "left")):
        ramp = screening.ramp(DIRECTIONS[relation], IMAGE_SIZE).reshape(IMAGE_SIZE, -1).float()  # type: ignore[index]

        def offset(images: Tensor, ramp: Tensor = ramp) -> Float[Tensor, " image"]:
            return ((images[:, 0] - images[:, 2]) * ramp).mean(dim=(1, 2))

        one, other = offset(
            scenes.render(
                [scenes.from_caption(f"red circle is {word} blue square") for word in words]
            )
        )
        first, second = (
            model.trajectory(f"red circle is {word} blue square", seed=0) for word in words
        )
        found = patching.path_patch_matrix(
            first,
            second,
            [patching.Nodes(f"text[{relation_role(truth)}]", steps=list(EARLY))],
            [
                patching.Nodes(f"cross_attn.L{layer}H{head}", steps=list(EARLY))
                for layer, head in heads
            ],
            offset,
            "exact",
        )
        moved = abs(found["patched"] - found["original"]).values.reshape(len(heads), -1)[
            :, 0
        ] / abs(float(one - other))
        for place, value in zip(heads, moved, strict=True):
            total[place] += float(value)
    return pd.DataFrame({"score": total}).rename_axis(["layer", "head"])


HEAD_METHODS: dict[
    str, tuple[Callable[..., pd.DataFrame], Callable[[PlantedTruth], set[tuple[int, int]]]]
] = {
    "screening by axis": (by_axes, ramp_heads),
    "screening": (by_screening, ramp_heads),
    "synopsis": (by_synopsis, ramp_heads),
    "knock-out": (by_knockout, relation_heads),
    "path patching": (by_path_patching, relation_heads),
}
"""Method → itself, and the heads that it should name: weights and patterns of queries and keys
cannot tell ramp decoys apart.
"""


def by_variance(model: HookedTextToImage) -> pd.DataFrame:
    """Partial share of the variance of each role's vector explained by the relation, and p."""
    roles: tuple[Role, ...] = ("color1", "shape1", "relation", "color2", "shape2")
    rows = {}
    for role in roles:
        vectors, factors = variance.word_vectors(model, variance.factorial_prompts(PHRASES), role)
        table = variance.partition(
            vectors, factors[["color1", "shape1", "shape2", "relation"]], permutations=99
        )
        rows[role] = table.loc["relation", ["r2_partial", "p"]]
    return pd.DataFrame(rows).T.astype(float)


def by_arithmetic(model: HookedTextToImage, role: Role) -> pd.Series[float]:
    """Embedding arithmetic: share of scenes with the opposite relation, by condition.

    V_to − V_from is added at a role's words.
    """
    drawn = [scene for scene, _ in cardinal_scenes(1)]
    doses = steering.dose_response(model, drawn, doses=(1.0,), tokens=role, draws=1)
    return doses["target_loose"].astype(float).mean(("k", "scene", "seed")).to_series()


def cardinal_scenes(repeats: int) -> list[tuple[Scene, str]]:
    """Scenes above, below, left and right, `repeats` of each.

    Both colors are named, and each phrase has two tokens.
    """
    pool = scenes.sample(400, seed=0, split="all", color_words="both")
    found = []
    for relation, phrase in zip(CARDINALS, PHRASES, strict=True):
        found += [(scene, phrase) for scene in pool if scene.relation == relation][:repeats]
    return found
