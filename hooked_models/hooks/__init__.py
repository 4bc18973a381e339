"""Hooks: modules with strict hook names, the table of all hooks, and their scopes."""

from __future__ import annotations

from ..lazy_imports import renamed
from .errors import NotFoldedError, UnknownHookError, unknown_hook
from .module import HookedModule, HookFunction, LanguageToolGuard, NameFilter, has_hooks

__getattr__ = renamed(__name__, {"NoLanguageModel": "hooked_models.hooks:LanguageToolGuard"})

__all__ = [
    "HookFunction",
    "HookedModule",
    "LanguageToolGuard",
    "NameFilter",
    "NotFoldedError",
    "UnknownHookError",
    "has_hooks",
    "unknown_hook",
]
