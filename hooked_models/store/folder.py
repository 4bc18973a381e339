"""A folder of results with a record of their settings and of every file's digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from .hashing import digest
from .writing import disk_errors, remove_parts, replace_folder, write_json, write_whole

INDEX, LOCK = "index.json", "lock"
AGAIN = "delete it and run again"
Entry = str | dict[str, str]
Value = TypeVar("Value")


@dataclass
class Index:
    """The content of a folder's `index.json`: settings, facts, and the digest of every file.

    A file that is being replaced has two digests, its old one and its new one, until it is in its
    place.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with Store(folder, {"seed": 0}) as store:
        ...     store.put("a.txt", lambda path: path.write_text("first"))
        >>> index = Index.read(folder)
        >>> index.settings, list(index.files)
        ({'seed': 0}, ['a.txt'])
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """Decide the state of the folder."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Go with it."""
    files: dict[str, list[Entry]] = field(default_factory=dict)
    """Name of a file → digests of its bytes; of a folder → files in it, with theirs."""
    remedy: str = AGAIN
    """Remedy for a damaged file: the end of a sentence."""
    checked: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: str | Path, remedy: str = AGAIN) -> Index | None:
        """The index of a folder, or None if it has none.

        Raises:
            OSError: it is damaged.
        """
        folder = Path(folder)
        path = folder / INDEX
        try:
            content = json.loads(path.read_bytes())
            body, found = content["content"], content["digest"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError):
            raise OSError(
                f"{path} is damaged, or is not an index of this version: {remedy}."
            ) from None
        if found != _digest_of(body):
            raise OSError(f"{path} is damaged: {remedy}.")
        return cls(folder, body["settings"], body["facts"], body["files"], remedy)

    def path(self, name: str) -> Path:
        """The path of a listed file or folder, whose bytes are those that were written.

        Raises:
            FileNotFoundError: it, or a file in it, is missing, or it was never listed.
            OSError: it, or a file in it, is damaged.
        """
        path = self.folder / name
        if name not in self.files:
            raise FileNotFoundError(
                f"{path} is not among the files that {self.folder / INDEX} lists: {self.remedy}."
            )
        if name not in self.checked:
            wrong = [_wrong_file(path, entry) for entry in self.files[name]]
            if None not in wrong:
                raise self._damage(Path(str(wrong[0])))
            self.checked.add(name)
        return path

    def _damage(self, path: Path) -> OSError:
        if not path.exists():
            return FileNotFoundError(
                f"{path} is missing: restore it, or {self.remedy.removeprefix('delete it and ')}."
            )
        size = path.stat().st_size
        return OSError(
            f"{path} is damaged: its {size:,} bytes are not those that were written; {self.remedy}."
        )


