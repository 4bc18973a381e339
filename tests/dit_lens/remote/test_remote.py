"""Through nnsight, here and on a server that has no dit_lens: the numbers of the local hooked
model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor

from dit_lens import Add, Intervention, Replace, Scale, readout, sweep, synopsis
from dit_lens.remote import CLEAN, RemoteTextToImage
from hooked_models import HookedTextToImage, UnknownHookError, list_models

from .served import Served

PROMPTS = [
    "red circle is above blue square",
    "blue square is left of red circle",
    "red square is above blue circle",
]
RUN: dict[str, Any] = {"seed": [3, 4, 5], "num_steps": 3}
UNREACHABLE = ("hook_latent", "hook_rel_pos_bias")
"""May be read, not written."""


def close(ours: Tensor, oracle: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to a part of the largest value."""
    torch.testing.assert_close(
        ours, oracle.detach(), rtol=0, atol=tolerance * max(1.0, float(oracle.abs().max()))
    )


def same_caches(
    model: RemoteTextToImage, oracle: HookedTextToImage, tolerance: float = 1e-5, **wanted: Any
) -> None:
    with torch.no_grad():
        images, cache = oracle.run_with_cache(PROMPTS, **RUN, **wanted)
        ours, found = model.run_with_cache(PROMPTS, **RUN, **wanted)
    assert sorted(found.keys()) == sorted(cache.keys())
    close(ours, images, tolerance)
    for name, tensor in cache.items():
        close(found[name], tensor, tolerance)


@pytest.fixture(scope="module")
def exact(folder) -> tuple[RemoteTextToImage, HookedTextToImage]:
    """nnsight in this process and the oracle, in float64 (in which the fused and the explicit
    attention agree).
    """
    ours, oracle = (
        RemoteTextToImage(folder, dtype=torch.float64),
        HookedTextToImage.from_pretrained(folder),
    )
    for part in (oracle.dit, oracle.text_encoder, oracle.codec):
        part.double()
    return ours, oracle


# In this process


def test_every_name_is_read(exact) -> None:
    # T5's norms are float32 in any model
    same_caches(*exact, tolerance=1e-6, branch="both", steps=[0, 2])
    same_caches(
        *exact,
        tolerance=1e-6,
        names_filter=lambda name: name.endswith(("hook_z", "hook_mlp_out")),
        guidance=1.0,
    )


def nudge(tensor: Tensor, hook: Any) -> Tensor:
    return 1.01 * tensor + 0.02


def nudge_in_place(tensor: Tensor, hook: Any) -> None:
    tensor[:, 0] *= 0.9


def writable(model: HookedTextToImage) -> list[str]:
    names = [name for name in model.hook_dict if not name.endswith(UNREACHABLE)]
    return [
        name
        for name in names
        if name.startswith(("steps.1.", "text_encoder", "null_text_encoder", "hook_image"))
    ]


@pytest.mark.parametrize("function", [nudge, nudge_in_place])
def test_all_names_are_written_at_once(exact, function: Callable) -> None:
    ours, oracle = exact
    hooks = [(name, function) for name in writable(oracle)]
    with torch.no_grad():
        expected = oracle.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks)
        assert (expected - oracle(PROMPTS, **RUN)).abs().max() > 1e-3
    close(ours.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks), expected, 1e-6)


def by_name(exact, names: list[str]) -> None:
    """One name a run; what is cached afterwards differs where it should, and agrees."""
    ours, oracle = exact
    for name in names:
        hooks, last = (
            [(name, nudge)],
            {
                "names_filter": [
                    "hook_image",
                    "steps.2.hook_latent",
                    "steps.1.cond.blocks.1.hook_resid_post",
                ]
            },
        )
        with torch.no_grad(), oracle.hooks(hooks):
            _, expected = oracle.run_with_cache(PROMPTS, **RUN, **last)
        with ours.hooks(hooks):
            _, found = ours.run_with_cache(PROMPTS, **RUN, **last)
        for key, tensor in expected.items():
            close(found[key], tensor, 1e-6)


SOME = (
    "hook_attn_out",
    "hook_resid_mid",
    "hook_resid_mid_cross",
    "hook_mlp_out",
    "adaln.hook_gate_msa",
    "ln2.hook_scale",
)


def test_residual_stream_is_written_name_by_name(exact) -> None:
    by_name(
        exact,
        [f"steps.1.cond.blocks.0.{name}" for name in SOME]
        + ["steps.1.hook_x0", "steps.0.hook_out"],
    )


@pytest.mark.slow
def test_every_name_is_written(exact) -> None:
    by_name(exact, writable(exact[1]))


