"""Failures between here and a server, and their messages."""

from __future__ import annotations

import builtins
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_lens.remote import RemoteTextToImage, ServerError
from dit_lens.remote import server as server_module

from .ndif_server import SECRET
from .served import Served

PROMPT = "red circle is above blue square"


def refused(folder: Path, url: str, match: str, **options: Any) -> ServerError:
    with pytest.raises(ServerError, match=match) as caught:
        RemoteTextToImage(folder, remote=url, **options)(PROMPT, num_steps=1)
    return caught.value


def test_an_api_key_is_sent_and_never_shown(
    folder, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/locked"
    model = RemoteTextToImage(folder, remote=url, api_key=SECRET)
    assert model(PROMPT, num_steps=1).shape == (1, 3, 8, 8)
    wrong = "not-the-key-7f3a"
    error = refused(folder, url, "refused the API key: say api_key=", api_key=wrong)
    assert error.__context__ is None  # httpx' error holds the request and its headers
    assert error.__cause__ is None
    said = (
        "".join(traceback.format_exception(error))
        + repr(model)
        + repr(model.server)
        + str(vars(error))
    )
    assert wrong not in said
    assert SECRET not in said
    monkeypatch.setattr("nnsight.CONFIG.API.APIKEY", SECRET)  # nnsight's own setting
    monkeypatch.setattr("nnsight.CONFIG.API.HOST", url)
    assert RemoteTextToImage(folder, remote=True)(PROMPT, num_steps=1).shape == (1, 3, 8, 8)


def test_other_versions(folder, server: Served) -> None:
    refused(folder, f"{server.url}/old", r"runs nnsight 0\.7\.3, and here is 0\.8")
    refused(
        folder,
        f"{server.url}/gated",
        r"refused the run \(HTTP 400\): nnsight 0\.8.* is not supported",
    )


def test_an_error_in_a_hook_comes_back(remote: RemoteTextToImage) -> None:
    def wrong(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return tensor.reshape(7, 11, 13)

    with pytest.raises(
        ServerError, match=r"The run failed at .*: RuntimeError: shape '\[7, 11, 13\]' is invalid"
    ) as caught:
        remote.run_with_hooks(
            PROMPT, num_steps=1, fwd_hooks=[("steps.0.cond.blocks.1.attn.hook_z", wrong)]
        )
    # the line, of a file that is not there
    assert "return tensor.reshape(7, 11, 13)" in caught.value.remote_traceback
    assert remote(PROMPT, num_steps=1).shape == (1, 3, 8, 8)  # the server goes on


def test_a_model_that_the_server_does_not_have(folder, server: Served) -> None:
    model = RemoteTextToImage(folder, remote=server.url)
    model.model_key = model.model_key.replace(str(folder), str(folder / "nowhere"))
    with pytest.raises(ServerError, match="The run failed at"):
        model(PROMPT, num_steps=1)


def test_no_server(folder) -> None:
    refused(folder, "http://127.0.0.1:9", "No server answers at .*ConnectError")
    with pytest.raises(ValueError, match="http://gpu-box:8001"):
        RemoteTextToImage(folder, remote="gpu-box:8001")


def test_waiting_has_an_end(folder, server: Served) -> None:
    refused(
        folder, f"{server.url}/stuck", r"No result within 2 s: the run \w+ is QUEUED", timeout=2
    )


def test_a_server_that_dies(folder, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "PATIENCE", 0.3)
    model = RemoteTextToImage(folder, remote=f"{server.child_url}/stuck")
    wait, alive = model.server.wait, server.child is not None

    def wait_and_die(backend: Any) -> Any:
        server.kill_child()  # it has taken the run
        return wait(backend)

    monkeypatch.setattr(model.server, "wait", wait_and_die)
    with pytest.raises(ServerError, match=r"does not answer any more; the run \w+ was QUEUED"):
        model(PROMPT, num_steps=1)
    assert alive
    refused(folder, f"{server.child_url}/stuck", "No server answers")


def test_nnsight_is_missing(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "nnsight":
            raise ModuleNotFoundError("No module named 'nnsight'", name="nnsight")
        return ordinary(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'dit_lens\[remote\]'"):
        RemoteTextToImage(folder)


@pytest.mark.slow
def test_bundled_models_where_the_server_imports_hooked_models() -> None:
    served = Served("--hooked-models", str(Path(__file__).parents[3]))
    try:
        ours, here = RemoteTextToImage("t5-micro", remote=served.url), RemoteTextToImage("t5-micro")
        torch.testing.assert_close(
            ours(PROMPT, num_steps=3), here(PROMPT, num_steps=3), rtol=0, atol=1e-5
        )
    finally:
        served.stop()
