"""Training: exact resumption after SIGKILL, objectives that match their schedulers, and a recipe
that learns.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dit_lens import scenes
from dit_lens.task.sentences import all_captions
from dit_lens.training import (
    PRESETS,
    TrainConfig,
    build_pipeline,
    dynamics,
    finished,
    loop,
    train,
)
from dit_lens.training.data import encode_captions
from dit_lens.training.history import open_run
from dit_lens.training.objectives import CleanImageObjective, NoiseObjective
from dit_lens.training.pipelines import Size, load_pipeline

from ...killing import killed

TINY = {
    "size": "nano",
    "batch_size": 4,
    "precision": "no",
    "checkpoint_every": 2,
    "evaluate_every": 100,
    "evaluation_scenes": 2,
    "dynamics_points": 2,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", Size(layers=1, width=32, heads=2))
    monkeypatch.setattr("dit_lens.training.pipelines.CODEC_SCENES", 100)


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint.safetensors")


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert {k for k in a if k.startswith("muon")}
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_killed_at_any_moment_it_resumes_bit_exactly(tmp_path):
    config = TrainConfig(
        out=tmp_path / "whole",
        steps=8,
        caption_dropout=0.3,
        anchored_steps=2,
        spreading_steps=4,
        trios=0.5,
        **TINY,
    )
    train(config)

    broken = replace(config, out=tmp_path / "killed")
    # at the checkpoints of steps 4 and 6; tests/hooked_models/store kills it at any file operation
    for _ in range(2):
        killed(lambda: train(broken), loop, "save_checkpoint", 2)
    train(broken)

    assert_equal_states(final_state(config.out), final_state(broken.out))
    logged = [json.loads(line) for line in (broken.out / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in logged]
    assert steps == sorted(set(steps))
    courses = [pd.read_parquet(c.out / "dynamics.parquet") for c in (config, broken)]
    last = courses[0][courses[0]["step"] == 8].set_index("quantity")["value"]
    assert logged[-1]["dipole"] == pytest.approx(last["dipole"], abs=1e-3) != 0
    assert sorted(courses[0]["step"].unique()) == dynamics.record_points(8, 2) == [1, 8]
    pd.testing.assert_frame_equal(*courses)
    weights = [
        load_file(c.out / "pipeline/transformer/diffusion_pytorch_model.safetensors")
        for c in (config, broken)
    ]
    for key in weights[0]:
        assert torch.equal(weights[0][key], weights[1][key])


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    launch = [
        str(Path(sys.executable).with_name("torchrun")),
        "--nproc_per_node",
        "2",
        "-m",
        "dit_lens.cli",
        "train",
    ]
    options = [
        "--size=nano",
        "--batch-size=2",
        "--precision=no",
        "--evaluation-scenes=2",
        "--dynamics-points=1",
    ]
    options += ["--checkpoint-every=1"]
    for steps, logged in ((2, [8]), (3, [8, 12])):  # the second goes on where the first ended
        command = [*launch, "--out", str(tmp_path), "--steps", str(steps), *options]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [entry["samples"] for entry in log] == logged


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    config = TrainConfig(out=tmp_path, steps=2, **TINY)
    train(config)
    with pytest.raises(ValueError, match=r"muon_lr \(0\.002, now 0\.1\)"):
        train(replace(config, muon_lr=0.1))
    train(replace(config, steps=3))  # going on for longer is no other run


def test_other_settings_are_refused_before_the_first_checkpoint(tmp_path):
    config = TrainConfig(out=tmp_path, steps=2, **TINY)
    with open_run(tmp_path, {"size": "nano", "seed": 0}, ()) as run:
        loop.start_pipeline(config, run)
    assert not finished(tmp_path)  # though it has a pipeline
    with pytest.raises(ValueError, match=r"seed \(0, now 7\)"):
        open_run(tmp_path, {"size": "nano", "seed": 7}, ())


def test_the_history_is_the_checkpoints_whatever_becomes_of_the_files(tmp_path):
    config = TrainConfig(
        out=tmp_path, steps=4, **{**TINY, "dynamics_points": 2, "evaluate_every": 2}
    )
    train(config)
    assert finished(tmp_path)
    log, course = tmp_path / "metrics.jsonl", tmp_path / "dynamics.parquet"
    whole, points = log.read_text(), pd.read_parquet(course)
    assert len(whole.splitlines()) == 2
    for damage in (whole[:-5], "", whole + '{"step": 9}\n', None):
        log.unlink() if damage is None else log.write_text(damage)
        course.write_bytes(b"")
        train(config)
        assert log.read_text() == whole
        pd.testing.assert_frame_equal(pd.read_parquet(course), points)


def test_a_run_that_version_0_1_began_goes_on(tmp_path):
    """Its checkpoint has no history and its folder no index; a kill has torn its last line."""
    config = TrainConfig(
        out=tmp_path, steps=2, **{**TINY, "dynamics_points": 1, "evaluate_every": 1}
    )
    train(config)
    before = (tmp_path / "metrics.jsonl").read_text()
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        known = {key: file.metadata()[key] for key in ("step", "facts")}
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != "history.course"}  # noqa: SIM118
    save_file(tensors, tmp_path / "checkpoint.safetensors", known)
    (tmp_path / "index.json").unlink()
    (tmp_path / "metrics.jsonl").write_text(before + '{"step": 3, "lo')
    train(replace(config, steps=3))
    log = (tmp_path / "metrics.jsonl").read_text()
    assert log.startswith(before)
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 2, 3]
    assert sorted(pd.read_parquet(tmp_path / "dynamics.parquet")["step"].unique()) == [2, 3]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"size": "micro"}, "1 layers of width 32, not what --size micro says"),
        ({"objective": "epsilon"}, "sample, not what --objective epsilon says"),
        ({"encoder": "rte-nopos"}, "rte, not what --encoder rte-nopos says"),
        ({"encoder": "t5-scenes"}, "rte, not what --encoder t5-scenes says"),
        ({"encoder": "fused"}, "rte, not what --encoder fused says"),
        ({"heads": 4}, "1 layers of width 32, not what --size nano says"),
    ],
)
def test_a_model_of_another_kind_is_no_start(tmp_path, settings, says):
    build_pipeline(PRESETS["nano"], "rte").save_pretrained(tmp_path / "source")
    config = TrainConfig(
        out=tmp_path / "run", steps=1, init_from=str(tmp_path / "source"), **{**TINY, **settings}
    )
    with pytest.raises(ValueError, match=says):
        train(config)


def test_the_fused_encoder_trains_resumes_and_goes_on(tmp_path):
    config = TrainConfig(out=tmp_path / "a", steps=1, encoder="fused", moved_share=0.5, **TINY)
    train(config)
    folder = train(replace(config, steps=2))
    assert load_pipeline(str(folder)).text_encoder.config.share == 0.5
    train(
        TrainConfig(
            out=tmp_path / "b",
            steps=1,
            encoder="fused",
            moved_share=0.5,
            init_from=str(folder),
            **TINY,
        )
    )
    with pytest.raises(ValueError, match="fused, not what --encoder fused says"):
        train(
            TrainConfig(out=tmp_path / "c", steps=1, encoder="fused", init_from=str(folder), **TINY)
        )


def test_heads_and_weight_decay_are_what_they_say(tmp_path):
    folder = train(TrainConfig(out=tmp_path / "run", steps=1, heads=4, **TINY))
    assert load_pipeline(str(folder)).transformer.config.num_attention_heads == 4
    # one step of Muon without gradient: only the decay acts
    model = build_pipeline(PRESETS["nano"]).transformer
    config = TrainConfig(out=tmp_path, weight_decay=0.5, muon_lr=0.1, precision="no")
    muon = loop.build_optimizers(model, config)["muon"]
    weight = model.transformer_blocks[0].attn1.to_q.weight
    before = weight.detach().clone()
    for group in muon.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    muon.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5))


def test_a_held_out_relation_is_never_drawn():
    seen = scenes.sample(640, seed=0, without="upper_left")
    assert {scene.relation for scene in seen} == set(scenes.RELATIONS) - {"upper_left"}
    assert scenes.sample(64, seed=0, without=None) == scenes.sample(64, seed=0)


def test_settings_at_their_ends(tmp_path):
    assert (
        TrainConfig(tmp_path, steps=10, decay_from=1.0, warmup_steps=0).learning_rate_factor(9) == 1
    )
    with pytest.raises(ValueError, match="one scene at least"):
        train(TrainConfig(tmp_path, steps=1, **{**TINY, "evaluation_scenes": 0}))


def test_starting_from_a_model_takes_its_weights_and_codec(tmp_path):
    first = train(TrainConfig(out=tmp_path / "first", steps=2, **TINY))
    train(
        TrainConfig(
            out=tmp_path / "second", steps=1, muon_lr=0.0, adam_lr=0.0, init_from=str(first), **TINY
        )
    )
    a, b = (
        load_file(p / "transformer/diffusion_pytorch_model.safetensors")
        for p in (first, tmp_path / "second/pipeline")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (
        load_file(p / "vae/diffusion_pytorch_model.safetensors")
        for p in (first, tmp_path / "second/pipeline")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_speed_is_of_training_alone(tmp_path, monkeypatch):
    now = 0.0

    def takes(seconds, function):
        def slow(*args, **options):
            nonlocal now
            now += seconds
            return function(*args, **options)

        return slow

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(loop.StepData, "__call__", takes(0.5, loop.StepData.__call__))
    monkeypatch.setattr(dynamics, "measure", takes(1000, dynamics.measure))
    monkeypatch.setattr(loop, "score", takes(100, loop.score))
    settings = {**TINY, "dynamics_points": 3, "evaluate_every": 30}
    train(TrainConfig(out=tmp_path, steps=50, **settings))
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["samples_per_second"] for entry in log if "samples_per_second" in entry] == [
        4 / 0.5
    ] * 2
    assert now == 25 + 3000 + 200


@pytest.mark.parametrize("encoder", ["rte", "rte-nopos"])
def test_the_null_caption_of_training_is_the_empty_prompt_of_sampling(encoder):
    pipe = build_pipeline(PRESETS["nano"], encoder)
    text, mask = encode_captions(pipe, ["", "red circle is above blue square"])
    reference, reference_mask, null, null_mask = pipe.encode_prompt(
        "red circle is above blue square", True, max_sequence_length=20, clean_caption=False
    )
    length = text.shape[1]
    assert torch.equal(mask[0], null_mask[0, :length])
    assert mask[0].sum() == 1
    assert torch.equal(mask[1], reference_mask[0, :length])
    assert torch.equal(text[0][mask[0].bool()], null[0, :length][mask[0].bool()])
    assert torch.equal(text[1], reference[0, :length])


def test_all_captions_are_924_and_cover_what_is_sampled():
    captions = all_captions()
    assert len(captions) == len(set(captions)) == 924
    assert {scenes.caption(s) for s in scenes.sample(3000, seed=0, split="all")} <= set(captions)


@pytest.mark.parametrize(
    ("objective", "prediction"),
    [(CleanImageObjective(), "clean"), (NoiseObjective(), "noise")],
    ids=["x0", "epsilon"],
)
def test_a_perfect_network_has_no_loss_and_samples_the_image(objective, prediction):
    clean = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    alphas = DDPMScheduler().alphas_cumprod

    def perfect(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if prediction == "clean":
            return clean
        signal = alphas[timestep.long()][:, None, None, None]
        return (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()

    assert objective.loss(perfect, clean, torch.Generator().manual_seed(0)) < 1e-6
    name = "x0" if prediction == "clean" else "epsilon"
    assert (
        objective.loss(
            lambda noisy, t: perfect(noisy, t) + 1, clean, torch.Generator().manual_seed(0)
        )
        > 0.9
    )
    scheduler = build_pipeline(PRESETS["nano"], objective=name).scheduler
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    scheduler.set_timesteps(14)
    latent = (
        torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
        * scheduler.init_noise_sigma
    )
    for t in scheduler.timesteps:
        latent = scheduler.step(perfect(latent, t.expand(3)), t, latent).prev_sample
    assert (latent - clean).abs().max() < 1e-3


def test_noise_levels_of_training_are_those_the_saved_scheduler_tells_the_network():
    seen = []

    def spy(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append((noisy, timestep))
        return torch.zeros_like(noisy)

    CleanImageObjective().loss(spy, torch.zeros(20000, 1, 1, 1), torch.Generator().manual_seed(0))
    noisy, timestep = seen[0]
    scheduler = build_pipeline(PRESETS["nano"]).scheduler
    scheduler.set_timesteps(14)
    for t, sigma in itertools.islice(
        zip(scheduler.timesteps, scheduler.sigmas, strict=False), 1, 12
    ):
        near = (timestep - t).abs() < 30
        assert noisy[near].std().item() == pytest.approx(sigma.item(), abs=0.05)


def test_schedules():
    config = TrainConfig(
        out=Path("x"),
        steps=1000,
        warmup_steps=10,
        decay_from=0.5,
        biased_steps=100,
        anchored_steps=200,
        spreading_steps=100,
    )
    assert [config.learning_rate_factor(s) for s in (0, 9, 500, 1000)] == pytest.approx(
        [0.1, 1.0, 1.0, 0.02]
    )
    assert config.learning_rate_factor(750) == pytest.approx(0.51)
    assert [config.spread(s) for s in (0, 199, 299, 900)] == [0.0, 0.0, 1.0, 1.0]
    assert [config.red_first(s) for s in (0, 50, 100)] == pytest.approx([0.9, 0.7, 0.5])
    assert TrainConfig(out=Path("x")).spread(0) == 1.0
    assert TrainConfig(out=Path("x")).red_first(0) == 0.5


@pytest.mark.slow
def test_the_recipe_learns_colours(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", Size(3, 192, 3))
    train(
        TrainConfig(
            out=tmp_path,
            size="nano",
            steps=400,
            anchored_steps=400,
            evaluate_every=400,
            evaluation_scenes=32,
        )
    )
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["color"] > 0.8
