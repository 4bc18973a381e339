"""The lab draws what its snippet draws, answers its own page alone, and works in a browser."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit_lens.intervene.interchange import Interchange
from dit_lens.lab import Lab, State, serve
from dit_lens.readout.heat_maps import text_attentions
from dit_lens.task import from_caption, layout, opposite
from hooked_models import HookedTextToImage

from ...hooked_models.tiny_pipelines import tiny_pipeline

ABOVE, BELOW = "red circle is above blue square", "red circle is below blue square"
RELATION_HEADS = ("L2H1", "L1H0", "L2H2", "L1H1")


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(HookedTextToImage.from_pretrained("rte-nano"), "rte-nano")


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[tuple[int, str]]:
    """Port and token."""
    running = serve(lab, port=0)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    port = running.server_address[1]
    page = ask(port, "GET", "/")[1]
    yield port, json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.S)[1])["token"]
    running.shutdown()
    running.server_close()


def ask(port: int, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(
        method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
    )
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


STATES = [
    State(ABOVE, num_steps=3, last=2),
    State(ABOVE, num_steps=3, heads=("L0H1", "L1H0", "L0H2"), words=(3, 0), first=1, last=2),
    State(ABOVE, num_steps=3, heads=("L1H0",), last=2),
    State(ABOVE, BELOW, 5, 3, "exchange", ("L0H1", "L1H0"), (3,), 0, 1),
    State(ABOVE, BELOW, 5, 3, "exchange", ("L0H1", "L1H0"), (), 0, 1),
    State(ABOVE, num_steps=3, action="scale", heads=("L2H1",), last=2, factor=-1.5),
    State(ABOVE, num_steps=3, action="freeze", heads=("L2H1", "L0H0"), first=0, last=2),
]


@pytest.mark.parametrize("state", STATES, ids=range(len(STATES)))
def test_a_snippet_draws_the_same_image(
    lab: Lab, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_snippet(lab, state, monkeypatch)


def check_snippet(lab: Lab, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its image is the state's bit by bit, and another one than without the edit."""
    monkeypatch.setattr(HookedTextToImage, "from_pretrained", lambda name: lab.model)
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(lab.draw(state)["snippet"], names)
    assert torch.equal(names["image"], state.draw(lab.model))
    plain = lab.model(state.prompt, seed=state.seed, num_steps=state.num_steps)
    assert torch.equal(names["image"], plain) == (not state.heads)


