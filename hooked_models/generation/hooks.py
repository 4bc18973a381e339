"""The side of a hooked model that takes hooks of a whole generation, by full name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, SupportsIndex
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedRootModule

from ..hooks.module import HookFunction, as_hooks, has_hooks
from ..hooks.scopes import lookup, scope, scopes
from ..lazy_imports import RenamedAttribute, renamed
from .attached import AttachedHook, Extent, SamplerHooks, select
from .names import GenerationNames, Site
from .sampling import Solver, solver_of

__getattr__ = renamed(
    __name__,
    {
        "Buckets": "hooked_models.generation.attached:Buckets",
        "attach": "hooked_models.generation.attached:attach",
        "chain_hooks": "hooked_models.generation.attached:chain_hooks",
        "restrict_to_rows": "hooked_models.generation.attached:restrict_to_rows",
    },
)

Hooks = Iterable[tuple[str | Callable[[str], bool], HookFunction]]
OTHER_NAMES = {"transformer": "dit", "vae": "codec"}
"""Name of a component in diffusers → here."""
_CONTEXTS: ContextVar[WeakKeyDictionary[Any, dict[str, dict[str, Any]]] | None] = ContextVar(
    "contexts of hooks", default=None
)


class HookedGeneration(HookedRootModule):
    """The side of `HookedTextToImage` that attaches hooks by full name.

    Only where a run would reach them.
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
        """The hooks that a run made here has.

        Those of the blocks that the caller is in, and those that were added for good.
        """
        return tuple(lookup(("attached", self), self._kept, list))

    def contexts(self) -> dict[str, dict[str, Any]]:
        """Name → the `ctx` that hooks of that name share in this thread, until it is cleared.

        Forward and backward hooks share it.
        """
        known = _CONTEXTS.get()
        if known is None:
            _CONTEXTS.set(known := WeakKeyDictionary())
        return known.setdefault(self, {})

    def _lists(self) -> Iterator[list[AttachedHook]]:
        """The lists of attached hooks of the scopes around, and of those added for good."""
        yield from [
            each.values["attached", self] for each in scopes() if ("attached", self) in each.values
        ]
        yield self._kept

    def _resolve(self, where: str | Callable[[str], bool]) -> Site | Callable[[str], bool]:
        return self.names.site(where) if isinstance(where, str) else where

    def active_hooks(
        self, chosen: Callable[[Site], bool], sites: Callable[[], Iterable[Site]]
    ) -> Iterator[AttachedHook]:
        """The attached hooks whose site is `chosen`, in the order of attachment.

        Predicates are asked of `sites`.
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
        """Raise ValueError if anything is attached, here or to a module inside.

        `why` begins the message.
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
        """Attach hooks for the runs that this block makes, in this thread.

        Names are full names, or predicates on them. `fn(tensor, hook)` gets the rows of its branch,
        [batch …], and `hook` has the full `name`, `step`, `branch` and `layer()`. It edits in place
        or returns the new value.

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
        """Attach a hook until `reset_hooks()`.

        A permanent one until `reset_hooks(including_permanent=True)`.
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
        """`forward` with hooks attached.

        `fwd_hooks=[("steps.0.cond.blocks.2.cross_attn.hook_z", fn)]`.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end):
            return self(*args, **kwargs)

    def solver(self, num_steps: SupportsIndex) -> Solver:
        """The scheduler prepared for runs of `num_steps`.

        Raises ValueError if it cannot draw (`sampling.solver_of`).
        """
        return solver_of(self.scheduler, num_steps, self.device)

    def count_steps(self, num_steps: SupportsIndex) -> int:
        """The steps of a run, which are evaluations of the denoiser.

        More than `num_steps` for solvers of higher order.

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
        """Raise ValueError for hooks that a run would never reach.

        `part`: its steps after the text has been encoded.
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
