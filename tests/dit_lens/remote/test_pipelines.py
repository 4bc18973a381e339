"""Pipelines of many families through nnsight, here and on a server without dit_lens: the numbers of
the local hooked model.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dit_lens import Add, Intervention, Replace, Scale, blocks, prompts, readout, synopsis
from dit_lens.readout.heat_maps import text_attentions
from dit_lens.remote import CLEAN, RemotePipeline, RemoteTextToImage, pipeline_plan
from dit_lens.remote.plan import Request
from hooked_models import HookedTextToImage
from hooked_models.families.kernel_tap import KernelTap
from hooked_models.generation.names import Site

from ...hooked_models.tiny_pipelines import NO_FOLDER, PIPELINES, tiny_pipeline
from .served import Served

PROMPTS = ["red circle is above blue square", "blue square is left of red circle"]
RUN: dict[str, Any] = {"seed": [3, 4], "num_steps": 3}
SERVED = ("FLUX.1 true CFG", "SD3", "Qwen-Image", "SANA")
"""Two calls a step with text first; one call; texts of several lengths; cross-attention."""


class Pair(NamedTuple):
    """A model through nnsight, and the oracle."""

    ours: RemoteTextToImage
    oracle: HookedTextToImage


def options(name: str) -> dict[str, Any]:
    """Arguments of a tiny pipeline's call that a model takes as its options."""
    _, call = PIPELINES[name]
    return {
        key: value
        for key, value in call.items()
        if key not in ("num_inference_steps", "output_type")
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny pipelines that were asked for so far."""
    return {}


def folder_of(name: str, folders: dict[str, Path], factory: pytest.TempPathFactory) -> Path:
    if name not in folders:
        folders[name] = factory.mktemp("pipeline")
        tiny_pipeline(name)[0].save_pretrained(folders[name])
    return folders[name]


def pair(ours: RemoteTextToImage, folder: Path, name: str, dtype: torch.dtype) -> Pair:
    oracle = HookedTextToImage.from_pretrained(folder, dtype=dtype)
    for one in (ours, oracle):
        model: Any = one
        model.options = options(name)
        model.pipe.set_progress_bar_config(disable=True)
    return Pair(ours, oracle)


@pytest.fixture(scope="module", params=SERVED)
def served(request, server: Served, folders, tmp_path_factory) -> Pair:
    """On a server, in float32."""
    folder = folder_of(request.param, folders, tmp_path_factory)
    return pair(RemoteTextToImage(folder, remote=server.url), folder, request.param, torch.float32)


@pytest.fixture(scope="module", params=SERVED)
def exact(request, folders, tmp_path_factory) -> Pair:
    """In this process, in float64."""
    folder = folder_of(request.param, folders, tmp_path_factory)
    ours = RemoteTextToImage(folder, dtype=torch.float64)
    return pair(ours, folder, request.param, torch.float64)


def close(ours: Tensor, oracle: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to a part of the largest finite value; masked scores are -inf in both."""
    finite = oracle[oracle.isfinite()]
    largest = float(finite.abs().max()) if len(finite) else 1.0
    torch.testing.assert_close(ours, oracle, rtol=0, atol=tolerance * max(1.0, largest))


def test_a_whole_generation(served: Pair) -> None:
    close(served.ours(PROMPTS, **RUN), served.oracle(PROMPTS, **RUN))
    assert isinstance(served.ours, RemotePipeline)
    assert served.ours.dit.device.type == "meta"  # no weight was ever here


def test_options_and_latents_are_passed_on(served: Pair) -> None:
    shape = served.oracle.draft(PROMPTS, **RUN).shapes["hook_latent"]
    latents = torch.randn(shape, generator=torch.manual_seed(5))
    how: dict[str, Any] = {"num_steps": 2, "latents": latents, "guidance": 2.0}
    expected = served.oracle(PROMPTS, **how)
    assert (expected - served.oracle(PROMPTS, **how | {"guidance": 5.0})).abs().max() > 1e-4
    close(served.ours(PROMPTS, **how), expected)
    with pytest.raises(TypeError, match="has no argument 'colour'"):
        served.ours(PROMPTS, colour="red")


def test_every_name_is_read(served: Pair, server: Served) -> None:
    before = len(server.log())
    images, cache = served.oracle.run_with_cache(PROMPTS, **RUN, branch="both", steps=[0, 2])
    ours, found = served.ours.run_with_cache(PROMPTS, **RUN, branch="both", steps=[0, 2])
    assert len(server.log()) == before + 1
    assert sorted(found.keys()) == sorted(cache.keys())
    close(ours, images)
    for name, tensor in cache.items():
        close(found[name], tensor)


# Written


def nudge(tensor: Tensor, hook: Any) -> Tensor:
    return 1.01 * tensor + 0.02


def nudge_in_place(tensor: Tensor, hook: Any) -> None:
    tensor[:, 0] *= 0.9


def nudge_row(tensor: Tensor, hook: Any, row: int) -> Tensor:
    changed = tensor.clone()
    changed[row] = 1.01 * tensor[row] + 0.02
    return changed


def firing(model: HookedTextToImage, *steps: int) -> list[str]:
    """Names that a run fires at some steps, and the image."""
    extent = model.draft(PROMPTS, **RUN).extent
    sites = [site for site in model.names.sites(steps=steps) if extent.fires(site)]
    return [site.name for site in sites]


@pytest.mark.parametrize("function", [nudge, nudge_in_place])
def test_all_names_are_written_at_once(exact: Pair, function: Any) -> None:
    hooks = [(name, function) for name in firing(exact.oracle, 0, 1)]
    expected = exact.oracle.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks)
    assert (expected - exact.oracle(PROMPTS, **RUN)).abs().max() > 1e-3
    close(exact.ours.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks), expected, 1e-9)


