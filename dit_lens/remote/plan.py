"""Hooks under our names as plain data, checked before they are sent.

`pixart_plan` and `pipeline_plan` make the plans that the kernels follow inside a trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.generation.attached import AttachedHook
from hooked_models.generation.names import Branch, Site
from hooked_models.generation.sampling import Solver

from ..intervene.edits import Edit, RowEdits
from .kernel import Point

FROM_CLEAN_RUN = torch.tensor(torch.nan)


class _CleanRun(Mapping[str, Tensor]):
    """Has a value for every name, which only `RemoteTextToImage.patch` can tell."""

    def __getitem__(self, name: str) -> Tensor:
        return FROM_CLEAN_RUN

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "CLEAN"


CLEAN = _CleanRun()
"""`Intervention(…, action=Replace(CLEAN))`: put the activation of
`RemoteTextToImage.patch`'s clean run there.
"""


class GroupSum(NamedTuple):
    """Attention between groups, summed where the model is.

    Arguments of `intervene.portable_ops.sums_of_pattern`.
    """

    attention: str
    """As in "blocks.2.cross_attn"."""
    step: int
    branch: Branch
    queries: Float[Tensor, "batch pos group"] | None
    """None: each query is a group of its own."""
    keys: Float[Tensor, "batch key_pos key_group"]
    reduce: str
    key: Any
    """Under which the kernel returns it; sums with equal keys are added up."""
    over_heads: bool = False

    @property
    def sent(self) -> tuple[Any, ...]:
        """As the kernel takes it."""
        return self.key, self.branch, self.queries, self.keys, self.reduce, self.over_heads


class Groups(NamedTuple):
    """Groups of positions whose attention is added up, and how."""

    queries: Float[Tensor, "batch pos group"]
    keys: Mapping[Branch, Float[Tensor, "batch key_pos key_group"]]
    reduce: Literal["sum", "max"]


class Request(NamedTuple):
    """Hooks of a run, and everything that it returns beside its images."""

    attached: Sequence[AttachedHook] = ()
    """Hooks, in the order in which they act."""
    keep: Sequence[Site] = ()
    """Sites whose tensors, as hooks leave them, are returned."""
    sums: Sequence[GroupSum] = ()
    to_cpu: bool = True
    """True to return kept tensors to the client, False to leave them with the model, for the next
    run of a session.
    """
    patching: bool = False
    """True if there is an earlier run for `CLEAN` to mean."""

    @property
    def actions(self) -> list[tuple[Site, Any]]:
        """Each site with its hook function, or None to keep the tensor, in order."""
        return [
            *((each.site, each.function) for each in self.attached),
            *((site, None) for site in self.keep),
        ]


def action_of(
    model: HookedTextToImage, draft: Any, site: Site, action: Any, patching: bool
) -> tuple[Point, Any]:
    """The point of a site, and its hook function as it is or its edit as arguments.

    Raises:
        ValueError: the edit was made for other prompts or sizes, or cannot be sent.
    """
    point = Point(site.name, site.inner, site.step, site.branch)
    if isinstance(action, RowEdits):
        raise ValueError(
            f"{site.name}: edits of some rows of a batch stay in sweeps, which need a model at "
            "hand."
        )
    if not isinstance(action, Edit):
        return point, action
    action.check_shape(model.shape(draft, site))
    if action.values is not FROM_CLEAN_RUN:
        return point, action.arguments
    if not patching:
        raise ValueError(
            f"{site.name}: Replace(CLEAN) has a meaning in RemoteTextToImage.patch alone."
        )
    return point, {**action.arguments, "values": None}


def unreachable(site: Site, reason: str) -> ValueError:
    """An error that says why no trace gets at a tensor."""
    return ValueError(f"{site.name} is not within nnsight's reach: {reason}")


def x0_coefficients(solver: Solver, step: int) -> tuple[float, float]:
    """(a, b) of a step, where x0 = a · latent + b · out."""
    zero, one = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    return float(solver.x0(step, one, zero)), float(solver.x0(step, zero, one))
