"""Files and folders that are written whole or not at all, and errors of the disk as sentences."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXCHANGE = 2
"""Flag of Linux's renameat2: the two paths change places in one step."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file such that a kill at any moment leaves the old one or the new one.

    Args:
        path: the file; its folder is made if need be.
        write: writes the content to the path that it is given, which has the same suffix.

    Raises:
        OSError: the disk is full, or the path cannot be written to; the message names it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_whole(path, lambda part: part.write_text("whole"))
        >>> path.read_text()
        'whole'
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _beside(path)
        try:
            write(part)
            sync(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        sync(path.parent)


def write_json(path: str | Path, content: Any) -> None:
    """Write a value as JSON, as `write_whole` does.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "n.json")
        >>> write_json(path, {"n": 7})
        >>> json.loads(path.read_text())
        {'n': 7}
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def replace_folder(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Write a folder such that a kill at any moment leaves the old one or the new one.

    Where the system cannot exchange two folders in one step (Linux can), a kill between two renames
    leaves neither in its place.

    Args:
        folder: the folder; its old content is gone afterwards.
        write: fills the empty folder that it is given.

    Raises:
        OSError: the disk is full, or the path cannot be written to; the message names it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "new"
        >>> replace_folder(folder, lambda part: (part / "a").write_text("b"))
        >>> [path.name for path in folder.iterdir()]
        ['a']
    """
    folder = Path(folder)
    with disk_errors(folder):
        part = _beside(folder)
        try:
            part.mkdir(parents=True)
            write(part)
            for path in (*part.rglob("*"), part):
                sync(path)
            _put(part, folder)
        finally:
            # the old content of the place, or half of the new
            shutil.rmtree(part, ignore_errors=True)
        sync(folder.parent)


def remove_parts(folder: Path) -> None:
    """Remove leftovers of a killed `write_whole` or `replace_folder` in one writer's folder."""
    for part in folder.glob(".*.part*"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk into a sentence with the path.

    In Python or in a library that writes for it.

    Raises:
        OSError: of the same kind and number.

    Example:
        >>> with disk_errors(Path("results/a.json")):
        ...     raise OSError(errno.ENOSPC, "No space left on device")
        Traceback (most recent call last):
        OSError: results/a.json could not be written (No space left on device): make ...
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        reason = os.strerror(number)
        advice = "make room" if number in FULL else "choose another folder"
        said = type(OSError(number, ""))(
            f"{path} could not be written ({reason}): {advice}, and run again."
        )
        said.errno = number
        raise said from error


def _number(error: Exception) -> int | None:
    """The number of an error of the disk, also of one that Rust (safetensors) has told as text."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    return next(
        (
            number
            for number in (*FULL, errno.EACCES, errno.EROFS, errno.EIO)
            if f"(os error {number})" in text
        ),
        None,
    )


def _beside(path: Path) -> Path:
    return path.with_name(f".{secrets.token_hex(6)}.part{path.suffix}")


def _put(part: Path, folder: Path) -> None:
    """Put a folder in the place of another, which then stands where the first was."""
    if not folder.is_dir():
        part.rename(folder)
    elif not _exchanged(part, folder):
        old = _beside(folder)
        folder.rename(old)
        part.rename(folder)
        old.rename(part)


def _exchanged(a: Path, b: Path) -> bool:
    """True if the system has exchanged two paths in one step."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return (
        renameat2 is not None
        and renameat2(-100, os.fsencode(a), -100, os.fsencode(b), EXCHANGE) == 0
    )
