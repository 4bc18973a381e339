"""Hooks: modules with strict hook names, the table of every hook, and the scopes that hooks live
in.
"""

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
