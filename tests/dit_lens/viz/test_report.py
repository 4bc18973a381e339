"""A report repeats: its code gives its table, its CSV all numbers; whatever it is given is text,
never markup.
"""

from __future__ import annotations

import base64
import html
import io
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from dit_lens import viz
from hooked_models import HookedTextToImage


def table_of(path: Path) -> pd.DataFrame:
    written = re.search(r"data:text/csv;base64,([^\"]+)", path.read_text())[1]
    return pd.read_csv(io.BytesIO(base64.b64decode(written)))


def squares() -> pd.DataFrame:
    """<b>Not bold</b>."""
    import pandas as pd

    return pd.DataFrame({"n": range(300), "square": [i**2 / 7 for i in range(300)]})


def test_its_code_gives_its_table(tmp_path: Path) -> None:
    path = viz.report(
        squares(), tmp_path / "new" / "a.html", title="Squares", code=squares, settings={"seed": 3}
    )
    code = html.unescape(
        re.search("<pre><code>(.*?)</code></pre>", path.read_text(), flags=re.S)[1]
    )
    names: dict[str, Any] = {"pd": pd}
    exec(code, names)
    pd.testing.assert_frame_equal(table_of(path), names["squares"]())  # all 300 rows
    # 200 rows, 2 columns
    shown = [float(cell) for cell in re.findall("<td>([0-9.e+]+)</td>", path.read_text())[:400]]
    np.testing.assert_allclose(shown, squares().to_numpy()[:200].ravel(), rtol=1e-3)


def test_model_versions_and_settings(tmp_path: Path) -> None:
    model = HookedTextToImage.from_pretrained("rte-nano")
    array = xr.DataArray(np.arange(2.0), dims="head", name="effect", attrs={"interval": "95 %"})
    text = viz.report(
        array, tmp_path / "a.html", title="t", code="1", model=model, settings={"seed": 3}
    ).read_text()
    rows = dict(re.findall("<tr><th>(.*?)</th><td>(.*?)</td></tr>", text))
    assert rows["model"] == "rte-nano"
    assert rows["model hash"] == model.digest()
    assert (rows["seed"], rows["interval"]) == ("3", "95 %")
    assert rows["torch"] == version("torch")
    assert table_of(tmp_path / "a.html")["effect"].tolist() == [0, 1]


def test_whatever_it_is_given_is_text(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>"
    figure = plt.figure()
    path = viz.report(
        pd.DataFrame({evil: [evil]}),
        tmp_path / "a.html",
        title=evil,
        code=evil,
        settings={evil: evil},
        figures={evil: figure},
    )
    plt.close(figure)
    assert "<script" not in path.read_text()
    assert "http://" not in re.sub(r"base64,[^\"]+", "", path.read_text())


def test_an_array_over_heads_and_steps_is_drawn(tmp_path: Path) -> None:
    dims = {"layer": range(2), "head": range(3), "step": range(4)}
    array = xr.DataArray(
        np.random.default_rng(0).normal(size=(2, 3, 4)),
        dims=tuple(dims),
        coords=dims,
        name="effect",
    )
    open_before = plt.get_fignums()
    path = viz.report(array, tmp_path / "a.html", title="t", code="1")
    (drawn,) = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", path.read_text())
    picture = base64.b64decode(drawn).decode()
    assert all(f">L{layer}H{head}<" in picture for layer in range(2) for head in range(3))
    assert len(table_of(path)) == 24
    assert plt.get_fignums() == open_before
    with pytest.raises(TypeError, match=r"not list|parameter 'result'"):
        viz.report([1], tmp_path / "a.html", title="t", code="1")  # type: ignore[arg-type]
