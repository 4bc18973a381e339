"""Every cell of a sweep against its own run with hooks, one at a time; what is shared, counted; and
what survives.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_lens import scenes, sweep
from dit_lens.intervene.interventions import Add, Intervention, Replace, Scale
from dit_lens.stats import clustered_mean, clustered_means, paired_difference
from dit_lens.store import fingerprint
from dit_lens.sweep import results
from hooked_models import HookedTextToImage, UnknownHookError

from ...killing import killed
from ..sweeps import METRICS, PROMPTS, SEEDS, STEPS, durable, pixels, shards, tiny


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return tiny()


ACTIONS = {
    "zero": "zero",
    "mean": "mean",
    "resample": "resample",
    "scale": Scale(-1.5),
    "add": None,  # of a vector that has the site's size
    "replace": Replace(torch.tensor(0.2)),
}
DENOISER = {  # site → heads, tokens
    "blocks.1.cross_attn.hook_z": ([1], None),
    "blocks.1.attn.hook_v": (None, [1, 3]),
    "blocks.0.attn.hook_pattern": ([1], [2]),
    "blocks.*.hook_mlp_out": (None, [0, 2]),
    "blocks.1.hook_resid_pre": (None, None),
    "ln_final.hook_normalized": (None, None),
}
TEXT = (
    "hook_text",
    "hook_caption",
    "blocks.1.cross_attn.hook_v",
    "text_encoder.blocks.1.hook_resid_post",
)
ALIKE = ("hook_t_emb", "blocks.0.adaln.hook_gate_mlp")
"""Tensors in which prompts do not differ."""


def vector(site: str) -> Add:
    """Not the same for all channels: a LayerNorm would take that away."""
    sizes = {
        "hook_z": 8,
        "hook_v": 8,
        "hook_pattern": 4,
        "hook_latent": 4,
        "hook_x0": 4,
        "hook_out": 4,
        "hook_out_uncond": 4,
    }
    size = sizes.get(site.rpartition(".")[2], 16)
    return Add(torch.linspace(-1, 1.5, size, dtype=torch.float64))


def everything() -> dict[str, Intervention]:
    """All actions at sites of every kind, in all branches, at one step and at several."""
    found = {}
    early, late = (
        itertools.cycle([1, slice(1, None), None, 0, STEPS - 1]),
        itertools.cycle([1, None, STEPS - 1, slice(1, None)]),
    )

    def add(label: str, site: str, kind: str, steps: object = 0, **where: object) -> None:
        # what prompts share at the first step, the noise and what follows from it alone, has no
        # other mean
        steps = None if steps is None else next(late if kind in ("mean", "resample") else early)
        action = ACTIONS[kind] or vector(site)
        found[f"{site} {kind} {label}".strip()] = Intervention(
            site, steps=steps, action=action, **where
        )

    for kind, branch in itertools.product(ACTIONS, ("cond", "uncond", "both")):
        for site, (heads, tokens) in DENOISER.items():
            add(branch, site, kind, heads=heads, tokens=tokens, branch=branch)
        for site in ALIKE if branch == "both" and kind not in ("mean", "resample") else ():
            add(branch, site, kind, branch=branch)
    for kind, site in itertools.product(ACTIONS, TEXT):
        steps = None if site.startswith("text_encoder") else 0
        add("words", site, kind, steps, tokens="shape1")
        if kind not in ("mean", "resample"):
            add("null", site, kind, steps, tokens="eos", branch="uncond")
    for kind in ACTIONS:
        for site in ("hook_latent", "hook_out", "hook_x0", "hook_image"):
            add("", site, kind, None if site == "hook_image" else 0)
    for branch, step in itertools.product(("cond", "both"), (None, 0, 2)):
        hide = Intervention(
            "blocks.*.cross_attn.hook_pattern", None, "relation", step, "cond", "knockout"
        )
        found[f"words {branch} {step}"] = hide
        found[f"keys {branch} {step}"] = Intervention(
            "blocks.0.attn.hook_attn_scores", [1], [0, 2], step, branch, "knockout"
        )
    return found


def one_at_a_time(
    model: HookedTextToImage,
    several: Sequence[Intervention],
    seed: int,
    extra: Sequence[tuple] = (),
    **run: float,
) -> Tensor:
    hooks = [hook for one in several for hook in one.hooks(model, PROMPTS, num_steps=STEPS)]
    with torch.no_grad():
        return model.run_with_hooks(
            PROMPTS, seed=seed, num_steps=STEPS, fwd_hooks=[*hooks, *extra], **run
        )


def assert_equal_to_hook_runs(
    found: xr.Dataset,
    model: HookedTextToImage,
    cells: Mapping[str, Intervention | Sequence[Intervention]],
    atol: float,
    **run: float,
) -> None:
    assert (found["error"] == "").all()
    for label, several in cells.items():
        several = [several] if isinstance(several, Intervention) else several
        for seed in found["seed"].values.tolist():
            kept = {}

            def keep(tensor: Tensor, hook, kept: dict = kept) -> None:
                kept["x0"] = tensor.clone()

            # the last prediction of the clean image is where the last solver step ends
            images = one_at_a_time(
                model, several, seed, [(f"steps.{STEPS - 1}.hook_x0", keep)], **run
            )
            here = found.sel(intervention=label, seed=seed)
            for name, values in (("image", pixels(images)), ("latent", pixels(kept["x0"]))):
                for part, value in values.items():
                    np.testing.assert_allclose(
                        here[f"{name}_{part}"],
                        value,
                        rtol=atol,
                        atol=atol,
                        err_msg=f"{label}, {name}",
                    )
    clean = found.sel(seed=SEEDS[0])
    with torch.no_grad():
        images = model(PROMPTS, seed=SEEDS[0], num_steps=STEPS, **run)
    np.testing.assert_allclose(
        clean["image_mean_baseline"], images.flatten(1).mean(dim=1), rtol=0, atol=atol
    )


def differs(found: xr.Dataset, names: Sequence[str]) -> xr.DataArray:
    """True if some prompt and seed of each condition is not the clean run's."""
    parts = [abs(found[name] - found[f"{name}_baseline"]).max(["prompt", "seed"]) for name in names]
    return xr.concat(parts, "part").max("part") > 1e-6


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_cell_is_that_of_its_own_hook_run(dtype, atol):
    """All actions × sites × branches, in batches of mixed steps and layers."""
    model = tiny(dtype)
    cells = everything()
    if dtype == torch.float32:  # the same paths: a sample
        cells = dict(list(cells.items())[::9])
    seeds = SEEDS[:1] if dtype == torch.float64 else SEEDS
    found = sweep.run(model, PROMPTS, seeds, cells, METRICS, num_steps=STEPS, batch=13)
    assert list(found["intervention"].values) == list(cells)
    assert_equal_to_hook_runs(found, model, cells, atol)
    changed = differs(found, ["image_mean", "image_first", "latent_first", "latent_mean"])
    # there is one word, whose value it is
    same = {f"blocks.1.cross_attn.hook_z {kind} uncond" for kind in ("mean", "resample")}
    assert set(changed["intervention"].values[~changed]) == (
        same if dtype == torch.float64 else set()
    )


