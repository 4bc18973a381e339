"""One tiny pipeline and one server for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.pipelines import small_vae
from dit_lens.remote import RemoteTextToImage
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import randomise, tiny_pipeline
from .served import Served

nnsight = pytest.importorskip("nnsight")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of public classes alone: T5, PixArt with a learned variance, AutoencoderKL."""
    pipe = tiny_pipeline("t5", learned_sigma=True)
    torch.manual_seed(3)
    pipe.vae = small_vae(sample_size=8)
    randomise(pipe.text_encoder, 0.1)
    path = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    nnsight.CONFIG.APP.REMOTE_LOGGING = False
    served = Served()
    yield served
    served.stop()


@pytest.fixture(scope="session")
def hooked(folder: Path) -> HookedTextToImage:
    """The oracle."""
    return HookedTextToImage.from_pretrained(folder)


@pytest.fixture(scope="session")
def remote(folder: Path, server: Served) -> RemoteTextToImage:
    return RemoteTextToImage(folder, remote=server.url)