@pytest.mark.parametrize("kind", ["FLUX.1", "SD3", "SANA"])
def test_any_pipeline(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every action, by its snippet; attention to each token against the pattern."""
    pipe, call = tiny_pipeline(kind)
    call.pop("guidance_scale")
    model = HookedTextToImage.from_pipeline(pipe)
    model.options = call
    lab = Lab(model, kind)
    options: dict[str, Any] = {"num_steps": 2, "last": 1, "heads": ("L0H1", "L1H0")}
    for state in (
        State(ABOVE, words=(0,), **options),
        State(ABOVE, **options),
        State(ABOVE, BELOW, action="exchange", **options),
        State(ABOVE, action="scale", **options),
        State(ABOVE, action="freeze", **options),
    ):
        check_snippet(lab, state, monkeypatch)
    answer = lab.draw(State(ABOVE, **options))
    sublayer = text_attentions(lab.model.dit)[0]
    name = f"blocks.0.{sublayer}.hook_pattern"
    _, cache = lab.model.run_with_cache(ABOVE, num_steps=2, steps=[0], names_filter=name)
    pattern, layout = cache["pattern", 0, sublayer, 0][0], lab.model.layout(ABOVE)
    n = len(lab.model.encoded_texts([ABOVE])[0].ids)
    to_text = pattern[:, : layout.n_image].mean(1)[:, -n:]
    for head in range(len(to_text)):
        for (place, _), found in zip(answer["tokens"], answer["attention"][head], strict=True):
            assert found == pytest.approx(float(to_text[head, place]), abs=2e-4)


def test_frozen_heads_keep_their_attention(lab: Lab) -> None:
    state = State(ABOVE, num_steps=3, action="freeze", heads=("L2H1",), first=1, last=2)
    hooks = [
        hook
        for edit in state.interventions(lab.model)
        for hook in edit.hooks(lab.model, ABOVE, num_steps=3)
    ]
    with torch.no_grad(), lab.model.hooks(fwd_hooks=hooks):
        _, cache = lab.model.run_with_cache(
            ABOVE, num_steps=3, names_filter="blocks.2.cross_attn.hook_pattern"
        )
    first, second, third = (cache["pattern", 2, "cross_attn", step][0] for step in range(3))
    assert torch.equal(third[1], second[1])
    assert not torch.equal(second[1], first[1])
    assert not torch.equal(third[0], second[0])  # another head goes on


def test_an_exchange_is_an_interchange(lab: Lab) -> None:
    scene = from_caption(ABOVE)
    swap = Interchange(lab.model, [scene], [opposite(scene)])
    with torch.no_grad():
        expected = lab.model.run_with_hooks(
            swap.texts, seed=1, fwd_hooks=swap.hooks(["L0H1", "L1H0"], steps=slice(0, 3))
        )
    state = State(ABOVE, BELOW, 1, 14, "exchange", ("L0H1", "L1H0"), (), 0, 2)
    torch.testing.assert_close(state.draw(lab.model), expected, rtol=0, atol=1e-6)


def test_one_generation_gives_image_and_attention(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many denoiser calls as a plain image takes; none for an edit of no heads."""
    calls: list[int] = []
    denoise = lab.model.denoise
    monkeypatch.setattr(
        lab.model, "denoise", lambda *given, **how: (calls.append(1), denoise(*given, **how))[1]
    )
    with torch.no_grad():
        lab.model(ABOVE, seed=77, num_steps=2)
    plain = len(calls)
    lab.draw(State(ABOVE, seed=77, num_steps=2, last=1))
    assert len(calls) == 2 * plain > 0


def test_the_four_relation_heads_turn_the_relation() -> None:
    model = HookedTextToImage.from_pretrained("rte-micro")
    scene = from_caption(ABOVE)
    plain, turned = (
        State(ABOVE, BELOW, 1, action="exchange", heads=heads).draw(model)
        for heads in ((), RELATION_HEADS)
    )
    assert float(layout(plain, [scene])["dy"][0]) < 0 < float(layout(turned, [scene])["dy"][0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "A prompt is needed"),
        ({"prompt": ABOVE, "code": "1"}, "no field 'code'"),
        ({"prompt": ["red"]}, "prompt"),
        ({"prompt": "x" * 3000}, "at most 2000"),
        ({"prompt": ABOVE, "num_steps": 10**6}, "num_steps"),
        ({"prompt": ABOVE, "seed": "1"}, "seed"),
        ({"prompt": ABOVE, "first": 5, "last": 2}, "last"),
        ({"prompt": ABOVE, "action": "run"}, "action"),
        ({"prompt": ABOVE, "heads": ["L9H9"]}, "no head L9H9"),
        ({"prompt": ABOVE, "heads": [None]}, "None"),
        ({"prompt": ABOVE, "heads": ["L0H0"], "words": [99]}, "no position 99"),
        ({"prompt": ABOVE, "heads": ["L0H0"], "action": "exchange"}, "needs another prompt"),
        (
            {"prompt": ABOVE, "heads": ["L0H0"], "action": "exchange", "other": "red circle"},
            "tokens",
        ),
        ({"prompt": "green horse"}, "green"),
        ([], "A prompt is needed"),
    ],
)
def test_bad_requests_are_sentences(server: tuple[int, str], given: Any, message: str) -> None:
    port, token = server
    status, answer = ask(port, "POST", "/draw", json.dumps(given), X_Token=token)
    assert status == 400
    assert message in json.loads(answer)["error"]


def test_other_pages_are_refused(server: tuple[int, str]) -> None:
    """No token, another site's name, another path, a body that is too long or no JSON."""
    port, token = server
    good = json.dumps({"prompt": ABOVE, "num_steps": 1, "last": 0})
    assert ask(port, "POST", "/draw", good)[0] == 403
    assert ask(port, "POST", "/draw", good, X_Token="guess")[0] == 403
    assert ask(port, "GET", "/", Host="evil.example")[0] == 403
    assert ask(port, "POST", "/draw", good, X_Token=token, Host=f"evil.example:{port}")[0] == 403
    assert ask(port, "GET", "/etc/passwd")[0] == 404
    assert ask(port, "POST", "/draw", "x" * 70_000, X_Token=token)[0] == 413
    assert ask(port, "POST", "/draw", "{", X_Token=token)[0] == 400
    status, answer = ask(port, "POST", "/draw", good, X_Token=token, Host=f"localhost:{port}")
    assert status == 200
    assert set(json.loads(answer)) == {"original", "edited", "tokens", "attention", "snippet"}


