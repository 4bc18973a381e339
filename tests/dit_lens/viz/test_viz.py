"""Figures show the numbers they were given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from dit_lens import variance, viz


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def drawn(ax: Any) -> np.ndarray:
    return np.asarray(ax.get_images()[-1].get_array())


def test_heat_map_of_heads_and_steps() -> None:
    values = xr.DataArray(
        np.random.default_rng(0).normal(size=(3, 2, 4)),
        dims=("step", "layer", "head"),
        coords={"step": [0, 4, 8]},
    )
    ax = viz.head_step_map(values, "effect").axes[0]
    np.testing.assert_array_equal(
        drawn(ax), values.transpose("layer", "head", "step").values.reshape(8, 3)
    )
    assert [t.get_text() for t in ax.get_yticklabels()][:5] == [
        "L0H0",
        "L0H1",
        "L0H2",
        "L0H3",
        "L1H0",
    ]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "4", "8"]
    low, high = ax.get_images()[0].get_clim()
    assert low == -high == -abs(values).max()
    assert viz.head_step_map(abs(values)).axes[0].get_images()[0].get_clim()[0] == 0
    top = viz.head_step_map(values, top=2).axes[0]
    strongest = abs(values).max("step").stack(name=("layer", "head")).to_series().nlargest(2).index
    assert [t.get_text() for t in top.get_yticklabels()] == [
        f"L{layer}H{head}" for layer, head in sorted(strongest)
    ]
    with pytest.raises(ValueError, match="layer, head and step, not layer, head, step, prompt"):
        viz.head_step_map(
            values.expand_dims(prompt=2, axis=-1).transpose("layer", "head", "step", "prompt")
        )


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
    axes = [
        ax
        for ax in viz.ramp_gallery(maps).axes
        if ax.get_images() and ax.get_label() != "<colorbar>"
    ]
    assert len(axes) == 3
    assert [ax.get_title() for ax in axes] == ["above", "left", ""]
    np.testing.assert_allclose(drawn(axes[1]), maps["L2H1"]["left"] - maps["L2H1"]["left"].mean())


def test_bars_of_a_variance_partition() -> None:
    rng = np.random.default_rng(0)
    factors = pd.DataFrame(
        {"shape": list("aabbcc") * 10, "color": list("xy") * 30, "copy": list("xy") * 30}
    )
    table = variance.partition(rng.normal(size=(60, 5)), factors, permutations=9)
    ax = viz.variance_bars({"before": table, "after": table}).axes[0]
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[0] == pytest.approx(table.loc["shape", "r2_partial"])
    assert len(heights) == 6
    assert "aliased" in [text.get_text() for text in ax.texts]


def test_dose_response_curves() -> None:
    rows = [
        {
            "kind": kind,
            "k": k,
            "metric": metric,
            "mean": k / 4,
            "low": k / 4 - 0.1,
            "high": k / 4 + 0.1,
        }
        for kind in ("steered", "random_vector", "steered − random_vector")
        for k in (1.0, 0.0)
        for metric in ("target", "original")
    ]
    axes = viz.dose_response_curves(pd.DataFrame(rows), ("target", "original")).axes
    assert [ax.get_title() for ax in axes] == ["target", "original"]
    lines = axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["steered", "random vector"]
    np.testing.assert_array_equal(lines[0].get_xydata(), [[0, 0], [1, 0.25]])
