"""Hooks of a whole generation: they fire where they say, for any number of steps, or are
refused.
"""

from __future__ import annotations

import pytest
import torch

from dit_lens import Intervention
from dit_lens.intervene.edits import Replace
from hooked_models import GenerationCache

from ..pipelines import PROMPTS

Z = "blocks.1.cross_attn.hook_z"


def is_z(name: str) -> bool:
    return name.endswith("cross_attn.hook_z")


def zero(z: torch.Tensor, hook: object) -> torch.Tensor:
    return z * 0


@pytest.mark.parametrize(("num_steps", "guidance"), [(3, 4.5), (20, 4.5), (3, 1.0)])
def test_a_predicate_is_asked_of_the_runs_own_names(model, num_steps, guidance):
    seen = []
    model.run_with_hooks(
        PROMPTS,
        num_steps=num_steps,
        guidance=guidance,
        fwd_hooks=[(is_z, lambda z, hook: seen.append(hook.name))],
    )
    branches = ("uncond", "cond") if guidance > 1 else ("cond",)
    layers = range(model.cfg.n_layers)
    expected = [
        f"steps.{s}.{b}.blocks.{n}.cross_attn.hook_z"
        for s in range(num_steps)
        for n in layers
        for b in branches
    ]
    assert sorted(seen) == sorted(expected)
    run = model.trajectory(PROMPTS, num_steps=num_steps, guidance=guidance)
    seen.clear()
    run.fork(num_steps - 1, [(is_z, lambda z, hook: seen.append(hook.name))])
    assert sorted(seen) == sorted(
        name for name in expected if name.startswith(f"steps.{num_steps - 1}.")
    )


def test_a_predicate_may_be_about_the_text_encoder_and_the_image(model):
    seen = []
    hook = (
        lambda name: name.startswith("text_encoder") or name == "hook_image",
        lambda x, hook: seen.append(hook.name),
    )
    model.run_with_hooks(PROMPTS, num_steps=1, fwd_hooks=[hook])
    encoder = [f"text_encoder.{name}" for name in model.text_encoder.names(None)]
    assert sorted(seen) == sorted([*encoder, "hook_image"])
    assert encoder
    run = model.trajectory(PROMPTS, num_steps=2)
    # a fork keeps the text as it was encoded
    with pytest.raises(ValueError, match="selects no hook"):
        run.fork(1, [(lambda name: name.startswith("text_encoder"), zero)])


def test_a_predicate_that_selects_nothing_is_refused(model):
    with pytest.raises(ValueError, match="selects no hook: this run goes over steps 0 to 1"):
        model.run_with_hooks(
            PROMPTS, num_steps=2, fwd_hooks=[(lambda name: name.endswith("crossattn.hook_z"), zero)]
        )
    with pytest.raises(ValueError, match="selects no hook"):
        model.dit.add_hook(lambda name: name.endswith("crossattn.hook_z"), zero)


def test_an_edit_of_all_steps_is_of_a_run_of_as_many(model):
    for steps in (None, slice(1, None)):
        hooks = Intervention(Z, steps=steps).hooks(model, PROMPTS)
        with pytest.raises(
            ValueError, match=r"made for a run of 14 steps, and this one has 20: .*num_steps=20"
        ):
            model.run_with_hooks(PROMPTS, num_steps=20, fwd_hooks=hooks)
    model.run_with_hooks(
        PROMPTS, num_steps=3, fwd_hooks=Intervention(Z).hooks(model, PROMPTS, num_steps=3)
    )
    # a step is a step
    model.run_with_hooks(
        PROMPTS, num_steps=3, fwd_hooks=Intervention(Z, steps=1).hooks(model, PROMPTS)
    )


def test_names_are_no_modules_to_attach_to(model):
    point = model.hook_dict[f"steps.0.cond.{Z}"]
    with pytest.raises(TypeError, match=r"model\.add_hook\('steps\.0\.cond\.blocks"):
        point.add_hook(zero)
    with pytest.raises(TypeError, match="run_with_hooks"):
        model.add_caching_hooks(is_z)


