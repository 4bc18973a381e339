"""`HookedTextToImage` against `PixArtSigmaPipeline.__call__`, and its own promises: names, forks,
caches, refusals.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from transformer_lens import ActivationCache

from hooked_models import CacheTooLargeError, HookedTextToImage, UnknownHookError
from hooked_models.generation.cache import estimate

from ..pipelines import CALL, PROMPTS, tiny_pipeline

SCHEDULERS = {
    "flow": DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True),
    "epsilon": DPMSolverMultistepScheduler(),
    "third order": DPMSolverMultistepScheduler(solver_order=3),
    "unipc": UniPCMultistepScheduler(),
    "ddim": DDIMScheduler(),
    "euler": EulerDiscreteScheduler(),
}


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline())


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def noise(seed: int = 3, batch: int = 2, grid: int = 4) -> torch.Tensor:
    return torch.randn(batch, 4, grid, grid, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize(
    ("text", "learned_sigma", "guidance"),
    [("rte", False, 4.5), ("rte-nopos", False, 1.0), ("t5", True, 4.5), ("t5", False, 4.5)],
)
def test_images_equal_the_pipelines(text, dtype, tolerance, guidance, learned_sigma):
    scheduler = SCHEDULERS["epsilon" if learned_sigma else "flow"]
    pipe = tiny_pipeline(text, learned_sigma, dtype, scheduler)
    reference = pipe(
        list(PROMPTS),
        latents=noise().to(dtype),
        guidance_scale=guidance,
        num_inference_steps=14,
        **CALL,
    ).images
    images = HookedTextToImage.from_pipeline(pipe)(PROMPTS, latents=noise(), guidance=guidance)
    assert reference.std() > 0.05  # not a constant picture
    assert (images - reference).abs().max() < tolerance


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_deterministic_scheduler_gives_the_pipelines_images_and_forks_exactly(name, steps):
    pipe = tiny_pipeline(dtype=torch.float64, scheduler=SCHEDULERS[name])
    reference = pipe(
        list(PROMPTS), latents=noise().double(), num_inference_steps=steps, **CALL
    ).images
    model = HookedTextToImage.from_pipeline(pipe)
    run = model.trajectory(PROMPTS, latents=noise(), num_steps=steps)
    assert (run.images - reference).abs().max() < 1e-9
    for step in {0, steps // 2, steps - 1}:
        assert torch.equal(run.fork(step).images, run.images)


def test_runs_are_bitwise_repeatable_and_seeds_are_paired(model):
    assert torch.equal(model(PROMPTS, seed=5), model(PROMPTS, seed=5))
    assert not torch.equal(model(PROMPTS, seed=5), model(PROMPTS, seed=6))
    same = model.trajectory(PROMPTS, seed=5).latents[0]
    assert torch.equal(same[0], same[1])
    each = model.trajectory(PROMPTS, seed=[5, 6]).latents[0]
    assert torch.equal(each[0], same[0])
    assert not torch.equal(each[1], same[1])
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        model(PROMPTS, seed=[1, 2, 3])


def test_stock_pipeline_around_the_hooked_modules_gives_the_same_images(model):
    reference = tiny_pipeline()(
        list(PROMPTS), latents=noise(), num_inference_steps=4, **CALL
    ).images
    pipe = model.as_diffusers()
    pipe.set_progress_bar_config(disable=True)
    assert (
        pipe(list(PROMPTS), latents=noise(), num_inference_steps=4, **CALL).images - reference
    ).abs().max() < 1e-5


def test_non_square_latents(model):
    wide = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    images, cache = model.run_with_cache(
        PROMPTS, latents=wide, num_steps=2, names_filter="blocks.0.cross_attn.hook_pattern"
    )
    assert images.shape == (2, 3, 16, 32)
    assert cache["pattern", 0, "cross_attn", 1].shape[2] == 8


# Names and hooks


def every_name(model: HookedTextToImage, steps: int) -> list[str]:
    return [site.name for site in model.names.select(branch="both", num_steps=steps)]


def test_hook_dict_lists_what_a_default_run_fires(model):
    fired = []
    with model.hooks([(lambda name: True, lambda tensor, hook: fired.append(hook.name))]):
        model(PROMPTS)
    # text is encoded once and no hook asks for it at a step … except that here every hook does, so
    # all names fire
    assert sorted(fired) == sorted(model.hook_dict)
    assert len(model.hook_dict) == len(set(model.hook_dict)) == len(fired)


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


def test_aliases_reach_the_same_tensor(model):
    def zero(tensor, hook):
        assert hook.name == "steps.2.cond.blocks.1.cross_attn.hook_z"
        return torch.zeros_like(tensor)

    a = model.run_with_hooks(PROMPTS, fwd_hooks=[("steps.2.cond.blocks.1.hook_cross_z", zero)])
    b = model.run_with_hooks(PROMPTS, fwd_hooks=[("steps.2.cond.blocks.1.cross_attn.hook_z", zero)])
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        (
            "steps.0.cond.blocks.1.cross_attn.hook_patern",
            "steps.0.cond.blocks.1.cross_attn.hook_pattern",
        ),
        ("steps.0.con.blocks.1.attn.hook_z", "steps.0.cond.blocks.1.attn.hook_z"),
        ("steps.1.hook_latents", "steps.1.hook_latent"),
        ("text_encoder.hook_embd", "text_encoder.hook_embed"),
        ("hook_images", "hook_image"),
    ],
)
def test_a_misspelt_name_is_an_error_with_the_nearest_one(model, wrong, nearest):
    with (
        pytest.raises(UnknownHookError) as error,
        model.hooks([(wrong, lambda tensor, hook: None)]),
    ):
        pass
    assert f"did you mean {nearest!r}" in str(error.value)
    with pytest.raises(UnknownHookError):
        model.run_with_cache(PROMPTS, names_filter=wrong)


def test_hooks_that_a_run_never_reaches_are_refused(model):
    def keep(tensor, hook):
        return None

    with pytest.raises(ValueError, match="steps 0 to 3"):
        model.run_with_hooks(PROMPTS, num_steps=4, fwd_hooks=[("steps.4.cond.hook_embed", keep)])
    with pytest.raises(ValueError, match="no unconditional branch"):
        model.run_with_hooks(PROMPTS, guidance=1.0, fwd_hooks=[("steps.0.uncond.hook_embed", keep)])
    with pytest.raises(ValueError, match="set_use_attn_result"):
        model.run_with_hooks(PROMPTS, fwd_hooks=[("steps.0.cond.blocks.0.attn.hook_result", keep)])
    consistency = HookedTextToImage.from_pipeline(
        tiny_pipeline(scheduler=CMStochasticIterativeScheduler())
    )
    with pytest.raises(ValueError, match="clean-image prediction"):
        consistency.run_with_hooks(PROMPTS, fwd_hooks=[("steps.0.hook_x0", keep)])
    assert model.attached == ()  # nothing is left behind by an error


def test_hooks_are_gone_after_the_block_and_added_ones_stay_until_reset(model):
    base = model(PROMPTS)

    def zero(tensor, hook):
        return torch.zeros_like(tensor)

    with model.hooks([("steps.0.hook_latent", zero)]):
        model.add_hook("steps.1.hook_latent", zero)
    assert not torch.equal(model(PROMPTS), base)
    model.reset_hooks()
    assert torch.equal(model(PROMPTS), base)


def test_text_keys_are_computed_once_unless_a_hook_asks(model):
    calls = []
    linear = model.dit.blocks[0].cross_attn.to_k
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    try:
        model(PROMPTS, num_steps=5)
        once = len(calls)
        calls.clear()
        model.run_with_hooks(
            PROMPTS,
            num_steps=5,
            fwd_hooks=[("steps.2.cond.hook_caption", lambda tensor, hook: None)],
        )
        with_hook = len(calls)
    finally:
        handle.remove()
    assert (once, with_hook) == (1, 2)


def test_without_guidance_no_second_branch_is_run(model):
    rows = []
    handle = model.dit.proj_out.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output))
    )
    try:
        model(PROMPTS, guidance=1.0, num_steps=2)
    finally:
        handle.remove()
    assert rows == [2, 2]


# Forks


@pytest.mark.parametrize("step", [0, 5, 13])
@pytest.mark.parametrize(
    "hook",
    [
        "cond.blocks.1.cross_attn.hook_pattern",
        "hook_x0",
        "hook_out",
        "uncond.blocks.0.hook_mlp_out",
    ],
)
def test_a_fork_with_a_patch_is_the_full_rerun_with_it(model, step, hook):
    def halve(tensor, hook):
        return tensor / 2

    name = f"steps.{step}.{hook}"
    run = model.trajectory(PROMPTS, seed=2)
    fork = run.fork(step, [(name, halve)])
    with model.hooks([(name, halve)]):
        rerun = model.trajectory(PROMPTS, seed=2)
    for ours, full in zip(fork.latents, rerun.latents, strict=True):
        assert torch.equal(ours, full)
    assert not torch.equal(fork.latents[-1], run.latents[-1])
    # forking has left the trajectory as it was
    assert torch.equal(run.fork(step).images, run.images)


def test_a_fork_refuses_hooks_before_it(model):
    run = model.trajectory(PROMPTS)
    with pytest.raises(ValueError, match="steps 5 to 13"):
        run.fork(5, [("steps.4.hook_latent", lambda tensor, hook: None)])
    with pytest.raises(ValueError, match="keeps the text"):
        run.fork(5, [("text_encoder.hook_embed", lambda tensor, hook: None)])
    with pytest.raises(ValueError, match="steps 0 to 13"):
        run.fork(14)


def test_patching_all_cross_attention_from_a_clean_run_gives_the_clean_image(model):
    clean, cache = model.run_with_cache(
        PROMPTS[:1], seed=0, branch="both", names_filter=lambda n: n.endswith("hook_cross_attn_out")
    )
    hooks = [(name, lambda tensor, hook: cache[hook.name]) for name in cache]
    assert torch.equal(model.run_with_hooks(PROMPTS[1:], seed=0, fwd_hooks=hooks), clean)
    assert not torch.equal(model(PROMPTS[1:], seed=0), clean)


# Gradients


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


# The cache


def test_cache_shorthands(model):
    _, cache = model.run_with_cache(PROMPTS, branch="both", num_steps=5)
    assert isinstance(cache, ActivationCache)
    name = "steps.4.cond.blocks.1.cross_attn.hook_pattern"
    assert torch.equal(cache[name], cache["pattern", 1, "cross_attn", 4])
    assert torch.equal(cache[name], cache["pattern", -1, "cross_attn", 4])
    assert torch.equal(cache[name], cache["steps.4.cond.blocks.1.hook_cross_pattern"])
    assert torch.equal(
        cache["steps.4.uncond.blocks.1.attn.hook_z"], cache["z", 1, "attn", 4, "uncond"]
    )
    assert torch.equal(
        cache["steps.4.cond.blocks.1.hook_resid_mid_cross"], cache["resid_mid2", 1, None, 4]
    )
    assert torch.equal(cache["steps.4.hook_x0"], cache["x0", None, None, 4])
    stacked = cache.stack("pattern", layer=1, sublayer="cross_attn")
    assert stacked.shape == (5, 2, 2, 4, 8)
    assert torch.equal(stacked[4], cache[name])
    at = cache.at(step=4)
    assert torch.equal(at["pattern", 1, "cross_attn"], cache[name])
    assert torch.equal(at["cross_pattern", 1], cache[name])
    assert torch.equal(at["z", 1], cache["steps.4.cond.blocks.1.attn.hook_z"])
    assert torch.equal(at["resid_post", -1], cache["steps.4.cond.blocks.1.hook_resid_post"])
    assert torch.equal(at["scale", 0, "ln1"], cache["steps.4.cond.blocks.0.ln1.hook_scale"])
    with pytest.raises(KeyError, match="which step"):
        cache["pattern", 1, "cross_attn"]


def test_derived_noise_recomposes_the_latent(model):
    _, cache = model.run_with_cache(
        PROMPTS, names_filter=lambda n: n.endswith(("hook_latent", "hook_x0"))
    )
    sigma = model.scheduler.__class__.from_config(model.scheduler.config)
    sigma.set_timesteps(14)
    for step in range(14):
        s = sigma.sigmas[step]
        recomposed = (1 - s) * cache[f"steps.{step}.hook_x0"] + s * cache[f"steps.{step}.eps"]
        assert (recomposed - cache[f"steps.{step}.hook_latent"]).abs().max() < 1e-4


def test_selection_by_step_branch_and_name(model):
    by_name = model.run_with_cache(
        PROMPTS, names_filter=["blocks.0.attn.hook_z", "hook_image"], steps=[1, 3]
    )[1]
    assert set(by_name) == {
        "steps.1.cond.blocks.0.attn.hook_z",
        "steps.3.cond.blocks.0.attn.hook_z",
        "hook_image",
    }
    sliced = model.run_with_cache(
        PROMPTS, names_filter=lambda n: n.endswith("hook_q"), steps=slice(0, 14, 7), branch="uncond"
    )[1]
    assert {name.split(".")[1] for name in sliced} == {"0", "7"}
    assert all(".uncond." in name for name in sliced)
    with pytest.raises(ValueError, match="steps=14: this run has steps 0 to 13"):
        model.run_with_cache(PROMPTS, steps=14)
    with pytest.raises(ValueError, match="Nothing would be cached"):
        model.run_with_cache(PROMPTS, names_filter=lambda n: False)


@pytest.mark.parametrize("text", ["rte", "t5"])
@pytest.mark.parametrize("learned_sigma", [False, True])
def test_the_estimate_is_what_is_used(text, learned_sigma):
    model = HookedTextToImage.from_pipeline(
        tiny_pipeline(text, learned_sigma, scheduler=SCHEDULERS["epsilon"])
    )
    model.dit.set_use_attn_result(True)
    model.dit.set_use_split_qkv_input(True)
    tokens = model.to_tokens(PROMPTS, length=9)
    _, cache = model.run_with_cache(tokens, num_steps=2, branch="both")
    expected = estimate(model, tokens, 2, branch="both")
    assert {name: tensor.nbytes for name, tensor in cache.items()} == expected.sizes
    # the text's keys and values are kept once
    assert cache.nbytes == expected.nbytes < sum(expected.sizes.values())


def test_a_cache_that_is_too_large_is_refused_before_running(model, monkeypatch):
    monkeypatch.setattr(model, "trajectory", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(CacheTooLargeError, match=r"names_filter=.*steps=.*branch="):
        model.run_with_cache(PROMPTS, max_bytes=1000)
    monkeypatch.setattr("hooked_models.generation.cache.free_bytes", lambda device: 4000)
    with pytest.raises(CacheTooLargeError, match="a quarter of free memory"):
        model.run_with_cache(PROMPTS)


def test_cached_tensors_are_not_touched_by_later_hooks(model):
    clean = model.run_with_cache(PROMPTS, names_filter="steps.0.hook_latent")[1]

    def zero(tensor, hook):
        tensor[:] = 0

    # attached before the caching hook, but in place on the same tensor
    with model.hooks([("steps.0.hook_latent", zero)]):
        after = model.run_with_cache(PROMPTS, names_filter="steps.0.cond.hook_embed")[1]
    assert clean["steps.0.hook_latent"].abs().max() > 0
    assert len(after) == 1


# Text


def test_tokens(model):
    assert model.to_str_tokens(PROMPTS[0]) == [
        "▁red",
        "▁circle",
        "▁is",
        "▁above",
        "▁blue",
        "▁square",
        "</s>",
    ]
    assert model.to_tokens(PROMPTS).shape == (2, 8)
    assert model.to_tokens(PROMPTS, length=12).shape == (2, 12)
    images = model(PROMPTS, seed=0)
    assert (model(model.to_tokens(PROMPTS, length=20), seed=0) - images).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"'yellow', 'star'. It knows: red, blue"):
        model("yellow circle above star")
    with pytest.raises(ValueError, match="longest that this model reads"):
        model.to_tokens("red " * 30)


def test_loading_by_folder_and_friendly_failure(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    images = HookedTextToImage.from_pretrained(tmp_path / "model")(PROMPTS)
    assert torch.equal(images, HookedTextToImage.from_pipeline(pipe)(PROMPTS))
    with pytest.raises(FileNotFoundError, match="bundled name"):
        HookedTextToImage.from_pretrained("no-such-model")
    with pytest.raises(
        FileNotFoundError, match=r"wheel carries the micro models only.*Did you mean 'rte-m"
    ):
        HookedTextToImage.from_pretrained("rte-mikro-mini")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="model_index"):
        HookedTextToImage.from_pretrained(tmp_path / "empty")
    with pytest.raises(TypeError, match="PixArt"):
        HookedTextToImage.from_pipeline(object())
