"""A server that speaks NDIF's protocol: sending it a trace, waiting for the result, and saying what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

Result = TypeVar("Result")

POLL, PATIENCE = 0.05, 3.0
"""Seconds before the first look at a run's status (later ones are rarer), and for which a server may be silent."""
COMPARED = {"nnsight": 2, "diffusers": 2, "transformers": 1}
"""Packages whose versions must agree, and in how many numbers: they decide the names of modules and the format of requests."""


class ServerError(RuntimeError):
    """A server could not be asked, or a run failed there.

    Args:
        message: one sentence, and what to do.
        remote_traceback: what the server said of a run that failed.
        lost: whether there was no answer at all.
    """

    def __init__(self, message: str, remote_traceback: str = "", lost: bool = False) -> None:
        super().__init__(message)
        self.remote_traceback, self.lost = remote_traceback, lost


class Server:
    """Where a model runs.

    Args:
        host: "http://…" or "https://…"; None for nnsight's own setting (`NDIF_HOST`).
        api_key: None for nnsight's own setting (`NDIF_API_KEY`). It is sent with requests, and never printed or raised.
        timeout: seconds to wait for a run.
    """

    def __init__(self, host: str | None, api_key: str | None, timeout: float) -> None:
        nnsight = import_nnsight()
        self.host: str = (host or nnsight.CONFIG.API.HOST).rstrip("/")
        if not self.host.startswith(("http://", "https://")):
            raise ValueError(f"remote={self.host!r}: write the address with its scheme, as in 'http://{self.host}'.")
        self.timeout = timeout
        self._api_key = api_key
        self._compared = False

    def __repr__(self) -> str:
        return f"Server({self.host!r}, timeout={self.timeout:g})"

    def backend(self, model_key: str) -> Any:
        """What a trace or session takes as `backend`.

        Raises:
            ServerError: there is no answer, or its packages are of other versions than ours.
        """
        from nnsight.intervention.backends.remote import RemoteBackend

        if not self._compared:
            self._compare_versions()
            self._compared = True
        # Not the websocket: waiting there has no end when the server hangs, and a run is lost with the connection.
        return RemoteBackend(model_key, host=self.host, api_key=self._api_key, blocking=False)

    def wait(self, backend: Any) -> dict[str, Any]:
        """The saved values of a run that was sent, by their names in the traced block.

        Raises:
            ServerError: the run failed, the server does not answer any more, or `timeout` is over.
        """
        pause, sent, lost_at = POLL, time.monotonic(), None
        while True:
            try:
                result, lost_at = self.asked(backend), None
            except ServerError as error:
                if not error.lost:
                    raise
                result, lost_at = None, lost_at or time.monotonic()
            if result is not None:
                return result
            if lost_at is not None and time.monotonic() > lost_at + PATIENCE:
                raise ServerError(
                    f"{self.host} does not answer any more; the run {backend.job_id} was {_name(backend.status)} when last "
                    "heard of. If the server has died, so has the run: start it and run again.",
                    lost=True,
                )
            if time.monotonic() > sent + self.timeout:
                raise ServerError(
                    f"No result within {self.timeout:g} s: the run {backend.job_id} is {_name(backend.status)} at {self.host}. "
                    "Say timeout=… for more, or ask for less: fewer steps, prompts or tensors."
                )
            time.sleep(pause)
            pause = min(1.0, 1.3 * pause)

    def asked(self, ask: Callable[[], Result]) -> Result:
        """What `ask` returns; its errors of nnsight and httpx as ServerErrors."""
        import httpx
        from nnsight.intervention.backends.remote import RemoteError

        try:
            return ask()
        except (RemoteError, httpx.HTTPError) as error:
            cause: Any = error.__cause__ if isinstance(error, RemoteError) else error
            explained = self._explained(error, getattr(cause, "response", None), cause)
        raise explained  # out here, where it has no context: that would be the request, whose headers hold the key

    def _explained(self, error: Exception, response: Any, cause: Any) -> ServerError:
        import httpx

        if response is not None and response.status_code in (401, 403):
            return ServerError(f"{self.host} refused the API key: say api_key=…, or set NDIF_API_KEY.")
        if response is not None:
            said = str(error).removeprefix("Failed to send request: ")
            return ServerError(f"{self.host} refused the run (HTTP {response.status_code}): {said}")
        if isinstance(cause, httpx.TransportError):
            return ServerError(
                f"No server answers at {self.host} ({type(cause).__name__}): is it running, and the address right?", lost=True
            )
        text = str(error).strip()
        last = text.splitlines()[-1] if text else "it did not say why"
        return ServerError(f"The run failed at {self.host}: {last}", remote_traceback=text)

    def _compare_versions(self) -> None:
        import httpx

        def ask() -> dict[str, Any]:
            response = httpx.get(f"{self.host}/env", timeout=httpx.Timeout(10.0, read=60.0))
            if response.status_code == 404:
                return {}  # a server that does not tell
            return response.raise_for_status().json().get("packages", {})

        theirs = self.asked(ask)
        for package, numbers in COMPARED.items():
            ours, found = version(package), str(theirs.get(package, ""))
            if found and found.split(".")[:numbers] != ours.split(".")[:numbers]:
                raise ServerError(
                    f"{self.host} runs {package} {found}, and here is {ours}: the names of modules or the format of requests "
                    f"may differ. Install {package} {'.'.join(found.split('.')[:numbers])}.* here, or the same as here there."
                )


def import_nnsight() -> Any:
    """The package, or an ImportError that says how to get it."""
    try:
        import nnsight
    except ModuleNotFoundError as error:
        raise ImportError("RemoteTextToImage needs nnsight: pip install 'dit_lens[remote]'") from error
    return nnsight


def _name(status: Any) -> str:
    return "in an unknown state" if status is None else str(getattr(status, "value", status))
