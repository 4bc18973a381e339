"""Draws the pictures of the API reference.

Each function of `dit_lens.viz`, with numbers of the bundled models:

    python docs/gallery.py

Functions that draw a figure give docs/_static/viz/NAME.svg, which docs/conf.py draws where it is
missing or older than this file, and puts under its function; the command above opens pages and the
lab in a headless Chromium and gives NAME.webp, which stand in the repository.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib.pyplot as plt
import pandas as pd
import torch
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image

from dit_lens import Intervention, circuits, scenes, screening, steering, sweep, variance, viz
from dit_lens.lab import Lab, State, serve
from dit_lens.stats import proportion
from dit_lens.training import dynamics
from hooked_models import HookedTextToImage
from hooked_models.generation.cache import GenerationCache
from hooked_models.pipelines.hub import ZOO

OUT = Path(__file__).parent / "_static" / "viz"
PROMPTS = ["red circle is above blue square", "red circle is below blue square"]
WORDS = ("above", "below", "left", "right")
HEADS = ("L2H1", "L2H2")
READY = """
return document.body.dataset.ready || document.body.dataset.drawn || !document.scripts.length
"""


class Generation:
    """One generation of rte-micro, with its patterns."""

    def __init__(self) -> None:
        self.model = HookedTextToImage.from_pretrained("rte-micro")
        self.images: torch.Tensor
        self.cache: GenerationCache
        with torch.no_grad():
            self.images, self.cache = self.model.run_with_cache(
                PROMPTS, seed=1, names_filter=lambda name: name.endswith("cross_attn.hook_pattern")
            )

    def maps(self, head: str) -> dict[str, xr.DataArray]:
        """Word → position-by-word map of a head's weights."""
        vectors = {word: screening.word_vector(self.model, word) for word in WORDS}
        return {
            word: circuits.position_word_map(self.model.dit, head, vector)
            for word, vector in vectors.items()
        }


def head_step_map(run: Generation) -> Figure:
    """Pixels that move if a head is zeroed at a step, one prompt."""
    cells = sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"), layers=range(6), heads=range(3), steps=range(6)
    )
    moved = sweep.Metric(sweep.displacement, given=["baseline"])
    found = sweep.run(run.model, PROMPTS[0], [0], cells, {"moved": moved}, num_steps=6)
    effect = found["moved_effect"].sel(interval="mean", drop=True)
    table = effect.set_index(intervention=["layer", "head", "step"]).unstack("intervention")
    return viz.head_step_map(table, "displacement of the image", top=9)


def word_maps(run: Generation) -> Figure:
    """A relation head at the first step."""
    tokens = run.model.to_str_tokens(PROMPTS[0])
    pattern = run.cache["pattern", 2, "cross_attn", 0][0, 2, :, : len(tokens)]
    return viz.word_maps(pattern.T.detach(), tokens, run.images[0], "L2H2, step 0")


def ramp_gallery(run: Generation) -> Figure:
    """Two relation heads."""
    return viz.ramp_gallery({head: run.maps(head) for head in HEADS})


def relation_head_figure(run: Generation) -> Figure:
    """A relation head and its weights."""
    steps, place = [0, 1, 2, 4, 8, 13], 3
    seen = [run.cache["pattern", 2, "cross_attn", step][:, 2, :, place] for step in steps]
    grid = torch.stack(seen, dim=1).unflatten(-1, (8, 8)).detach().numpy()
    attention = xr.DataArray(grid, dims=("prompt", "step", "y", "x"), coords={"step": steps})
    return viz.relation_head_figure("L2H2", PROMPTS, run.images, attention, run.maps("L2H2"))


def variance_bars(run: Generation) -> Figure:
    """The second shape word of t5-micro, before and after the caption projection."""
    model, texts = HookedTextToImage.from_pretrained("t5-micro"), variance.factorial_prompts()
    found = {}
    for name, at in (("text encoder", "text"), ("after projection", "caption")):
        vectors, factors = variance.word_vectors(model, texts, "shape2", at)  # type: ignore[arg-type]
        own = factors[["shape1", "color1", "shape2", "relation"]]  # the rest is aliased
        found[name] = variance.partition(vectors, own, permutations=0)
    return viz.variance_bars(found)