def test_permanent_hooks_stay(model):
    plain = model(PROMPTS, num_steps=1)
    model.add_perma_hook(f"steps.0.cond.{Z}", zero)
    changed = model(PROMPTS, num_steps=1)
    model.reset_hooks()
    assert torch.equal(model(PROMPTS, num_steps=1), changed)
    assert not torch.equal(changed, plain)
    model.reset_hooks(direction="bwd", including_permanent=True)
    assert torch.equal(model(PROMPTS, num_steps=1), changed)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(PROMPTS, num_steps=1), plain)


def test_a_folder_takes_no_hooks_that_it_cannot_tell_of(model, tmp_path):
    model.run_with_cache(PROMPTS, num_steps=1, names_filter=Z, out=tmp_path)
    model.dit.add_hook(Z, zero)
    with pytest.raises(ValueError, match="hooks inside the denoiser"):
        model.run_with_cache(PROMPTS, num_steps=1, names_filter=Z, out=tmp_path)
    model.reset_hooks()
    with model.hooks([(is_z, zero)]), pytest.raises(ValueError, match="hooks"):
        model.run_with_cache(PROMPTS, num_steps=1, names_filter=Z, out=tmp_path)


def test_layers_that_are_not_there(model):
    _, cache = model.run_with_cache(PROMPTS, num_steps=1)
    last = model.cfg.n_layers - 1
    assert torch.equal(cache["z", -1, "cross_attn", 0], cache["z", last, "cross_attn", 0])
    for layer in (last + 1, -last - 2):
        with pytest.raises(KeyError, match=f"no layer {layer}"):
            cache["z", layer, "cross_attn", 0]
        with pytest.raises(KeyError, match=f"no layer {layer}"):
            cache.at(0)["z", layer]
        with pytest.raises(KeyError, match=f"no layer {layer}"):
            cache.stack("z", layer, "cross_attn")
    with pytest.raises(KeyError, match=r"hook_pattern"):
        cache["patern", 1, "cross_attn", 0]


def test_a_cache_of_a_generation_keeps_its_kind(model):
    _, cache = model.run_with_cache(PROMPTS, num_steps=1)
    part = cache.apply_slice_to_batch_dim(slice(0, 1))
    assert isinstance(part, GenerationCache)
    assert torch.equal(part["z", 1, "cross_attn", 0], cache["z", 1, "cross_attn", 0][:1])
    assert torch.equal(part["steps.0.eps"], cache["steps.0.eps"][:1])
    with pytest.raises(TypeError, match=r"slice\(0, 1\)"):
        cache.apply_slice_to_batch_dim(0)
    with pytest.raises(TypeError, match=r"cache\.at\(step=s\)"):
        cache.remove_batch_dim()


def test_a_cache_of_some_heads_replaces_no_others(model):
    _, cache = model.run_with_cache(PROMPTS, num_steps=1, names_filter=Z, heads="L1H1")
    with pytest.raises(ValueError, match=r"1 of the \d heads"):
        Intervention(Z, heads=[0], steps=0, action=Replace(cache)).hooks(
            model, PROMPTS, num_steps=1
        )


def test_steps_that_a_full_name_contradicts(model):
    with pytest.raises(ValueError, match="outside of the steps"):
        model.run_with_cache(PROMPTS, num_steps=3, names_filter=f"steps.0.cond.{Z}", steps=2)


def test_a_run_has_at_least_a_step(model):
    with pytest.raises(ValueError, match="num_steps=0: give an integer of at least 1"):
        model(PROMPTS, num_steps=0)


def test_what_a_cell_ends_with_is_short(model):
    run = model.trajectory(PROMPTS, num_steps=2)
    assert repr(run) == "Trajectory(2 prompts, before steps 0 to 2 of 2)"