def test_batches_of_any_size_agree(model):
    cells = dict(list(everything().items())[::16])
    one, other = (
        sweep.run(model, PROMPTS, SEEDS, cells, METRICS, num_steps=STEPS, batch=batch)
        for batch in (1, 1000)
    )
    xr.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_several_interventions_of_one_condition_act_in_order(model):
    site = "blocks.0.attn.hook_z"
    double, shift = (
        Intervention(site, steps=1, action=action)
        for action in (Scale(2.0), Add(torch.tensor(1.0)))
    )
    words = Intervention("blocks.1.cross_attn.hook_pattern", tokens="relation", action="knockout")
    encoder = Intervention(
        "text_encoder.hook_out", tokens="color1", action="mean", missing="ignore"
    )
    cells = {
        "double, shift": [double, shift],
        "shift, double": [shift, double],
        "all": [encoder, words, double, shift],
    }
    found = sweep.run(model, PROMPTS, SEEDS, cells, METRICS, num_steps=STEPS)
    assert_equal_to_hook_runs(found, model, cells, 1e-10)
    assert (abs(found["latent_mean"].diff("intervention")) > 1e-6).all()


def test_without_guidance_there_is_one_branch(model):
    cells = {
        "head": Intervention("blocks.1.cross_attn.hook_z", [0], steps=1),
        "words": Intervention("text_encoder.hook_out", tokens="shape1", action="mean"),
        "latent": Intervention("hook_latent", steps=0, action=Scale(0.5)),
    }
    found = sweep.run(model, PROMPTS, SEEDS, cells, METRICS, num_steps=STEPS, guidance=1.0, batch=4)
    assert_equal_to_hook_runs(found, model, cells, 1e-10, guidance=1.0)
    with pytest.raises(ValueError, match="no unconditional branch"):
        sweep.run(
            model,
            PROMPTS,
            SEEDS,
            [Intervention("blocks.0.attn.hook_z", branch="both")],
            METRICS,
            guidance=1.0,
        )