@pytest.mark.parametrize("name", ["rte-micro", pytest.param("t5-micro", marks=pytest.mark.slow)])
def test_bundled_models(name: str) -> None:
    ours, oracle = RemoteTextToImage(name), HookedTextToImage.from_pretrained(name)
    # (patterns: in float64, above)
    names = ["cross_attn.hook_z", "attn.hook_q", "hook_attn_out", "hook_resid_post"]
    wanted = [f"blocks.{layer}.{part}" for layer in range(oracle.cfg.n_layers) for part in names]
    same_caches(ours, oracle, names_filter=wanted, steps=[0, 2], branch="both")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in list_models() if name not in ("rte-micro", "t5-micro")]
)
def test_other_bundled_models(name: str) -> None:
    test_bundled_models(name)


# On a server


def test_the_server_has_no_dit_lens(remote) -> None:
    def which(image: Tensor, hook: Any) -> Tensor:
        there = []
        for package in ("dit_lens", "hooked_models", "transformer_lens", "jaxtyping", "diffusers"):
            try:
                importlib.import_module(package)
                there.append(1.0)
            except ImportError:
                there.append(0.0)
        image[:, 0, 0, :5] = torch.tensor(there)
        return image

    images = remote.run_with_hooks(PROMPTS[0], num_steps=1, fwd_hooks=[("hook_image", which)])
    assert images[0, 0, 0, :5].tolist() == [0, 0, 0, 0, 1]


def test_remote_reads(remote, hooked, server: Served) -> None:
    before = len(server.log())
    same_caches(remote, hooked, branch="both", steps=[0, 2])
    assert len(server.log()) == before + 1
    assert remote.dit.device.type == "meta"  # no weight was ever here


def test_remote_hook_functions(remote, hooked) -> None:
    factor = torch.tensor(0.5)

    def scale(tensor: Tensor, hook: Any) -> Tensor | None:
        if (
            hook.step == 1
            and hook.branch == "uncond"
            and hook.layer() == 1
            and hook.name.endswith("cross_attn.hook_pattern")
        ):
            return factor * tensor
        return None

    hooks = [
        (name, scale)
        for name in hooked.hook_dict
        if name.endswith("cross_attn.hook_pattern") and name < "steps.3"
    ]
    hooks = [(name, function) for name, function in hooks if int(name.split(".")[1]) < 3]
    with torch.no_grad():
        expected = hooked.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks)
        assert (expected - hooked(PROMPTS, **RUN)).abs().max() > 1e-4
    close(remote.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks), expected)


ACTIONS = [
    Intervention(
        "blocks.*.cross_attn.hook_pattern", heads=[1], tokens="relation", action="knockout"
    ),
    Intervention("blocks.1.cross_attn.hook_z", heads="L1H0", steps=[0, 2], branch="both"),
    Intervention("blocks.0.hook_mlp_out", tokens=[1, 3], action="mean"),
    Intervention("blocks.1.cross_attn.hook_v", tokens="color1", action="resample"),
    Intervention("text_encoder.hook_out", tokens="shape2", action=Scale(-2.0)),
    Intervention(
        "text_encoder.blocks.1.attn.hook_pattern", heads=[2], tokens=[1], action="knockout"
    ),
    Intervention(
        "blocks.0.hook_resid_mid2", steps=slice(1, 3), action=Add(torch.linspace(-1, 1, 16))
    ),
    Intervention("hook_x0", steps=1, action=Replace(torch.full((1, 4, 1, 1), 0.3))),
]


def test_remote_interventions(remote, hooked) -> None:
    """All kinds of action; those that act at once are told apart by their effects, one after the
    other.
    """
    ours = [hook for each in ACTIONS for hook in each.hooks(remote, PROMPTS, num_steps=3, seed=2)]
    theirs = [hook for each in ACTIONS for hook in each.hooks(hooked, PROMPTS, num_steps=3, seed=2)]
    with torch.no_grad():
        close(
            remote.run_with_hooks(PROMPTS, **RUN, fwd_hooks=ours),
            hooked.run_with_hooks(PROMPTS, **RUN, fwd_hooks=theirs),
        )


@pytest.mark.parametrize("action", ACTIONS, ids=lambda each: f"{each.site}-{each.action}"[:60])
def test_interventions_one_by_one(exact, action: Intervention) -> None:
    ours, oracle = exact
    with torch.no_grad():
        hooks = action.hooks(oracle, PROMPTS, num_steps=3)
        expected, plain = (
            oracle.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks),
            oracle(PROMPTS, **RUN),
        )
    assert (expected - plain).abs().max() > 1e-7
    close(
        ours.run_with_hooks(PROMPTS, **RUN, fwd_hooks=action.hooks(ours, PROMPTS, num_steps=3)),
        expected,
        1e-7,
    )


