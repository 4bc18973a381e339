"""Figures show the numbers they were given; the attention page works in a real browser and takes a prompt for text."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from dit_lens import variance, viz
from hooked_models import HookedTextToImage

from ..hooked_models.pipelines import PROMPTS, tiny_pipeline


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def drawn(ax: Any) -> np.ndarray:
    return np.asarray(ax.get_images()[-1].get_array())


def test_heat_map_of_heads_and_steps() -> None:
    values = xr.DataArray(
        np.random.default_rng(0).normal(size=(3, 2, 4)), dims=("step", "layer", "head"), coords={"step": [0, 4, 8]}
    )
    ax = viz.head_step_map(values, "effect").axes[0]
    np.testing.assert_array_equal(drawn(ax), values.transpose("layer", "head", "step").values.reshape(8, 3))
    assert [t.get_text() for t in ax.get_yticklabels()][:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "4", "8"]
    low, high = ax.get_images()[0].get_clim()
    assert low == -high == -abs(values).max()
    assert viz.head_step_map(abs(values)).axes[0].get_images()[0].get_clim()[0] == 0
    top = viz.head_step_map(values, top=2).axes[0]
    strongest = abs(values).max("step").stack(name=("layer", "head")).to_series().nlargest(2).index
    assert [t.get_text() for t in top.get_yticklabels()] == [f"L{layer}H{head}" for layer, head in sorted(strongest)]
    with pytest.raises(ValueError, match="layer, head and step, not layer, head, step, prompt"):
        viz.head_step_map(values.expand_dims(prompt=2, axis=-1).transpose("layer", "head", "step", "prompt"))


def test_maps_of_words_over_the_image() -> None:
    maps = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    figure = viz.word_maps(maps, ["▁red", "▁circle", "</s>"], torch.rand(3, 8, 8))
    axes = figure.axes[:4]
    assert [ax.get_title() for ax in axes] == ["image", "red", "circle", "</s>"]
    for ax, expected in zip(axes[1:], maps, strict=True):
        np.testing.assert_allclose(drawn(ax), expected.reshape(4, 4))
    with pytest.raises(ValueError, match="3 maps for 2 tokens"):
        viz.word_maps(maps, ["a", "b"], torch.rand(3, 8, 8))


def test_gallery_of_ramps() -> None:
    rng = np.random.default_rng(0)
    maps = {
        head: {word: xr.DataArray(rng.normal(size=(4, 4)) + 3, dims=("y", "x")) for word in words}
        for head, words in (("L2H1", ["above", "left"]), ("L2H2", ["above"]))
    }
    axes = [ax for ax in viz.ramp_gallery(maps).axes if ax.get_images() and ax.get_label() != "<colorbar>"]
    assert len(axes) == 3
    assert [ax.get_title() for ax in axes] == ["above", "left", ""]
    np.testing.assert_allclose(drawn(axes[1]), maps["L2H1"]["left"] - maps["L2H1"]["left"].mean())


def test_bars_of_a_variance_partition() -> None:
    rng = np.random.default_rng(0)
    factors = pd.DataFrame({"shape": list("aabbcc") * 10, "color": list("xy") * 30, "copy": list("xy") * 30})
    table = variance.partition(rng.normal(size=(60, 5)), factors, permutations=9)
    ax = viz.variance_bars({"before": table, "after": table}).axes[0]
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[0] == pytest.approx(table.loc["shape", "r2_partial"])
    assert len(heights) == 6
    assert "aliased" in [text.get_text() for text in ax.texts]


def test_dose_response_curves() -> None:
    rows = [
        {"kind": kind, "k": k, "metric": metric, "mean": k / 4, "low": k / 4 - 0.1, "high": k / 4 + 0.1}
        for kind in ("steered", "random_vector", "steered − random_vector")
        for k in (1.0, 0.0)
        for metric in ("target", "original")
    ]
    axes = viz.dose_response_curves(pd.DataFrame(rows), ("target", "original")).axes
    assert [ax.get_title() for ax in axes] == ["target", "original"]
    lines = axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["steered", "random vector"]
    np.testing.assert_array_equal(lines[0].get_xydata(), [[0, 0], [1, 0.25]])


# The page

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def generation() -> tuple[HookedTextToImage, torch.Tensor, Any]:
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    with torch.no_grad():
        images, cache = model.run_with_cache(PROMPTS, num_steps=3, names_filter=lambda n: n.endswith("cross_attn.hook_pattern"))
    return model, images, cache


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    folder = tempfile.mkdtemp()
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={folder}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()
    shutil.rmtree(folder, ignore_errors=True)


def test_page_without_a_browser(generation: Any, tmp_path: Path) -> None:
    model, images, cache = generation
    page = viz.attention_page(cache, list(PROMPTS), images, tmp_path / "new" / "page.html").read_text()
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    with pytest.raises(ValueError, match="1 prompts and 2 rows"):
        viz.attention_page(cache, [PROMPTS[0]], images, tmp_path / "page.html")
    _, other = model.run_with_cache(PROMPTS, num_steps=1, names_filter="hook_embed")
    with pytest.raises(KeyError, match=r"cross_attn\.hook_pattern"):
        viz.attention_page(other, list(PROMPTS), images, tmp_path / "page.html")


def on_page(path: Path) -> dict[str, Any]:
    """What the page shows, with weights [step head place word] of the first prompt in place of their bytes."""
    data = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), flags=re.S)[1])
    first = data["prompts"][0]
    shape = (len(data["steps"]), sum(map(len, data["heads"])), math.prod(data["grid"]), len(first["tokens"]))
    weights = np.frombuffer(base64.b64decode(first["pattern"]), np.uint8).reshape(shape) / 255
    return {**data, "weights": weights**2}


@pytest.mark.parametrize("heads", [None, ["L1H1"], ["L0H1", "L1H0", "L1H1"], ["L0H0", "L1H1"]])
@pytest.mark.parametrize("on_disk", [False, True])
def test_page_of_some_heads(generation: Any, heads: list[str] | None, on_disk: bool, tmp_path: Path) -> None:
    """Named by their own numbers, whichever were kept, and with their own weights."""
    model, _, whole = generation
    keep = {"names_filter": lambda name: name.endswith("cross_attn.hook_pattern"), "heads": heads, "num_steps": 3}
    images, cache = model.run_with_cache(PROMPTS, **keep, out=tmp_path / "cache" if on_disk else None)
    data = on_page(viz.attention_page(cache, list(PROMPTS), images, tmp_path / "page.html"))
    shown = [(layer, head) for layer, some in zip(data["layers"], data["heads"], strict=True) for head in some]
    assert [f"L{layer}H{head}" for layer, head in shown] == (heads or ["L0H0", "L0H1", "L1H0", "L1H1"])
    words = len(data["prompts"][0]["tokens"])
    for i, (layer, head) in enumerate(shown):
        for step in range(3):
            expected = whole["pattern", layer, "cross_attn", step][0, head, :, :words]
            np.testing.assert_allclose(data["weights"][step, i], expected.detach(), atol=0.004)


@pytest.mark.parametrize(("height", "width", "grid"), [(8, 8, [4, 4]), (8, 12, [4, 6]), (16, 4, [8, 2])])
def test_page_of_an_image_that_is_not_square(height: int, width: int, grid: list[int], tmp_path: Path) -> None:
    model = HookedTextToImage.from_pipeline(tiny_pipeline(grid=8))
    latents = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images, cache = model.run_with_cache(
            PROMPTS[:1], latents=latents, num_steps=1, names_filter=lambda name: name.endswith("cross_attn.hook_pattern")
        )
    assert images.shape[-2:] == (4 * height, 4 * width)
    assert on_page(viz.attention_page(cache, [PROMPTS[0]], images, tmp_path / "page.html"))["grid"] == grid


def test_page_of_summaries_is_refused(generation: Any, tmp_path: Path) -> None:
    model, images, _ = generation
    _, cache = model.run_with_cache(
        PROMPTS, num_steps=1, patterns="entropy", names_filter=lambda name: name.endswith("cross_attn.hook_pattern")
    )
    with pytest.raises(ValueError, match="holds summaries of patterns"):
        viz.attention_page(cache, list(PROMPTS), images, tmp_path / "page.html")


def test_page_in_a_browser(generation: Any, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, cache = generation
    own = model.to_str_tokens
    monkeypatch.setattr(model, "to_str_tokens", lambda text: own(PROMPTS[1]) if text == EVIL else [EVIL, *own(text)[1:]])
    page = viz.attention_page(cache, [PROMPTS[0], EVIL], images, tmp_path / "page.html")
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert browser.title == "Cross-attention"

    words = browser.find_elements("css selector", "#words button")
    assert words[0].text.startswith(EVIL)  # as text
    assert [w.text.split("\n")[0] for w in words[1:]] == [t.removeprefix("▁") for t in own(PROMPTS[0])[1:]]
    words[3].click()
    for name, value in (("layer", 1), ("head", 1), ("step", 2)):
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        browser.execute_script(script, browser.find_element("id", name), value)
    pattern = cache["pattern", 1, "cross_attn", 2][0, 1]  # [query text_pos]
    shown = browser.find_element("id", "readout").text
    assert shown.startswith("L1H1, step 2")
    assert float(shown.split(" gets ")[1].split()[0]) == pytest.approx(float(pattern[:, 3].mean()), abs=0.006)
    weights = browser.execute_script("return [...Array(4).keys()].map((place) => weight(1, 1, place, 3))")
    np.testing.assert_allclose(weights, pattern[:, 3], atol=0.004)

    canvases = browser.find_elements("css selector", "#heads canvas")
    assert len(canvases) == 4
    canvases[2].click()
    assert browser.find_element("id", "readout").text.startswith("L1H0, step 2")
    browser.execute_script(
        "document.getElementById('prompt').value = 1; document.getElementById('prompt').onchange({target: {value: 1}})"
    )
    assert browser.find_element("css selector", "#prompt option:nth-child(2)").text == EVIL
    assert browser.title == "Cross-attention"
    assert browser.find_elements("css selector", "body > img") == []
    assert browser.get_log("browser") == []


def test_page_of_some_heads_in_a_browser(generation: Any, browser: Any, tmp_path: Path) -> None:
    model, images, _ = generation
    keep = {"names_filter": lambda name: name.endswith("cross_attn.hook_pattern"), "heads": ["L0H1", "L1H0", "L1H1"]}
    _, cache = model.run_with_cache(PROMPTS, **keep, num_steps=3)
    browser.get(viz.attention_page(cache, list(PROMPTS), images, tmp_path / "page.html").as_uri())
    assert browser.find_element("id", "readout").text.startswith("L0H1, step 0")
    labels = [span.text for span in browser.find_elements("css selector", "#heads span")]
    assert labels == ["", "H0", "H1", "L0", "", "L1"]
    canvases = browser.find_elements("css selector", "#heads canvas")
    for canvas, name in zip(canvases, ["L0H1", "L1H0", "L1H1"], strict=True):
        canvas.click()
        assert browser.find_element("id", "readout").text.startswith(f"{name}, step 0")
    weights = browser.execute_script("return [...Array(4).keys()].map((place) => weight(1, 1, place, 3))")
    np.testing.assert_allclose(weights, cache["pattern", 1, "cross_attn", 0][0, 1, :4, 3].detach(), atol=0.004)
    assert browser.get_log("browser") == []
