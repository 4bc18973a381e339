"""A server that speaks NDIF's protocol, for tests: it runs whatever it is sent, so it listens on
the loopback alone.

    python -I tests/dit_lens/remote/ndif_server.py [--port PORT] [--hooked-models FOLDER]

Without a folder to import `hooked_models` from, this process has none of the packages of ABSENT, as
a stranger's server. It prints one line of JSON: `port`, and, unless a port was given, `child` and
`child_port` of a second server, forked off, which a test may kill.

The first part of a path is the face it shows: "locked" wants the API key SECRET; "old" says that it
runs another nnsight; "gated" does not say, and refuses the client's; "stuck" takes runs and never
begins them. "open" has no quirk, and neither has an address without a face.

What nnsight 0.8.1 asks for: GET /env; POST /request, a form with `data` (JSON: model_key, compress,
…) and `blob` (the block); GET /response/{id}, 404 until there is a status; on COMPLETED its `data`
is the address of the result, written by torch.save. GET /log tells the test what has passed: bytes
in and out of every run.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import http.server
import io
import json
import os
import sys
import threading
import traceback
import uuid
import warnings
from typing import Any

ABSENT = (
    "dit_lens",
    "hooked_models",
    "transformer_lens",
    "jaxtyping",
    "beartype",
    "einops",
    "xarray",
    "sklearn",
)
SECRET = "open-sesame"

MODELS: dict[str, Any] = {}
STATUS: dict[str, str] = {}
RESULTS: dict[str, bytes] = {}
LOG: list[dict[str, Any]] = []
ONE_AT_A_TIME = threading.Lock()


def open_model(key: str) -> Any:
    import torch
    from nnsight.modeling.huggingface import HuggingFaceModel

    if key not in MODELS:
        # without a dtype every component has that of its files, and a pipeline's may differ
        MODELS[key] = model = HuggingFaceModel.from_model_key(
            key, dispatch=True, dtype=torch.float32
        )
        model._module.requires_grad_(False)
        model.pipeline.set_progress_bar_config(disable=True)
    return MODELS[key]


def execute(key: str, blob: bytes, compress: bool) -> bytes:
    """As NDIF's actor does: rebuild the block around the live model, run it, keep what was
    saved.
    """
    import torch
    import zstandard
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import _saves, dec, inc

    model = open_model(key)
    try:
        tracer = RequestModel.deserialize(
            blob, model._remoteable_persistent_objects(), compress=compress
        )
        inc()
        try:
            tracer.execute(tracer.info.code)
            marked = _saves()
            saved = {
                name: value
                for name, value in tracer.info.frame.f_locals.items()
                if id(value) in marked
            }
        finally:
            dec()
    finally:
        model.interleaver.cancel()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return (
        zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())
        if compress
        else buffer.getvalue()
    )


def work(run: str, request: dict[str, Any], blob: bytes, address: str) -> None:
    from nnsight.schema.response import ResponseModel, Status

    def say(status: Status, description: str = "", data: str | None = None) -> None:
        STATUS[run] = ResponseModel(
            id=run, status=status, description=description, data=data
        ).model_dump_json()

    try:
        with ONE_AT_A_TIME:
            say(Status.RUNNING)
            RESULTS[run] = execute(request["model_key"], blob, request["compress"])
            LOG.append({"in": len(blob), "out": len(RESULTS[run])})
        say(Status.COMPLETED, data=f"{address}/result/{run}")
    except BaseException:
        say(Status.ERROR, traceback.format_exc())


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def answer(self, body: Any, code: int = 200) -> None:
        data = (
            body
            if isinstance(body, bytes)
            else (body if isinstance(body, str) else json.dumps(body)).encode()
        )
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def route(self) -> tuple[str, list[str]]:
        face, *rest = self.path.strip("/").split("/")
        return (
            (face, rest)
            if face in ("open", "locked", "old", "gated", "stuck")
            else ("open", [face, *rest])
        )

    def locked_out(self, face: str) -> bool:
        wrong = face == "locked" and self.headers.get("ndif-api-key") != SECRET
        if wrong:
            self.answer({"detail": "Missing or invalid API key."}, 401)
        return wrong

    def do_GET(self) -> None:
        from importlib.metadata import version

        face, path = self.route()
        if path == ["env"] and face != "gated":
            versions = {
                name: version(name) for name in ("nnsight", "diffusers", "transformers", "torch")
            }
            self.answer(
                {
                    "python_version": sys.version,
                    "packages": versions | ({"nnsight": "0.7.3"} if face == "old" else {}),
                }
            )
        elif path[0] == "response" and path[1] in STATUS:
            if not self.locked_out(face):
                self.answer(STATUS[path[1]])
        elif path[0] == "result":
            self.answer(RESULTS.pop(path[1]))
        elif path == ["log"]:
            self.answer(LOG)
        else:
            self.answer({"detail": "Not found."}, 404)

    def do_POST(self) -> None:
        from nnsight.schema.response import ResponseModel, Status

        face, _ = self.route()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.locked_out(face):
            return
        if face == "gated":
            self.answer(
                {
                    "detail": (
                        f"nnsight {self.headers['nnsight-version']} is not supported: use 0.7.x."
                    )
                },
                400,
            )
            return
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        form: Any = email.message_from_bytes(head + body, policy=email.policy.HTTP)
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in form.iter_parts()
        }
        request, run = json.loads(parts["data"]), uuid.uuid4().hex
        received = ResponseModel(id=run, status=Status.QUEUED).model_dump_json()
        STATUS[run] = received
        if face != "stuck":
            address = f"http://{self.headers['Host']}"
            threading.Thread(
                target=work, args=(run, request, parts["blob"], address), daemon=True
            ).start()
        self.answer(received)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--hooked-models")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    if options.hooked_models:
        sys.path.insert(0, options.hooked_models)
        import hooked_models  # noqa: F401
    else:
        sys.modules.update(dict.fromkeys(ABSENT))  # type: ignore[arg-type]  # None: their import fails
    import nnsight.modeling.diffusion  # noqa: F401  (so that the fork has it too)
    import torch

    torch.set_num_threads(1)
    from diffusers import PixArtSigmaPipeline  # noqa: F401

    server = http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    said = {"port": server.server_address[1]}
    if not options.port:
        second = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        said["child_port"] = second.server_address[1]
        said["child"] = os.fork()
        server, other = (server, second) if said["child"] else (second, server)
        other.socket.close()
    if said.get("child", 1):
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
