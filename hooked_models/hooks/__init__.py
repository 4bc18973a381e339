"""Hooks: modules with strict hook names, the table of all hooks, and their scopes."""

from __future__ import annotations

from .module import (
    HookedModule,
    HookFunction,
    NameFilter,
    NoLanguageModel,
    NotFoldedError,
    UnknownHookError,
    has_hooks,
    unknown_hook,
)

__all__ = [
    "HookFunction",
    "HookedModule",
    "NameFilter",
    "NoLanguageModel",
    "NotFoldedError",
    "UnknownHookError",
    "has_hooks",
    "unknown_hook",
]