def test_names_are_written_one_by_one(exact: Pair) -> None:
    """Every kind of name in the conditional branch by itself, a row for each of its layers; an
    effect of each, the same as locally.
    """
    kinds: dict[str, list[str]] = {}
    for name in firing(exact.oracle, 1):
        if ".uncond." not in name:
            kinds.setdefault(re.sub(r"blocks\.\d+", "blocks", name), []).append(name)
    plain = {}
    for names in kinds.values():
        rows = {"prompts": PROMPTS[:1] * len(names), "seed": 3, "num_steps": 3}
        if len(names) not in plain:
            plain[len(names)] = exact.oracle(**rows)
        hooks = [(name, partial(nudge_row, row=row)) for row, name in enumerate(names)]
        expected = exact.oracle.run_with_hooks(**rows, fwd_hooks=hooks)
        close(exact.ours.run_with_hooks(**rows, fwd_hooks=hooks), expected, 1e-9)
        same = (expected == plain[len(names)]).flatten(1).all(1).tolist()
        # the text that leaves a last block is read by nothing
        unread = [name for name, alike in zip(names, same, strict=True) if alike]
        assert all("text" in name or name.endswith("resid_post") for name in unread)


def test_a_hook_function_is_sent(served: Pair) -> None:
    factor = torch.tensor(0.5)

    def halve(tensor: Tensor, hook: Any) -> Tensor | None:
        return factor * tensor if hook.step == 1 and hook.branch == "cond" else None

    sublayer = "cross_attn" if "SANA" in str(served.oracle.dit.family.name) else "attn"
    hooks = [
        (f"steps.{step}.cond.blocks.{layer}.{sublayer}.hook_z", halve)
        for step in range(3)
        for layer in range(2)
    ]
    expected = served.oracle.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks)
    assert (expected - served.oracle(PROMPTS, **RUN)).abs().max() > 1e-4
    close(served.ours.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks), expected)


def test_hooks_that_share_a_variable(served: Pair) -> None:
    """Two hooks of a block, the second of which gives back what the first has seen."""
    ours, oracle = (
        one.run_with_hooks(PROMPTS, **RUN, fwd_hooks=blocks.remove_blocks(one, 0)) for one in served
    )
    assert (oracle - served.oracle(PROMPTS, **RUN)).abs().max() > 1e-3
    close(ours, oracle)