def dose_response_curves(run: Generation) -> Figure:
    """Steering in two scenes: too few for a claim, enough for a picture."""
    wanted = scenes.sample(2, seed=0, color_words="both")
    doses = steering.dose_response(run.model, wanted, doses=(0.0, 0.5, 1.0, 1.5), draws=1)
    return viz.dose_response_curves(steering.summarise(doses))


def learning_curves(run: Generation) -> Figure:
    """The training of rte-mini."""
    table = pd.read_parquet(ZOO / "rte-mini/dynamics.parquet")
    return viz.learning_curves(table, {"words": dynamics.strongest_heads(table, "words")})


def intervals(run: Generation) -> Figure:
    """Accuracy of rte-micro by relation, on held-out scenes."""
    rows = pd.read_parquet(ZOO / "rte-micro/evaluation.parquet")
    part = rows[rows["split"] == "held_out"]
    names = sorted(part["relation"].unique())
    with viz.style.applied():
        figure, ax = plt.subplots(figsize=(5, 2.8), layout="constrained")
        found = [
            proportion(part.loc[part["relation"] == name, "relation_loose"].to_numpy(float))
            for name in names
        ]
        viz.intervals(ax, found)
        viz.name_rows(ax, [name.replace("_", " ") for name in names])
        ax.set_xlabel("relation drawn as prompted, 95 % interval")
    return figure


FIGURES: dict[str, Callable[[Generation], Figure]] = {
    made.__name__: made
    for made in (
        head_step_map,
        word_maps,
        ramp_gallery,
        relation_head_figure,
        variance_bars,
        dose_response_curves,
        learning_curves,
        intervals,
    )
}


def pages(run: Generation, folder: Path) -> dict[str, Path]:
    """The pages, written to a folder."""
    effects = screening.screen_heads(
        run.model.dit, {word: screening.word_vector(run.model, word) for word in WORDS}
    )
    return {
        "attention_page": viz.attention_page(
            run.cache,
            PROMPTS,
            run.images,
            folder / "attention.html",
            start={"head": "L2H2", "word": "above", "beside": 1},
        ),
        "report": viz.report(
            effects.head(8).round(4),
            folder / "report.html",
            title="Heads of rte-micro whose weights match the directions",
            code="screening.screen_heads(model.dit, vectors)",
            model=run.model,
        ),
    }


def photographed(addresses: dict[str, str]) -> None:
    """A picture of each address, as Chromium draws it."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1180,860"):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser: Any = webdriver.Chrome(options=options, service=service)
    try:
        for name, address in addresses.items():
            browser.get(address)
            WebDriverWait(browser, 60).until(lambda b: b.execute_script(READY))
            picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            picture.save(OUT / f"{name}.webp", quality=80, method=6)
    finally:
        browser.quit()


def draw_figures(run: Generation) -> None:
    """Write every figure."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw(run)
        if faults := viz.style.problems(figure):
            raise SystemExit(f"{name}: {'; '.join(faults)}")
        viz.style.save(figure, OUT / f"{name}.svg")
        plt.close(figure)


def draw_missing() -> None:
    """Write the figures, unless all are there and newer than this file."""
    written = [OUT / f"{name}.svg" for name in FIGURES]
    changed = Path(__file__).stat().st_mtime
    if not all(path.exists() and path.stat().st_mtime > changed for path in written):
        draw_figures(Generation())


def photograph_pages(run: Generation) -> None:
    """Write the picture of every page, and of the lab."""
    server = serve(Lab(run.model, "rte-micro"), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        addresses = {name: path.as_uri() for name, path in pages(run, Path(folder)).items()}
        state = State(*PROMPTS, seed=1, action="exchange", heads=("L2H1", "L1H0", "L2H2", "L1H1"))
        view = quote(json.dumps(state.as_json()))
        lab = f"http://127.0.0.1:{server.server_address[1]}/#{view}"
        photographed(addresses | {"Lab": lab})
    server.shutdown()


if __name__ == "__main__":
    whole = Generation()
    draw_figures(whole)
    photograph_pages(whole)
