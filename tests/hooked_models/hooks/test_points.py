"""Hook points have TransformerLens' contexts and levels, in every thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from hooked_models.hooks.points import ScopedHookPoint

from ..pipelines import PROMPTS
from .zeroed import PATTERN, STEPS, Z, zero


def test_an_added_hook_acts_in_all_threads_and_in_open_blocks(model):
    with torch.no_grad():
        plain = model(PROMPTS, num_steps=STEPS)
        with model.hooks([(PATTERN, lambda tensor, hook: None)]):
            model.add_hook(Z, zero)
            assert not torch.allclose(model(PROMPTS, num_steps=STEPS), plain)
        changed = model(PROMPTS, num_steps=STEPS)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(
                pool.submit(lambda: model(PROMPTS, num_steps=STEPS).detach()).result(), changed
            )
        assert not torch.allclose(changed, plain)
        model.reset_hooks()
        assert torch.equal(model(PROMPTS, num_steps=STEPS), plain)


def test_hooks_of_a_name_share_a_context(model):
    seen = []
    hooks = {
        "fwd_hooks": [(Z, lambda tensor, hook: hook.ctx.update(mean=tensor.mean().item()))],
        "bwd_hooks": [(Z, lambda gradient, hook: seen.append(hook.ctx["mean"]))],
    }
    with model.hooks(**hooks):
        model(PROMPTS, num_steps=STEPS).sum().backward()
    assert len(seen) == 1
    later = []
    model.run_with_hooks(
        PROMPTS, num_steps=STEPS, fwd_hooks=[(Z, lambda tensor, hook: later.append(dict(hook.ctx)))]
    )
    assert later == [{"mean": seen[0]}]
    model.reset_hooks()  # clears contexts, as in TransformerLens
    model.run_with_hooks(
        PROMPTS, num_steps=STEPS, fwd_hooks=[(Z, lambda tensor, hook: later.append(dict(hook.ctx)))]
    )
    assert later[1] == {}


def test_levels_are_those_of_transformer_lens(model):
    calls = []

    def named(name: str) -> Any:
        return lambda tensor, hook: calls.append(name)

    for owner, where in ((model, Z), (model.dit, Z.split(".", 3)[3])):
        calls.clear()
        owner.add_hook(where, named("zero"), level=0)
        owner.add_hook(where, named("one"), level=1)
        owner.add_hook(where, named("none"))
        owner.reset_hooks(level=0)
        model(PROMPTS, num_steps=1, guidance=1.0)
        assert calls == ["one", "none"]
        owner.reset_hooks()
        with owner.hooks([(where, named("block"))]):
            owner.reset_hooks(level=1)
            model(PROMPTS, num_steps=1, guidance=1.0)
        assert calls == ["one", "none"]


@pytest.mark.parametrize("kind", ["forward", "forward pre", "backward", "backward pre", "global"])
def test_every_hook_of_torch_is_called(kind: str) -> None:
    """A point without hooks does nothing, not even torch's call of a module; one with any does."""
    point, called = ScopedHookPoint(), []

    def hook(*args: object) -> None:
        called.append(kind)

    attach = {
        "forward": point.register_forward_hook,
        "forward pre": point.register_forward_pre_hook,
        "backward": point.register_full_backward_hook,
        "backward pre": point.register_full_backward_pre_hook,
        "global": torch.nn.modules.module.register_module_forward_hook,
    }[kind]
    x = torch.zeros(2, requires_grad=True)
    assert point(x) is x
    handle = attach(hook)
    point(x).sum().backward()
    assert called == [kind]
    handle.remove()
    assert point(x) is x
    assert called == [kind]