def test_the_app_of_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is visited under the name that a Space gives it."""
    from examples.space import app

    visited: list[int] = []

    def once(running: Any) -> None:
        thread = threading.Thread(target=running.handle_request, daemon=True)
        thread.start()
        visited.append(ask(running.server_address[1], "GET", "/", Host="me-lab.hf.space")[0])

    def on_loopback(lab: Lab, host: str, port: int, names: tuple[str, ...]) -> Any:
        assert host == "0.0.0.0"
        return serve(lab, "127.0.0.1", port, names)

    monkeypatch.setattr("http.server.HTTPServer.serve_forever", once)
    monkeypatch.setattr(app, "serve", on_loopback)
    monkeypatch.setenv("SPACE_HOST", "me-lab.hf.space")
    app.main(port=0)
    assert visited == [200]


def test_attention_and_ranking(lab: Lab) -> None:
    answer = lab.draw(State(ABOVE, num_steps=2, last=1))
    _, cache = lab.model.run_with_cache(
        ABOVE, num_steps=2, names_filter=lambda name: name.endswith("cross_attn.hook_pattern")
    )
    for i, head in enumerate(lab.heads):
        expected = cache["pattern", int(head[1]), "cross_attn", 0][0, int(head[3])].mean(dim=0)
        np.testing.assert_allclose(answer["attention"][i], expected.detach(), atol=1e-4)
    assert set(lab.cosines) == set(lab.heads)
    assert abs(lab.cosines["L1H2"]) > 0.8  # a relation head, by its card
    assert [place for place, _ in answer["tokens"]] == list(range(len(ABOVE.split()) + 1))
    assert [token for _, token in answer["tokens"]] == [*ABOVE.split(), "eos"]
    with pytest.raises(TypeError, match="HookedTextToImage"):
        Lab(lab.model.dit, "dit")


def test_in_a_browser(lab: Lab, server: tuple[int, str], browser: Any, tmp_path: Path) -> None:
    """Four heads are clicked, the image changes, the snippet draws it, and the address brings it
    back.
    """
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def drawn(**wanted: Any) -> dict[str, Any]:
        def ready(found: Any) -> Any:
            state = json.loads(found.execute_script("return document.body.dataset.drawn || '{}'"))
            return (
                state
                if state and all(state[name] == value for name, value in wanted.items())
                else False
            )

        return WebDriverWait(browser, 120).until(ready)

    browser.get("about:blank")
    browser.get(f"http://127.0.0.1:{server[0]}/")
    drawn(heads=[])
    assert browser.find_element("id", "prompt").get_attribute("value") == ABOVE
    for name, value in (("num_steps", 3), ("seed", 2)):
        script = (
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
        )
        browser.execute_script(script, browser.find_element("id", name), value)
    Select(browser.find_element("id", "action")).select_by_value("exchange")
    heads = ["L0H1", "L0H0", "L1H2", "L1H0"]
    for head in heads:
        browser.execute_script(
            "[...document.querySelectorAll('#heads button')].find((b) => b.firstChild.data === "
            "arguments[0]).click()",
            head,
        )
    state = drawn(heads=heads, action="exchange", num_steps=3, seed=2)
    original, edited = (
        pixels(browser.find_element("id", name).get_attribute("src"))
        for name in ("original", "edited")
    )
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(browser.find_element("id", "snippet").text, names)
        plain = lab.model(ABOVE, seed=2, num_steps=3)
    for shown, image in ((edited, names["image"]), (original, plain)):
        np.testing.assert_array_equal(
            shown, (image[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
        )
    assert (original != edited).any()
    address = browser.current_url
    browser.get("about:blank")
    browser.get(address)
    assert drawn(heads=heads) == state

    def order() -> list[str]:
        return [
            button.text.split("\n")[0]
            for button in browser.find_elements("css selector", "#heads button")
        ]

    Select(browser.find_element("id", "sort")).select_by_value("weights")
    assert order() == sorted(lab.heads, key=lambda head: -abs(lab.cosines[head]))
    assert [
        entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]
    ] == []
