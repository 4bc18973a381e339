"""Every figure of `viz` is legible at its own width, on white and on black, with one color for each
head; faults are found.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

from dit_lens import viz
from dit_lens.viz import style

RNG = np.random.default_rng(0)
WORDS = ["above", "below", "left", "right", "upper", "lower", "higher"]
PROMPTS = ["red circle is above blue square", "blue circle is to the lower right of red square"]


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def head_step_map() -> Figure:
    dims = {"layer": range(6), "head": range(3), "step": range(14)}
    return viz.head_step_map(
        xr.DataArray(RNG.normal(size=(6, 3, 14)), dims=tuple(dims), coords=dims),
        "change of the relation",
    )


def word_maps() -> Figure:
    tokens = [
        "▁red",
        "▁circle",
        "▁is",
        "▁diagonally",
        "▁down",
        "▁and",
        "▁left",
        "▁from",
        "▁blue",
        "▁square",
        "</s>",
    ]
    return viz.word_maps(
        RNG.random((len(tokens), 64)), tokens, torch.rand(3, 128, 128), "L2H1, step 0"
    )


def ramp_gallery() -> Figure:
    def row() -> dict[str, xr.DataArray]:
        return {word: xr.DataArray(RNG.normal(size=(8, 8)), dims=("y", "x")) for word in WORDS}

    return viz.ramp_gallery({"L2H1": row(), "L2H2": row(), "L1H0": row()})


def variance_bars() -> Figure:
    terms = [
        "shape1",
        "color1",
        "shape2",
        "relation",
        "shape1:color1",
        "shape2:relation",
        "color1:relation",
    ]
    table = pd.DataFrame({"r2_partial": RNG.random(len(terms)).round(2)}, index=terms)
    table.iloc[4] = np.nan
    return viz.variance_bars({"before projection": table, "after projection": table})


def dose_response_curves() -> Figure:
    rows = [
        {"kind": kind, "k": k, "metric": metric, "mean": 0.5, "low": 0.4, "high": 0.6}
        for kind in ("steered", "random_vector", "random_words")
        for k in (0.0, 0.5, 1.0, 1.5, 2.0)
        for metric in ("target_loose", "original_loose", "unique_binding")
    ]
    return viz.dose_response_curves(pd.DataFrame(rows))


def learning_curves() -> Figure:
    rows = []
    for samples in (1000, 10000, 100000):
        for quantity in ("color", "shape", "unique_binding", "relation_loose", "dipole"):
            rows.append(
                {"quantity": quantity, "samples": samples, "value": 0.5, "low": 0.4, "high": 0.6}
            )
        for source, (layer, head) in itertools.product(("words", "shape2"), ((2, 1), (1, 0))):
            row = {
                "quantity": "projection",
                "samples": samples,
                "value": 3.0,
                "source": source,
                "layer": layer,
                "head": head,
            }
            rows.append(row)
    return viz.learning_curves(pd.DataFrame(rows), {"words": [(2, 1), (1, 0)], "shape2": [(1, 0)]})


def relation_head_figure() -> Figure:
    dims = {"prompt": range(2), "step": [0, 1, 2, 4, 8, 13]}
    attention = xr.DataArray(
        RNG.random((2, 6, 8, 8)), dims=("prompt", "step", "y", "x"), coords=dims
    )
    weights = {word: xr.DataArray(RNG.normal(size=(8, 8)), dims=("y", "x")) for word in WORDS[:4]}
    return viz.relation_head_figure("L2H1", PROMPTS, torch.rand(2, 3, 128, 128), attention, weights)


FIGURES = [
    head_step_map,
    word_maps,
    ramp_gallery,
    variance_bars,
    dose_response_curves,
    learning_curves,
    relation_head_figure,
]


def test_every_figure_is_looked_at() -> None:
    drawn = {name for name in viz.__all__ if callable(getattr(viz, name))} - {
        "Effects",
        "attention_page",
        "bare",
        "intervals",
        "name_rows",
        "report",
        "show",
    }
    assert drawn == {draw.__name__ for draw in FIGURES}


@pytest.mark.parametrize("draw", FIGURES, ids=lambda draw: draw.__name__)
def test_a_figure_has_no_faults(draw: Callable[[], Figure], tmp_path: Path) -> None:
    before = dict(plt.rcParams)
    figure = draw()
    assert dict(plt.rcParams) == before  # the look is not left behind
    assert style.problems(figure) == []
    vectors = style.save(figure, tmp_path / "figure.svg").read_text()
    words = {
        text.get_text()
        for text in figure.findobj(plt.Text)
        if re.fullmatch(r"[a-z ]+", text.get_text())
    }
    assert words
    assert all(f">{word}<" in vectors for word in words)  # letters are text, not shapes
    style.save(figure, tmp_path / "figure.pdf")


def test_faults_are_found() -> None:
    with style.applied():
        figure = plt.figure(figsize=(11, 3))
        figure.text(0.5, 0.5, "one")
        figure.text(0.505, 0.5, "two")
        figure.text(0.1, 0.1, "small", fontsize=6)
        figure.text(-0.2, 0.1, "outside")
        figure.text(0.8, 0.8, "faint", color="#eeeeee")
        ax = figure.add_axes((0.2, 0.2, 0.2, 0.2))
        ax.plot([0, 1], label="L2H1", color="red")
        ax.bar([0], [1], label="L2H2", color="red")
        ax.errorbar([0], [1], label="L3H0", color="red")
        ax.plot([0, 1], label="L1H0", color=style.head_color("L1H0"))
        ax.bar([0], [1], label="L1H1", color=style.head_color("L1H1"))
        ax.errorbar([0], [1], label="L1H2", color=style.head_color("L1H2"))
        viz.bare(ax)
    assert style.problems(figure) == [
        "11.0 inches wide",
        *[f"{head!r} has another color than elsewhere" for head in ("L2H1", "L2H2", "L3H0")],
        "'small' has 6.0 points",
        "'outside' leaves the figure",
        "'faint' is faint on white or on black",
        "'one' overlaps 'two'",
    ]
    assert style.problems(plt.figure()) == ["a background"]


def test_a_head_has_one_color() -> None:
    heads = list(itertools.product(range(6), range(6)))
    colors = [style.head_color(head) for head in heads]
    assert len(set(colors)) == len(heads)
    for color in colors:
        shade = style.luminance(color)
        assert min(1.05 / (shade + 0.05), (shade + 0.05) / 0.05) >= 3  # lines on white and on black
    axes = learning_curves().axes
    lines = {
        (ax, line.get_label()): line.get_color()
        for ax in axes[1:]
        for line in ax.get_lines()
        if line.get_label()[0] == "L"
    }
    assert len(lines) == 3
    assert all(color == style.head_color(label) for (_, label), color in lines.items())


def test_luminance_is_that_of_the_standard() -> None:
    """Contrast of #767676 with white is 4.54, of #0000ff with white 8.59 (WCAG's own examples)."""
    assert 1.05 / (style.luminance("#767676") + 0.05) == pytest.approx(4.54, abs=0.01)
    assert 1.05 / (style.luminance("#0000ff") + 0.05) == pytest.approx(8.59, abs=0.01)
