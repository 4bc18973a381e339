"""Everything that writes results to a folder, small enough to be killed hundreds of times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file

from dit_lens import evaluation, sweep, synopsis
from dit_lens.intervene.interventions import Add, Intervention
from dit_lens.sweep import results
from dit_lens.training import PRESETS, TrainConfig, build_pipeline, train
from dit_lens.training.history import History
from dit_lens.training.pipelines import Size
from hooked_models import GenerationCache, HookedTextToImage
from recipes.claims import stage

from ..pipelines import PROMPTS, tiny_pipeline
from .harness import User, same_tensors

STEPS = 2


def users(patch: pytest.MonkeyPatch) -> dict[str, User]:
    """By name. `patch` makes them small; their models are shared."""
    patch.setattr(results, "FLUSH_SECONDS", 0.0)
    patch.setattr(evaluation, "BATCH", 2)
    patch.setitem(PRESETS, "nano", Size(layers=1, width=16, heads=2))
    patch.setattr("dit_lens.training.pipelines.CODEC_SCENES", 60)
    model = HookedTextToImage.from_pipeline(tiny_pipeline().to(torch.float64))
    judged = HookedTextToImage.from_pipeline(build_pipeline(PRESETS["nano"]))
    makers = [
        of_sweep(model),
        of_cache(model),
        of_synopsis(model),
        of_evaluation(judged),
        of_stage(model),
        of_training(),
        of_saving(model),
    ]
    return {user.name: user for user in makers}


def of_sweep(model: HookedTextToImage) -> User:
    cells = {
        f"layer {layer}": Intervention(f"blocks.{layer}.cross_attn.hook_z", steps=1)
        for layer in range(2)
    }
    metric = sweep.Metric(lambda images: images.mean((1, 2, 3)))

    def work(out: Path) -> xr.Dataset:
        return sweep.run(model, PROMPTS, [0], cells, {"m": metric}, out, num_steps=STEPS, batch=2)

    def same(a: xr.Dataset, b: xr.Dataset) -> None:
        # on a full disk: "not saved", and the numbers all the same
        a, b = (found.drop_vars("error") for found in (a, b))
        xr.testing.assert_allclose(a, b, rtol=0, atol=1e-10)

    return User("sweep", work, same)


def of_cache(model: HookedTextToImage) -> User:
    names = lambda name: "hook_z" in name or "hook_latent" in name  # noqa: E731

    def work(out: Path) -> dict[str, torch.Tensor]:
        images, cache = model.run_with_cache(PROMPTS, num_steps=STEPS, names_filter=names, out=out)
        return {"images": images, **cache}

    return User(
        "cache", work, same_tensors, lambda folder: dict(GenerationCache.load(folder, model))
    )


def of_synopsis(model: HookedTextToImage) -> User:
    added = Intervention(
        "hook_latent", steps=0, action=Add(torch.ones(4, 1, 1, dtype=torch.float64))
    )

    def work(out: Path) -> xr.DataArray:
        return synopsis.attention_synopsis(
            model,
            [*PROMPTS, PROMPTS[0]],
            [0, 1, 2],
            num_steps=1,
            interventions=[added],
            batch_size=1,
            out=out,
        )

    return User("synopsis", work, xr.testing.assert_identical)


def of_evaluation(model: HookedTextToImage) -> User:
    def work(out: Path) -> pd.DataFrame:
        return evaluation.evaluate_model(model, 2, templates=[], out=out)

    return User("evaluation", work, pd.testing.assert_frame_equal)


def of_stage(model: HookedTextToImage) -> User:
    def made(model: HookedTextToImage, n: int) -> pd.DataFrame:
        return pd.DataFrame(
            {"x": np.arange(n), "y": [model(PROMPTS[:1], i, 1).mean().item() for i in range(n)]}
        )

    return User(
        "stage", lambda out: stage(out, "made", model, made, 3), pd.testing.assert_frame_equal
    )


def of_training() -> User:
    def work(out: Path) -> tuple[Any, ...]:
        settings = {
            "batch_size": 2,
            "precision": "no",
            "checkpoint_every": 1,
            "evaluate_every": 2,
            "evaluation_scenes": 1,
        }
        folder = train(TrainConfig(out=out, size="nano", steps=3, **settings, dynamics_points=0))
        transformer = HookedTextToImage.from_pretrained(out, check=False).dit.state_dict()
        state = load_file(out / "checkpoint.safetensors")
        shown = (out / "metrics.jsonl").read_text()
        return (
            state,
            {name: tensor.clone() for name, tensor in transformer.items()},
            History.read(out).rows,
            shown,
            folder.name,
        )

    def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
        same_tensors(a[0], b[0])
        same_tensors(a[1], b[1])
        assert a[2:] == b[2:]

    return User("training", work, same, weights)


def of_saving(model: HookedTextToImage) -> User:
    def work(out: Path) -> dict[str, torch.Tensor]:
        model.save_pretrained(out)
        return dict(
            HookedTextToImage.from_pretrained(
                out, dtype=torch.float64, check=False
            ).dit.state_dict()
        )

    return User("saving", work, same_tensors, weights)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model in a folder."""
    model = HookedTextToImage.from_pretrained(folder)
    parts = {"dit": model.dit, "codec": model.codec, "text_encoder": model.text_encoder}
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
