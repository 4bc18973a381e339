"""Every scheduler that diffusers exports either draws as promised, or is refused in one sentence
before anything runs.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dit_lens import Intervention, sweep
from hooked_models import HookedTextToImage
from hooked_models.generation.sampling import solver_of

from ..pipelines import CALL, PROMPTS, tiny_pipeline

STEPS = 4
SEEDS = [3, 4]
EXPORTED = {name: cls for name, cls in vars(diffusers).items() if inspect.isclass(cls)} | {
    name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")
}
CLASSES = sorted(
    (
        name
        for name, cls in EXPORTED.items()
        if issubclass(cls, diffusers.SchedulerMixin) and cls is not diffusers.SchedulerMixin
    )
)


def made(name: str, **options: Any) -> Any:
    """A scheduler with default options, and without those that clip pixels; None if its class has
    options without default.
    """
    cls = EXPORTED[name]
    known = inspect.signature(cls.__init__).parameters
    try:
        return cls(
            **{
                key: value
                for key, value in {"clip_sample": False, **options}.items()
                if key in known
            }
        )
    except TypeError:
        return None


def usable(name: str) -> bool:
    scheduler = made(name)
    try:
        return scheduler is not None and solver_of(scheduler, STEPS) is not None
    except ValueError:
        return False


USABLE = [name for name in CLASSES if usable(name)]


@cache
def shared() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline())


def model_with(scheduler: Any) -> HookedTextToImage:
    """The one model of these tests, with another scheduler."""
    model = shared()
    model.scheduler = scheduler
    return model


def test_most_schedulers_are_usable_and_both_kinds_are_among_them():
    assert len(CLASSES) >= 40
    assert len(USABLE) >= 25
    draws = {name for name in USABLE if solver_of(made(name), STEPS).draws}
    longer = {name for name in USABLE if len(solver_of(made(name), STEPS)) > STEPS}
    assert draws >= {"DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"}
    assert longer >= {"HeunDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"}


@pytest.mark.parametrize(
    "name", [name for name in CLASSES if name not in USABLE and made(name) is not None]
)
def test_others_are_refused_before_anything_runs(name, monkeypatch):
    model = model_with(made(name))
    monkeypatch.setattr(model, "encode", lambda *args: pytest.fail("it ran"))
    for call in (
        model,
        model.trajectory,
        model.run_with_cache,
        lambda prompts, **how: model.at(0, prompts, **how),
    ):
        with pytest.raises(ValueError, match=name) as refused:
            call(PROMPTS, num_steps=STEPS)
        message = str(refused.value)
        assert "\n" not in message
        assert len(message) < 300
        assert "DPMSolverMultistepScheduler" in message


@pytest.mark.parametrize("name", USABLE)
def test_a_run_can_be_repeated_forked_and_swept(name, caplog):
    model = model_with(made(name))
    call = {"num_steps": STEPS, "seed": SEEDS}
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = model.trajectory(PROMPTS, **call)
    images = run.images
    torch.rand(3)  # moves torch's own generator
    assert torch.equal(model(PROMPTS, **call), images)
    last = len(run) - 1
    for step in range(len(run)):
        assert torch.equal(run.fork(step).images, images)
    half = (f"steps.{last}.hook_out", lambda out, hook: out / 2)
    zero = ("steps.1.cond.blocks.0.cross_attn.hook_z", lambda z, hook: 0 * z)
    for hook in (half, zero):
        step = int(hook[0].split(".")[1])
        assert torch.equal(
            run.fork(step, [hook]).images, model.run_with_hooks(PROMPTS, fwd_hooks=[hook], **call)
        )
    assert not [
        record
        for record in caplog.records
        if "schedul" in record.name and "lower_order" not in record.message
    ]
    alone = model(PROMPTS[1], num_steps=STEPS, seed=SEEDS[1])
    assert (alone[0] - images[1]).abs().max() < 1e-3
    with pytest.raises(ValueError, match="does not fire"):
        model.run_with_hooks(PROMPTS, fwd_hooks=[(f"steps.{last + 1}.hook_out", half[1])], **call)

    cells = {
        "late": Intervention("blocks.0.cross_attn.hook_z", steps=slice(-1, None)),
        "all": Intervention("blocks.1.attn.hook_z"),
    }
    found = sweep.run(
        model,
        PROMPTS,
        SEEDS,
        cells,
        {"m": lambda images: images.flatten(1).std(dim=1)},
        num_steps=STEPS,
    )
    for label, intervention in cells.items():
        for seed in SEEDS:
            hooks = intervention.hooks(model, PROMPTS, num_steps=STEPS)
            own = (
                model.run_with_hooks(PROMPTS, seed=seed, num_steps=STEPS, fwd_hooks=hooks)
                .flatten(1)
                .std(dim=1)
            )
            assert torch.allclose(
                torch.tensor(found["m"].sel(intervention=label, seed=seed).values).float(),
                own,
                atol=1e-4,
            )


@pytest.mark.parametrize("name", USABLE)
def test_images_equal_the_pipelines(name):
    pipe = tiny_pipeline(dtype=torch.float64, scheduler=made(name))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    try:
        reference = pipe(
            list(PROMPTS), latents=noise, generator=generators, num_inference_steps=STEPS, **CALL
        ).images
    except (
        AttributeError,
        RuntimeError,
    ) as error:  # no init_noise_sigma, or latents that became float32
        pytest.skip(f"PixArtSigmaPipeline itself cannot use it: {error}")
    images = HookedTextToImage.from_pipeline(pipe)(
        PROMPTS, latents=noise, seed=SEEDS, num_steps=STEPS
    )
    assert (images - reference).abs().max() < 1e-4


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_is_the_clean_image_and_can_be_written(name, kind):
    scheduler = made(name, prediction_type=kind)
    if scheduler is None or scheduler.config.get("prediction_type", "none") not in (kind, "none"):
        pytest.skip("it has no such prediction")
    model = model_with(scheduler)
    call = {"num_steps": STEPS, "seed": SEEDS}
    try:
        solver = model.solver(STEPS)
    except ValueError:
        pytest.skip("refused with this prediction")
    if not solver.forms_x0:
        with pytest.raises(ValueError, match="no clean-image prediction"):
            model.run_with_hooks(
                PROMPTS, fwd_hooks=[("steps.0.hook_x0", lambda x0, hook: None)], **call
            )
        return
    names = [
        f"steps.{s}.{inner}"
        for s in range(len(solver))
        for inner in ("hook_latent", "hook_out", "hook_x0")
    ]
    plain = model.trajectory(PROMPTS, **call)
    images, cache = model.run_with_cache(PROMPTS, names_filter=names, **call)
    assert torch.equal(images, plain.images)  # reading changes nothing
    theirs = said_by(scheduler, cache, len(solver))
    for step, expected in theirs.items():
        x0 = cache[f"steps.{step}.hook_x0"]
        assert torch.allclose(x0, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        if kind == "epsilon" and scheduler.config.get("prediction_type") == kind:
            rounding = (
                1e-6
                * float(cache[f"steps.{step}.hook_latent"].abs().max())
                / solver.noise_levels[step][1]
            )
            assert torch.allclose(
                cache[f"steps.{step}.eps"], cache[f"steps.{step}.hook_out"], atol=1e-4 + rounding
            )

    target = torch.linspace(-0.8, 0.8, plain.latent.numel()).view_as(plain.latent)
    with model.hooks([(lambda name: name.endswith("hook_x0"), lambda x0, hook: target)]):
        # a last noise level may be left
        assert (model.trajectory(PROMPTS, **call).latent - target).abs().max() < 0.15
    step = len(solver) // 2
    nudge = (f"steps.{step}.hook_x0", lambda x0, hook: x0 + 1)
    moved = plain.fork(step, [nudge])
    assert torch.equal(moved.latent, model_run(model, nudge, call))
    assert (moved.latent - plain.latent).abs().mean() > 1e-4


def model_run(model: HookedTextToImage, hook: Any, call: dict[str, Any]) -> Tensor:
    with model.hooks([hook]):
        return model.trajectory(PROMPTS, **call).latent


def said_by(scheduler: Any, cache: Any, steps: int) -> dict[int, Tensor]:
    """The clean images that a scheduler itself returns for the latents and predictions of a run,
    where it returns any.
    """
    scheduler, found = copy.deepcopy(scheduler), {}
    scheduler.set_timesteps(STEPS)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    own = (
        {"generator": generators}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )
    for step in range(steps):
        latent, out = cache[f"steps.{step}.hook_latent"], cache[f"steps.{step}.hook_out"]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(latent, scheduler.timesteps[step])
        said = scheduler.step(out, scheduler.timesteps[step], latent, **own)
        if (clean := getattr(said, "pred_original_sample", None)) is not None:
            found[step] = clean
    return found


def test_numbers_of_steps():
    model = model_with(diffusers.DPMSolverMultistepScheduler())
    for wrong in (0, -1, 1.5, True, "3", None):
        with pytest.raises(ValueError, match=r"num_steps=.*give an integer"):
            inspect.unwrap(solver_of)(model.scheduler, wrong)  # past a run-time type checker
    for wrong in (1500, 5_000_000):
        with pytest.raises(ValueError, match="1000 timesteps"):
            model(PROMPTS, num_steps=wrong)
    assert model.count_steps(torch.tensor(7)) == 7


def test_a_step_is_one_evaluation_everywhere():
    model = model_with(diffusers.HeunDiscreteScheduler())
    steps = model.count_steps(5)
    assert steps == 9
    calls = []
    model.run_with_hooks(
        PROMPTS,
        num_steps=5,
        fwd_hooks=[
            (lambda name: name.endswith("cond.hook_embed"), lambda x, hook: calls.append(hook.step))
        ],
    )
    assert sorted(set(calls)) == list(range(steps))
    _, cache = model.run_with_cache(PROMPTS, num_steps=5, names_filter="hook_embed")
    assert cache.steps == list(range(steps))
    edits = Intervention("blocks.0.attn.hook_z").resolve(model, PROMPTS, num_steps=5)
    assert [edit.site.step for edit in edits] == list(range(steps))
    assert len(model.trajectory(PROMPTS, num_steps=5)) == steps
    assert {site.step for site in model.names.sites() if site.step is not None} == set(
        range(model.count_steps(14))
    )
