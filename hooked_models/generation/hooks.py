"""Hooks of a whole generation, attached to the modules inside for just the step and the rows that
they are about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, SupportsIndex
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from ..arguments import shown
from ..hooks.module import HookedModule, HookFunction, as_hooks, has_hooks
from ..hooks.scopes import lookup, scope, scopes
from ..lazy_imports import RenamedAttribute
from .names import Branch, GenerationHookPoint, GenerationNames, Site
from .sampling import Solver, solver_of

Hooks = Iterable[tuple[str | Callable[[str], bool], HookFunction]]
OTHER_NAMES = {"transformer": "dit", "vae": "codec"}
"""Name of a component in diffusers → here."""
_CONTEXTS: ContextVar[WeakKeyDictionary[Any, dict[str, dict[str, Any]]] | None] = ContextVar(
    "contexts of hooks", default=None
)


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
    """Attach hooks inside the `module` of their part, each restricted to the `rows` of its branch,
    for the block.

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
    """Compose hooks; each receives the previous one's output (torch would hand every backward hook
    the first gradient).
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
    """`function` on some rows of a tensor, with `point` as its hook; works on activations and on
    gradients.
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
        """Those that fire at a step, in the order in which they were attached; predicates are asked
        of the step's names.
        """
        near = sorted(
            [*self.by_step.get(step, []), *self.by_step.get(None, [])], key=lambda each: each[0]
        )
        chosen = lambda site: site.step == step and extent.fires(site)  # noqa: E731
        return list(select((hook for _, hook in near), chosen, lambda: names.sites(steps=[step])))


