"""Servers that are silent, slow or no NDIF servers at all: one sentence each, within the timeout.

All on loopback.
"""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dit_lens.remote import RemoteTextToImage, ServerError

PROMPT = "red circle is above blue square"
TIMEOUT = 1.5
ENVIRONMENT = b"/env"


def reply(body: bytes, status: str = "200 OK") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def silent(connection: socket.socket, stop: threading.Event) -> None:
    stop.wait()


def drip(start: bytes) -> Callable[[socket.socket, threading.Event], None]:
    def talk(connection: socket.socket, stop: threading.Event) -> None:
        connection.sendall(start)
        while not stop.wait(0.3):
            connection.sendall(b" ")

    return talk


def say(answer: bytes) -> Callable[[socket.socket, threading.Event], None]:
    return lambda connection, stop: connection.sendall(answer)


@contextmanager
def serving(
    talk: Callable[[socket.socket, threading.Event], None], environment: bool
) -> Iterator[str]:
    """A server whose every answer is `talk`'s; with `environment`, it is a well-behaved one when
    its packages are requested.
    """
    stop, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                request = connection.recv(2**16)
                (
                    say(reply(b'{"packages": {}}'))
                    if environment and ENVIRONMENT in request
                    else talk
                )(connection, stop)
                if not environment or ENVIRONMENT not in request:
                    connection.settimeout(0.2)
                    # read the request to its end, so that closing does not reset it
                    while connection.recv(2**16):
                        pass
            except OSError:
                pass

    def accept() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.close()


DEEP = b"[" * 100_000 + b"]" * 100_000
HUGE = json.dumps({"packages": {"nnsight": "9" * 20_000_000}}).encode()
LONG = json.dumps({"packages": {"nnsight": "9" * 500_000}}).encode()
TALKS = {
    "silent": (silent, "has not answered within 1.5 s"),
    "a byte now and then": (
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"),
        "has not answered within 1.5 s",
    ),
    "headers byte by byte": (drip(b"HTTP/1.1 200 OK\r\nX:"), "has not answered within 1.5 s"),
    "html": (say(reply(b"<html><body>Welcome</body></html>")), "not as an NDIF server does"),
    "a list": (say(reply(b"[1, 2]")), "not as an NDIF server does"),
    "null": (say(reply(b"null")), "not as an NDIF server does"),
    "a number": (say(reply(b"3")), "not as an NDIF server does"),
    "an empty body": (say(reply(b"")), "not as an NDIF server does"),
    "no unicode": (say(reply(b"\xff\xfe\x00")), "not as an NDIF server does"),
    "deep": (say(reply(DEEP)), "not as an NDIF server does"),
    "other keys": (say(reply(b'{"package": {}}')), "not as an NDIF server does"),
    "packages of another kind": (say(reply(b'{"packages": [1]}')), "not as an NDIF server does"),
    "huge": (say(reply(HUGE)), "not as an NDIF server does"),
    "a long version": (say(reply(LONG)), "runs nnsight 99999"),
    "an error page": (
        say(reply(b"<html>" + b"x" * 10**6, "500 Internal Server Error")),
        r"HTTP 500",
    ),
    "moved": (say(reply(b"", "302 Found")), r"HTTP 302"),
    "no http": (say(b"SSH-2.0-OpenSSH_9.6\r\n"), "No server answers"),
    "nothing": (lambda connection, stop: None, "No server answers"),
}


@pytest.fixture(scope="module")
def model(folder: Path) -> RemoteTextToImage:
    return RemoteTextToImage(folder, remote="http://127.0.0.1:9", timeout=TIMEOUT)


@pytest.mark.parametrize(
    "environment", [False, True], ids=["from the start", "when the run is sent"]
)
@pytest.mark.parametrize("name", TALKS)
def test_every_answer_is_one_sentence_within_the_timeout(
    model: RemoteTextToImage, name: str, environment: bool
) -> None:
    talk, message = TALKS[name]
    if environment and name in ("huge", "a long version", "other keys", "packages of another kind"):
        message = "not as an NDIF server does"
    with serving(talk, environment) as url:
        model.server = type(model.server)(url, None, TIMEOUT)
        start = time.monotonic()
        with pytest.raises(ServerError, match=message) as caught:
            model(PROMPT, num_steps=1)
        took = time.monotonic() - start
    said = str(caught.value)
    assert url in said
    assert len(said) < 600
    assert "\n" not in said
    # nnsight raises within its own frames when a trace is sent
    assert caught.value.__context__ is None or environment
    assert took < TIMEOUT + 10  # tracing itself, on a loaded machine, is the remainder


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_is_a_positive_number(folder: Path, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout="):
        RemoteTextToImage(folder, remote="http://127.0.0.1:9", timeout=timeout)


def test_a_result_with_code_is_not_loaded(model: RemoteTextToImage, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "made by code"),)

    model.server = type(model.server)("http://127.0.0.1:9", None, TIMEOUT)
    model.server._compared = True
    backend, blob = model.server.backend("key"), io.BytesIO()
    backend.compress = False
    torch.save({"found": Code()}, blob)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        backend.finalize(blob.getvalue())
    assert not list(tmp_path.iterdir())
    torch.save({"found": {"images": torch.ones(2)}}, whole := io.BytesIO())
    assert backend.finalize(whole.getvalue())["found"]["images"].sum() == 2