def test_hooks_behind_a_flag():
    model = tiny()
    model.dit.set_use_attn_result(True)
    model.dit.set_use_split_qkv_input(True)
    cells = {
        site: Intervention(f"blocks.{layer}.{site}", [1], steps=1)
        for layer, site in (
            (1, "attn.hook_result"),
            (0, "attn.hook_q_input"),
            (1, "cross_attn.hook_k_input"),
        )
    }
    found = sweep.run(model, PROMPTS, SEEDS, cells, METRICS, num_steps=STEPS)
    assert_equal_to_hook_runs(found, model, cells, 1e-10)
    assert differs(found, ["latent_mean"]).all()


# Metrics


def test_metrics_on_what_one_step_predicts(model):
    """Metrics of the first touched step, or of a step that is named; nothing after it is run."""
    cells = {
        "late": Intervention("blocks.1.cross_attn.hook_z", steps=2),
        "early": Intervention("blocks.0.attn.hook_z", steps=[0, 1], branch="uncond"),
        "words": Intervention("text_encoder.hook_out", tokens="shape1"),
    }
    own = {
        name: sweep.Metric(lambda tensor: tensor.flatten(1)[:, 5], on=name)
        for name in ("x0", "out", "eps")
    }
    named = {
        "named": sweep.Metric(lambda tensor: tensor.flatten(1)[:, 5], on="steps.1.hook_latent")
    }
    found = sweep.run(model, PROMPTS, SEEDS, cells, {**own, **named}, num_steps=STEPS)
    for label, step in (("late", 2), ("early", 0), ("words", 0)):
        for seed in SEEDS:
            for edited, suffix in ((True, ""), (False, "_baseline")):
                hooks = cells[label].hooks(model, PROMPTS, num_steps=STEPS) if edited else []
                names = [f"steps.{step}.{hook}" for hook in ("hook_x0", "hook_out", "hook_latent")]
                with torch.no_grad(), model.hooks(hooks):
                    _, cache = model.run_with_cache(
                        PROMPTS, seed, STEPS, names_filter=[*names, "steps.1.hook_latent"]
                    )
                expected = {
                    "x0": cache[names[0]],
                    "out": cache[names[1]],
                    "eps": cache[f"steps.{step}.eps"],
                    "named": cache["steps.1.hook_latent"],
                }
                for name, tensor in expected.items():
                    here = found[f"{name}{suffix}"].sel(seed=seed)
                    here = here.sel(intervention=label) if "intervention" in here.dims else here
                    np.testing.assert_allclose(here, tensor.flatten(1)[:, 5], rtol=0, atol=1e-10)
    assert found["x0_baseline"].dims == ("intervention", "prompt", "seed")
    assert found["named_baseline"].dims == ("prompt", "seed")
    # step 1 comes before
    assert (found["named"] == found["named_baseline"]).sel(intervention="late").all()
    assert differs(found, ["x0"]).all()


