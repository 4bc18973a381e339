"""Pipelines of many families through nnsight, here and on a server without dit_lens: the numbers of
the local hooked model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dit_lens.remote import RemotePipeline, RemoteTextToImage
from hooked_models import HookedTextToImage

from ..hooked_models.tiny_pipelines import PIPELINES, tiny_pipeline
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
