"""Measurements of a training run: part of its checkpoint, and shown in files beside it.

The checkpoint decides: a run that goes on writes the files anew from it, whatever has become of
them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from safetensors import safe_open
from torch import Tensor

from ..store import Index, Store, disk_errors, write_whole

CHECKPOINT, METRICS, COURSE = "checkpoint.safetensors", "metrics.jsonl", "dynamics.parquet"


def finished(run: str | Path) -> bool:
    """True if the training run in a folder has done all its steps.

    A pipeline is there before that, too.

    Example:
        >>> finished("runs/none")
        False
    """
    run = Path(run)
    if not (run / "pipeline").exists() or not (run / METRICS).exists():
        return False
    steps = [json.loads(line)["step"] for line in (run / METRICS).read_text().splitlines()]
    index = Index.read(run)  # None: a run of version 0.1
    settings = index.settings if index else json.loads((run / "settings.json").read_text())
    return bool(steps) and steps[-1] == settings["steps"]


@dataclass
class History:
    """Measurements of a run, in order.

    Args:
        rows: the log, one dictionary a line of metrics.jsonl, each with its "step".
        course: results of `dynamics.measure` at each of its points; None before the first.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    course: pd.DataFrame | None = None

    @classmethod
    def read(cls, run: Path) -> History:
        """The history of the run in a folder up to its checkpoint, which has to be there."""
        with safe_open(run / CHECKPOINT, "pt") as file:
            known = file.metadata()
            packed = file.get_tensor("history.course") if "history.course" in file.keys() else None  # noqa: SIM118
        if "history" not in known:
            return cls._of_files(run, int(known["step"]))
        course = None if packed is None else pd.read_parquet(io.BytesIO(packed.numpy().tobytes()))
        return cls(json.loads(known["history"]), course)

    @classmethod
    def _of_files(cls, run: Path, step: int) -> History:
        """The same from the files of a run that version 0.1 began, which wrote them alone."""
        # the last line is empty, or was torn by a kill
        *lines, _torn = (run / METRICS).read_text().split("\n")
        rows = [row for row in map(json.loads, lines) if row["step"] <= step]
        path = run / COURSE
        return cls(rows, pd.read_parquet(path).query("step <= @step") if path.exists() else None)

    def packed(self) -> tuple[dict[str, UInt8[Tensor, " byte"]], dict[str, str]]:
        """Tensors and metadata of the checkpoint, from which `read` makes it again."""
        tensors = {}
        if self.course is not None:
            data = np.frombuffer(self.course.to_parquet(index=False), np.uint8)
            tensors["history.course"] = torch.from_numpy(data.copy())
        return tensors, {"history": json.dumps(self.rows)}

    def show(self, run: Store) -> None:
        """Write the files anew."""
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_whole(run.folder / METRICS, lambda path: path.write_text(text))
        if self.course is not None:
            self._show_course(run)
        elif COURSE in run.files:
            run.drop(COURSE)

    def log(self, run: Store, row: dict[str, Any]) -> None:
        """Add a row, and a line to metrics.jsonl."""
        self.rows.append(row)
        path = run.folder / METRICS
        with disk_errors(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def add(self, run: Store, point: pd.DataFrame) -> None:
        """Add a point of the course."""
        self.course = (
            point if self.course is None else pd.concat([self.course, point], ignore_index=True)
        )
        self._show_course(run)

    def _show_course(self, run: Store) -> None:
        course = self.course
        assert course is not None
        run.put(COURSE, lambda path: course.to_parquet(path, index=False))


def open_run(out: Path, facts: Mapping[str, object], may_change: Sequence[str]) -> Store:
    """The folder of a run, to write to.

    Raises:
        ValueError: it holds a run with other settings, or another process is training in it.
        OSError: its checkpoint is damaged.
    """
    run = Store(
        out,
        facts,
        may_change=may_change,
        remedy=f"restore it from a copy, or delete the folder {out} and train again",
    )
    if CHECKPOINT in run.files:
        run.path(CHECKPOINT)
    return run


def checkpoint_of(run: Path) -> Path:
    """The checkpoint of the run in a folder.

    Raises:
        FileNotFoundError: it is missing.
        OSError: it is damaged.
    """
    index = Index.read(run)
    return run / CHECKPOINT if index is None else index.path(CHECKPOINT)