def test_a_metric_is_given_its_prompt_and_the_clean_run(model):
    cells = {
        "head": Intervention("blocks.1.cross_attn.hook_z", steps=1),
        "all": Intervention("hook_latent", steps=1),
    }
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    metrics = {
        "moved": sweep.Metric(sweep.displacement, given=["baseline"]),
        "weighed": sweep.Metric(
            lambda images, prompt: images.flatten(1).mean(dim=1) * weights[prompt], given=["prompt"]
        ),
    }
    found = sweep.run(model, PROMPTS, SEEDS, cells, metrics, num_steps=STEPS, batch=4)
    for label, seed in itertools.product(cells, SEEDS):
        images = one_at_a_time(model, [cells[label]], seed)
        clean = one_at_a_time(model, [], seed)
        moved = (images - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
        here = found.sel(intervention=label, seed=seed)
        np.testing.assert_allclose(here["moved"], moved, rtol=0, atol=1e-10)
        np.testing.assert_allclose(
            here["weighed"], images.flatten(1).mean(dim=1) * weights, rtol=0, atol=1e-10
        )
    assert (found["moved_baseline"] == 0).all()


def test_scenes_are_judged_by_their_own_prompts():
    model = HookedTextToImage.from_pretrained("rte-micro")
    wanted = scenes.sample(3, seed=5, color_words="both")
    prompts = [scenes.caption(scene) for scene in wanted]
    cells = {
        "words": Intervention(
            "blocks.*.cross_attn.hook_pattern", tokens="shape1", action="knockout"
        )
    }
    found = sweep.run(
        model, prompts, [0], cells, {"scene": sweep.scene_metric(wanted)}, num_steps=4
    )
    with torch.no_grad():
        images = model.run_with_hooks(
            prompts,
            seed=0,
            num_steps=4,
            fwd_hooks=cells["words"].hooks(model, prompts, num_steps=4),
        )
        clean = model(prompts, seed=0, num_steps=4)
    for suffix, drawn in (("", images), ("_baseline", clean)):
        judged = scenes.evaluate(drawn, wanted)
        for verdict in ("color", "shape", "relation_loose"):
            assert (
                found[f"scene_{verdict}{suffix}"].values.flatten().tolist()
                == judged[verdict].values.tolist()
            )


# What the Dataset says


def test_effects_are_paired_and_have_intervals(model):
    cells = sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"), layers=range(2), heads=range(2), steps=[0, 2]
    )
    assert list(cells)[:3] == ["L0H0 s0", "L0H0 s2", "L0H1 s0"]
    found = sweep.run(
        model,
        PROMPTS,
        SEEDS,
        cells,
        {"mean": lambda images: images.flatten(1).mean(dim=1)},
        num_steps=STEPS,
    )
    for label in cells:
        here = found.sel(intervention=label)
        expected = paired_difference(found["mean_baseline"].values, here["mean"].values)
        np.testing.assert_allclose(here["mean_effect"], expected, rtol=0, atol=1e-12)
    wide = (
        found["mean_effect"]
        .set_index(intervention=["layer", "head", "step"])
        .unstack("intervention")
    )
    assert wide.sizes == {"interval": 3, "layer": 2, "head": 2, "step": 2}
    assert (
        wide.sel(layer=1, head=0, step=2).values.tolist()
        == found["mean_effect"].sel(intervention="L1H0 s2").values.tolist()
    )
    alone = sweep.run(
        model,
        PROMPTS[0],
        SEEDS,
        cells,
        {"mean": lambda images: images.flatten(1).mean(dim=1)},
        num_steps=STEPS,
    )
    mean, low, high = alone["mean_effect"].values.T
    assert (low < mean).any()  # of one prompt, seeds are what is drawn
    assert (mean < high).any()


