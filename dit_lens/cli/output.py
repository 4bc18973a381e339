"""Output of the commands: text, tables, and errors of one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..store import write_whole

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".parquet", ".json", ".html")
"""File types that a table is written as, by the suffix of `--out`."""


def say(text: str) -> None:
    """Print text as it is: brackets in a path or a prompt are no markup."""
    Console(soft_wrap=True, markup=False, highlight=False).print(text)


def show(table: pd.DataFrame, out: Path | None, title: str, rows: int | None = None) -> None:
    """Print a table, and write all of it to a file."""
    if out is not None:
        save(table, out)
    say(f"{title}\n{table.head(rows or len(table)).round(4).to_string(index=False)}")


def save(table: pd.DataFrame, out: Path) -> None:
    """Write a table by its file's suffix.

    Raises:
        ValueError: the suffix is none of `TABLES`.
    """
    writers: dict[str, Callable[[Path], Any]] = {
        ".csv": lambda path: table.to_csv(path, index=False),
        ".parquet": lambda path: table.to_parquet(path, index=False),
        ".json": lambda path: table.to_json(path, orient="records", indent=1),
        ".html": lambda path: table.to_html(path, index=False),
    }
    if out.suffix not in writers:
        raise ValueError(f"--out {out}: name a file that ends in {', '.join(TABLES)}.")
    write_whole(out, writers[out.suffix])


@contextmanager
def step_bar(total: int) -> Iterator[Callable[..., None]]:
    """Show denoising steps, steps/s and time left, on stderr.

    The function that is given is called once a step, and can be a hook.
    """
    columns = (
        *(BarColumn(), MofNCompleteColumn(), TextColumn("steps, {task.fields[rate]:.1f}/s,")),
        *(TimeRemainingColumn(), TextColumn("left")),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("steps", total=total, rate=0.0)

        def advance(*_: Any, **__: Any) -> None:
            shown = progress.tasks[0]
            progress.update(
                task, advance=1, rate=(shown.completed + 1) / max(shown.elapsed or 0.0, 1e-3)
            )

        yield advance


def first_line(error: BaseException) -> str:
    """The message; `str` of a KeyError would quote it."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