def actions(model: Any) -> list[Intervention]:
    """Every kind of action, at every kind of tensor."""
    attention = f"blocks.1.{next(iter(text_attentions(model.dit).values()))}"
    square, d_model = prompts.word("square"), model.cfg.d_model
    joint = model.dit.axes("blocks.0.hook_resid_post")[1] == "joint_pos"
    some = square if joint else [1, 3]
    value = torch.full(
        model.shape(model.draft(PROMPTS, **RUN), Site("sampler", "hook_x0", 0))[1:], 0.3
    )
    return [
        Intervention(f"{attention}.hook_pattern", heads=[1], tokens=square, action="knockout"),
        Intervention(f"{attention}.hook_z", heads="L1H0", steps=[0, 2], branch="both"),
        Intervention(f"{attention}.hook_v", tokens=square, action=Scale(-2.0)),
        Intervention("blocks.0.hook_resid_post", tokens=some, steps=1, action="mean"),
        Intervention(
            "blocks.1.hook_resid_pre", steps=slice(1, 3), action=Add(torch.linspace(-1, 1, d_model))
        ),
        Intervention(f"{attention}.hook_k", tokens=square, action="resample"),
        Intervention("hook_out", steps=1, action=Scale(0.5)),
        Intervention("hook_out_cond", steps=0, action=Scale(0.9)),
        Intervention("hook_latent", steps=2, action=Scale(0.5)),
        Intervention("hook_x0", steps=1, action=Replace(value)),
    ]


def test_interventions(served: Pair) -> None:
    """All at once on the server."""
    hooks = [
        [hook for each in actions(one) for hook in each.hooks(one, PROMPTS, num_steps=3, seed=2)]
        for one in served
    ]
    close(
        served.ours.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks[0]),
        served.oracle.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks[1]),
    )


def test_interventions_one_by_one(exact: Pair) -> None:
    """Each by itself acts, and equally."""
    plain = exact.oracle(PROMPTS, **RUN)
    for each in actions(exact.oracle):
        ours, oracle = (
            one.run_with_hooks(PROMPTS, **RUN, fwd_hooks=each.hooks(one, PROMPTS, num_steps=3))
            for one in exact
        )
        assert not torch.equal(oracle, plain), each
        close(ours, oracle, 1e-9)


def test_patching_is_one_request(served: Pair, server: Served) -> None:
    clean, corrupt = "red circle is above blue square", "blue circle is above red square"
    attention = f"blocks.1.{next(iter(text_attentions(served.oracle.dit).values()))}"

    def head(action: Any) -> list[Intervention]:
        return [Intervention(f"{attention}.hook_z", heads=[1], steps=[0, 1], action=action)]

    before = len(server.log())
    found = served.ours.patch(clean, corrupt, {"head": head(Replace(CLEAN))}, seed=1, num_steps=3)
    (passed,) = server.log()[before:]
    assert passed["out"] < 60_000  # images alone
    images, cache = served.oracle.run_with_cache(clean, seed=1, num_steps=3)
    close(found["clean"], images)
    close(found["corrupt"], served.oracle(corrupt, seed=1, num_steps=3))
    (edit,) = head(Replace(cache))
    hooks = edit.hooks(served.oracle, corrupt, num_steps=3)
    expected = served.oracle.run_with_hooks(corrupt, seed=1, num_steps=3, fwd_hooks=hooks)
    assert (expected - found["corrupt"]).abs().max() > 1e-5
    close(found["head"], expected)


# Summed there


