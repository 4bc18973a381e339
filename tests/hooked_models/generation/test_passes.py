"""One pass of a loop: hooks and gradients of its calls."""

from __future__ import annotations

import torch

from hooked_models import HookedTextToImage

from ..pipelines import PROMPTS, noise, tiny_pipeline


def every_name(model: HookedTextToImage, steps: int) -> list[str]:
    return [site.name for site in model.names.select(branch="both", num_steps=steps)]


def test_every_hooks_return_value_changes_what_follows():
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    model.dit.set_use_attn_result(True)
    model.dit.set_use_split_qkv_input(True)
    base = model.trajectory(PROMPTS, num_steps=2, seed=1)

    # the last step's latents, unclamped: a decoded image may saturate
    def outcome(name: str) -> torch.Tensor:
        def bump(tensor, hook):
            assert hook.name == name
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
            return tensor + 0.5 * noise.to(tensor)

        if name.startswith("steps.1."):  # a fork is a full rerun (tested below), at half the price
            return base.fork(1, [(name, bump)]).latents[-1]
        with model.hooks([(name, bump)]):
            run = model.trajectory(PROMPTS, num_steps=2, seed=1)
            return run.images if name == "hook_image" else run.latents[-1]

    def changes(name: str) -> bool:
        before = base.images if name == "hook_image" else base.latents[-1]
        # an attached hook alone may change the last bits
        return bool((outcome(name) - before).abs().max() > 1e-5)

    # of the first step one layer, and what stands around the layers; of the last one everything
    names = [
        name
        for name in every_name(model, 2)
        if not name.startswith("steps.0.") or "blocks.1." not in name
    ]
    unchanged = [name for name in names if not changes(name)]
    # The empty prompt is EOS alone: with one key, attention has nothing to choose, whatever queries
    # and keys are.
    idle = ("q", "k", "q_input", "k_input", "attn_scores")
    assert set(unchanged) == {
        f"steps.{s}.uncond.blocks.{layer}.cross_attn.hook_{x}"
        for s, layer in ((0, 0), (1, 0), (1, 1))
        for x in idle
    }


def test_hooks_act_at_their_step_and_on_their_branch_only(model):
    seen = {}

    def look(tensor, hook):
        seen[hook.name] = (tensor.shape[0], hook.step, hook.branch, hook.layer())

    names = ["steps.3.cond.blocks.1.cross_attn.hook_z", "steps.5.uncond.blocks.0.attn.hook_q"]
    model.run_with_hooks(PROMPTS, fwd_hooks=[(name, look) for name in names])
    assert seen == {names[0]: (2, 3, "cond", 1), names[1]: (2, 5, "uncond", 0)}

    clean = model.run_with_cache(
        PROMPTS, seed=0, branch="both", names_filter=lambda n: n.endswith("hook_resid_post")
    )[1]

    def zero(tensor, hook):
        tensor[:] = 0  # in place: must reach the model through the view of the branch's rows

    with model.hooks([("steps.3.cond.blocks.0.hook_cross_attn_out", zero)]):
        patched = model.run_with_cache(
            PROMPTS, seed=0, branch="both", names_filter=lambda n: n.endswith("hook_resid_post")
        )[1]
    for name in clean:
        step, branch = int(name.split(".")[1]), name.split(".")[2]
        should_differ = step > 3 or (step == 3 and branch == "cond")
        assert torch.equal(clean[name], patched[name]) != should_differ, name


def test_gradients_reach_the_noise_and_backward_hooks_see_their_rows(model):
    latents = noise().requires_grad_()
    seen = {}
    with torch.enable_grad():
        out = model.run_with_hooks(
            PROMPTS,
            latents=latents,
            num_steps=3,
            bwd_hooks=[
                (
                    "steps.1.cond.blocks.0.hook_resid_post",
                    lambda grad, hook: seen.update({hook.name: grad.shape}),
                )
            ],
        )
        out.sum().backward()
    assert latents.grad.abs().max() > 0
    assert seen == {"steps.1.cond.blocks.0.hook_resid_post": (2, 4, 16)}


def test_a_backward_hooks_return_value_replaces_the_gradient_of_its_branch(model):
    def gradient(hooks):
        latents = noise().requires_grad_()
        with torch.enable_grad(), model.hooks(bwd_hooks=hooks):
            model.trajectory(PROMPTS, latents=latents, num_steps=1).latents[
                -1
            ].square().sum().backward()
        return latents.grad

    names = [f"steps.0.{branch}.hook_embed" for branch in ("cond", "uncond")]
    stop = [(name, lambda grad, hook: torch.zeros_like(grad)) for name in names]
    assert gradient([]).abs().max() > 0
    # all paths from the noise go through the patches of the two branches
    assert gradient(stop).abs().max() == 0
    assert not torch.equal(gradient(stop[:1]), gradient([]))
