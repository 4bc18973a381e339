"""Hooks of a generation, each attached inside for just the step and the rows that it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from ..arguments import shown
from ..hooks.module import HookedModule, HookFunction
from .names import Branch, GenerationHookPoint, GenerationNames, Site
from .sampling import Solver


class SamplerHooks(HookedModule):
    """The tensors between two denoiser calls, each [batch channel rows columns]."""

    hook_part = "sampler"

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
class AttachedHook:
    """One hook of a generation: site, function and direction."""

    where: Site | Callable[[str], bool]
    """A predicate on full names is asked when a run is there: only the run knows its steps and
    branches.
    """
    function: HookFunction
    direction: Literal["fwd", "bwd"] = "fwd"
    is_permanent: bool = False
    level: int | None = None
    """Level of the `hooks` block that it belongs to, as in TransformerLens."""

    @property
    def site(self) -> Site:
        """The resolved site; a hook returned by `HookedGeneration.active_hooks` always has one."""
        assert isinstance(self.where, Site)
        return self.where


@contextmanager
def attach(
    hooks: Iterable[AttachedHook],
    module: Callable[[str], HookedModule],
    rows: Callable[[Branch], slice] | None = None,
    contexts: dict[str, dict[str, Any]] | None = None,
) -> Iterator[None]:
    """Attach hooks inside the `module` of their part, for the block.

    Each is restricted to the `rows` of its branch.

    Args:
        hooks: resolved hooks, attached in order.
        module: part → the module that holds its hook points.
        rows: branch → its rows of the batch; None for all rows.
        contexts: by name, the `ctx` that all hooks of a name share.
    """
    per_point: dict[tuple[str, str, str], list[HookFunction]] = {}
    for attached in hooks:
        site = attached.site
        part = rows(site.branch) if rows is not None and site.branch is not None else None
        point = GenerationHookPoint(site)
        if contexts is not None:
            point.ctx = contexts.setdefault(site.name, {})
        function = partial(restrict_to_rows, attached.function, point, part)
        per_point.setdefault((site.part, attached.direction, site.inner), []).append(function)
    with ExitStack() as stack:
        for part_name in {part for part, _, _ in per_point}:
            pairs: dict[str, list[Any]] = {"fwd": [], "bwd": []}
            for (owner, direction, inner), functions in per_point.items():
                if owner == part_name:
                    pairs[direction].append((inner, partial(chain_hooks, functions)))
            stack.enter_context(module(part_name).hooks(pairs["fwd"], pairs["bwd"]))
        yield


def chain_hooks(
    functions: Sequence[HookFunction], tensor: Tensor, hook: HookPoint
) -> Tensor | None:
    """Compose hooks; each receives the previous one's output.

    torch would hand every backward hook the first gradient.
    """
    changed = None
    for function in functions:
        replaced = function(tensor if changed is None else changed, hook=hook)
        changed = changed if replaced is None else replaced
    return changed


def restrict_to_rows(
    function: HookFunction,
    point: GenerationHookPoint,
    rows: slice | None,
    tensor: Tensor,
    hook: HookPoint,
) -> Tensor | None:
    """`function` on some rows of a tensor, with `point` as its hook.

    Works on activations and on gradients.
    """
    seen = tensor if rows is None else tensor[rows]
    try:
        replaced: Any = function(seen, hook=point)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise  # from within the hook
        raise TypeError(
            f"The hook {shown(function)} takes other arguments: write it as fn(tensor, hook)."
        ) from error
    if replaced is None:
        if rows is None or not seen.requires_grad:
            return None  # an edit in place has reached `tensor` through the view
        # now part of the computation, so that a tool can differentiate by its hook's input
        replaced = seen
    if isinstance(replaced, tuple):  # TransformerLens lets a backward hook return (gradient,)
        (replaced,) = replaced
    if not isinstance(replaced, Tensor) or replaced.shape != seen.shape:
        got = (
            f"a tensor of {list(replaced.shape)}"
            if isinstance(replaced, Tensor)
            else shown(replaced)
        )
        raise ValueError(
            f"A hook at {point.name} got {list(seen.shape)} and returned {got}: return the whole "
            "tensor, or None."
        )
    if rows is None:
        return replaced
    whole = tensor.clone()
    whole[rows] = replaced
    return whole


def select(
    hooks: Iterable[AttachedHook],
    chosen: Callable[[Site], bool],
    sites: Callable[[], Iterable[Site]],
) -> Iterator[AttachedHook]:
    """The hooks whose site is `chosen`, in order; predicates are asked of `sites`."""
    for hook in hooks:
        if isinstance(hook.where, Site):
            if chosen(hook.where):
                yield hook
        else:
            yield from (
                replace(hook, where=site)
                for site in sites()
                if chosen(site) and hook.where(site.name)
            )


class Buckets:
    """Hooks by step, so that a step does not go over those of all steps."""

    def __init__(self, hooks: Iterable[AttachedHook]) -> None:
        self.by_step: dict[int | None, list[tuple[int, AttachedHook]]] = {}
        for order, hook in enumerate(hooks):
            step = hook.where.step if isinstance(hook.where, Site) else None
            self.by_step.setdefault(step, []).append((order, hook))

    def at(self, step: int, names: GenerationNames, extent: Extent) -> list[AttachedHook]:
        """Those that fire at a step, in the order in which they were attached.

        Predicates are asked of the step's names.
        """
        near = sorted(
            [*self.by_step.get(step, []), *self.by_step.get(None, [])], key=lambda each: each[0]
        )
        chosen = lambda site: site.step == step and extent.fires(site)  # noqa: E731
        return list(select((hook for _, hook in near), chosen, lambda: names.sites(steps=[step])))


@dataclass(frozen=True)
class Extent:
    """Tensors that a run computes.

    Those of its steps, and of the steps in which guidance runs a second branch.
    """

    solver: Solver
    uncond: frozenset[int]
    """Steps with an unconditional branch."""

    @classmethod
    def of(cls, solver: Solver, guided: bool) -> Extent:
        """The extent of a run whose steps are all guided, or none."""
        return cls(solver, frozenset(range(len(solver)) if guided else ()))

    @property
    def guided(self) -> bool:
        """True if some step has an unconditional branch."""
        return bool(self.uncond)

    def fires(self, site: Site) -> bool:
        """True if the run computes the tensor of a site."""
        guided = self.guided if site.step is None else site.step in self.uncond
        return site.fires(guided, self.solver.forms_x0)

    def why_silent(self, site: Site, steps: range, encodes: bool) -> str | None:
        """The reason why `steps` of the run do not compute the tensor of a site; None if they do.

        Args:
            site: a parsed hook name.
            steps: steps that are run.
            encodes: False for a fork, which keeps the text.
        """
        if site.part.endswith("text_encoder") and not encodes:
            return "a fork keeps the text as it was encoded; run the model again instead."
        if site.step is not None and site.step not in steps:
            return f"this run goes over steps {steps.start} to {steps.stop - 1}."
        if self.fires(site):
            return None
        if site.inner == "hook_x0":
            return f"{self.solver.name} forms no clean-image prediction that is known here."
        if site.step is None or not self.guided:
            return (
                "there is no unconditional branch in this run: guidance or a negative prompt makes "
                "one."
            )
        guides = ", ".join(map(str, sorted(self.uncond)))
        return (
            f"there is no unconditional branch at step {site.step} of this run, which guides at "
            f"{guides} alone."
        )
