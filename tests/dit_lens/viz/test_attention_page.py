"""The attention page has the cache's numbers under their own names, works in a real browser and
takes a prompt for text.
"""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

from dit_lens import viz
from hooked_models import HookedTextToImage

from ...hooked_models import tiny_pipelines
from ...hooked_models.pipelines import PROMPTS, tiny_pipeline

EVIL = (
    "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
)
TITLE = "Attention to the prompt"


def keep(name: str) -> bool:
    return name.endswith("cross_attn.hook_pattern")


@pytest.fixture(scope="module")
def generation() -> tuple[HookedTextToImage, torch.Tensor, Any]:
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    with torch.no_grad():
        images, cache = model.run_with_cache(PROMPTS, num_steps=3, names_filter=keep)
    return model, images, cache


def on_page(path: Path) -> dict[str, Any]:
    """The page's data, with weights [step head place word] of each entry in place of their
    bytes.
    """
    data = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), flags=re.S)[1])
    for entry in data["entries"]:
        shape = (
            len(data["steps"]),
            len(data["heads"]),
            math.prod(data["grid"]),
            len(entry["tokens"]),
        )
        stored = gzip.decompress(base64.b64decode(entry["pattern"]))
        entry["weights"] = (np.frombuffer(stored, np.uint8).reshape(shape) / 255) ** 2
    return data


def test_a_page_without_a_browser(generation: Any, tmp_path: Path) -> None:
    model, images, cache = generation
    page = viz.attention_page(cache, PROMPTS, images, tmp_path / "new" / "page.html").read_text()
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    with pytest.raises(ValueError, match="1 prompts and 2 rows"):
        viz.attention_page(cache, [PROMPTS[0]], images, tmp_path / "page.html")
    _, other = model.run_with_cache(PROMPTS, num_steps=1, names_filter="hook_embed")
    with pytest.raises(KeyError, match=r"cross_attn\.hook_pattern"):
        viz.attention_page(other, PROMPTS, images, tmp_path / "page.html")
    _, other = model.run_with_cache(PROMPTS, num_steps=1, patterns="entropy", names_filter=keep)
    with pytest.raises(ValueError, match="holds summaries of patterns"):
        viz.attention_page(other, PROMPTS, images, tmp_path / "page.html")


@pytest.mark.parametrize("heads", [None, ["L1H1"], ["L0H1", "L1H0", "L1H1"], ["L0H0", "L1H1"]])
@pytest.mark.parametrize("on_disk", [False, True])
def test_some_heads(
    generation: Any, heads: list[str] | None, on_disk: bool, tmp_path: Path
) -> None:
    """Named by their own numbers, whichever were kept, and with their own weights."""
    model, _, whole = generation
    images, cache = model.run_with_cache(
        PROMPTS,
        names_filter=keep,
        heads=heads,
        num_steps=3,
        out=tmp_path / "cache" if on_disk else None,
    )
    data = on_page(viz.attention_page(cache, PROMPTS, images, tmp_path / "page.html"))
    assert data["heads"] == (heads or ["L0H0", "L0H1", "L1H0", "L1H1"])
    for row, entry in enumerate(data["entries"]):
        assert entry["tokens"] == [
            token.removeprefix("▁") for token in model.to_str_tokens(PROMPTS[row])
        ]
        for i, name in enumerate(data["heads"]):
            for step in range(3):
                expected = whole["pattern", int(name[1]), "cross_attn", step][
                    row, int(name[3]), :, : len(entry["tokens"])
                ]
                np.testing.assert_allclose(entry["weights"][step, i], expected.detach(), atol=0.004)


@pytest.mark.parametrize(
    ("height", "width", "grid"), [(8, 8, [4, 4]), (8, 12, [4, 6]), (16, 4, [8, 2])]
)
def test_an_image_that_is_not_square(
    height: int, width: int, grid: list[int], tmp_path: Path
) -> None:
    model = HookedTextToImage.from_pipeline(tiny_pipeline(grid=8))
    latents = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images, cache = model.run_with_cache(
            PROMPTS[:1], latents=latents, num_steps=1, names_filter=keep
        )
    assert images.shape[-2:] == (4 * height, 4 * width)
    assert (
        on_page(viz.attention_page(cache, [PROMPTS[0]], images, tmp_path / "page.html"))["grid"]
        == grid
    )


