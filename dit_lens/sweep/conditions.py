"""Interventions of a sweep, resolved.

The tensors that each touches, the first of them, and so the work shared with the clean run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.arguments import is_several, shown
from hooked_models.generation.names import IMAGE_HOOK, Branch, Site

from ..intervene.edits import Edit, Scale
from ..intervene.interventions import Intervention
from ..store import digest

Interventions = (
    Intervention
    | Sequence[Intervention | Sequence[Intervention]]
    | Mapping[str, Intervention | Sequence[Intervention]]
)
"""One entry a condition: an intervention, or several that are made together; a mapping names
them. An empty list is the run without intervention.
"""


def grid(
    intervention: Intervention,
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    steps: Iterable[int] | None = None,
) -> dict[str, Intervention]:
    """Make one intervention for every combination of the arguments, by name ("L2H1 s3").

    Omitted ones stay as they are.

    Args:
        intervention: the one that is repeated; its site may have a `*` for the layer.
        layers: put in the place of the site's `*`.
        heads: one condition each.
        steps: denoising steps, one condition each; negative ones count from the end.

    Raises:
        ValueError: layers are given, but the site has no `*`; or nothing is given.

    Example:
        >>> list(
        ...     grid(
        ...         Intervention("blocks.*.cross_attn.hook_z"), layers=[2], heads=[0, 1], steps=[3]
        ...     )
        ... )
        ['L2H0 s3', 'L2H1 s3']
    """
    if layers is not None and "*" not in intervention.site:
        raise ValueError(
            f"layers take the place of a '*' in the site, and {intervention.site!r} has none."
        )
    if layers is None and heads is None and steps is None:
        raise ValueError("A grid needs layers, heads or steps to go over.")
    axes = [[None] if values is None else list(values) for values in (layers, heads, steps)]
    return dict(_cell(intervention, *cell) for cell in itertools.product(*axes))


def _cell(
    intervention: Intervention, layer: int | None, head: int | None, step: int | None
) -> tuple[str, Intervention]:
    """(name, intervention) of one combination; None stays as it is."""
    one = (
        intervention
        if layer is None
        else replace(intervention, site=intervention.site.replace("*", str(layer)))
    )
    one = one if head is None else replace(one, heads=[head])
    one = one if step is None else replace(one, steps=step)
    where = ("" if layer is None else f"L{layer}") + ("" if head is None else f"H{head}")
    return " ".join(filter(None, (where, "" if step is None else f"s{step}"))), one


@dataclass(frozen=True, eq=False)
class Condition:
    """Edits of one condition, in rows of the sweep's prompts."""

    label: str
    edits: tuple[Edit, ...]
    """In the order in which hooks of one site act."""
    coords: Mapping[str, int]
    """Layer, head and step, where it has just one; else −1."""
    steps: int
    """Steps of a run."""

    @cached_property
    def joint(self) -> bool:
        """True if a prompt's run depends on others' of the same noise: all run together."""
        return any(edit.depends_on_batch for edit in self.edits)

    @cached_property
    def prompts(self) -> Bool[np.ndarray, " prompt"]:
        """Which prompts it changes anything for."""
        touched = [edit.where.flatten(1).any(dim=1).cpu().numpy() for edit in self.edits]
        return np.any(touched, axis=0) if touched else np.zeros(0, dtype=bool)

    @cached_property
    def before(self) -> tuple[Edit, ...]:
        """On the text encoder."""
        return tuple(edit for edit in self.edits if edit.site.part.endswith("text_encoder"))

    @cached_property
    def after(self) -> tuple[Edit, ...]:
        """On the image."""
        return tuple(edit for edit in self.edits if edit.site.inner == IMAGE_HOOK)

    @cached_property
    def at(self) -> dict[int, tuple[Edit, ...]]:
        """Step → its edits."""
        found: dict[int, list[Edit]] = {}
        for edit in self.edits:
            if edit.site.step is not None:
                found.setdefault(edit.site.step, []).append(edit)
        return {step: tuple(edits) for step, edits in found.items()}

    @cached_property
    def first(self) -> int:
        """The first step that is not the clean run's.

        The number of steps where only the image is touched.
        """
        return 0 if self.before else min(self.at, default=self.steps)

    def starts(self, layers: int, step: int) -> dict[Branch, int]:
        """Branch → the layer from which on a run differs at `step`, if it is clean before.

        Branches without a layer do not differ.
        """
        found: dict[Branch, int] = {}
        for edit in self.before:
            found["uncond" if edit.site.part == "null_text_encoder" else "cond"] = 0
        for edit in self.at.get(step, ()):
            site = edit.site
            if site.part == "dit":
                assert site.branch is not None
                found[site.branch] = min(_layer(site, layers), found.get(site.branch, layers))
            elif site.inner == "hook_latent":
                found = {"cond": 0, "uncond": 0}
        return found

    @property
    def digest(self) -> str:
        """Hash of the edits, wherever their tensors came from."""
        parts: list[str | Tensor] = [self.label]
        for edit in self.edits:
            action = edit.action if isinstance(edit.action, str) else type(edit.action).__name__
            parts += [
                edit.site.name,
                action,
                str(getattr(edit.action, "factor", "")),
                str((edit.ordered_axis, edit.seed)),
            ]
            parts += [
                edit.where,
                edit.prompt,
                edit.exchange_group,
                *([] if edit.values is None else [edit.values]),
            ]
        return digest(*parts)


