"""The progress bar of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Advance(NamedTuple):
    """Callbacks that advance the progress bar."""

    cells: Callable[[int], None]
    """Cells."""
    rows: Callable[[int], None]
    """Rows that went through a denoising step: the measure of time left, for cells differ in how
    many steps they take.
    """


@contextmanager
def progress_bar(cells: int, work: int, disable: bool) -> Iterator[Advance]:
    """Cells, cells/s and time left, on stderr, for the time of the block."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(
            "{task.fields[cells]}/{task.fields[of]} cells, {task.fields[rate]:.1f} cells/s,"
        ),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=disable
    ) as progress:
        task = progress.add_task("sweep", total=work, cells=0, of=cells, rate=0.0)
        counted = 0

        def advance_cells(cells: int) -> None:
            nonlocal counted
            counted += cells
            progress.update(task, cells=counted, rate=counted / (progress.tasks[0].elapsed or 1.0))

        yield Advance(advance_cells, lambda rows: progress.advance(task, rows))
