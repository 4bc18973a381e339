"""Ablation presets, matched random controls, and their effect on scene accuracy.

    head, words = knockout_role("relation", heads="L2H2"), knockout_role("relation")
    conditions = {"head": head, "words": words}
    drawn = scenes.sample(64, seed=1, color_words="both")
    effects = ablation_effects(model, drawn, conditions, seeds=[0, 1])
    effects["relation_loose_effect"].to_pandas()

Source: Wang, Fan, Pan (arXiv 2601.06338), sections 4.2 and 5. Differences: all tokens of a role are
masked, heads can also be zeroed, averaged or resampled, and every condition has the same noise, an
interval and random heads and tokens as controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import numpy as np
import xarray as xr
from jaxtyping import Int, Shaped
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.arguments import integer
from hooked_models.lazy_imports import renamed_arguments

from ..readout.circuits import parse_head
from ..runs.drawing import Experiment
from ..stats import paired_difference
from ..task import Scene, Trio, caption, evaluate
from ..task.judge import ATTRIBUTES, parts_of_scenes
from ..text.prompts import Tokens
from .interventions import Action, Intervention, Steps
from .random_controls import random_heads, random_tokens
from .verdicts import verdicts

__all__ = ["ablate_heads", "ablation_effects", "knockout_role", "random_heads", "random_tokens"]

VERDICTS = (
    "color",
    "shape",
    "unique_binding",
    "relation_strict",
    "relation_loose",
    "relation_given_both",
)
"""The verdicts of `scenes.evaluate` whose change is an effect."""

Branches = Literal["cond", "uncond", "both"]


# Presets


def knockout_role(
    role: Tokens,
    heads: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    steps: Steps = None,
    branch: Branches = "cond",
    missing: Literal["error", "ignore"] = "error",
    sublayer: Literal["attn", "cross_attn"] = "cross_attn",
) -> list[Intervention]:
    """Hide tokens from an attention, whose patterns renormalise over the others.

    By default in all heads of all layers: the words are dropped from the prompt, as by its mask, at
    the given steps (`slice(5)`: before the fifth).

    Args:
        role: a role, `prompts.word("cat")`, several, positions or a mask, as `tokens` of an
            `Intervention`.
        heads: "L2H8", or several.
        layers: one or several, in place of heads.
        steps: denoising steps that are edited; by default all.
        branch: guidance branch that is edited.
        missing: "ignore" leaves prompts alone that have no such token.
        sublayer: "attn" of models that join image and text in one attention.

    Raises:
        ValueError: heads and layers are both given, or a head or role is misspelt.

    Example:
        >>> [one.site for one in knockout_role("relation", heads="L2H8")]
        ['blocks.2.cross_attn.hook_pattern']
    """
    if heads is not None and layers is not None:
        raise ValueError("Give heads or layers: a head's name says its layer.")
    site = f"blocks.{{}}.{sublayer}.hook_pattern"
    if heads is not None:
        return [
            Intervention(site.format(layer), numbers, role, steps, branch, "knockout", missing)
            for layer, numbers in _by_layer(heads).items()
        ]
    chosen = ["*"] if layers is None else [layers] if isinstance(layers, int) else layers
    return [
        Intervention(site.format(layer), None, role, steps, branch, "knockout", missing)
        for layer in chosen
    ]


def ablate_heads(
    heads: str | Sequence[str],
    action: Action = "zero",
    sublayer: Literal["attn", "cross_attn"] = "cross_attn",
    steps: Steps = None,
    branch: Branches = "cond",
) -> list[Intervention]:
    """Apply an action to the output of heads before W_O (`hook_z`, at all positions).

    Args:
        heads: "L2H8", or several.
        action: "zero", "mean", "resample", ….
        sublayer: the attention that the heads belong to.
        steps: denoising steps that are edited; by default all.
        branch: guidance branch that is edited.

    Raises:
        ValueError: a head is misspelt.

    Example:
        >>> [(one.site, one.heads) for one in ablate_heads(["L2H8", "L2H9"], "mean")]
        [('blocks.2.cross_attn.hook_z', (8, 9))]
    """
    return [
        Intervention(f"blocks.{layer}.{sublayer}.hook_z", numbers, None, steps, branch, action)
        for layer, numbers in _by_layer(heads).items()
    ]


def _by_layer(heads: str | Sequence[str]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, head in map(parse_head, [heads] if isinstance(heads, str) else heads):
        found.setdefault(layer, []).append(head)
    return found


# Effects


@renamed_arguments(wanted="scenes")
def ablation_effects(
    model: HookedTextToImage,
    scenes: Sequence[Scene | Trio],
    conditions: Mapping[str, Intervention | Sequence[Intervention]],
    seeds: Sequence[int] | Int[np.ndarray, "scene seed"],
    *,
    controls: int = 2,
    exclude: Sequence[str] = (),
    **how: Unpack[Experiment],
) -> xr.Dataset:
    """Verdicts of scenes under each condition, and their paired change from no intervention.

    All conditions draw the same scenes from the same noise, as a sweep (`sweep.run`). A condition
    whose interventions name heads is repeated `controls` times on random heads (`random_heads`),
    one whose interventions name tokens on random tokens of the same prompts (`random_tokens`).

    Args:
        model: model that draws; no hooks may be attached.
        scenes: one prompt each (`scenes.caption`).
        conditions: name → interventions, applied together; "mean" and "resample" are over all
            scenes, with one seed each.
        seeds: of the noise; the same for all scenes, or for each its own.
        controls: draws of each kind; every one costs as much as a condition.
        exclude: heads never drawn as controls, see `random_heads`.
        **how: `num_steps`, `guidance`, `batch`, `rng` (seed of controls and "resample"), and
            `out`, `executor` and `workers` of `sweep.run`; see `runs.drawing.Experiment`.

    Returns:
        A Dataset with dims (condition, scene, seed). It has every variable of `scenes.evaluate`,
        and for each of `VERDICTS` `{verdict}_effect`, dims (condition, interval): the mean of
        condition − "none" over the same images, and its 95 % interval over scenes
        (`stats.paired_difference`). Coordinates of condition: `kind` ("none", "condition", "random
        heads", "random tokens") and `control_for`, the condition that a control belongs to.

    Raises:
        ValueError: seeds and scenes do not fit, a condition is called "none", or no control matches
            one.

    Example:
        >>> drawn, conditions = scenes.sample(2, seed=0), {"hide": knockout_role("relation")}
        >>> found = ablation_effects(model, drawn, conditions, [0], controls=1, num_steps=1)
        >>> found["condition"].values.tolist()
        ['none', 'hide', 'hide | random tokens 1']
    """
    if "none" in conditions:
        raise ValueError("The condition 'none' is added by itself: give yours another name.")
    controls, rng = integer("controls", controls, 0), np.random.default_rng(how.get("rng", 0))
    texts = [caption(scene) for scene in scenes]
    plans = _plans(model, texts, conditions, controls, exclude, rng)

    def judge(images: Tensor, prompt: np.ndarray) -> dict[str, np.ndarray]:
        found = evaluate(images, [scenes[row] for row in prompt])
        return {str(name): found[name].values for name in found}

    whole = {name: interventions for name, _, _, interventions in plans}
    values = verdicts(model, texts, seeds, whole, judge, **how)
    return _labelled(values, scenes, seeds).assign_coords(
        condition=list(whole),
        kind=("condition", [kind for _, kind, _, _ in plans]),
        control_for=("condition", [of for _, _, of, _ in plans]),
    )


def _labelled(
    values: Mapping[str, Shaped[np.ndarray, "condition scene seed"]],
    scenes: Sequence[Scene | Trio],
    seeds: Any,
) -> xr.Dataset:
    """Verdicts labelled as by `evaluate`, with their paired changes from the first condition."""
    numbers = np.atleast_1d(np.asarray(seeds))
    noise = np.broadcast_to(numbers, (len(scenes), numbers.shape[-1]))
    effects = {
        f"{name}_effect": (
            ("condition", "interval"),
            [paired_difference(v[0].astype(float), after.astype(float)) for after in v],
        )
        for name, v in values.items()
        if name in VERDICTS
    }
    return xr.Dataset(
        {
            name: (("condition", "scene", "seed"), value, ATTRIBUTES[name])
            for name, value in values.items()
        }
        | effects,
        coords={
            "seed": numbers if numbers.ndim == 1 else np.arange(noise.shape[1]),
            "scene": np.arange(len(scenes)),
            "interval": ["mean", "low", "high"],
            "noise_seed": (("scene", "seed"), noise),
            **{name: ("scene", words) for name, words in parts_of_scenes(scenes).items()},
        },
    )


def _plans(
    model: HookedTextToImage,
    texts: Sequence[str],
    conditions: Mapping[str, Intervention | Sequence[Intervention]],
    controls: int,
    exclude: Sequence[str],
    rng: np.random.Generator,
) -> list[tuple[str, str, str, list[Intervention]]]:
    """(name, kind, control_for, interventions) of all conditions, with "none" and the controls."""
    plans: list[tuple[str, str, str, list[Intervention]]] = [("none", "none", "", [])]
    for name, several in conditions.items():
        interventions = [several] if isinstance(several, Intervention) else several
        plans.append((name, "condition", "", list(interventions)))
        for draw in range(1, controls + 1):
            if any(i.heads is not None for i in interventions):
                control = random_heads(model, interventions, rng, exclude)
                plans.append((f"{name} | random heads {draw}", "random heads", name, control))
            if any(i.tokens is not None for i in interventions):
                control = random_tokens(model, texts, interventions, rng)
                plans.append((f"{name} | random tokens {draw}", "random tokens", name, control))
    return plans