@pytest.mark.parametrize("reduce", ["mass", "max"])
def test_a_synopsis_is_summed_there(served: Pair, server: Served, reduce: Any) -> None:
    circle = {"circle": prompts.word("circle"), "square": prompts.word("square")}
    how: dict[str, Any] = {"seed": [3, 4], "reduce": reduce, "text_groups": circle, "num_steps": 2}
    if reduce == "max":  # with an edited pattern, which is read instead of q and k
        how["interventions"] = [actions(served.oracle)[0]]
    before = len(server.log())
    ours, oracle = (synopsis.attention_synopsis(model, PROMPTS, **how) for model in served)
    (passed,) = server.log()[before:]
    assert passed["out"] < 60_000  # the images, and a number for each pair of groups
    assert ours.dims == oracle.dims
    assert all(ours[dim].equals(oracle[dim]) for dim in ours.dims)
    assert bool(oracle.notnull().any())
    torch.testing.assert_close(
        torch.tensor(ours.values), torch.tensor(oracle.values), rtol=0, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("by", [(), ("layer", "head", "step")])
def test_a_heat_map_is_summed_there(served: Pair, by: Any) -> None:
    how: dict[str, Any] = {**RUN, "by": by, "steps": [0, 2]}
    ours, oracle = (
        readout.heatmap(model, PROMPTS, ["circle", "square"], **how) for model in served
    )
    assert ours.dims == oracle.dims
    assert all(ours[dim].equals(oracle[dim]) for dim in ours.coords)
    largest = float(oracle.max())
    torch.testing.assert_close(
        torch.tensor(ours.values), torch.tensor(oracle.values), rtol=0, atol=1e-5 * largest
    )


# Every other family

FLOAT32_LATENTS = ("CogView4", "Wan", "HunyuanVideo")
"""Their latents begin in float32 in a model of any dtype, and the oracle keeps them so."""
ROUNDING = 2 * 3 * 2 * 32 * 2**-24
"""Largest sum of float32's rounding on both sides, in 3 steps of 2 blocks, each of some 32 operations
one after the other."""
BETWEEN_HIDDEN = ("CogVideoX", "CogView3-Plus", "ERNIE-Image")
"""Their loops hide tensors between calls: the first two call their scheduler in two places, the last
draws its latents itself.
"""


OTHERS = [name for name in PIPELINES if name not in (*NO_FOLDER, *SERVED, "Ideogram 4")]


def test_the_page_names_them() -> None:
    page = (Path(__file__).parents[3] / "docs" / "remote.md").read_text()
    assert f"| loopback server: {', '.join(SERVED)} |" in page
    assert f"| this process: {', '.join(OTHERS)} |" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_family(name: str, folders, tmp_path_factory) -> None:
    """In this process: the image, every name read, and all names written at once."""
    folder = folder_of(name, folders, tmp_path_factory)
    dtype = torch.float32 if name in FLOAT32_LATENTS else torch.float64
    both = pair(RemoteTextToImage(folder, dtype=dtype), folder, name, dtype)
    part = ROUNDING if name in FLOAT32_LATENTS else 1e-5
    close(both.ours(PROMPTS, **RUN), both.oracle(PROMPTS, **RUN), part)
    fired = firing(both.oracle, 0, 2)
    names = [name for name in fired if readable(both.ours, name)]
    hidden = [name for name in fired if name not in names]
    assert bool(hidden) == (name in BETWEEN_HIDDEN)
    for each in hidden:
        with pytest.raises(ValueError, match="not within nnsight's reach"):
            both.ours.run_with_cache(PROMPTS, **RUN, names_filter=[each])
    _, cache = both.oracle.run_with_cache(PROMPTS, **RUN, branch="both", names_filter=names)
    _, found = both.ours.run_with_cache(PROMPTS, **RUN, branch="both", names_filter=names)
    for key, tensor in cache.items():
        close(found[key], tensor, part)
    hooks = [(name, nudge) for name in names]
    expected = both.oracle.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks)
    assert (expected - both.oracle(PROMPTS, **RUN)).abs().max() > 1e-3
    close(both.ours.run_with_hooks(PROMPTS, **RUN, fwd_hooks=hooks), expected, part)


def readable(model: RemoteTextToImage, name: str) -> bool:
    """True unless the plan of a trace refuses the name."""
    if (inner := name.rpartition(".")[2]) in pipeline_plan.BETWEEN:
        try:
            pipeline_plan.check_between(type(model.pipe), Site("sampler", inner, 0))
        except ValueError:
            return False
    return True


# What cannot be


