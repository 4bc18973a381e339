"""The lab's server: this machine only, nothing from elsewhere, one drawing at a time."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import secrets
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.generation.pipeline import HookedPipeline

from ..readout import screening
from ..readout.heat_maps import heatmap_and_run, text_attentions
from .state import State

LONGEST_REQUEST = 64_000
DIRECTION_WORDS = ("above", "below", "left", "right")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Lab:
    """A model behind the page.

    Args:
        model: any that has attention to a text.
        name: by which `from_pretrained` opens it again.

    Raises:
        TypeError: the model is none of this library's.
        ValueError: no attention of it reads a text.

    Example:
        >>> lab = Lab(HookedTextToImage.from_pretrained("rte-nano"), "rte-nano")
        >>> answer = lab.draw(State("red circle is above square", num_steps=1, last=0))
        >>> sorted(answer)
        ['attention', 'edited', 'original', 'snippet', 'tokens']
    """

    def __init__(self, model: HookedTextToImage, name: str) -> None:
        if not isinstance(model, HookedTextToImage):
            raise TypeError(f"The lab needs a HookedTextToImage, not {type(model).__name__}.")
        self.model, self.name = model, name
        self.heads = [
            f"L{layer}H{head}"
            for layer in text_attentions(model.dit)
            for head in range(model.cfg.n_heads)
        ]
        self.cosines = self._cosines()
        self._originals: dict[tuple[str, int, int], dict[str, Any]] = {}

    def draw(self, state: State) -> dict[str, Any]:
        """Images as data URLs, tokens, attention of heads, and the snippet.

        Tokens are [position, text], attention [head token], at the first step without the edit.

        Raises:
            ValueError: the state and the model do not go together.
        """
        original = self._original(state)
        edited = _url(state.draw(self.model)) if state.heads else original["original"]
        return {**original, "edited": edited, "snippet": state.snippet(self.model, self.name)}

    def _original(self, state: State) -> dict[str, Any]:
        """Without an edit; kept, since clicks change the edit more often than the prompt."""
        key = state.prompt, state.seed, state.num_steps
        if key not in self._originals:
            if len(self._originals) > 30:
                self._originals.clear()
            (text,) = self.model.encoded_texts([state.prompt])
            tokens = [
                (place, text.text[start:end] or text.kinds[place])
                for place, (start, end) in enumerate(text.spans)
                if text.kinds[place] != "pad" and (start < end or text.kinds[place] == "eos")
            ]
            found, run = heatmap_and_run(
                self.model,
                state.prompt,
                [[place] for place, _ in tokens],
                by=("layer", "head"),
                steps=0,
                seed=state.seed,
                num_steps=state.num_steps,
            )
            assert run is not None
            attention = found[0].stack(name=("layer", "head")).transpose("name", "word", ...)
            self._originals[key] = {
                "original": _url(run.images),
                "tokens": tokens,
                "attention": attention.values.reshape(*attention.shape[:2], -1)
                .mean(-1)
                .round(4)
                .tolist(),
            }
        return self._originals[key]

    def _cosines(self) -> dict[str, float]:
        """Screening of each head with direction words.

        Empty for a model that does not know them, or has no linear map from words to keys.
        """
        if isinstance(self.model, HookedPipeline):
            return {}
        try:
            vectors = {word: screening.word_vector(self.model, word) for word in DIRECTION_WORDS}
            table = screening.screen_heads(self.model.dit, vectors)
        except ValueError:
            return {}
        rows: Any = table.itertuples()
        return {f"L{row.layer}H{row.head}": round(float(row.cosine), 3) for row in rows}

    def page(self, token: str) -> str:
        """The HTML, with the token that its requests carry."""
        here = files(__package__)
        script = (here / "lab.js").read_text()
        facts = {
            "model": self.name,
            "heads": self.heads,
            "cosines": self.cosines,
            "token": token,
            "prompt": "red circle is above blue square" if self.cosines else "",
            "other": "red circle is below blue square" if self.cosines else "",
        }
        return Template((here / "lab.html").read_text()).substitute(
            SCRIPT_HASH="sha256-"
            + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            SCRIPT=script,
            DATA=json.dumps(facts).replace("<", "\\u003c"),
        )


def serve(
    lab: Lab, host: str = "127.0.0.1", port: int = 7860, names: Sequence[str] = LOOPBACK
) -> HTTPServer:
    """A server of the lab, bound and not yet running: `serve(lab).serve_forever()`.

    Requests to draw need the token of the page that this server gave out, and the address that they
    were sent to must be one of `names`: a page of another site can neither read nor start anything.

    Args:
        lab: the model and its page; one request draws at a time.
        host: the address to listen at; by default, this machine alone can reach it.
        port: 0 for any that is free.
        names: host names under which the server is visited.

    Raises:
        OSError: the port is taken.

    Example:
        >>> lab = Lab(HookedTextToImage.from_pretrained("rte-nano"), "rte-nano")
        >>> server = serve(lab, port=0)
        >>> server.server_address[0]
        '127.0.0.1'
        >>> server.server_close()
    """
    facts = {"lab": lab, "token": secrets.token_urlsafe(16), "names": names}
    return HTTPServer((host, port), type("Handler", (_Handler,), facts))


class _Handler(BaseHTTPRequestHandler):
    """Answers requests for the page and for images; subclassed for each server."""

    lab: Lab
    token: str
    names: Sequence[str]

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path.split("?")[0] != "/":
            self._answer(404, b"There is one page here: /", "text/plain")
            return
        self._answer(200, self.lab.page(self.token).encode(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if self._refused():
            return
        length = self.headers.get("Content-Length", "")
        if not secrets.compare_digest(
            self.headers.get("X-Token", "").encode(), self.token.encode()
        ):
            self._json(403, {"error": "Open the page anew: it was given out by another server."})
        elif not length.isdecimal() or int(length) > LONGEST_REQUEST:
            self._json(413, {"error": "The request is too long."})
        else:
            self._draw(self.rfile.read(int(length)))

    def _draw(self, body: bytes) -> None:
        try:
            given = json.loads(body)
            answer = self.lab.draw(State.read(given if isinstance(given, dict) else {}))
        except (ValueError, TypeError, LookupError) as error:
            message = error.args[0] if error.args else type(error).__name__
            self._json(400, {"error": str(message)})
        else:
            self._json(200, answer)

    def _refused(self) -> bool:
        visited = self.headers.get("Host", "").rsplit(":", 1)[0].strip("[]")
        if visited in self.names:
            return False
        self._answer(403, b"This address is not one of the lab's names.", "text/plain")
        return True

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


def _url(image: Float[Tensor, "1 3 height width"]) -> str:
    buffer = io.BytesIO()
    pixels = (
        (image[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy().astype(np.uint8)
    )
    Image.fromarray(pixels).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
