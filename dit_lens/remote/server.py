"""A server that speaks NDIF's protocol: send it a trace, wait for the result, and explain failures.

Every exchange with the server has a deadline: one `timeout` for the whole of a request, from the
comparison of versions to the result. Answers of any other form than NDIF's become a ServerError,
and results are loaded without pickled code.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from threading import Thread
from typing import Any, TypeVar

import torch

from hooked_models.arguments import number

Result = TypeVar("Result")

POLL, PATIENCE = 0.05, 3.0
"""Seconds before the first look at a run's status (later ones are rarer), and for which a server
may be silent.
"""
COMPARED = {"nnsight": 2, "diffusers": 2, "transformers": 1}
"""Packages whose versions must agree, and in how many numbers: they decide the names of modules and
the format of requests.
"""
LONGEST_MESSAGE, LARGEST_ENVIRONMENT = 300, 2**20
"""Characters of a server's text that a message quotes, and bytes of its list of packages."""


class ServerError(RuntimeError):
    """A server could not be asked, or a run failed there.

    Args:
        message: one sentence, and the remedy.
        remote_traceback: the server's traceback of a run that failed.
        lost: True if there was no answer at all.

    Example:
        >>> ServerError("http://localhost:1 does not answer: start it.", lost=True).lost
        True
    """

    def __init__(self, message: str, remote_traceback: str = "", lost: bool = False) -> None:
        super().__init__(message)
        self.remote_traceback, self.lost = remote_traceback, lost


class Server:
    """Where a model runs.

    Args:
        host: "http://…" or "https://…"; None for nnsight's own setting (`NDIF_HOST`).
        api_key: None for nnsight's own setting (`NDIF_API_KEY`). It is sent with requests, and
            never printed or raised.
        timeout: seconds for a request as a whole.

    Raises:
        ValueError: the address has no scheme, or `timeout` is no positive number.
    """

    def __init__(self, host: str | None, api_key: str | None, timeout: int | float) -> None:
        nnsight = import_nnsight()
        self.host: str = (host or nnsight.CONFIG.API.HOST).rstrip("/")
        if not self.host.startswith(("http://", "https://")):
            raise ValueError(
                f"remote={self.host!r}: write the address with its scheme, as in "
                f"'http://{self.host}'."
            )
        self.timeout = number("timeout", timeout)
        if self.timeout <= 0:
            raise ValueError(f"timeout={timeout!r}: give a positive number of seconds.")
        self._api_key = api_key
        self._compared = False
        self._deadline = math.inf

    def __repr__(self) -> str:
        return f"Server({self.host!r}, timeout={self.timeout:g})"

    def backend(self, model_key: str) -> Any:
        """The `backend` of a trace or session; its time, `timeout`, begins here.

        Raises:
            ServerError: there is no answer, or its packages are of other versions than ours.
        """
        self._deadline = time.monotonic() + self.timeout
        if not self._compared:
            self._compare_versions()
            self._compared = True
        # Not the websocket: waiting there has no end when the server hangs, and a run is lost with
        # the connection.
        return _backend_class()(self, model_key, self._api_key)

    def wait(self, backend: Any) -> dict[str, Any]:
        """The saved values of a run that was sent, by their names in the traced block.

        Raises:
            ServerError: the run failed, the server does not answer any more, or `timeout` is over.
        """
        pause, lost_at = POLL, None
        while True:
            try:
                result, lost_at = backend(), None
            except ServerError as error:
                if not error.lost and time.monotonic() < self._deadline:
                    raise
                result, lost_at = None, lost_at or time.monotonic() if error.lost else None
            if result is not None:
                return result
            if lost_at is not None and time.monotonic() > lost_at + PATIENCE:
                raise ServerError(
                    f"{self.host} does not answer any more; the run {backend.job_id} was "
                    f"{_name(backend.status)} when last "
                    "heard of. If the server has died, so has the run: start it and run again.",
                    lost=True,
                )
            if time.monotonic() > self._deadline:
                raise ServerError(
                    f"No result within {self.timeout:g} s: the run {backend.job_id} is "
                    f"{_name(backend.status)} at {self.host}. "
                    "Say timeout=… for more, or request less: fewer steps, prompts or tensors."
                )
            time.sleep(min(pause, max(0.0, self._deadline - time.monotonic())))
            pause = min(1.0, 1.3 * pause)

    def exchange(self, talk: Callable[[], Result]) -> Result:
        """The value of `talk`, which speaks with the server and nothing else, before the deadline.

        httpx limits the silence between two bytes, not the whole: a server that sends a byte a
        second never exceeds it. So `talk` runs in a thread of its own, which is left behind when
        the time is over.

        Raises:
            ServerError: the time is over, there is no answer, or it is no answer of NDIF's.
        """
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append((talk(), None))
            except Exception as error:  # of nnsight, pydantic or httpx, at a foreign answer
                outcome.append((None, error))

        thread = Thread(target=run, daemon=True)
        thread.start()
        thread.join(max(0.0, self._deadline - time.monotonic()))
        if not outcome:
            raise ServerError(
                f"{self.host} has not answered within {self.timeout:g} s: say timeout=… for more, "
                "or see whether it is busy."
            )
        value, error = outcome[0]
        if error is None:
            return value
        # out here, where it has no context: that would be the request, whose headers hold the key
        raise self._explained(error)

    def _explained(self, error: Exception) -> ServerError:
        import httpx
        from nnsight.intervention.backends.remote import RemoteError

        if isinstance(error, ServerError):
            return error
        cause: Any = error.__cause__ if isinstance(error, RemoteError) else error
        response = getattr(cause, "response", None) if isinstance(cause, httpx.HTTPError) else None
        if response is not None and response.status_code in (401, 403):
            return ServerError(
                f"{self.host} refused the API key: say api_key=…, or set NDIF_API_KEY."
            )
        if response is not None:
            said = _short(str(error).removeprefix("Failed to send request: "))
            return ServerError(f"{self.host} refused the run (HTTP {response.status_code}): {said}")
        if isinstance(cause, httpx.TransportError):
            return ServerError(
                f"No server answers at {self.host} ({type(cause).__name__}): is it running, and "
                "the address right?",
                lost=True,
            )
        if not isinstance(error, RemoteError):
            return ServerError(
                f"{self.host} answers, but not as an NDIF server does ({type(error).__name__}: "
                f"{_short(str(error))}): is the address right?"
            )
        text = str(error).strip()
        last = text.splitlines()[-1] if text else "it did not say why"
        return ServerError(f"The run failed at {self.host}: {_short(last)}", remote_traceback=text)

    def _compare_versions(self) -> None:
        theirs = self.exchange(self._packages)
        for package, numbers in COMPARED.items():
            ours, found = version(package), _short(str(theirs.get(package, "")), 40)
            if found and found.split(".")[:numbers] != ours.split(".")[:numbers]:
                raise ServerError(
                    f"{self.host} runs {package} {found}, and here is {ours}: the names of modules "
                    f"or the format of requests may differ. Install {package} "
                    f"{'.'.join(found.split('.')[:numbers])}.* here, or the same as here there."
                )

    def _packages(self) -> dict[str, Any]:
        import httpx

        text = b""
        with httpx.stream("GET", f"{self.host}/env", timeout=self.timeout) as response:
            if response.status_code == 404:
                return {}  # a server that does not tell
            response.raise_for_status()
            for chunk in response.iter_bytes():
                text += chunk
                if len(text) > LARGEST_ENVIRONMENT:
                    raise ValueError(f"a list of packages of more than {LARGEST_ENVIRONMENT} bytes")
        packages = json.loads(text)["packages"]
        if not isinstance(packages, dict):
            raise ValueError("a list of packages that is no object")
        return packages


