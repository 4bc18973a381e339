"""Hook names are strict: flags, aliases, predicates and the nearest name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_models.hooks.errors import UnknownHookError
from hooked_models.pixart.dit import HookedDiT

from ..tiny import GATED, NAMES, look, set_flags, ways


def attach(dit: HookedDiT, how: str, name: str, inputs: dict[str, Any]) -> None:
    if how == "hooks":
        with dit.hooks([(name, look)]):
            pass
    elif how == "bwd_hooks":
        with dit.hooks(bwd_hooks=[(name, look)]):
            pass
    elif how == "run_with_hooks":
        dit.run_with_hooks(**inputs, fwd_hooks=[(name, look)])
    elif how == "add_hook":
        dit.add_hook(name, look)
    elif how == "add_perma_hook":
        dit.add_perma_hook(name, look)
    elif how == "add_caching_hooks":
        dit.add_caching_hooks(name)
    elif how == "run_with_cache":
        dit.run_with_cache(**inputs, names_filter=name)
    else:
        dit.run_with_cache(
            **inputs, names_filter={"tuple": (name,), "list": [name], "set": {name}}[how]
        )


def test_a_flag_stays_on_while_a_hook_needs_it(full: HookedDiT) -> None:
    with (
        full.hooks([("blocks.0.hook_cross_result", look)]),
        pytest.raises(ValueError, match="would silently stop firing"),
    ):
        full.set_use_attn_result(False)
    with (
        full.hooks(bwd_hooks=[("blocks.0.hook_mlp_in", look)]),
        pytest.raises(ValueError, match="would silently stop firing"),
    ):
        full.set_use_hook_mlp_in(False)
    set_flags(full)


@ways
@pytest.mark.parametrize(
    ("name", "setter"),
    [
        ("blocks.0.attn.hook_result", "set_use_attn_result"),
        ("blocks.1.hook_cross_result", "set_use_attn_result"),
        ("blocks.1.cross_attn.hook_q_input", "set_use_split_qkv_input"),
        ("blocks.1.hook_cross_attn_in", "set_use_attn_in"),
        ("blocks.0.hook_mlp_in", "set_use_hook_mlp_in"),
    ],
)
def test_a_gated_name_is_refused_until_its_flag_is_set(
    how: str, name: str, setter: str, dit: HookedDiT, inputs: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=rf"cfg\.{setter[4:]} is False: call {setter}\(True\)"):
        attach(dit, how, name, inputs)
    assert not any(point.has_hooks() for point in dit.hook_points())
    getattr(dit, setter)(True)
    attach(dit, how, name, inputs)


@ways
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocks.1.attn.hook_pattren", "blocks.1.attn.hook_pattern"),
        ("blocks.7.cross_attn.hook_z", "blocks.1.cross_attn.hook_z"),
        ("blocks.0.hook_cros_v", "blocks.0.hook_cross_v"),
        ("blocks.0.attn", "blocks.0.attn.hook_v"),
    ],
)
def test_a_misspelt_name_is_an_error_that_suggests_the_nearest(
    how: str, name: str, nearest: str, dit: HookedDiT, inputs: dict[str, Any]
) -> None:
    with pytest.raises(UnknownHookError) as caught:
        attach(dit, how, name, inputs)
    message = str(caught.value)
    assert message.startswith(f"no hook is called '{name}'; did you mean 'blocks.")
    # those have several names as near
    if name != "blocks.0.attn" and not name.startswith("blocks.7"):
        assert message.endswith(f"'{nearest}'?")
    assert not any(point.has_hooks() for point in dit.hook_points())


@pytest.mark.parametrize(
    ("alias", "name"),
    [(f"hook_cross_{x}", f"cross_attn.hook_{x}") for x in ("q", "k", "v", "z", "pattern", "result")]
    + [("hook_resid_mid2", "hook_resid_mid_cross")],
)
def test_aliases(alias: str, name: str, full: HookedDiT, inputs: dict[str, Any]) -> None:
    alias, name = f"blocks.1.{alias}", f"blocks.1.{name}"
    assert alias not in full.hook_dict
    assert full.mod_dict[alias] is full.hook_dict[name]
    assert full.canonical_name(alias) == name
    seen: list[str] = []
    edited = full.run_with_hooks(
        **inputs, fwd_hooks=[(alias, lambda tensor, hook: seen.append(hook.name) or tensor * 2)]
    )
    assert seen == [name]
    assert not torch.allclose(edited.sample, full(**inputs).sample, atol=1e-3)
    assert set(full.run_with_cache(**inputs, names_filter=alias)[1]) == {name}


def test_predicates_pass_over_gated_names_unless_there_is_nothing_else(
    dit: HookedDiT, inputs: dict[str, Any]
) -> None:
    seen: list[str] = []
    dit.run_with_hooks(
        **inputs, fwd_hooks=[(lambda name: True, lambda tensor, hook: seen.append(hook.name))]
    )
    assert sorted(seen) == sorted(set(NAMES) - set(GATED))
    for attach_predicate in (
        dit.add_hook,
        lambda where, hook: dit.run_with_hooks(**inputs, fwd_hooks=[(where, hook)]),
    ):
        with pytest.raises(ValueError, match=r"set_use_attn_result\(True\)"):
            attach_predicate(lambda name: name.endswith("hook_result"), look)