@pytest.mark.parametrize("family", ["SD3", "SANA DPM++"])
def test_joint_and_cross_attention_of_other_families(family: str, tmp_path: Path) -> None:
    """Rows are image places and columns text positions of the joint pattern; each place's words and
    other keys sum to one.
    """
    pipe, call = tiny_pipelines.tiny_pipeline(family)
    model = HookedTextToImage.from_pipeline(pipe)
    model.options = {
        key: value
        for key, value in call.items()
        if key not in ("num_inference_steps", "output_type")
    }
    with torch.no_grad():
        images, cache = model.run_with_cache(
            PROMPTS, [3, 4], 2, names_filter=lambda name: name.endswith("attn.hook_pattern")
        )
    data = on_page(viz.attention_page(cache, PROMPTS, images, tmp_path / "page.html"))
    rows, columns, frames = model.dit.layout.grid
    assert (rows, columns, frames) == (*data["grid"], 1)
    n_image = rows * columns
    for row, entry in enumerate(data["entries"]):
        spelt = "".join(entry["tokens"]).lower()
        assert all(word in spelt for word in PROMPTS[row].lower().split())
        for i, name in enumerate(data["heads"]):
            layer, head = map(int, re.fullmatch(r"L(\d+)H(\d+)", name).groups())
            sublayer = "attn" if family == "SD3" else "cross_attn"
            whole = cache[f"steps.1.cond.blocks.{layer}.{sublayer}.hook_pattern"][row, head]
            text = whole[:n_image, n_image:] if family == "SD3" else whole
            np.testing.assert_allclose(
                entry["weights"][1, i], text[:, : len(entry["tokens"])], atol=0.004
            )


def test_a_prompt_never_takes_more_than_its_bytes(generation: Any, tmp_path: Path) -> None:
    """Larger maps are averaged over squares; random weights cannot be compressed much."""
    _, images, cache = generation
    whole = on_page(viz.attention_page(cache, PROMPTS, images, tmp_path / "whole.html"))
    grid = whole["grid"]
    sizes = [len(base64.b64decode(entry["pattern"])) * 4 // 3 for entry in whole["entries"]]
    page = viz.attention_page(
        cache, PROMPTS, images, tmp_path / "page.html", largest=max(sizes) - 50
    )
    data = on_page(page)
    assert data["grid"] == [grid[0] // 2, grid[1] // 2]
    assert "averages over squares of 2 × 2" in data["about"]
    for small, large, packed in zip(
        data["entries"], whole["entries"], json_entries(page), strict=True
    ):
        assert len(packed["pattern"]) <= max(sizes) - 50
        step, head, _, word = large["weights"].shape
        squares = (
            large["weights"]
            .reshape(step, head, grid[0] // 2, 2, grid[1] // 2, 2, word)
            .mean((3, 5))
        )
        np.testing.assert_allclose(
            small["weights"], squares.reshape(small["weights"].shape), atol=0.006
        )
    with pytest.raises(ValueError, match="take more than largest=10 bytes"):
        viz.attention_page(cache, PROMPTS, images, tmp_path / "page.html", largest=10)


def json_entries(path: Path) -> list[dict[str, Any]]:
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), flags=re.S)[1])[
        "entries"
    ]