def test_patching_is_one_request(remote, hooked, server: Served) -> None:
    clean, corrupt = PROMPTS[0], "blue square is above red circle"
    site = "blocks.{}.cross_attn.hook_z"
    conditions = {
        "one head": [Intervention(site.format(1), heads=[1], steps=[0, 1], action=Replace(CLEAN))],
        "both layers": [
            Intervention(site.format("*"), action=Replace(CLEAN)),
            Intervention("hook_out", steps=2, action=Scale(0.5)),
        ],
        "text": [Intervention("text_encoder.hook_out", action=Replace(CLEAN))],
    }
    before = len(server.log())
    found = remote.patch(clean, corrupt, conditions, seed=1, num_steps=3)
    (passed,) = server.log()[before:]
    assert passed["out"] < 60_000  # images alone
    with torch.no_grad():
        images, cache = hooked.run_with_cache(clean, seed=1, num_steps=3, branch="both")
        close(found["clean"], images)
        close(found["corrupt"], hooked(corrupt, seed=1, num_steps=3))
        for name, condition in conditions.items():
            filled = [
                Intervention(
                    i.site,
                    i.heads,
                    i.tokens,
                    i.steps,
                    i.branch,
                    Replace(cache) if isinstance(i.action, Replace) else i.action,
                )
                for i in condition
            ]
            hooks = [hook for each in filled for hook in each.hooks(hooked, corrupt, num_steps=3)]
            expected = hooked.run_with_hooks(corrupt, seed=1, num_steps=3, fwd_hooks=hooks)
            assert (expected - found["corrupt"]).abs().max() > 1e-5
            close(found[name], expected)


@pytest.mark.parametrize("by", [(), ("layer", "head", "step")])
def test_a_heat_map_is_summed_there(remote, hooked, server: Served, by: Any) -> None:
    before, words = len(server.log()), ["circle", "square"]
    ours, oracle = (
        readout.heatmap(model, PROMPTS, words, by=by, steps=[0, 2], **RUN)
        for model in (remote, hooked)
    )
    assert len(server.log()) == before + 1
    xr.testing.assert_allclose(ours, oracle, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduce", ["mass", "max"])
@pytest.mark.parametrize("sublayer", ["cross_attn", "attn"])
def test_synopsis_is_reduced_there(remote, hooked, server: Served, sublayer, reduce) -> None:
    how: dict[str, Any] = {
        "seed": [3, 4, 5],
        "sublayer": sublayer,
        "reduce": reduce,
        "num_steps": 2,
        "batch_size": 2,
    }
    if reduce == "max":  # with an edited pattern, which is read instead of q and k
        how["interventions"] = [
            Intervention(
                f"blocks.1.{sublayer}.hook_pattern",
                heads=[1],
                steps=1,
                tokens=[0],
                action="knockout",
            )
        ]
    before = len(server.log())
    ours, oracle = (
        synopsis.attention_synopsis(model, PROMPTS, **how) for model in (remote, hooked)
    )
    assert ours.dims == oracle.dims
    assert all(ours[dim].equals(oracle[dim]) for dim in ours.dims)
    torch.testing.assert_close(
        torch.tensor(ours.values), torch.tensor(oracle.values), rtol=0, atol=1e-6, equal_nan=True
    )
    assert len(server.log()) == before + 2  # a request a batch


def test_tokens_stand_for_their_text(remote, hooked) -> None:
    tokens = hooked.to_tokens(PROMPTS, length=12)
    with torch.no_grad():
        close(remote(tokens, num_steps=1), hooked(tokens, num_steps=1))
    with pytest.raises(ValueError, match="not those of a text"):
        remote(tokens.flip(1))


# What cannot be


def test_what_no_trace_reaches_is_said_before_anything_is_sent(
    remote, hooked, server: Served
) -> None:
    before = len(server.log())
    for name, reason in (
        ("steps.1.hook_latent", "scheduler"),
        ("text_encoder.hook_rel_pos_bias", "share one"),
    ):
        with pytest.raises(ValueError, match=f"not within nnsight's reach.*{reason}"):
            remote.run_with_hooks(PROMPTS, fwd_hooks=[(name, nudge)])
    with pytest.raises(NotImplementedError, match="No gradients"):
        remote.run_with_hooks(PROMPTS, bwd_hooks=[("steps.1.cond.blocks.1.hook_resid_post", nudge)])
    for resume in (remote.trajectory, remote.at):
        with pytest.raises(NotImplementedError, match="always runs whole"):
            resume(PROMPTS)
    with pytest.raises(UnknownHookError, match="did you mean"):
        remote.run_with_hooks(PROMPTS, fwd_hooks=[("steps.1.cond.blocks.1.hook_resid_pots", nudge)])
    remote.dit.set_use_attn_result(True)
    try:
        with pytest.raises(ValueError, match="hook_result is not within nnsight's reach"):
            remote.run_with_cache(PROMPTS, names_filter="blocks.1.attn.hook_result", steps=0)
    finally:
        remote.dit.set_use_attn_result(False)
    with pytest.raises(ValueError, match="keeps whole tensors, in memory"):
        remote.run_with_cache(PROMPTS, names_filter="blocks.1.attn.hook_z", heads="L1H0")
    clean = Intervention("blocks.1.attn.hook_z", action=Replace(CLEAN))
    with pytest.raises(ValueError, match="has a meaning in"):
        remote.run_with_hooks(PROMPTS, fwd_hooks=clean.hooks(remote, PROMPTS))
    with pytest.raises(ValueError, match="this edit was made for"):
        remote.run_with_hooks(
            PROMPTS[:2], fwd_hooks=Intervention("blocks.1.attn.hook_z").hooks(remote, PROMPTS)
        )
    with pytest.raises(ValueError, match="equally long"):
        remote.patch("red circle", PROMPTS[0], {})
    assert len(server.log()) == before


# The scheduler


def test_a_server_keeps_its_scheduler(remote) -> None:
    kept = remote.scheduler
    with pytest.raises(ValueError, match="scheduler of the folder that it opened: save one"):
        remote.scheduler = DDPMScheduler()
    assert remote.scheduler is kept


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDPMScheduler])
def test_another_scheduler_is_set_in_this_process(folder, kind: Any) -> None:
    """One that draws nothing, and one that draws noise at every step."""
    ours, oracle = RemoteTextToImage(folder), HookedTextToImage.from_pretrained(folder)
    plain = ours(PROMPTS, **RUN)
    for model in (ours, oracle):
        model.scheduler = kind.from_config(model.scheduler.config)
    assert ours.nnsight.pipeline.scheduler is ours.scheduler
    with torch.no_grad():
        expected = oracle(PROMPTS, **RUN)
    assert (expected - plain).abs().max() > 1e-3
    close(ours(PROMPTS, **RUN), expected)


