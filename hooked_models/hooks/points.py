"""TransformerLens' HookPoint, whose hooks belong to the block and thread that attached them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformer_lens.hook_points import HookPoint, LensHandle

from .scopes import Scope, call_apart, lookup, scopes

STATE = ("fwd_hooks", "bwd_hooks", "_forward_hooks", "_backward_hooks")
_PINNED: ContextVar[tuple[Any, dict[str, Any]] | None] = ContextVar(
    "the state that is written to", default=None
)


def _empty() -> dict[str, Any]:
    return {
        "fwd_hooks": [],
        "bwd_hooks": [],
        "_forward_hooks": OrderedDict(),
        "_backward_hooks": OrderedDict(),
    }


class _InScope:
    """One attribute of a point's state."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, point: Any, owner: type | None = None) -> Any:
        return self if point is None else point.hook_state()[self.name]

    def __set__(self, point: Any, value: Any) -> None:
        point.hook_state()[self.name] = value


class ScopedHookPoint(HookPoint):
    """A HookPoint that finds the hooks of the current scope, and those that were attached for good.

    A hook function is called in a scope apart (`scopes.call_apart`). A backward hook makes the
    tensor require a gradient where nothing before it does, so that it fires in models whose weights
    are frozen.
    """

    fwd_hooks = _InScope("fwd_hooks")
    bwd_hooks = _InScope("bwd_hooks")
    _forward_hooks = _InScope("_forward_hooks")
    _backward_hooks = _InScope("_backward_hooks")

    def hook_state(self) -> dict[str, Any]:
        """The lists and dictionaries of hooks that count here."""
        pinned = _PINNED.get()
        if pinned is not None and pinned[0] is self:
            return pinned[1]
        return lookup(self, self.__dict__, _empty)

    def attach_in(
        self, scope: Scope, hook: Callable[..., Any], dir: Any = "fwd", level: int | None = None
    ) -> None:
        """Attach a hook for as long as a scope lasts."""
        if self not in scope.values:
            here = self.hook_state()
            scope.values[self] = {name: here[name].copy() for name in STATE}
        self._on(scope.values[self], HookPoint.add_hook, hook, dir, False, level)

    def add_hook(
        self, hook: Callable[..., Any], dir: Any = "fwd", *args: Any, **kwargs: Any
    ) -> LensHandle:
        """As in TransformerLens: until it is removed, and in all threads."""
        handles = [
            self._on(state, HookPoint.add_hook, hook, dir, *args, **kwargs)
            for state in self._states()
        ]
        return handles[-1]

    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens."""
        for state in self._states():
            self._on(state, HookPoint.remove_hooks, *args, **kwargs)

    def _states(self) -> Iterator[dict[str, Any]]:
        """Values of every scope around that has one, and the point's own."""
        yield from [scope.values[self] for scope in scopes() if self in scope.values]
        yield self.__dict__

    def _on(
        self, state: dict[str, Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        token = _PINNED.set((self, state))
        try:
            if function is HookPoint.add_hook:
                handle = function(self, _apart(args[0]), *args[1:], **kwargs)
                handle.user_hook = args[0]
                return handle
            return function(self, *args, **kwargs)
        finally:
            _PINNED.reset(token)

    def __call__(self, x: Tensor) -> Tensor:
        """Pass the tensor through the hooks in scope; at once where there are none."""
        state = self.hook_state()
        if not (
            state["fwd_hooks"]
            or state["bwd_hooks"]
            or state["_forward_hooks"]
            or state["_backward_hooks"]
            or self._forward_pre_hooks
            or self._backward_pre_hooks
            or "forward" in self.__dict__
            or _has_any_global_hook()
        ):
            return x  # as torch would, which reads the state five times more
        if (
            torch.is_grad_enabled()
            and not x.requires_grad
            and state["bwd_hooks"]
            and x.is_floating_point()
        ):
            x = x.detach().requires_grad_().clone()  # no leaf, into which a hook could not write
        return super().__call__(x)


def _apart(hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook, assigned=("__doc__",), updated=())
    def called(tensor: Tensor, hook: HookPoint, function: Callable[..., Any] = hook) -> Any:
        return call_apart(function, tensor, hook=hook)

    return called
