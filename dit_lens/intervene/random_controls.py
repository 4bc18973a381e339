"""Random heads and tokens that match those of an intervention: its controls."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.hooks.table import layer_of

from ..readout.circuits import parse_head
from .interventions import Intervention


def random_heads(
    model: HookedTextToImage,
    interventions: Sequence[Intervention],
    rng: np.random.Generator,
    exclude: Sequence[str] = (),
) -> list[Intervention]:
    """Repeat interventions on equally many random heads of the same sublayer and range of layers.

    The range is widened by a layer on each side while it has too few other heads. Interventions on
    all heads stay as they are.

    Args:
        model: the model whose other heads are drawn from.
        interventions: each is repeated once, in order.
        rng: generator of the draw.
        exclude: heads ("L2H1") never drawn as controls, unless too few others exist.

    Raises:
        ValueError: the model has too few other heads.

    Example:
        >>> from dit_lens.intervene.ablation import ablate_heads
        >>> control = random_heads(model, ablate_heads("L1H0"), np.random.default_rng(0))
        >>> control[0].site, control[0].heads != (0,)
        ('blocks.1.cross_attn.hook_z', True)
    """
    used: dict[str, set[tuple[int, int]]] = {}
    for intervention in interventions:
        if intervention.heads is not None:
            cells = {
                (layer, int(head))
                for layer in _layers(model, intervention)
                for head in intervention.heads
            }
            used.setdefault(_family(intervention), set()).update(cells)
    excluded = set(map(parse_head, exclude))
    drawn = {
        family: _other_heads(model, family, heads, excluded, rng) for family, heads in used.items()
    }
    controls = []
    for intervention in interventions:
        if intervention.heads is None:
            controls.append(intervention)
            continue
        others = [
            drawn[_family(intervention)][layer, int(head)]
            for layer in _layers(model, intervention)
            for head in intervention.heads
        ]
        for layer in sorted({layer for layer, _ in others}):
            site = re.sub(r"blocks\.(\d+|\*)\.", f"blocks.{layer}.", intervention.site)
            controls.append(
                replace(intervention, site=site, heads=[head for at, head in others if at == layer])
            )
    return controls


def _family(intervention: Intervention) -> str:
    return re.sub(r"blocks\.\d+\.", "blocks.*.", intervention.site).rpartition(".")[0]


def _cfg(model: HookedTextToImage, site: str) -> Any:
    return model.text_encoder.cfg if site.startswith("text_encoder.") else model.cfg


def _layers(model: HookedTextToImage, intervention: Intervention) -> list[int]:
    layer = layer_of(intervention.site)
    return list(range(_cfg(model, intervention.site).n_layers)) if layer is None else [layer]


def _other_heads(
    model: HookedTextToImage,
    family: str,
    used: set[tuple[int, int]],
    excluded: set[tuple[int, int]],
    rng: np.random.Generator,
) -> dict[tuple[int, int], tuple[int, int]]:
    cfg = _cfg(model, family)
    low, high = min(layer for layer, _ in used), max(layer for layer, _ in used)
    for left_out, margin in itertools.product((used | excluded, used), range(cfg.n_layers)):
        layers = range(max(low - margin, 0), min(high + margin + 1, cfg.n_layers))
        others = [
            (layer, head)
            for layer in layers
            for head in range(cfg.n_heads)
            if (layer, head) not in left_out
        ]
        if len(others) >= len(used):
            picks = rng.choice(len(others), len(used), replace=False)
            return {head: others[pick] for head, pick in zip(sorted(used), picks, strict=True)}
    raise ValueError(
        f"There are only {len(others)} other heads to compare {len(used)} with: fewer heads, or "
        "controls=0."
    )


def random_tokens(
    model: HookedTextToImage,
    prompts: Sequence[str],
    interventions: Sequence[Intervention],
    rng: np.random.Generator,
) -> list[Intervention]:
    """Repeat interventions on equally many random tokens of each prompt.

    No intervention selects these tokens. EOS is drawn only if a prompt has no other word left, a
    pad never. Interventions on all tokens stay as they are.

    Raises:
        ValueError: a prompt has too few other tokens.

    Example:
        >>> from dit_lens.intervene.ablation import knockout_role
        >>> hide, rng = knockout_role("relation"), np.random.default_rng(0)
        >>> control = random_tokens(model, ["red circle is above blue square"], hide, rng)
        >>> [sum(row) for row in control[0].tokens]
        [1]
    """
    masks = {i: i.token_masks(model, prompts) for i in interventions if i.tokens is not None}
    drawn: dict[Any, Tensor] = {}
    controls = []
    for intervention in interventions:
        if intervention.tokens is None:
            controls.append(intervention)
            continue
        selected, exist = masks[intervention]
        # equal numbers may be positions of an image and of a prompt
        key = intervention.tokens, selected.shape
        if key not in drawn:
            taken = torch.stack(
                [other for other, _ in masks.values() if other.shape == selected.shape]
            ).any(dim=0)
            drawn[key] = _other_tokens(selected, exist, taken, rng)
        # an empty prompt has no token of a role, so neither has its control
        branch = (
            "cond"
            if intervention.names_words and intervention.branch == "both"
            else intervention.branch
        )
        controls.append(replace(intervention, tokens=drawn[key], branch=branch))
    return controls


def _other_tokens(
    selected: Bool[Tensor, "prompt pos"],
    exist: Bool[Tensor, "prompt pos"],
    taken: Bool[Tensor, "prompt pos"],
    rng: np.random.Generator,
) -> Bool[Tensor, "prompt pos"]:
    others = torch.zeros_like(selected)
    for row in range(len(selected)):
        last = int(exist[row].nonzero().max())  # EOS, or the last position of an image
        free = (exist[row] & ~taken[row]).nonzero().flatten().numpy()
        count = int(selected[row].sum())
        if count > len(free):
            raise ValueError(
                f"Prompt {row} has {len(free)} other tokens to compare {count} with: fewer tokens, "
                "or controls=0."
            )
        order = rng.permutation(free)
        others[row, np.concatenate([order[order != last], order[order == last]])[:count]] = True
    return others
