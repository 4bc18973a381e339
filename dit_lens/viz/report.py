"""One HTML file of an experiment: settings, versions, model, table, figures, code."""

from __future__ import annotations

import base64
import html
import inspect
import io
import platform
import textwrap
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from ..store import write_whole
from .figures import head_step_map
from .style import applied

LIBRARIES = ("dit_lens", "torch", "diffusers", "transformers", "transformer_lens", "numpy")
SHOWN_ROWS = 200
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; }
body { margin: 1.5rem auto; max-width: 60rem; padding: 0 1rem;
  font: 15px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #8884;
  vertical-align: top; }
pre { overflow: auto; padding: .6rem; border: 1px solid #8884; }
img { max-width: 100%; }
figure { margin: 1rem 0; }
figcaption { opacity: .75; }
"""


def report(
    result: pd.DataFrame | xr.DataArray | xr.Dataset,
    path: str | Path,
    *,
    title: str,
    code: str | Callable[..., Any],
    model: Any = None,
    settings: Mapping[str, Any] | None = None,
    figures: Mapping[str, Figure] | None = None,
) -> Path:
    """Write an experiment as one file to send to somebody.

    No script, nothing fetched, figures as vectors.

    Args:
        result: the numbers. Labelled arrays become one row a cell; the page shows the first 200
            rows and carries all of them as CSV.
        path: the file.
        title: heading of the page.
        code: the source that computes `result`, or a function, whose source is taken.
        model: the model that it was computed with; its name, revision and hash are recorded.
        settings: further facts, such as seeds; the attributes of an array are added.
        figures: caption → figure. A `DataArray` over (layer, head, step) is drawn where none is
            given.

    Raises:
        TypeError: `result` is no table and no labelled array.
        OSError: the source of `code` cannot be found, or the file cannot be written.

    Example:
        >>> table = pd.DataFrame({"head": ["L2H1"], "effect": [0.4]})
        >>> report(table, "report.html", title="Knock-outs", code="print('…')").name
        'report.html'
    """
    if not isinstance(result, pd.DataFrame | xr.DataArray | xr.Dataset):
        raise TypeError(
            f"report needs a DataFrame, DataArray or Dataset, not {type(result).__name__}."
        )
    attributes = {} if isinstance(result, pd.DataFrame) else result.attrs
    facts = {**(settings or {}), **{str(name): value for name, value in attributes.items()}}
    drawn = dict(figures or {})
    own = (
        not drawn
        and isinstance(result, xr.DataArray)
        and set(result.dims) == {"layer", "head", "step"}
    )
    if own:
        drawn[str(result.name or "value")] = head_step_map(result, str(result.name or ""))
    source = code if isinstance(code, str) else textwrap.dedent(inspect.getsource(code))
    table = _table(result)
    written = base64.b64encode(table.to_csv(index=False).encode()).decode()
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    name = html.escape(title)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{name}</title><style>{STYLE}</style></head><body><h1>{name}</h1>",
        *map(_figure, drawn, drawn.values()),
        f"<h2>Result</h2><p>{len(table)} rows;",
        f'<a download="result.csv" href="data:text/csv;base64,{written}">all as CSV</a>.</p>',
        table.head(SHOWN_ROWS).to_html(index=False, float_format="{:.4g}".format, border=0),
        f"<h2>Repeat it</h2><pre><code>{html.escape(source)}</code></pre>",
        "<h2>Settings</h2>" + _pairs(facts | _origin(model)),
        "<h2>Versions</h2>" + _pairs(versions),
        "</body></html>",
    ]
    if own:
        plt.close(next(iter(drawn.values())))
    path = Path(path)
    write_whole(path, lambda part: part.write_text("\n".join(parts)))
    return path


def _table(result: pd.DataFrame | xr.DataArray | xr.Dataset) -> pd.DataFrame:
    """One row a cell; an index with a name is a column."""
    if isinstance(result, xr.DataArray):
        result = result.rename(result.name or "value").to_dataset()
    frame = result.to_dataframe() if isinstance(result, xr.Dataset) else result
    named = any(name is not None for name in frame.index.names)
    return frame.reset_index() if named else frame.reset_index(drop=True)


def _origin(model: Any) -> dict[str, str]:
    if model is None:
        return {}
    found = getattr(model, "source", None)
    named = {"model": str(found.name)} if found is not None else {"model": type(model).__name__}
    if found is not None and found.commit:
        named["revision"] = str(found.commit)
    return {**named, "model hash": model.digest()}


def _vectors(figure: Figure) -> str:
    buffer = io.BytesIO()
    with applied():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(caption: str, figure: Figure) -> str:
    text = html.escape(caption)
    image = f'<img src="{_vectors(figure)}" alt="{text}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _pairs(facts: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        return html.escape(
            np.array2string(value, threshold=20) if isinstance(value, np.ndarray) else str(value)
        )

    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{shown(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{rows}</table>"
