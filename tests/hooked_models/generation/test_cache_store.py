"""Caches on disk, always against the whole cache in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_models import CacheTooLargeError, GenerationCache, HookedTextToImage

from ...killing import killed
from ..pipelines import PROMPTS, SCHEDULERS, tiny_pipeline
from .watching import STEPS, is_pattern, is_watched, run


def test_a_cache_on_disk_is_the_one_in_memory(exact, whole, tmp_path: Path) -> None:
    cache = run(exact, branch="both", names_filter=is_watched, out=tmp_path / "run")
    assert set(cache) == set(whole)
    assert all(torch.equal(cache[name], whole[name]) for name in whole)
    assert torch.equal(
        cache["pattern", 1, "cross_attn", 1, "uncond"],
        whole["pattern", 1, "cross_attn", 1, "uncond"],
    )
    assert torch.equal(cache.stack("z", 0, "attn"), whole.stack("z", 0, "attn"))
    assert torch.equal(cache["steps.1.eps"], whole["steps.1.eps"])
    assert torch.equal(
        cache.at(step=1).stack_activation("z"), whole.at(step=1).stack_activation("z")
    )
    assert torch.equal(
        cache.cache_dict.read("steps.1.hook_latent", slice(1, 2)), whole["steps.1.hook_latent"][1:]
    )
    assert cache.nbytes == whole.nbytes
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        *("images.safetensors", "index.json", "lock"),
        *(f"step-00{step}.safetensors" for step in range(STEPS)),
        "text.safetensors",
    ]


def test_a_folder_opens_without_the_model(tmp_path: Path) -> None:
    pipe = tiny_pipeline("t5")
    pipe.save_pretrained(tmp_path / "model")
    model = HookedTextToImage.from_pretrained(tmp_path / "model")
    _, cache = model.run_with_cache(
        PROMPTS, num_steps=1, names_filter=is_pattern, out=tmp_path / "run"
    )
    opened = GenerationCache.load(tmp_path / "run")
    assert opened.model.dit.device.type == "meta"
    alias = "steps.0.cond.blocks.1.hook_cross_pattern"
    assert torch.equal(opened[alias], cache[alias])
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        GenerationCache.load(tmp_path)
    HookedTextToImage.from_pipeline(pipe).run_with_cache(
        PROMPTS, num_steps=1, names_filter=is_pattern, out=tmp_path / "other"
    )
    with pytest.raises(ValueError, match="does not say which model"):
        GenerationCache.load(tmp_path / "other")


@pytest.mark.parametrize(
    "scheduler",
    [
        "flow",
        "unipc",
        *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("third order", "ddim", "euler")),
    ],
)
def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, total, killed_at = (
        HookedTextToImage.from_pipeline(tiny_pipeline(scheduler=SCHEDULERS[scheduler])),
        5,
        3,
    )
    settings = {
        "num_steps": total,
        "names_filter": lambda name: "resid_post" in name or "hook_latent" in name,
    }
    images, whole = model.run_with_cache(PROMPTS, **settings)
    denoise, ran = model.denoise, []

    killed(
        lambda: model.run_with_cache(PROMPTS, out=tmp_path / "run", **settings),
        model,
        "denoise",
        killed_at + 1,
    )
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        GenerationCache.load(tmp_path / "run", model)

    def counted(latents: Any, timestep: Any, *args: Any) -> Any:
        ran.append(timestep[0])
        return denoise(latents, timestep, *args)

    monkeypatch.setattr(model, "denoise", counted)
    resumed, cache = model.run_with_cache(PROMPTS, out=tmp_path / "run", **settings)
    timesteps = model.solver(total).scheduler.timesteps.tolist()
    # the last step before the end may not have been written yet
    assert ran in (timesteps[killed_at:], timesteps[killed_at - 1 :])
    before = len(ran)
    assert torch.equal(resumed, images)
    assert set(cache) == set(whole)
    assert all(torch.equal(cache[name], whole[name]) for name in whole)
    again, _ = model.run_with_cache(PROMPTS, out=tmp_path / "run", **settings)
    assert len(ran) == before  # what has ended is not run again
    assert torch.equal(again, images)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "noise"),
        ({"guidance": 3.0}, r"guidance \(4\.5, now 3\.0\)"),
        ({"names_filter": "hook_image"}, "names"),
        (
            {"names_filter": is_pattern, "patterns": "entropy"},
            r"names, patterns \('whole', now 'entropy'\)",
        ),
        ({"prompts": [PROMPTS[1]] * 2}, "text"),
        ({"weights": 1}, "model"),
    ],
)
def test_a_folder_of_another_generation_is_refused(tmp_path: Path, change, named) -> None:
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    settings = {
        "prompts": PROMPTS,
        "num_steps": 1,
        "names_filter": "blocks.0.attn.hook_z",
        "out": tmp_path,
    }
    model.run_with_cache(**settings)
    if change.pop("weights", 0):
        model.dit.proj_out.bias[0] += 1e-6
    with pytest.raises(ValueError, match=f"with other {named}: choose another folder"):
        model.run_with_cache(**settings | change)


def test_hooks_are_recorded_but_cannot_be_compared(exact, tmp_path: Path) -> None:
    settings = {"num_steps": 1, "names_filter": "steps.0.hook_x0", "out": tmp_path}
    with exact.hooks([("steps.0.hook_latent", lambda latent, hook: 2 * latent)]):
        _, cache = exact.run_with_cache(PROMPTS, **settings)
        assert not torch.equal(
            cache["steps.0.hook_x0"],
            run(exact, names_filter="steps.0.hook_latent")["steps.0.hook_latent"],
        )
        with pytest.raises(ValueError, match=r"with hooks on steps\.0\.hook_latent, and whether"):
            exact.run_with_cache(PROMPTS, **settings)
    with pytest.raises(ValueError, match="with other hooks"):
        exact.run_with_cache(PROMPTS, **settings)


def test_a_full_disk_is_noticed_before_running(
    exact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(exact, "run", lambda *args: pytest.fail("it ran"))
    with pytest.raises(CacheTooLargeError, match="1000 B are free"):
        run(exact, out=tmp_path / "not" / "there")


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_every_file_of_a_cache_is_known(tmp_path: Path, damage: str) -> None:
    """A damaged or missing step is named, at the latest when a tensor of it is read; no step is
    left out in silence.
    """
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    settings = {
        "num_steps": 3,
        "names_filter": lambda name: "hook_latent" in name or "resid_post" in name,
    }
    model.run_with_cache(PROMPTS, out=tmp_path / "run", **settings)
    for file in sorted((tmp_path / "run").glob("*.safetensors")):
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[-1] ^= 1
        if damage == "delete":
            file.unlink()
        else:
            file.write_bytes({"flip": bytes(changed), "truncate": whole[:-1], "empty": b""}[damage])
        with pytest.raises(
            OSError,
            match=rf"{file} is (missing|damaged).*delete the folder {tmp_path / 'run'} and run again",
        ):
            dict(GenerationCache.load(tmp_path / "run", model))
        file.write_bytes(whole)
    assert len(dict(GenerationCache.load(tmp_path / "run", model)))
