"""State that belongs to a block of code in one thread.

Hooks, flags and observers of the run that it makes. A `with model.hooks(…)` block opens a scope.
Hooks attached in it are found from inside the block alone: another thread that runs the same model
at the same time finds its own. A hook function is called in a scope apart, so that a run it makes
has only the hooks that it is given itself. A thread starts without scopes;
`contextvars.copy_context().run` takes those of its parent along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Key = Any


class Scope:
    """The state of a block, by owner and name; missing values are its parent's."""

    __slots__ = ("apart", "owner", "parent", "values")

    def __init__(self, parent: Scope | None, owner: object = None, apart: bool = False) -> None:
        self.parent, self.owner, self.apart = parent, owner, apart
        self.values: dict[Key, Any] = {}


_INNERMOST: ContextVar[Scope | None] = ContextVar("innermost scope", default=None)


@contextmanager
def scope(owner: object = None) -> Iterator[Scope]:
    """A scope inside the current one, for the time of the block.

    Example:
        >>> with scope() as inner:
        ...     inner.values["x"] = 1
        ...     lookup("x", 0)
        1
        >>> lookup("x", 0)
        0
    """
    token = _INNERMOST.set(found := Scope(_INNERMOST.get(), owner))
    try:
        yield found
    finally:
        _INNERMOST.reset(token)


def call_apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a scope without the state of those around it."""
    token = _INNERMOST.set(Scope(None, apart=True))
    try:
        return function(*args, **kwargs)
    finally:
        _INNERMOST.reset(token)


def scopes() -> Iterator[Scope]:
    """The current scope and those around it, innermost first."""
    current = _INNERMOST.get()
    while current is not None:
        yield current
        current = current.parent


def lookup(key: Key, base: Any, apart: Callable[[], Any] | None = None) -> Any:
    """The innermost value of a key, else `base`.

    In a scope apart, the result of `apart()` (made once) stands in its place.
    """
    current = _INNERMOST.get()
    while current is not None:
        if key in current.values:
            return current.values[key]
        if current.apart and apart is not None:
            current.values[key] = apart()
            return current.values[key]
        current = current.parent
    return base


class Scoped:
    """A class attribute whose value on an instance can be overridden in a scope.

    `scope.values[id(instance), name] = value`.
    """

    def __init__(self, default: Any) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self.default
        return lookup((id(instance), self.name), vars(instance).get(self.name, self.default))

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self.name] = value