def test_what_no_trace_reaches_is_said_before_anything_is_sent(
    served: Pair, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, before = served.ours, len(server.log())
    for resume in (ours.trajectory, ours.at, ours.denoise):
        with pytest.raises(NotImplementedError, match="always runs whole"):
            resume(PROMPTS)
    for tool in (readout.attention_sinks, readout.massive_activations):
        with pytest.raises(NotImplementedError, match="always runs whole"):
            tool(ours, PROMPTS[0])
    with pytest.raises(NotImplementedError, match="text encoders of this pipeline have no names"):
        readout.diffusion_lens(ours, PROMPTS[0])
    name = "steps.1.cond.blocks.1.hook_resid_post"
    with pytest.raises(NotImplementedError, match="No gradients"):
        ours.run_with_hooks(PROMPTS, bwd_hooks=[(name, nudge)])
    for less in ({"heads": "L1H0"}, {"patterns": "received"}, {"out": "nowhere"}):
        with pytest.raises(ValueError, match="keeps whole tensors, in memory"):
            ours.run_with_cache(PROMPTS, names_filter=name, **less)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"steps.7.*goes over steps 0 to 2"):
        ours.run_with_hooks(PROMPTS, num_steps=3, fwd_hooks=[(name.replace("1", "7", 1), nudge)])
    with pytest.raises(ValueError, match="equally many"):
        ours.patch(PROMPTS, PROMPTS[0], {})
    attention = f"blocks.1.{next(iter(text_attentions(ours.dit).values()))}"

    (tap,) = (
        tap
        for tap in ours.dit.blocks[1].taps
        if isinstance(tap, KernelTap) and tap.heads.place == attention
    )
    processor: Any = tap.module.processor

    class Own(type(processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return processor(*args, **kwargs)

    monkeypatch.setattr(tap.module, "processor", Own())
    with pytest.raises(ValueError, match="Own calls no attention kernel"):
        ours.run_with_cache(PROMPTS, names_filter=f"{attention}.hook_q", steps=0)
    monkeypatch.undo()
    draft = served.oracle.draft(PROMPTS)
    monkeypatch.setattr(type(ours.pipe), "__call__", lambda self: None)
    with pytest.raises(ValueError, match=r"calls self.scheduler.step in 0 places of its loop"):
        pipeline_plan.make(ours, draft, Request(keep=[Site("sampler", "hook_out", 1)]))
    assert len(server.log()) == before


# The scheduler


def shifted(model: HookedTextToImage) -> Any:
    """The model's scheduler with other settings."""
    return type(model.scheduler).from_config(model.scheduler.config, shift=5.0)


def test_a_server_keeps_its_scheduler(served: Pair) -> None:
    kept = served.ours.scheduler
    with pytest.raises(ValueError, match="scheduler of the folder that it opened: save one"):
        served.ours.scheduler = shifted(served.ours)
    assert served.ours.scheduler is kept
    served.ours.scheduler = kept  # no other


def test_another_scheduler_is_set_in_this_process(exact: Pair) -> None:
    plain, kept = exact.ours(PROMPTS, **RUN), exact.ours.scheduler
    try:
        exact.ours.scheduler = exact.oracle.pipe.scheduler = shifted(exact.oracle)
        assert exact.ours.nnsight.pipeline.scheduler is exact.ours.scheduler
        expected = exact.oracle(PROMPTS, **RUN)
        assert (expected - plain).abs().max() > 1e-4
        close(exact.ours(PROMPTS, **RUN), expected, 1e-9)
    finally:
        exact.ours.scheduler = exact.oracle.pipe.scheduler = kept
    close(exact.ours(PROMPTS, **RUN), plain, 1e-9)


def test_rows_that_a_pipeline_draws_together_are_refused() -> None:
    model = HookedTextToImage.from_pipeline(tiny_pipeline("GLM-Image")[0])
    model.options = options("GLM-Image")
    with pytest.raises(ValueError, match="give one prompt at a time, or prior_token_ids="):
        RemotePipeline.call_of(model, PROMPTS, model.draft(PROMPTS))  # type: ignore[arg-type]
    one = RemotePipeline.call_of(model, PROMPTS[0], model.draft(PROMPTS[0]))  # type: ignore[arg-type]
    assert one["prompt"] == PROMPTS[:1]
    tokens = torch.zeros(2, 16, dtype=torch.long)
    draft = model.draft(PROMPTS, prior_token_ids=tokens)
    sent = RemotePipeline.call_of(model, PROMPTS, draft)  # type: ignore[arg-type]
    assert sent["prior_token_ids"] is tokens
