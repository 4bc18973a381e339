"""Errors of hook names, and of models that are not folded."""

from __future__ import annotations

import difflib
from collections.abc import Collection


class UnknownHookError(KeyError):
    """No hook has this name; the message suggests the nearest one.

    Example:
        >>> HookedTextToImage.from_pretrained("rte-nano").dit.add_hook("blocks.0.atn.hook_z", print)
        Traceback (most recent call last):
        ...
        hooked_models.hooks.errors.UnknownHookError: no hook is called 'blocks.0.atn.hook_z'; ...
    """

    def __str__(self) -> str:  # KeyError would print the repr of the sentence
        return str(self.args[0])


class NotFoldedError(ValueError):
    """The request is exact only on a model whose timestep is folded into its weights.

    Example:
        >>> HookedTextToImage.from_pretrained("rte-nano").dit.W_U
        Traceback (most recent call last):
        ...
        hooked_models.hooks.errors.NotFoldedError: W_U ignores the timestep's shift, scale ...
    """


def unknown_hook(name: str, known: Collection[str]) -> UnknownHookError:
    """The error for a name that is not among ``known``."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return UnknownHookError(
        f"no hook is called {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "")
    )
