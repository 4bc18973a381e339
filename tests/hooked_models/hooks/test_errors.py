"""Errors of hook names read as sentences."""

from __future__ import annotations

from hooked_models.hooks.errors import UnknownHookError, unknown_hook


def test_the_nearest_name_is_suggested_and_the_message_is_no_repr():
    error = unknown_hook("hook_rezid_pre", ["hook_resid_pre", "hook_z"])
    assert isinstance(error, UnknownHookError)
    assert str(error) == "no hook is called 'hook_rezid_pre'; did you mean 'hook_resid_pre'?"
    assert str(unknown_hook("hook_z", [])) == "no hook is called 'hook_z'"
