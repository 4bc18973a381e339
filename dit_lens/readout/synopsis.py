"""Attention synopsis: each head's attention from image regions to prompt parts or to each other.

    images = model(prompts, seed=0)
    groups = image_groups_from_images(images, scenes)
    found = attention_synopsis(model, prompts, seed=0, image_groups=groups, reduce="mass")
    # heads whose second object attends to the relation word
    rank_heads(found, "object2", "relation", step=0)

No pattern is kept. The queries attend once more through the fused kernel, with the groups'
indicators in place of values: this gives each query's attention to each group, exactly, and the
image regions average it. If a text has at most as many tokens as a head has channels, the pattern
is smaller than the queries, and is made and dropped. ``reduce`` is one of:

- ``sum``: sum over the image group's tokens (queries) and the other group's (keys). Grows with the
  sizes of both.
- ``mass``: mean attention from a query in the image group to all keys of the other group; sums to 1
  over a partition of the keys.
- ``mean``: mean attention from a query in the image group to one key of the other group: comparable
  between groups.
- ``max``: largest entry of the pattern there. The only one that needs rows of the pattern, which
  are made and dropped in chunks, each no larger than the queries.

Steps stay apart: reduce them as needed (`.sel(step=0)`, `.mean("step")`, `.max("step")`). A group
without a token in a prompt, such as a color that it does not name, is NaN there, which xarray's
reductions leave out.

Source: Wang, Fan, Pan (arXiv 2601.06338), section 4.1, whose scores are sums, maximised over steps,
over words without EOS. Here all tokens of a role count, EOS and pads are groups, self-attention has
its synopsis too, and `rank_heads` gives intervals and a control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hooked_models import HookedTextToImage, Trajectory
from hooked_models.arguments import integer, one_of
from hooked_models.generation.loops import RunInputs
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.generation.names import BRANCHES, Branch
from hooked_models.generation.noise import Seeds, seed_of_each

from ..intervene.interventions import Intervention
from ..remote.attention import attention_there
from ..remote.model import RemoteTextToImage
from ..remote.plan import Groups as RemoteGroups
from ..runs.drawing import Drawing
from ..runs.repeated_runs import RepeatedRun
from ..store import Store, digest, fingerprint
from ..task.image_groups import image_groups_from_images, image_groups_from_scenes
from .group_attention import Sublayer, attention_between
from .position_groups import (
    Groups,
    TextGroups,
    TextKeys,
    stacked,
    text_keys,
)
from .ranking import rank_heads

__all__ = [
    "attention_synopsis",
    "image_groups_from_images",
    "image_groups_from_scenes",
    "rank_heads",
    "trajectory_synopsis",
]

Reduce = Literal["sum", "mass", "mean", "max"]
BATCH = 16


class Generations(Drawing, total=False):
    """Keyword arguments of `attention_synopsis` that concern its generations.

    Attributes:
        interventions: applied in each; "mean" and "resample" are those of a batch.
    """

    interventions: Sequence[Intervention]


@torch.no_grad()
def attention_synopsis(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    seed: Seeds = 0,
    sublayer: Sublayer = "cross_attn",
    image_groups: Groups | None = None,
    reduce: Reduce = "sum",
    *,
    text_groups: TextGroups | None = None,
    out: str | Path | None = None,
    **how: Unpack[Generations],
) -> xr.DataArray:
    """Attention between groups of tokens during whole generations, `batch_size` prompts at a time.

    Args:
        model: hooked model; hooks that are attached to it act.
        prompts: one prompt or several; all of them share the names of groups.
        seed: as in `HookedTextToImage.forward`: an int gives every prompt the same noise.
        sublayer: "cross_attn", image ← text, or "attn", image ← image, with the same groups for
            keys as for queries.
        image_groups: positions row by row on the model's own grid; by default, one group of all,
            "image".
        reduce: see the module.
        text_groups: name → positions of `model.to_tokens(prompts)`, or a role,
            `prompts.word("cat")` or several; by default, all roles of `dit_lens.prompts`. The
            unconditional branch reads no prompt: all roles but EOS and pad, and groups that are
            given here, are NaN in it.
        out: a folder for finished batches, from which an interrupted call goes on when it is
            repeated.
        **how: `num_steps`, `guidance`, `batch_size` (16 by default) and `interventions`; see
            `Generations`.

    Returns:
        Dims (prompt, layer, head, step, branch, image_group, text_group), with key_group in place
        of text_group for self-attention; at guidance ≤ 1 the only branch is "cond". Coordinates
        hold the sizes of groups, `image_tokens` (prompt, image_group) and `key_tokens` (prompt,
        branch, text_group), and `seed` along `prompt`.

    Raises:
        ValueError: groups, seeds and prompts do not go together; "max" with shares; or `out` holds
            a synopsis of another model, other prompts or other settings, which the message names.

    Example:
        >>> found = attention_synopsis(model, "red circle is above blue square", num_steps=2)
        >>> found.sizes["step"], found["text_group"].values.tolist()
        (2, ['color1', 'shape1', 'relation', 'color2', 'shape2', 'filler', 'eos', 'pad'])
    """
    num_steps, guidance = how.get("num_steps", DEFAULT_STEPS), how.get("guidance")
    interventions = how.get("interventions", ())
    batch_size = integer("batch_size", how.get("batch_size", BATCH), 1)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = seed_of_each(seed, len(texts))
    guidance = model.default_guidance if guidance is None else guidance
    draft = model.draft(texts, seeds, num_steps, guidance)
    branches = BRANCHES if draft.guided else BRANCHES[:1]
    groups = partial(text_keys, model, texts, draft, branches, text_groups)
    plan = _Plan.make(model, draft, branches, sublayer, image_groups, groups, reduce)

    settings: dict[str, Any] = {}
    if out is not None:
        model.check_no_hooks("A folder can record interventions=… only")
        settings = {
            "model": model.digest(),
            "prompts": digest(*texts, model.layout(draft).text_mask),
            "seeds": digest(str(seeds)),
            "groups": digest(*plan.image_names, plan.image, *plan.key_names, *plan.keys.values()),
            "interventions": fingerprint(list(interventions)),
            **{
                "sublayer": sublayer,
                "reduce": reduce,
                "num_steps": num_steps,
                "guidance": guidance,
                "batch_size": batch_size,
            },
        }

    def measure(
        start: int,
    ) -> Float[np.ndarray, "prompt layer head step branch image_group key_group"]:
        rows = slice(start, start + batch_size)
        hooks = _hooks(model, interventions, texts[rows], num_steps)
        if isinstance(model, RemoteTextToImage):
            with model.hooks(hooks):
                return plan.take(rows).measure_remotely(
                    model, texts[rows], seeds[rows], num_steps, guidance
                )
        whole = len(texts) <= batch_size
        inputs = draft if whole else model.draft(texts[rows], seeds[rows], num_steps, guidance)
        with model.hooks(hooks):
            model.check_hooks(inputs.extent)
            return plan.take(rows).measure(model, model.encoded(inputs))

    bar: Iterable[int] = range(0, len(texts), batch_size)
    if len(texts) > batch_size:
        bar = track(bar, "attention synopsis", transient=True, console=Console(stderr=True))
    with nullcontext() if out is None else Store(out, settings) as store:
        parts = [
            measure(i) if store is None else store.array(f"{i:08d}.npy", partial(measure, i))
            for i in bar
        ]
    return plan.label(np.concatenate(parts), texts, seeds)


def _hooks(
    model: HookedTextToImage,
    interventions: Sequence[Intervention],
    texts: Sequence[str],
    num_steps: int,
) -> list[Any]:
    return [
        hook for each in interventions for hook in each.hooks(model, texts, num_steps=num_steps)
    ]


@torch.no_grad()
def trajectory_synopsis(
    trajectory: Trajectory,
    sublayer: Sublayer = "cross_attn",
    image_groups: Groups | None = None,
    reduce: Reduce = "sum",
    *,
    text_groups: Groups | None = None,
) -> xr.DataArray:
    """Apply `attention_synopsis` to one trajectory.

    It is re-run from its first state, with the hooks attached to its model.

    Raises:
        ValueError: as in `attention_synopsis`, or a hook is attached to the text encoder, which is
            not run again.

    Example:
        >>> run = model.trajectory("red circle is above blue square", num_steps=2)
        >>> trajectory_synopsis(run, reduce="mass").sizes["branch"]
        2
    """
    model, inputs, run = trajectory.model, trajectory.inputs, RepeatedRun(trajectory)

    def groups() -> TextKeys:
        roles = run.roles() if text_groups is None else None
        return text_keys(model, run.texts, inputs, run.branches, text_groups, roles)

    plan = _Plan.make(model, inputs, run.branches, sublayer, image_groups, groups, reduce)
    trajectory.check_fork(0)
    return plan.label(plan.measure(model, inputs), run.texts)


@dataclass(frozen=True)
class _Plan:
    """Groups and reduction; `keys` by branch, over text or (self-attention) image positions."""

    sublayer: Sublayer
    reduce: Reduce
    image_names: list[str]
    image: Float[Tensor, "prompt pos image_group"]
    key_names: list[str]
    keys: dict[Branch, Float[Tensor, "prompt key_pos key_group"]]

    @classmethod
    def make(
        cls,
        model: HookedTextToImage,
        inputs: Any,
        branches: Sequence[Branch],
        sublayer: Sublayer,
        image_groups: Groups | None,
        text_keys: Callable[[], TextKeys],
        reduce: Reduce,
    ) -> _Plan:
        one_of("sublayer", sublayer, get_args(Sublayer))
        one_of("reduce", reduce, get_args(Reduce))
        n, pos = len(inputs), model.layout(inputs).n_image
        image_groups = (
            {"image": torch.ones(pos, dtype=torch.bool)} if image_groups is None else image_groups
        )
        image = stacked(image_groups, n, pos, "image")
        names, keys = list(image_groups), dict.fromkeys(branches, image)
        if sublayer == "cross_attn":
            names, keys = text_keys()
        if reduce == "max" and any(
            bool(((w != 0) & (w != 1)).any()) for w in (image, *keys.values())
        ):
            raise ValueError(
                "reduce='max' needs groups that hold a position or not: give booleans, such as "
                "shares > 0.25."
            )
        return cls(sublayer, reduce, list(image_groups), image, names, keys)

    def take(self, rows: slice) -> _Plan:
        """Plan for some of the prompts."""
        return replace(
            self,
            image=self.image[rows],
            keys={branch: keys[rows] for branch, keys in self.keys.items()},
        )

    def measure(
        self, model: HookedTextToImage, inputs: RunInputs
    ) -> Float[np.ndarray, "prompt layer head step branch image_group key_group"]:
        """Reduced attention of the run of `inputs`; NaN for empty groups."""
        return self._reduced(
            attention_between(model, inputs, self.sublayer, self.image, self.keys, self._kind)
        )

    def measure_remotely(
        self,
        model: RemoteTextToImage,
        texts: Sequence[str],
        seeds: Sequence[int],
        num_steps: int,
        guidance: float,
    ) -> Float[np.ndarray, "prompt layer head step branch image_group key_group"]:
        """Reduced attention of one run through nnsight, summed on the model's server."""
        sublayer: Any = self.sublayer
        found = attention_there(
            model,
            texts,
            seeds,
            sublayer,
            RemoteGroups(self.image, self.keys, self._kind),
            num_steps=num_steps,
            guidance=guidance,
        )
        return self._reduced(found)

    @property
    def _kind(self) -> Literal["sum", "max"]:
        return "max" if self.reduce == "max" else "sum"

    def _reduced(
        self, found: Float[Tensor, "prompt layer head step branch image_group key_group"]
    ) -> Float[np.ndarray, "prompt layer head step branch image_group key_group"]:
        image = self.image.sum(dim=1)[:, None, None, None, None, :, None]
        keys = torch.stack([keys.sum(dim=1) for keys in self.keys.values()], dim=1)[
            :, None, None, None, :, None
        ]
        divisor = {"mass": image, "mean": image * keys}.get(self.reduce, 1)
        return (
            torch.where((image > 0) & (keys > 0), found / divisor, torch.nan)
            .to(found.dtype)
            .numpy()
        )

    def label(
        self, values: np.ndarray, prompts: Sequence[str], seeds: Sequence[int] = ()
    ) -> xr.DataArray:
        key_group = "text_group" if self.sublayer == "cross_attn" else "key_group"
        sizes = np.stack([keys.sum(dim=1).numpy() for keys in self.keys.values()], axis=1)
        return xr.DataArray(
            values,
            dims=("prompt", "layer", "head", "step", "branch", "image_group", key_group),
            coords={
                "prompt": list(prompts),
                **{
                    name: range(values.shape[axis])
                    for axis, name in ((1, "layer"), (2, "head"), (3, "step"))
                },
                "branch": list(self.keys),
                "image_group": self.image_names,
                key_group: self.key_names,
                "image_tokens": (("prompt", "image_group"), self.image.sum(dim=1).numpy()),
                "key_tokens": (("prompt", "branch", key_group), sizes),
                **({"seed": ("prompt", list(seeds))} if seeds else {}),
            },
            name=f"{self.sublayer} {self.reduce}",
        )