def _layer(site: Site, layers: int) -> int:
    """The first block that a site of the denoiser has an influence on.

    `layers` for anything after the last.
    """
    if found := re.match(r"blocks\.(\d+)\.", site.inner):
        return int(found[1])
    return layers if site.inner.startswith("ln_final.") else 0


def _conditions(interventions: Any) -> Iterable[Any]:
    return interventions.values() if isinstance(interventions, Mapping) else interventions


def _is_condition(one: Any) -> bool:
    several = [one] if isinstance(one, Intervention) else one
    return isinstance(several, (list, tuple)) and all(
        isinstance(each, Intervention) for each in several
    )


def resolve(
    model: HookedTextToImage,
    texts: Sequence[str],
    interventions: Interventions,
    draft: Any,
    rng: int,
) -> list[Condition]:
    """Every condition in rows of `texts`, checked as a run would check it.

    `draft`: the inputs of such a run.

    Raises:
        UnknownHookError, ValueError: as `Intervention.hooks` and a run with these hooks; or a name
            stands twice.
    """
    num_steps, steps = draft.num_steps, len(draft.solver)
    found = []
    for label, several in _named(interventions):
        edits = [
            edit
            for one in several
            for edit in one.resolve(model, texts, num_steps=num_steps, seed=rng)
        ]
        with model.hooks([(edit.site.name, edit) for edit in edits]):
            model.check_hooks(draft.extent)
        for edit in edits:
            edit.check_shape(model.shape(draft, edit.site))
        found.append(
            Condition(
                label or " + ".join(map(describe, several)), tuple(edits), _coords(several), steps
            )
        )
    return found if isinstance(interventions, Mapping) else _numbered(found)


def _named(interventions: Interventions) -> list[tuple[str, list[Intervention]]]:
    """(name or "", interventions) of each condition. Raises ValueError for anything else."""
    interventions = [interventions] if isinstance(interventions, Intervention) else interventions
    if not is_several(interventions) or not all(map(_is_condition, _conditions(interventions))):
        raise ValueError(
            f"interventions={shown(interventions)}: give an Intervention, several (one condition "
            "each, which may be lists), or a dict of named ones."
        )
    named = (
        list(interventions.items())
        if isinstance(interventions, Mapping)
        else [("", one) for one in interventions]
    )
    if not named:
        raise ValueError("interventions is empty: give at least one to sweep over.")
    return [
        (name, [each] if isinstance(each, Intervention) else list(each)) for name, each in named
    ]


def _numbered(conditions: Sequence[Condition]) -> list[Condition]:
    """Number equal labels: values of Replace and Add do not stand in one."""
    seen: dict[str, int] = {}
    found = []
    for one in conditions:
        count = seen[one.label] = seen.get(one.label, 0) + 1
        found.append(one if count == 1 else replace(one, label=f"{one.label} #{count}"))
    return found


def describe(intervention: Intervention) -> str:
    """An intervention in a line."""
    parts = [intervention.site]
    for name in ("heads", "tokens", "steps"):
        if (value := getattr(intervention, name)) is not None:
            several = isinstance(value, tuple)
            mask = several and value and isinstance(value[0], tuple)
            parts.append(
                f"{name}="
                + ("mask" if mask else ",".join(map(str, value)) if several else str(value))
            )
    if intervention.branch != "cond":
        parts.append(intervention.branch)
    action = intervention.action
    name = action if isinstance(action, str) else type(action).__name__.lower()
    return " ".join([*parts, f"×{action.factor:g}" if isinstance(action, Scale) else name])


def _coords(several: Sequence[Intervention]) -> dict[str, int]:
    layers, heads, steps = set(), set(), set()
    for one in several:
        found = re.search(r"blocks\.(\d+)\.", one.site)
        layers.add(int(found[1]) if found else -1)
        chosen = tuple(map(int, one.heads or ()))
        heads.add(chosen[0] if len(chosen) == 1 else -1)
        steps.add(one.steps if isinstance(one.steps, int) else -1)
    return {
        name: next(iter(values)) if len(values) == 1 else -1
        for name, values in (("layer", layers), ("head", heads), ("step", steps))
    }