class Store(Index):
    """A folder that one process writes to.

    Whole files, listed with their digests, all made from the same settings.

    Args:
        folder: made if need be. A file in it that the index does not list counts as not there.
        settings: values that decide the results, as JSON; see `fingerprint` for values that JSON
            has no form of.
        facts: values that go with them and are not compared.
        may_change: names of settings that may differ from those before, and are then replaced.
        wait: wait for another process that writes to the folder, instead of raising.
        remedy: for a damaged file: the end of a sentence.

    Raises:
        ValueError: the folder holds results of other settings, or another process writes to it.
        OSError: its index is damaged, or it cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with Store(folder, {"seed": 0}) as store:
        ...     store.put("a.txt", lambda path: path.write_text("first"))
        >>> with Store(folder, {"seed": 0}) as store:
        ...     store.path("a.txt").read_text()
        'first'
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        *,
        facts: Mapping[str, Any] | None = None,
        may_change: Sequence[str] = (),
        wait: bool = False,
        remedy: str = AGAIN,
    ) -> None:
        folder, plain = Path(folder), json.loads(json.dumps(dict(settings)))
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / LOCK, timeout=-1 if wait else 0, thread_local=False)
            try:
                self._lock.acquire()
            except Timeout:
                raise ValueError(
                    f"Another run is writing to {folder}: wait until it has ended, or choose "
                    "another folder."
                ) from None
        try:
            found = Index.read(folder, remedy)
            if found is not None:
                check_settings(folder, found.settings, plain, may_change)
            remove_parts(folder)
            kept = {} if found is None else found.files
            self._coming: dict[str, Entry] = {}
            super().__init__(
                folder, plain, dict(facts or {}) if found is None else found.facts, kept, remedy
            )
            if found is None or found.settings != plain:
                self._write_index(kept)
        except BaseException:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self.files and (self.folder / name).exists()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._lock.release()

    def names(self, start: str = "") -> list[str]:
        """The listed files whose names begin so, in order."""
        return sorted(name for name in self.files if name.startswith(start))

    def record(self, **facts: Any) -> None:
        """Add facts to the index."""
        self.facts |= facts
        self._write_index(self.files)

    def _write_index(self, files: Mapping[str, list[Entry]]) -> None:
        body = json.loads(
            json.dumps({"settings": self.settings, "facts": self.facts, "files": files})
        )
        write_json(self.folder / INDEX, {"digest": _digest_of(body), "content": body})

    def put(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file, or replace one, and list it; a kill leaves the old one or the new one."""
        self.put_all({name: write})

    def put_all(self, writes: Mapping[str, Callable[[Path], object]]) -> None:
        """Write or replace files one after the other, as `put`, and list them together.

        A kill leaves some of them, none of which is listed before all are there.
        """
        for name, write in writes.items():

            def listed(part: Path, name: str = name, write: Any = write) -> None:
                write(part)
                self._expect(name, digest_file(part))

            write_whole(self.folder / name, listed)
        self._settle(*writes)

    def put_folder(self, name: str, write: Callable[[Path], object]) -> None:
        """Write or replace a folder and list its files; a kill leaves the old or the new one."""

        def listed(part: Path) -> None:
            write(part)
            files = [path for path in sorted(part.rglob("*")) if path.is_file()]
            self._expect(
                name, {path.relative_to(part).as_posix(): digest_file(path) for path in files}
            )

        replace_folder(self.folder / name, listed)
        self._settle(name)

    def drop(self, *names: str) -> None:
        """Remove files and forget them."""
        for name in names:
            del self.files[name]
        self._write_index(self.files)
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def put_json(self, name: str, content: Any) -> None:
        """Write a value as JSON and list it."""
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        self.put(name, lambda part: part.write_text(text, encoding="utf-8"))

    def load_or(
        self,
        name: str,
        make: Callable[[], Value],
        write: Callable[[Value, Path], object],
        read: Callable[[Path], Value],
    ) -> Value:
        """The value in a file; if the file is not there, a new one, which is then written to it.

        Args:
            name: of the file.
            make: makes the value.
            write: writes it to a path.
            read: reads it from there.

        Raises:
            OSError: the file is damaged; the message names the remedy.

        Example:
            >>> import tempfile
            >>> with Store(tempfile.mkdtemp(), {}) as store:
            ...     store.load_or(
            ...         "n.txt",
            ...         lambda: "7",
            ...         lambda value, path: path.write_text(value),
            ...         Path.read_text,
            ...     )
            '7'
        """
        if name in self:
            return read(self.path(name))
        value = make()
        self.put(name, lambda path: write(value, path))
        return value

    def array(self, name: str, make: Callable[[], Any]) -> Any:
        """The NumPy array in a file, such as "00000000.npy".

        If the file is not there, a new one, as in `load_or`.
        """
        import numpy as np

        return self.load_or(
            name,
            make,
            lambda values, path: np.save(path, values),
            partial(np.load, allow_pickle=False),
        )

    def _expect(self, name: str, entry: Entry) -> None:
        """List a file that is about to be put in a place, beside the one that stands there."""
        self._coming[name] = entry
        if before := self.files.get(name):
            self._write_index(
                {**self.files, name: [*(old for old in before if old != entry), entry]}
            )

    def _settle(self, *names: str) -> None:
        """List the files that were put in their places alone."""
        for name in names:
            self.files[name] = [self._coming.pop(name)]
            self.checked.add(name)
        self._write_index(self.files)


def check_settings(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], may_change: Sequence[str] = ()
) -> None:
    """Raise ValueError if results were made with other settings, apart from those in `may_change`.

    Example:
        >>> check_settings(Path("out"), {"seed": 0}, {"seed": 1})
        Traceback (most recent call last):
        ValueError: out holds results that were made with other seed (0, now 1): ...
    """
    missing = object()
    different = [
        name
        for name in {**before, **now}
        if name not in may_change and before.get(name, missing) != now.get(name, missing)
    ]
    if different:
        listing = ", ".join(
            _difference(name, before.get(name), now.get(name)) for name in different
        )
        raise ValueError(
            f"{folder} holds results that were made with other {listing}: choose another folder, "
            "or delete it."
        )


def _wrong_file(path: Path, entry: Entry) -> Path | None:
    """The first file that is not as listed."""
    listed = (
        {path: entry}
        if isinstance(entry, str)
        else {path / name: known for name, known in entry.items()}
    )
    return next(
        (
            file
            for file, known in listed.items()
            if not file.is_file() or digest_file(file, len(known)) != known
        ),
        None,
    )


def digest_file(path: Path, digits: int = 40) -> str:
    """The digest of a file's bytes, in hexadecimal digits.

    SHA-256, which processors compute at twice the speed of BLAKE2; with 32 digits BLAKE2, as in
    folders of version 0.1.
    """
    older = partial(hashlib.blake2b, digest_size=16)
    with path.open("rb") as file:
        return hashlib.file_digest(file, older if digits == 32 else "sha256").hexdigest()[:digits]


def _difference(name: str, before: Any, now: Any) -> str:
    """A setting with its two values, unless these are digests or long."""
    shown = [f"{value!r}" for value in (before, now)]
    if any(
        len(value) > 40 or _is_digest(raw) for value, raw in zip(shown, (before, now), strict=True)
    ):
        return name
    return f"{name} ({shown[0]}, now {shown[1]})"


def _is_digest(value: Any) -> bool:
    return (
        isinstance(value, str) and len(value) == 16 and all(c in "0123456789abcdef" for c in value)
    )


def _digest_of(body: Mapping[str, Any]) -> str:
    return digest(json.dumps(body, sort_keys=True))