def _backend_class() -> Any:
    """The backend of nnsight, with our deadline on every exchange.

    It loads no pickled code. A function, because nnsight is imported where it is needed only.
    """
    from nnsight.intervention.backends.remote import RemoteBackend

    class Backend(RemoteBackend):
        def __init__(self, server: Server, model_key: str, api_key: str | None) -> None:
            super().__init__(model_key, host=server.host, api_key=api_key, blocking=False)
            self.server = server

        def _post(self, request: Any, blob: bytes) -> Any:
            return self.server.exchange(lambda: RemoteBackend._post(self, request, blob))

        def poll(self, tracer: Any = None) -> Any:
            return self.server.exchange(lambda: RemoteBackend.poll(self, tracer))

        def finalize(self, content: bytes) -> Any:
            if self.compress:
                import zstandard

                content = zstandard.ZstdDecompressor().decompress(content)
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    return Backend


def import_nnsight() -> Any:
    """The package, or an ImportError that says how to get it."""
    try:
        import nnsight
    except ModuleNotFoundError as error:
        raise ImportError(
            "RemoteTextToImage needs nnsight: pip install 'dit_lens[remote]'"
        ) from error
    return nnsight


def _name(status: Any) -> str:
    return (
        "in an unknown state"
        if status is None
        else _short(str(getattr(status, "value", status)), 40)
    )


def _short(text: str, length: int = LONGEST_MESSAGE) -> str:
    """At most `length` characters of a server's text, in one line."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[:length] + "…"
