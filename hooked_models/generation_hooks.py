"""Hooks of a whole generation, attached to the modules inside for just the step and the rows that they are about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .hooked_module import HookedModule, HookFunction
from .names import Branch, GenerationHookPoint, Site

Hooks = Iterable[tuple[str | Callable[[str], bool], HookFunction]]


class SamplerHooks(HookedModule):
    """The tensors between two denoiser calls, each [batch channel rows columns]."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg: Any = None
        self.hook_latent = HookPoint()  # before the step
        self.hook_out_uncond = HookPoint()  # the network's own prediction, all output channels
        self.hook_out_cond = HookPoint()
        self.hook_out = HookPoint()  # guided, without the learned variance
        self.hook_x0 = HookPoint()  # the clean image that `out` implies; the solver goes on from it
        self.hook_image = HookPoint()  # [batch 3 height width] in [0, 1], after the last step
        self.setup()


@dataclass(frozen=True)
class Attached:
    """One hook of a generation: where, what, and in which direction."""

    site: Site
    function: HookFunction
    direction: Literal["fwd", "bwd"] = "fwd"


@contextmanager
def attach(
    hooks: Sequence[Attached],
    module: Callable[[str], HookedModule],
    chosen: Callable[[Site], bool],
    rows: Callable[[Branch], slice] | None = None,
) -> Iterator[None]:
    """Attach the chosen hooks inside the `module` of their part, each restricted to the `rows` of its branch, for the block."""
    per_point: dict[tuple[str, str, str], list[HookFunction]] = {}
    for attached in hooks:
        site = attached.site
        if chosen(site):
            part = rows(site.branch) if rows is not None and site.branch is not None else None
            function = restricted(attached.function, GenerationHookPoint(site), part)
            per_point.setdefault((site.part, attached.direction, site.inner), []).append(function)
    with ExitStack() as stack:
        for part_name in {part for part, _, _ in per_point}:
            pairs: dict[str, list[Any]] = {"fwd": [], "bwd": []}
            for (owner, direction, inner), functions in per_point.items():
                if owner == part_name:
                    pairs[direction].append((inner, in_turn(functions)))
            stack.enter_context(module(part_name).hooks(pairs["fwd"], pairs["bwd"]))
        yield


def in_turn(functions: Sequence[HookFunction]) -> HookFunction:
    """Several hooks as one, each given what the one before left (torch would hand every backward hook the first gradient)."""

    def all_of_them(tensor: Tensor, hook: HookPoint) -> Tensor | None:
        changed = None
        for function in functions:
            replaced = function(tensor if changed is None else changed, hook=hook)
            changed = changed if replaced is None else replaced
        return changed

    return all_of_them


def restricted(function: HookFunction, point: GenerationHookPoint, rows: slice | None) -> HookFunction:
    """`function` on some rows of a tensor, with `point` as its hook; works on activations and on gradients."""

    def on_rows(tensor: Tensor, hook: HookPoint) -> Tensor | None:
        seen = tensor if rows is None else tensor[rows]
        replaced: Any = function(seen, hook=point)
        if replaced is None:
            if rows is None or not seen.requires_grad:
                return None  # an edit in place has reached `tensor` through the view
            replaced = seen  # now part of the computation, so that a tool can differentiate by what its hook saw
        if isinstance(replaced, tuple):  # TransformerLens lets a backward hook return (gradient,)
            (replaced,) = replaced
        if rows is None:
            return replaced
        whole = tensor.clone()
        whole[rows] = replaced
        return whole

    return on_rows
