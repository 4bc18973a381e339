"""Where a sweep's numbers go.

A table, one row a cell, that survives being killed; and from it the Dataset. On disk the table is
Parquet shards in a folder (`dit_lens.store`), which records hashes of its origin: model, prompts,
seeds, interventions, metrics. Columns: `cell` = condition · (prompts · seeds) + seed index ·
prompts + prompt; the metrics; `{metric}_baseline`, the same run's without intervention; `error`,
empty where all went well.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from ..stats import clustered_means
from ..store import Store
from .conditions import Condition
from .halves import split_half

LARGEST = 10
"""Effects whose split-half stability a result carries."""
FLUSH_SECONDS = 10.0
"""How often a shard is written: the most that a killed run loses."""


class Results:
    """Rows of cells, in memory and, if there is a folder, on disk.

    Raises:
        ValueError: the folder holds a sweep of another model, other prompts or settings, or is
            written to by another run.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.parts: list[pd.DataFrame] = []
        self.unsaved: list[pd.DataFrame] = []
        self.failure: OSError | None = None
        self.flushed = time.monotonic()
        if folder is None:
            return
        self.store = Store(folder, settings)
        try:
            self.parts = [
                pd.read_parquet(self.store.path(name))
                for name in self.store.names("cells-")
                if name in self.store
            ]
        except BaseException:
            self.store.close()
            raise

    @property
    def table(self) -> pd.DataFrame:
        """All rows, ordered by cell."""
        if not self.parts:
            return pd.DataFrame({"cell": np.empty(0, dtype=np.int64)})
        return pd.concat(self.parts, ignore_index=True).sort_values("cell", ignore_index=True)

    @property
    def done(self) -> Int[np.ndarray, " cell"]:
        """The cells that have a row."""
        return self.table["cell"].to_numpy(dtype=np.int64)

    def add(self, rows: pd.DataFrame) -> None:
        """Add rows, and write those that have come together if it is time."""
        self.parts.append(rows)
        if self.folder is not None:
            self.unsaved.append(rows)
            if time.monotonic() - self.flushed >= FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write the rows that are not on disk yet, as one shard.

        After a full disk they are kept for the next try.
        """
        self.flushed = time.monotonic()
        if self.folder is None or not self.unsaved:
            return
        rows = pd.concat(self.unsaved, ignore_index=True)
        try:
            number = len(self.store.names("cells-"))
            self.store.put(
                f"cells-{number:06d}.parquet", lambda part: rows.to_parquet(part, index=False)
            )
        except OSError as error:
            self.failure = error
            return
        self.unsaved, self.failure = [], None

    def close(self) -> None:
        """Write the rest; report cells that could not be written, in rows and by a warning."""
        if self.folder is None:
            return
        self.flush()
        self.store.close()
        if self.failure is not None:
            reason = f"not saved: {self.failure}"
            for rows in self.unsaved:
                rows["error"] = [
                    f"{error}; {reason}" if error else reason for error in rows["error"]
                ]
            cells = sum(map(len, self.unsaved))
            warnings.warn(
                f"{cells} cells are in the returned Dataset but not in {self.folder}: "
                f"{self.failure} Running again computes these cells anew.",
                stacklevel=3,
            )


def dataset(
    table: pd.DataFrame,
    conditions: Sequence[Condition],
    prompts: Sequence[str],
    seeds: Sequence[int | Sequence[int]],
    own: Mapping[str, bool],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """The table as a Dataset over (intervention, prompt, seed).

    `own`: metric → True if its baseline depends on the condition.
    """
    shape = (len(conditions), len(seeds), len(prompts))
    names = [
        name
        for name in table.columns
        if name not in ("cell", "error") and not name.endswith("_baseline")
    ]
    cells = table["cell"].to_numpy()

    def laid_out(column: str, empty: Any) -> np.ndarray:
        whole = np.full(
            int(np.prod(shape)), empty, dtype=object if isinstance(empty, str) else float
        )
        whole[cells] = table[column].to_numpy()
        return whole.reshape(shape).swapaxes(1, 2)

    dims = ("intervention", "prompt", "seed")
    found = xr.Dataset(coords=_coords(conditions, prompts, seeds), attrs=dict(attrs))
    for name in names:
        after, before = laid_out(name, np.nan), laid_out(f"{name}_baseline", np.nan)
        found[name] = (dims, after)
        found[f"{name}_baseline"] = (
            (dims, before) if own[name] else (dims[1:], np.fmax.reduce(before))
        )
        found[f"{name}_effect"] = (("intervention", "interval"), effects(before, after))
        if len(conditions) > 1 and len(prompts) > 1:
            halves = split_half(after - before, LARGEST)
            found[f"{name}_effect"].attrs |= {
                f"split_half_{key}": value for key, value in halves._asdict().items()
            }
    found["error"] = (dims, laid_out("error", "").astype(str))
    return found


def _coords(
    conditions: Sequence[Condition],
    prompts: Sequence[str],
    seeds: Sequence[int | Sequence[int]],
) -> dict[str, Any]:
    own = [one for one in seeds if not isinstance(one, int)]
    return {
        "intervention": [one.label for one in conditions],
        **{
            name: ("intervention", [one.coords[name] for one in conditions])
            for name in ("layer", "head", "step")
        },
        "prompt": list(prompts),
        "seed": list(range(len(own))) if own else list(seeds),
        **({"noise_seed": (("seed", "prompt"), np.array(own))} if own else {}),
        "interval": ["mean", "low", "high"],
    }


def effects(
    before: Float[np.ndarray, "intervention prompt seed"],
    after: Float[np.ndarray, "intervention prompt seed"],
) -> Float[np.ndarray, "intervention bound"]:
    """Mean over the pairs of a cell and its baseline, with a 95 % interval.

    Over prompts; of one prompt, over seeds.
    """
    difference = after - before
    clusters = difference.swapaxes(1, 2) if difference.shape[1] == 1 else difference
    both = np.concatenate([before.ravel(), after.ravel()])
    verdicts = np.isin(both[~np.isnan(both)], (0, 1)).all() and bool((both == 1).any())
    return clustered_means(clusters, signed=bool(verdicts))