def test_a_sweep_of_images_is_that_of_the_local_model(folder) -> None:
    """Conditions that mix prompts run each seed by itself; metrics between steps are refused."""

    def upper(images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, : images.shape[-1] // 2].mean(dim=(1, 2))

    conditions: dict[str, Any] = {
        "none": [],
        "half": Intervention("blocks.1.hook_mlp_out", action=Scale(0.5), steps=1),
        "mean": Intervention("blocks.0.cross_attn.hook_z", heads=[0], action="mean"),
    }
    how: dict[str, Any] = {"num_steps": 2, "batch": 3}
    ours, oracle = (
        sweep.run(model, PROMPTS, [3, 4], conditions, {"upper": upper}, **how)
        for model in (RemoteTextToImage(folder), HookedTextToImage.from_pretrained(folder))
    )
    np.testing.assert_allclose(ours["upper"], oracle["upper"], atol=1e-5)
    assert (abs(ours["upper"] - ours["upper_baseline"])[1:] > 1e-6).all()
    moved = {"moved": sweep.Metric(sweep.displacement, "x0", ["baseline"])}
    with pytest.raises(ValueError, match="metrics on the image"):
        sweep.plan(RemoteTextToImage(folder), PROMPTS, [0], conditions, moved)
    plan = sweep.plan(RemoteTextToImage(folder), PROMPTS, [0], conditions, {"upper": upper})
    with pytest.raises(ValueError, match="'local'"):
        plan.run(executor="ray")


@pytest.mark.slow
def test_ablation_effects_are_those_of_the_local_model(tmp_path) -> None:
    from dit_lens import ablation, scenes

    wanted = scenes.sample(2, seed=0, color_words="both")
    conditions = {"relation": ablation.knockout_role("relation", heads="L2H2")}
    ours, oracle = (
        ablation.ablation_effects(model, wanted, conditions, [0], controls=1, num_steps=4)
        for model in (
            RemoteTextToImage("rte-micro"),
            HookedTextToImage.from_pretrained("rte-micro"),
        )
    )
    assert ours.identical(oracle)