def test_the_view_at_the_beginning(generation: Any, tmp_path: Path) -> None:
    """As given, and else where places differ most."""
    _, images, cache = generation
    begin = lambda **start: parse_qs(  # noqa: E731
        on_page(viz.attention_page(cache, PROMPTS, images, tmp_path / "page.html", start=start))[
            "start"
        ]
    )
    token = cache.model.to_str_tokens(PROMPTS[1])[2].removeprefix("▁")
    given = begin(prompt=1, head="L1H0", step=2, word=token)
    assert given == {"prompt": ["1"], "head": ["L1H0"], "step": ["2"], "word": ["2"]}
    words = len(cache.model.to_str_tokens(PROMPTS[0]))
    spread = {
        (f"L{layer}H{head}", word): float(
            cache["pattern", layer, "cross_attn", 0][0, head, :, word].std()
        )
        for layer in range(2)
        for head in range(2)
        for word in range(words)
    }
    head, word = max(spread, key=spread.__getitem__)
    assert begin() == {"head": [head], "step": ["0"], "word": [str(word)]}
    for wrong, message in (
        ({"head": "L9H9"}, "head 'L9H9' is not on the page"),
        ({"step": 7}, "step 7 is not on the page"),
        ({"word": "horse"}, "'horse' is no token"),
        ({"prompt": 5}, "there are 2"),
        ({"layer": 1}, "start has no 'layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            begin(**wrong)


# In a browser


def opened(browser: Any, path: Path, hash: str = "") -> None:
    browser.get("about:blank")
    browser.get(path.as_uri() + hash)
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(
        lambda b: b.execute_script("return document.body.dataset.ready")
    )


def readout(browser: Any) -> str:
    return browser.find_element("id", "readout").text


def choose(browser: Any, name: str, value: Any) -> None:
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    browser.execute_script(script, browser.find_element("id", name), value)


def test_in_a_browser(
    generation: Any, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hostile prompts and tokens are text; words, heads and steps show the cache's numbers."""
    model, images, cache = generation
    own = model.to_str_tokens
    monkeypatch.setattr(
        model,
        "to_str_tokens",
        lambda text: own(PROMPTS[1]) if text == EVIL else [EVIL, *own(text)[1:]],
    )
    page = viz.attention_page(
        cache, [PROMPTS[0], EVIL], images, tmp_path / "page.html", start={"head": "L0H0", "word": 0}
    )
    opened(browser, page)
    assert browser.get_log("browser") == []
    assert browser.title == TITLE
    words = browser.find_elements("css selector", "[data-panel='0'] .words button")
    assert words[0].text.startswith(EVIL)  # as text
    assert [w.text.split("\n")[0] for w in words[1:]] == [
        t.removeprefix("▁") for t in own(PROMPTS[0])[1:]
    ]
    words[3].click()
    choose(browser, "head", 3)
    choose(browser, "step", 2)
    pattern = cache["pattern", 1, "cross_attn", 2][0, 1]  # [query text_pos]
    assert readout(browser).startswith("L1H1, step 2")
    assert float(readout(browser).split(" gets ")[1].split()[0]) == pytest.approx(
        float(pattern[:, 3].mean()), abs=0.006
    )
    weights = browser.execute_script(
        "return [...Array(4).keys()].map((place) => weight(0, 3, place, 3))"
    )
    np.testing.assert_allclose(weights, pattern[:, 3], atol=0.004)
    buttons = browser.find_elements("css selector", "#heads button")
    assert len(buttons) == 4
    buttons[2].click()
    assert readout(browser).startswith("L1H0, step 2")
    choose(browser, "prompt", 1)
    choose(browser, "beside", 0)
    assert browser.find_element("css selector", "#prompt option:nth-child(2)").text == EVIL
    assert browser.title == TITLE
    assert browser.find_elements("css selector", "body > img") == []
    assert browser.get_log("browser") == []


def test_some_heads_in_a_browser(generation: Any, browser: Any, tmp_path: Path) -> None:
    model, _, _ = generation
    images, cache = model.run_with_cache(
        PROMPTS, names_filter=keep, heads=["L0H1", "L1H0", "L1H1"], num_steps=3
    )
    opened(
        browser,
        viz.attention_page(cache, PROMPTS, images, tmp_path / "page.html", start={"head": "L0H1"}),
    )
    assert readout(browser).startswith("L0H1, step 0")
    assert [span.text for span in browser.find_elements("css selector", "#heads > span")] == [
        "",
        "H0",
        "H1",
        "L0",
        "",
        "L1",
    ]
    for button, name in zip(
        browser.find_elements("css selector", "#heads button"),
        ["L0H1", "L1H0", "L1H1"],
        strict=True,
    ):
        button.click()
        assert readout(browser).startswith(f"{name}, step 0")
    weights = browser.execute_script(
        "return [...Array(4).keys()].map((place) => weight(0, 2, place, 3))"
    )
    np.testing.assert_allclose(
        weights, cache["pattern", 1, "cross_attn", 0][0, 1, :4, 3].detach(), atol=0.004
    )


def test_the_address_keeps_the_view(generation: Any, browser: Any, tmp_path: Path) -> None:
    _, images, cache = generation
    page = viz.attention_page(cache, PROMPTS, images, tmp_path / "page.html")
    opened(browser, page)
    for name, value in (
        ("head", 2),
        ("step", 1),
        ("opacity", 30),
        ("beside", 1),
        ("sort", "entropy"),
    ):
        choose(browser, name, value)
    before, address = readout(browser), browser.current_url
    opened(browser, page, "#" + address.split("#")[1])
    assert readout(browser) == before
    state = browser.execute_script("return {...state}")
    assert (state["head"], state["step"], state["opacity"], state["beside"], state["sort"]) == (
        2,
        1,
        30,
        1,
        "entropy",
    )
    # what is wrong is not read
    opened(browser, page, "#head=L9H9&step=x&word=99&prompt=-3&sort=constructor&opacity=<script>")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return state.sort") == "place"


def test_two_runs_beside_each_other(generation: Any, browser: Any, tmp_path: Path) -> None:
    model, images, cache = generation
    with model.hooks(
        fwd_hooks=[("steps.0.cond.blocks.0.cross_attn.hook_z", lambda z, hook: torch.zeros_like(z))]
    ):
        patched_images, patched = model.run_with_cache(PROMPTS, num_steps=3, names_filter=keep)
    page = viz.attention_page(
        cache,
        PROMPTS,
        images,
        tmp_path / "page.html",
        others={"patched": (patched, patched_images)},
        start={"beside": 2, "word": 1},
    )
    opened(browser, page)
    pictures = browser.find_elements("css selector", "[data-panel='1'] img")
    drawn = Image.open(io.BytesIO(base64.b64decode(pictures[0].get_attribute("src").split(",")[1])))
    expected = (patched_images[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    np.testing.assert_array_equal(np.asarray(drawn), expected)
    weights = browser.execute_script(
        "return [...Array(4).keys()].map((place) => weight(2, 3, place, 1, 2))"
    )
    np.testing.assert_allclose(
        weights, patched["pattern", 1, "cross_attn", 2][0, 1, :4, 1].detach(), atol=0.004
    )
    _, short = model.run_with_cache(PROMPTS, num_steps=2, names_filter=keep)
    with pytest.raises(ValueError, match="'patched' has other heads or steps"):
        viz.attention_page(
            cache, PROMPTS, images, tmp_path / "page.html", others={"patched": (short, images)}
        )


def test_all_prompts_side_by_side(generation: Any, browser: Any, tmp_path: Path) -> None:
    """One panel an entry, in the address, too; a word of another panel makes that one the first."""
    _, images, cache = generation
    others = {"patched": (cache, images.flip(1))}
    page = viz.attention_page(
        cache, PROMPTS, images, tmp_path / "page.html", others=others, start={"beside": "all"}
    )
    opened(browser, page)
    panels = browser.find_elements("css selector", "#panels .panel")
    assert len(panels) == 4
    first = [panel.find_element("tag name", "img").get_attribute("src") for panel in panels]
    assert len(set(first)) == 4
    panels[2].find_elements("css selector", ".words button")[1].click()
    assert browser.execute_script("return [state.prompt, state.beside, state.word]") == [2, -2, 1]
    address = browser.current_url
    opened(browser, page, "#" + address.split("#")[1])
    assert browser.find_element("id", "beside").get_attribute("value") == "-2"
    assert len(browser.find_elements("css selector", "#panels .panel")) == 4
    browser.execute_script("window.saved = []; save = (name, href) => saved.push(href)")
    browser.find_element("id", "png").click()
    picture = browser.execute_script("return saved[0]")
    tall = Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).size[1]
    choose(browser, "beside", -1)
    assert len(browser.find_elements("css selector", "#panels .panel")) == 1
    assert tall == 4 * (384 + 34)
    assert browser.get_log("browser") == []


def test_a_cell_opens_its_image(generation: Any, browser: Any, tmp_path: Path) -> None:
    """Images of the chosen prompt, beside the image as it is, with a text for screen readers."""
    _, images, cache = generation
    dims = {"layer": [0, 1], "head": [0, 1], "step": [0, 1, 2]}
    values = xr.DataArray(np.ones((2, 2, 3)), dims=tuple(dims), coords=dims, name="moved")
    edited = {("L1H0", 2): 1 - images, ("L0H1", 0): images / 2}
    effects = viz.Effects(values, edited)
    page = viz.attention_page(
        cache, PROMPTS, images, tmp_path / "page.html", start={"prompt": 1}, effects=effects
    )
    opened(browser, page, "#head=L1H0&step=2")
    shown = browser.find_elements("css selector", "#patched img")
    assert [image.get_attribute("alt") for image in shown] == [
        f"as it is: {PROMPTS[1]}",
        f"patched, L1H0 at step 2: {PROMPTS[1]}",
    ]
    for image, expected in zip(shown, (images[1], 1 - images[1]), strict=True):
        drawn = Image.open(io.BytesIO(base64.b64decode(image.get_attribute("src").split(",")[1])))
        pixels = (expected.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
        np.testing.assert_array_equal(np.asarray(drawn), pixels)
    opened(browser, page, "#head=L0H0&step=1")
    assert "no image of L0H0 at step 1" in browser.find_element("id", "patched").text
    assert browser.get_log("browser") == []
    large = viz.Effects(values, {("L1H0", 2): torch.zeros(2, 3, 512, 384)})
    stored = on_page(viz.attention_page(cache, PROMPTS, images, page, effects=large))["patched"]
    small = stored["L1H0 2"][0].split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(small))).size == (192, 256)
    for wrong, message in (
        ({("L9H0", 2): images}, "image of L9H0 at step 2: not on the page"),
        ({("L1H0", 2): images[:1]}, "has 1 images of L1H0 at step 2"),
    ):
        with pytest.raises(ValueError, match=message):
            viz.attention_page(cache, PROMPTS, images, page, effects=viz.Effects(values, wrong))


def test_keys_play_and_ranking(generation: Any, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    _, images, cache = generation
    opened(
        browser,
        viz.attention_page(
            cache, PROMPTS, images, tmp_path / "page.html", start={"head": "L0H0", "word": 1}
        ),
    )

    def press(*keys: str) -> dict[str, Any]:
        ActionChains(browser).send_keys(*keys).perform()
        return browser.execute_script("return {...state}")

    assert press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN, "]")["step"] == 1
    state = press(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_UP, "[", "[", "[")
    assert (state["step"], state["head"], state["word"]) == (0, 1, 0)
    press(" ")
    assert browser.find_element("id", "play").text == "stop"
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(lambda b: b.execute_script("return state.step") > 0)
    press(" ")
    choose(browser, "step", 1)
    choose(browser, "sort", "contrast")
    shown = [
        button.text.split() for button in browser.find_elements("css selector", "#heads button")
    ]
    expected = {
        f"L{layer}H{head}": float(
            cache["pattern", layer, "cross_attn", 1][0, head, :, 0].std(unbiased=False)
        )
        for layer in range(2)
        for head in range(2)
    }
    assert [float(value) for _, value in shown] == sorted(
        (float(value) for _, value in shown), reverse=True
    )
    for name, value in shown:
        assert float(value) == pytest.approx(expected[name], abs=0.012)
    choose(browser, "sort", "entropy")
    entropy = {
        f"L{layer}H{head}": float(
            torch.special.entr(cache["pattern", layer, "cross_attn", 1][0, head]).sum(-1).mean()
        )
        / math.log(2)
        for layer in range(2)
        for head in range(2)
    }
    for button in browser.find_elements("css selector", "#heads button"):
        name, value = button.text.split()
        assert float(value) == pytest.approx(entropy[name], abs=0.05)
    reached = "document.querySelectorAll('button, select, input')"
    assert browser.execute_script(f"return [...{reached}].every((node) => node.tabIndex === 0)")
    named = "node.ariaHidden || node.ariaLabel || node.closest('button').ariaLabel"
    assert browser.execute_script(
        f"return [...document.querySelectorAll('canvas')].every((node) => {named})"
    )


def test_effects_open_their_head_and_step(generation: Any, browser: Any, tmp_path: Path) -> None:
    """A click on a cell; its number is shown, and what is not known stays empty."""
    from selenium.webdriver.common.action_chains import ActionChains

    _, images, cache = generation
    dims = {"layer": [0, 1], "head": [0, 1], "step": [0, 2]}  # not step 1
    effects = xr.DataArray(
        np.arange(8.0).reshape(2, 2, 2) - 3, dims=tuple(dims), coords=dims, name="fall"
    )
    opened(
        browser, viz.attention_page(cache, PROMPTS, images, tmp_path / "page.html", effects=effects)
    )
    canvas = browser.find_element("css selector", "#effects canvas")
    for (head, step), expected in np.ndenumerate(
        np.array([[-3, np.nan, -2], [-1, np.nan, 0], [1, np.nan, 2], [3, np.nan, 4]])
    ):
        x, y = ((place + 0.5) / n - 0.5 for place, n in ((step, 3), (head, 4)))
        ActionChains(browser).move_to_element_with_offset(
            canvas, round(x * canvas.size["width"]), round(y * canvas.size["height"])
        ).click().perform()
        assert browser.execute_script("return [state.head, state.step]") == [head, step]
        text = browser.find_element("css selector", "#effects p").text
        assert text.startswith(f"fall of {['L0H0', 'L0H1', 'L1H0', 'L1H1'][head]} at step {step}: ")
        value = text.split(": ")[1].split(" (")[0]
        assert value == "not known" if np.isnan(expected) else float(value) == expected
    with pytest.raises(ValueError, match="layer, head and step, not layer, head"):
        viz.attention_page(cache, PROMPTS, images, tmp_path / "page.html", effects=effects[:, :, 0])


def test_exports(generation: Any, browser: Any, tmp_path: Path) -> None:
    """CSV of the weights that are shown, no formula in it; PNG of what is drawn."""
    _, images, cache = generation
    opened(
        browser,
        viz.attention_page(
            cache, PROMPTS, images, tmp_path / "page.html", start={"head": "L1H0", "step": 1}
        ),
    )
    browser.execute_script("window.saved = []; save = (name, href) => saved.push([name, href])")
    browser.find_element("id", "csv").click()
    browser.find_element("id", "png").click()
    (csv_name, table), (png_name, picture) = browser.execute_script("return saved")
    assert (csv_name, png_name) == ("attention-L1H0-step1.csv", "attention-L1H0-step1.png")
    rows = list(csv.reader(io.StringIO(unquote(table.split(",", 1)[1]))))
    assert rows[0][:2] == ["row", "column"]
    pattern = cache["pattern", 1, "cross_attn", 1][0, 0].detach()
    np.testing.assert_allclose(
        np.array(rows[1:], float)[:, 2:], pattern[:, : len(rows[0]) - 2], atol=0.004
    )
    drawn = Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1])))
    assert drawn.size[0] == 776
    assert len(drawn.getcolors(10**6)) > 10


def test_inside_a_notebook(generation: Any, browser: Any, tmp_path: Path) -> None:
    """A cell's output is a frame without a server that may not read the page around it."""
    _, images, cache = generation
    output = viz.show(
        cache, PROMPTS, images, start={"head": "L1H1", "word": 2}, height=500
    )._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><title>notebook</title>{output}")
    browser.get((tmp_path / "notebook.html").as_uri())
    frame = browser.find_element("tag name", "iframe")
    assert frame.size["height"] == 500
    browser.switch_to.frame(frame)
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(
        lambda b: b.execute_script("return document.body.dataset.ready")
    )
    assert readout(browser).startswith("L1H1, step 0")
    browser.find_elements("css selector", "#heads button")[0].click()
    assert readout(browser).startswith("L0H0, step 0")
    browser.switch_to.default_content()
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