def test_intervals_of_many_conditions_are_those_of_each():
    values = np.random.default_rng(0).normal(size=(5, 6, 3))
    values[1, 2, 0] = np.nan
    values[2] = 0.7
    values[3] = np.nan
    together = clustered_means(values)
    for condition, bounds in zip(values, together, strict=True):
        np.testing.assert_allclose(bounds, clustered_mean(condition), rtol=0, atol=1e-12)
    assert together[2] == pytest.approx(0.7)
    assert np.isnan(together[3]).all()


def test_conditions_are_named_apart(model):
    shift = [
        Intervention("hook_latent", steps=0, action=Add(torch.tensor(value)))
        for value in (0.1, 0.2)
    ]
    found = sweep.plan(
        model, PROMPTS, SEEDS, [*shift, [shift[0], Intervention("hook_t_emb", steps=1)]], METRICS
    )
    assert [one.label for one in found.conditions] == [
        "hook_latent steps=0 add",
        "hook_latent steps=0 add #2",
        "hook_latent steps=0 add + hook_t_emb steps=1 zero",
    ]


# What is shared


def test_work_is_what_the_prefix_tree_says(model):
    """Rows through every block, in full sampling and for what one step predicts; the decoder only
    where pixels are looked at.
    """
    layers, heads, runs = 2, 2, len(PROMPTS) * len(SEEDS)
    cells = sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"),
        layers=range(layers),
        heads=range(heads),
        steps=range(STEPS),
    )
    passed, decoded = [], []
    handles = [
        block.register_forward_pre_hook(lambda module, args: passed.append(len(args[0])))
        for block in model.dit.blocks
    ]
    decode = model.codec.decode
    try:
        model.codec.decode = lambda latent, **kwargs: (
            decoded.append(len(latent)),
            decode(latent, **kwargs),
        )[1]
        sweep.run(
            model, PROMPTS, SEEDS, cells, {"latent": METRICS["latent"]}, num_steps=STEPS, batch=40
        )
        full = sum(passed)
        passed.clear()
        x0 = sweep.Metric(lambda x0: x0.flatten(1).mean(dim=1), on="x0")
        sweep.run(model, PROMPTS, SEEDS, cells, {"x0": x0}, num_steps=STEPS, batch=40)
        one_step = sum(passed)
        assert not decoded
        sweep.run(
            model, PROMPTS, SEEDS, {"image": Intervention("hook_image")}, METRICS, num_steps=STEPS
        )
        assert sum(decoded) == 2 * runs
    finally:
        del model.codec.decode
        for handle in handles:
            handle.remove()
    # the runs; and what forks begin with, in one branch
    clean = runs * 2 * layers * STEPS + runs * layers * STEPS
    # one branch, from the head's layer on
    at_the_fork = runs * heads * sum(layers - layer for layer in range(layers)) * STEPS
    after = runs * heads * layers * 2 * layers * sum(range(STEPS))
    assert full == clean + at_the_fork + after
    assert one_step == clean + at_the_fork


def test_prompts_that_are_not_touched_are_the_clean_run(model):
    """No rows are run for them."""
    prompts = [PROMPTS[0], "red circle is blue square"]
    words = Intervention(
        "blocks.0.cross_attn.hook_pattern", tokens="relation", action="knockout", missing="ignore"
    )
    cells = {"words": words}
    plan = sweep.plan(model, prompts, SEEDS, cells, METRICS, num_steps=STEPS)
    assert [fork.rows.tolist() for fork in plan.forks] == [[0], [2]]
    found = plan.run()
    assert (found["latent_mean"] == found["latent_mean_baseline"]).sel(prompt=prompts[1]).all()
    assert (found["latent_mean"] != found["latent_mean_baseline"]).sel(prompt=prompts[0]).all()


# What goes wrong


