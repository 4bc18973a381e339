"""Revisions are commits; what the hub refuses is one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from hooked_models import HookedTextToImage


def hub_cache(folder: Path, cache: Path, commits: dict[str, float]) -> str:
    """A cache as huggingface_hub leaves it, with the model at several commits, the last of which is
    `main`.
    """
    repository = cache / "models--somebody--tiny"
    for commit, bias in commits.items():
        snapshot = repository / "snapshots" / commit
        shutil.copytree(folder, snapshot)
        network = PixArtTransformer2DModel.from_pretrained(snapshot, subfolder="transformer")
        network.proj_out.bias.fill_(bias)
        network.save_pretrained(snapshot / "transformer")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
    return "somebody/tiny"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_a_revision_is_a_commit_and_is_recorded(folder: Path, tmp_path: Path) -> None:
    old, new = "a" * 40, "b" * 40
    name = hub_cache(folder, tmp_path, {old: 1.0, new: 2.0})
    latest = HookedTextToImage.from_pretrained(name, cache_dir=tmp_path)
    pinned = HookedTextToImage.from_pretrained(name, cache_dir=tmp_path, revision=old)
    assert (latest.source.commit, latest.dit.proj_out.bias[0]) == (new, 2)
    assert (pinned.source.commit, pinned.dit.proj_out.bias[0]) == (old, 1)
    empty = HookedTextToImage.from_pretrained(name, cache_dir=tmp_path, revision=old, weights=False)
    assert (empty.source, empty.dit.device.type) == (pinned.source, "meta")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("weights", [True, False])
def test_offline_the_error_says_how_to_fetch(tmp_path: Path, weights: bool) -> None:
    with pytest.raises(FileNotFoundError, match=r"hf download somebody/absent --revision abc"):
        HookedTextToImage.from_pretrained(
            "somebody/absent", cache_dir=tmp_path, revision="abc", weights=weights
        )


@pytest.mark.parametrize(
    ("cause", "error", "message"),
    [
        (
            GatedRepoError,
            PermissionError,
            r"gated: accept its terms at https://huggingface.co/some/model",
        ),
        (RepositoryNotFoundError, FileNotFoundError, "has no model 'some/model'"),
        (RevisionNotFoundError, FileNotFoundError, r"has no revision 'v9'.*commits/main"),
    ],
)
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, cause: type[Exception], error: type[Exception], message: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        response = httpx.Response(
            403, request=httpx.Request("GET", "https://huggingface.co/some/model")
        )
        raise OSError("Cannot load model some/model") from cause("refused", response=response)

    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    with pytest.raises(error, match=message):
        HookedTextToImage.from_pretrained("some/model", revision="v9")


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(ValueError, match="which has no revisions"):
        HookedTextToImage.from_pretrained(folder, revision="abc")