@dataclass(frozen=True)
class Extent:
    """Tensors that a run computes: those of its steps, and of the steps in which guidance runs a
    second branch.
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


class HookedGeneration(HookedRootModule):
    """The side of `HookedTextToImage` that attaches hooks: by full name, and only where a run would
    reach them.
    """

    dit: Any
    scheduler: Any
    device: Any
    names: GenerationNames
    sampler_hooks: SamplerHooks

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[AttachedHook] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            dit = self.__dict__.get("_modules", {}).get("dit")
            there = OTHER_NAMES.get(name)
            if there is None and (
                dit is None or not (hasattr(type(dit), name) or name in vars(dit)["_modules"])
            ):
                raise
            kind = type(self).__name__
            raise AttributeError(
                f"{kind} has no {name}: see model.{there or f'dit.{name}'}."
            ) from None

    @property
    def attached(self) -> tuple[AttachedHook, ...]:
        """The hooks that a run made here has: those of the blocks that the caller is in, and those
        that were added for good.
        """
        return tuple(lookup(("attached", self), self._kept, list))

    def contexts(self) -> dict[str, dict[str, Any]]:
        """Name → the `ctx` that hooks of that name share in this thread, forward and backward,
        until it is cleared.
        """
        known = _CONTEXTS.get()
        if known is None:
            _CONTEXTS.set(known := WeakKeyDictionary())
        return known.setdefault(self, {})

    def _lists(self) -> Iterator[list[AttachedHook]]:
        """The lists of attached hooks that count here: of the scopes around, and of those added for
        good.
        """
        yield from [
            each.values["attached", self] for each in scopes() if ("attached", self) in each.values
        ]
        yield self._kept

    def _resolve(self, where: str | Callable[[str], bool]) -> Site | Callable[[str], bool]:
        return self.names.site(where) if isinstance(where, str) else where

    def active_hooks(
        self, chosen: Callable[[Site], bool], sites: Callable[[], Iterable[Site]]
    ) -> Iterator[AttachedHook]:
        """The attached hooks whose site is `chosen`, in the order of attachment; predicates are
        asked of `sites`.
        """
        return select(self.attached, chosen, sites)

    def active_hooks_of_run(self, extent: Extent) -> list[AttachedHook]:
        """Every attached hook, at every site of a whole generation."""
        return list(self.active_hooks(extent.fires, lambda: self.names.sites(len(extent.solver))))

    @property
    def has_hooks_inside(self) -> bool:
        """True if a hook was attached to a module inside, past the names of a generation."""
        modules = (self.dit, self.names.text_encoder, self.sampler_hooks)
        return any(
            has_hooks(point)
            for module in modules
            if module is not None
            for point in module.hook_dict.values()
        )

    def check_no_hooks(self, why: str) -> None:
        """Raise ValueError if anything is attached, here or to a module inside; `why` begins the
        message.
        """
        if self.attached or self.has_hooks_inside:
            raise ValueError(f"{why}, and hooks are attached to the model: reset_hooks() first.")

    refuse_hooks = RenamedAttribute("check_no_hooks")

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedGeneration]:
        """Attach hooks by full name (or by a predicate on full names) for the runs that this block
        makes, in this thread.

        `fn(tensor, hook)` gets the rows of its branch, [batch …], and `hook` has the full `name`,
        `step`, `branch` and `layer()`. It edits in place or returns the new value.

        A predicate is asked of the names that a run fires, at the steps and in the branches that it
        has.

        Raises:
            UnknownHookError: no such name; the nearest one is suggested.
            ValueError: the name is held back by a flag.
        """
        level = 1 + sum(each.owner is self for each in scopes())
        new = [
            AttachedHook(self._resolve(where), fn, "fwd", level=level)
            for where, fn in as_hooks(fwd_hooks)
        ]
        new += [
            AttachedHook(self._resolve(where), fn, "bwd", level=level)
            for where, fn in as_hooks(bwd_hooks)
        ]
        if not reset_hooks_end:
            for known in self._lists():
                known.extend(new)
            yield self
            return
        with scope(self) as inner:
            inner.values["attached", self] = [*self.attached, *new]
            try:
                yield self
            finally:
                if clear_contexts:
                    self.contexts().clear()

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Attach a hook until `reset_hooks()`, a permanent one until
        `reset_hooks(including_permanent=True)`.
        """
        ((where, function),) = as_hooks([(name, hook)])
        new = AttachedHook(self._resolve(where), function, dir, is_permanent, level)
        for known in self._lists():
            known.insert(0 if prepend else len(known), new)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks, here and in the models inside. Arguments as in TransformerLens."""

        def stays(hook: AttachedHook) -> bool:
            others = direction not in ("both", hook.direction) or (
                level is not None and hook.level != level
            )
            return others or (hook.is_permanent and not including_permanent)

        for known in self._lists():
            known[:] = filter(stays, known)
        if clear_contexts:
            self.contexts().clear()
        for module in (self.dit, self.names.text_encoder, self.sampler_hooks):
            if module is not None:
                module.reset_hooks(clear_contexts, direction, including_permanent, level)

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        **kwargs: Any,
    ) -> Float[Tensor, "batch 3 height width"]:
        """`forward` with hooks attached: `fwd_hooks=[("steps.0.cond.blocks.2.cross_attn.hook_z",
        fn)]`.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end):
            return self(*args, **kwargs)

    def solver(self, num_steps: SupportsIndex) -> Solver:
        """The scheduler prepared for runs of `num_steps`.

        Raises ValueError if it cannot draw (`sampling.solver_of`).
        """
        return solver_of(self.scheduler, num_steps, self.device)

    def count_steps(self, num_steps: SupportsIndex) -> int:
        """The steps of a run, which are evaluations of the denoiser: more than `num_steps` for
        solvers of higher order.

        Example:
            >>> HookedTextToImage.from_pretrained("rte-nano").count_steps(14)
            14
        """
        return len(self.solver(num_steps))

    def _names_of(self, extent: Extent, steps: range, encodes: bool) -> Iterator[str]:
        """Names that a run over `steps` fires."""
        for site in self.names.sites(steps=steps):
            if extent.fires(site) and (encodes or not site.part.endswith("text_encoder")):
                yield site.name

    def _check_made_for(self, num_steps: int) -> None:
        """Raise ValueError for a hook that was made for a run of other steps."""
        for attached in self.attached:
            if (made_for := getattr(attached.function, "num_steps", None)) not in (None, num_steps):
                raise ValueError(
                    f"{attached.function!r} was made for a run of {made_for} steps, and this one "
                    f"has {num_steps}: Intervention.hooks(…, num_steps={num_steps})."
                )

    def check_hooks(self, extent: Extent, part: range | None = None) -> None:
        """Raise ValueError for hooks that a run, or `part` of its steps after the text has been
        encoded, would never reach.
        """
        steps = range(len(extent.solver)) if part is None else part
        for where in [
            attached.where for attached in self.attached if not isinstance(attached.where, Site)
        ]:
            if not any(map(where, self._names_of(extent, steps, encodes=part is None))):
                raise ValueError(
                    f"A predicate ({where!r}) selects no hook: this run goes over steps "
                    f"{steps.start} to {steps.stop - 1}, with "
                    f"names such as {next(iter(self.names))!r}."
                )
        self._check_made_for(extent.solver.num_steps)
        for site in {
            attached.where for attached in self.attached if isinstance(attached.where, Site)
        }:
            # raises if its flag has been switched off since it was attached
            self.names.site(site.name)
            if (reason := extent.why_silent(site, steps, encodes=part is None)) is not None:
                raise ValueError(f"{site.name} does not fire: {reason}")