def test_a_metric_that_fails_in_one_cell_is_reported_with_it(model):
    cells = sweep.grid(Intervention("blocks.*.attn.hook_z"), layers=range(2), steps=range(STEPS))
    plain = sweep.run(model, PROMPTS, SEEDS, cells, METRICS, num_steps=STEPS)
    target = float(plain["image_mean"].sel(intervention="L1 s1", prompt=PROMPTS[2], seed=4))

    def fussy(images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(dim=1)
        if (mean - target).abs().min() < 1e-9:
            raise RuntimeError("too dark")
        return mean

    found = sweep.run(model, PROMPTS, SEEDS, cells, {**METRICS, "fussy": fussy}, num_steps=STEPS)
    failed = found["error"] != ""
    assert failed.sum() == 1
    here = {"intervention": "L1 s1", "prompt": PROMPTS[2], "seed": 4}
    assert found["error"].sel(here) == "fussy: RuntimeError: too dark"
    assert np.isnan(found["fussy"].sel(here))
    # the others go on, in this cell too
    xr.testing.assert_allclose(found["image_mean"], plain["image_mean"])
    xr.testing.assert_allclose(
        found["fussy"].where(~failed), plain["image_mean"].where(~failed).rename("fussy")
    )
    assert np.isfinite(found["fussy_effect"]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": [[1], [2], [3], [4]]}, r"for each, \[\d seed\]"),
        ({"seeds": np.zeros((1, 1, 1), dtype=int)}, "seed"),
        ({"interventions": []}, "interventions is empty"),
        ({"metrics": {}}, "nothing is measured"),
        ({"metrics": {"m": sweep.Metric(pixels, on="hook_z")}}, "choose image"),
        ({"metrics": {"m": sweep.Metric(pixels, on="steps.3.hook_x0")}}, "steps 0 to 2"),
        ({"metrics": {"m": lambda images: images}}, "one number for each row"),
        ({"metrics": {"m": lambda images: images.nothing}}, "fails on every run"),
        (
            {
                "metrics": {"m": sweep.Metric(pixels, on="x0")},
                "interventions": [Intervention("hook_image")],
            },
            "touches none",
        ),
        ({"interventions": [Intervention("blocks.0.attn.hook_z", steps=3)]}, "0 to 2"),
        (
            {"interventions": [Intervention("hook_latent", action=Add(torch.zeros(5)))]},
            "does not broadcast",
        ),
        ({"batch": 0}, "batch=0: give an integer of at least 1"),
        ({"executor": "slurm"}, "choose 'local'"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_runs(model, arguments, message):
    chosen = {
        "interventions": [Intervention("blocks.0.attn.hook_z")],
        "metrics": METRICS,
        "seeds": SEEDS,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        sweep.run(model, PROMPTS, num_steps=STEPS, **chosen)


def test_misspelt_sites_and_attached_hooks(model):
    with pytest.raises(UnknownHookError, match=r"blocks.0.attn.hook_z"):
        sweep.run(model, PROMPTS, SEEDS, [Intervention("blocks.0.atn.hook_z")], METRICS)
    with (
        model.hooks([("steps.0.hook_latent", lambda tensor, hook: None)]),
        pytest.raises(ValueError, match="reset_hooks"),
    ):
        sweep.run(model, PROMPTS, SEEDS, [Intervention("blocks.0.attn.hook_z")], METRICS)
    with pytest.raises(ValueError, match="has none"):
        sweep.grid(Intervention("blocks.0.attn.hook_z"), layers=[0])


# What is on disk


@pytest.mark.parametrize(
    ("when", "after"), [("pixels", 2), ("pixels", 5), ("replace", 1), ("replace", 4), ("fsync", 2)]
)
def test_a_killed_sweep_goes_on(model, tmp_path, when, after, monkeypatch):
    """Every cell stands exactly once, as in a sweep that was left alone."""
    whole = sweep.run(model, PROMPTS, SEEDS, durable(), METRICS, num_steps=STEPS, batch=5)
    monkeypatch.setattr(results, "FLUSH_SECONDS", 0.0)

    def run() -> xr.Dataset:
        return sweep.run(
            model, PROMPTS, SEEDS, durable(), METRICS, tmp_path, num_steps=STEPS, batch=5
        )

    killed(run, model if when == "pixels" else os, when, after)
    before = list(tmp_path.glob("cells-*.parquet"))
    on_disk = len(shards(tmp_path)) if before else 0
    assert on_disk < whole["error"].size
    ran = []
    handle = model.dit.register_forward_pre_hook(lambda *args: ran.append(1))
    again = run()
    xr.testing.assert_allclose(again, whole, rtol=0, atol=1e-10)
    table = shards(tmp_path)
    assert sorted(table["cell"]) == list(range(whole["error"].size))

    assert ran
    ran.clear()
    third = run()
    handle.remove()
    assert not ran  # nothing is left to do
    xr.testing.assert_identical(third, again)


def test_another_sweep_is_never_mixed_in(model, tmp_path):
    cells_of_all = durable()

    def swept(
        model=model, prompts=PROMPTS, seeds=SEEDS, cells=cells_of_all, metrics=METRICS, steps=STEPS
    ):
        return sweep.run(model, prompts, seeds, cells, metrics, tmp_path, num_steps=steps)

    first = swept()
    other = tiny()
    xr.testing.assert_identical(swept(other), first)  # the same weights, loaded again
    with torch.no_grad():
        other.codec.mean.add_(1e-3)
    changed = dict(durable(), mean=Intervention("blocks.0.attn.hook_z", steps=1, action="resample"))
    shift = {"a": Intervention("hook_latent", steps=1, action=Add(torch.tensor(1.0)))}
    for arguments, what in (
        ({"model": other}, "model"),
        ({"prompts": PROMPTS[::-1]}, "prompts"),
        ({"seeds": SEEDS[::-1]}, "seeds"),
        ({"cells": changed}, "interventions"),
        ({"cells": shift}, "interventions"),
        (
            {"metrics": {"image": sweep.Metric(pixels, on="latent"), "latent": METRICS["latent"]}},
            "metrics",
        ),
        ({"steps": 4}, "num_steps"),
    ):
        with pytest.raises(ValueError, match=f"other .*{what}"):
            swept(**arguments)


def test_metrics_are_known_by_what_they_compute():
    def scaled(factor):
        return lambda images: images.mean() * factor

    known = fingerprint
    assert known(scaled(2.0)) == known(scaled(2.0))
    functions = [
        scaled(2.0),
        scaled(3.0),
        lambda images: images.sum() * 2.0,
        lambda images, prompt=None: images.mean(),
    ]
    functions += [scaled(torch.zeros(2)), scaled(torch.ones(2)), torch.nn.Linear(2, 2), pixels]
    assert len({known(function) for function in functions}) == len(functions)


@pytest.mark.parametrize("name", ["error", "prompt", "size_baseline"])
def test_names_that_results_need_are_no_metrics(model, name):
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        sweep.plan(model, PROMPTS, SEEDS, durable(), {name: pixels}, num_steps=STEPS)


class Along:
    def __init__(self, direction: float) -> None:
        self.direction = direction

    def measure(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3)) * self.direction


def test_a_metric_is_another_when_what_it_reads_changes():
    """The loop of a notebook: a threshold, or a helper, is edited in a cell of its own."""
    module: dict[str, object] = {"__name__": "notebook"}
    exec(
        "THRESHOLD = 0.5\ndef helper(x): return x > THRESHOLD\ndef metric(x): return [helper(y) "
        "for y in x]",
        module,
    )
    known, before = fingerprint, fingerprint(module["metric"])
    assert known(module["metric"]) == before
    module["THRESHOLD"] = 0.6
    assert (after := known(module["metric"])) != before
    # which names its caller: no endless recursion
    exec("def helper(x): return metric and x < THRESHOLD", module)
    assert known(module["metric"]) not in (before, after)
    assert known(Along(1.0).measure) == known(Along(1.0).measure) != known(Along(2.0).measure)


def test_a_full_disk_costs_no_results(model, tmp_path, monkeypatch):
    """Results that cannot be written are kept, tried again, reported at last, and computed by the next
    call.
    """
    write, calls = pd.DataFrame.to_parquet, itertools.count(1)

    def full(frame, file, **kwargs):
        file.write_bytes(b"half a shard")
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_at_first(frame, file, **kwargs):
        return full(frame, file) if next(calls) in (2, 3) else write(frame, file, **kwargs)

    monkeypatch.setattr(results, "FLUSH_SECONDS", 0.0)
    plain = sweep.run(model, PROMPTS, SEEDS, durable(), METRICS, num_steps=STEPS)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full_at_first)
    found = sweep.run(
        model, PROMPTS, SEEDS, durable(), METRICS, tmp_path / "a", num_steps=STEPS, batch=5
    )
    xr.testing.assert_allclose(found, plain)
    assert sorted(shards(tmp_path / "a")["cell"]) == list(range(plain["error"].size))

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.warns(UserWarning, match="No space left"):
        found = sweep.run(
            model, PROMPTS, SEEDS, durable(), METRICS, tmp_path / "b", num_steps=STEPS, batch=5
        )
    xr.testing.assert_allclose(found.drop_vars("error"), plain.drop_vars("error"))
    assert found["error"].str.startswith("not saved: ").all()
    assert not list((tmp_path / "b").glob("cells*"))
    monkeypatch.setattr(pd.DataFrame, "to_parquet", write)
    xr.testing.assert_allclose(
        sweep.run(model, PROMPTS, SEEDS, durable(), METRICS, tmp_path / "b", num_steps=STEPS), plain
    )


def test_one_run_at_a_time_writes_to_a_folder(model, tmp_path):
    plan = sweep.plan(model, PROMPTS, SEEDS, durable(), METRICS, num_steps=STEPS)
    writing = results.Results(tmp_path, plan.settings)
    with pytest.raises(ValueError, match="Another run is writing"):
        plan.run(tmp_path)
    writing.close()
    plan.run(tmp_path)


# What it costs


@pytest.mark.parametrize("on", ["image", "x0"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_work_that_a_plan_announces_is_the_work_that_is_done(model, monkeypatch, on, guidance):
    cells = sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"),
        layers=range(2),
        heads=range(2),
        steps=range(STEPS),
    )
    cells |= {
        "late": Intervention("ln_final.hook_normalized", steps=1),
        "between": Intervention("hook_latent", steps=2, action=Scale(2.0)),
    }
    metric = sweep.Metric(pixels, on=on)
    plan = sweep.plan(
        model, PROMPTS, SEEDS, cells, {"m": metric}, num_steps=STEPS, guidance=guidance, batch=7
    )
    cost = plan.cost
    done, decoded = [], []
    for block in model.dit.blocks:
        forward = block.forward
        monkeypatch.setattr(
            block,
            "forward",
            lambda x, *args, forward=forward: done.append(len(x)) or forward(x, *args),
        )
    decode = model.decoded
    monkeypatch.setattr(
        model, "decoded", lambda latent: decoded.append(len(latent)) or decode(latent)
    )
    with FlopCounterMode(display=False) as counter:
        plan.run()
    assert cost.fork_layers + len(PROMPTS) * len(SEEDS) * STEPS * 2 * (
        2 if guidance > 1 else 1
    ) <= sum(done)
    assert cost.row_layers == sum(done)
    assert cost.images == sum(decoded)
    # embeddings of rows that begin in the middle
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert cost.naive_layers == plan.cells * STEPS * 2 * (2 if guidance > 1 else 1)
    assert f"{plan.cells} cells" in plan.explain()


def test_a_batch_is_as_large_as_half_of_the_memory_allows(model, monkeypatch):
    def batch_with(free: int) -> int:
        monkeypatch.setattr("dit_lens.sweep.cost.free_bytes", lambda device: free)
        return sweep.plan(
            model,
            PROMPTS,
            SEEDS,
            {"a": Intervention("blocks.0.attn.hook_z")},
            METRICS,
            num_steps=STEPS,
        ).batch

    assert batch_with(0) == 1
    assert batch_with(2**40) == 32
    small = batch_with(2**20)
    assert 1 < small < 32
    assert batch_with(2**21) in (2 * small, 2 * small + 1)
