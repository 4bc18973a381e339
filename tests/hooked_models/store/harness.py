"""Ways to harm what writes to a folder, and what may come of it: the right result, or a sentence
that says what to do.

Every harm happens in a process that is forked from this one, so that nothing is imported again.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "ctypes.dlsym")
ADVICE = (
    *(
        "run again",
        "train again",
        "save the pipeline again",
        "restore",
        "choose",
        "make room",
        "free some",
        "wait",
    ),
    *("writes one", "has no model_index.json", "give a"),
)
"""Remedies, in our sentences; the last three are of folders that hold nothing yet."""
RIGHT, SENTENCE = "right", "sentence"


@dataclass
class User:
    """Something that writes to a folder.

    Args:
        work: does it, or goes on with it, and returns the result.
        same: raises AssertionError unless two results are equal.
        read: opens the folder without writing, if there is a way, and returns tensors by name.
    """

    name: str
    work: Callable[[Path], Any]
    same: Callable[[Any, Any], object]
    read: Callable[[Path], dict[str, torch.Tensor]] | None = None


@dataclass
class Tally:
    """Counts of what came of each harm, and what was neither right nor a sentence."""

    user: str
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, harm: str, found: str, what: object = "") -> None:
        kind = found if found in (RIGHT, SENTENCE, "killed") else "wrong"
        self.counts.setdefault(harm, Counter())[kind] += 1
        if kind == "wrong":
            self.wrong.append(f"{self.user}, {harm}, {what}: {found}")

    def __str__(self) -> str:
        parts = []
        for harm, found in self.counts.items():
            kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(found.items()))
            parts.append(f"{harm} {sum(found.values())} ({kinds})")
        return f"{self.user}: {'; '.join(parts)}"


def outcome(work: Callable[[], Any], same: Callable[[Any], object], folder: Path) -> str:
    """`RIGHT`, `SENTENCE`, or what is wrong."""
    try:
        found = work()
    except Exception as error:
        return (
            SENTENCE
            if is_sentence(error, folder)
            else f"raw {''.join(traceback.format_exception(error))[-1500:]}"
        )
    try:
        same(found)
    except AssertionError as error:
        return f"silently wrong: {str(error)[:500]}"
    return RIGHT


def is_sentence(error: Exception, folder: Path) -> bool:
    """True if an error names a path in the folder and what to do, and was worded by us."""
    text = str(error)
    ours = (
        isinstance(error, (OSError, ValueError, MemoryError))
        and "[Errno" not in text
        and "\n" not in text
    )
    return (
        ours
        and str(folder) in text
        and text.rstrip().endswith(".")
        and any(advice in text for advice in ADVICE)
    )


# Processes


def forked(work: Callable[[], Any], kill_after: float | None = None) -> Any:
    """Result of `work` in a process of its own; "killed" if that dies by SIGKILL."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(receive)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            torch.set_num_threads(1)  # OpenMP's own do not survive a fork
            data = pickle.dumps(work())
            with os.fdopen(send, "wb") as pipe:
                pipe.write(data)
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(receive, "rb") as pipe:
        data = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    assert status == 0, "the process died by itself"
    return pickle.loads(data)


def at_operation(folder: Path, number: int | None, act: Callable[[], object]) -> Callable[[], int]:
    """Count this process's operations on files in the folder, and act at one of them.

    It cannot be undone.
    """
    count, sync, inside, hooked = itertools.count(1), os.fsync, str(folder), [0]

    def operation() -> None:
        hooked[0] = next(count)
        if hooked[0] == number:
            act()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS:
            return
        if event == "ctypes.dlsym":
            ours = arguments[1] == "renameat2"
        else:
            path, writes = (
                arguments[0],
                event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT),
            )
            ours = (
                bool(writes)
                and isinstance(path, (str, bytes, os.PathLike))
                and inside in os.fsdecode(path)
            )
        if ours:
            operation()

    def fsync(handle: int) -> None:
        operation()
        sync(handle)

    os.fsync = fsync
    sys.addaudithook(audit)
    return lambda: hooked[0]


def operations(user: User, folder: Path) -> int:
    """How many operations on files a whole run takes."""

    def work() -> int:
        counted = at_operation(folder, None, lambda: None)
        user.work(folder)
        return counted()

    return int(forked(work))


# Harms


def kill_at_operations(
    user: User, expected: Any, at: Path, times: int, rng: random.Random, tally: Tally
) -> None:
    """Kill a run at random operations on files, once or twice, and go on with it."""
    total = operations(user, at / "count")
    shutil.rmtree(at / "count")
    for number in range(times):
        folder = at / str(number)
        for _ in range(1 + number % 2):
            point = rng.randint(1, total)

            def work(folder: Path = folder, point: int = point) -> None:
                at_operation(folder, point, lambda: os.kill(os.getpid(), signal.SIGKILL))
                user.work(folder)

            forked(work)
            read_back(user, None, folder, "read after a kill", point, tally)
        tally.add("killed at an operation", go_on(user, expected, folder), point)


def kill_at_times(
    user: User, expected: Any, at: Path, times: int, rng: random.Random, tally: Tally
) -> None:
    """Kill a run at random moments, and go on with it."""
    start = time.perf_counter()
    forked(lambda: (user.work(at / "timed"), None)[1])
    duration = time.perf_counter() - start
    shutil.rmtree(at / "timed")
    for number in range(times):
        folder, moment = at / str(number), rng.uniform(0, duration)
        forked(lambda: (user.work(folder), None)[1], moment)  # noqa: B023
        tally.add("killed at a moment", go_on(user, expected, folder), f"{moment:.3f} s")


def fail_at_operations(
    user: User, expected: Any, at: Path, times: int, rng: random.Random, tally: Tally
) -> None:
    """Let random operations on files fail as on a full disk; then there is room again."""
    total = operations(user, at / "count")
    shutil.rmtree(at / "count")
    for number in range(times):
        folder, point = at / str(number), rng.randint(1, total)

        def full(folder: Path = folder) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "something"))

        def work(folder: Path = folder, point: int = point) -> str:
            at_operation(folder, point, full)
            return outcome(
                lambda: user.work(folder), lambda found: user.same(found, expected), folder
            )

        tally.add("full at an operation", forked(work), point)
        tally.add("then room", go_on(user, expected, folder), point)


def fill_the_disk(user: User, expected: Any, at: Path, sizes: list[int], tally: Tally) -> None:
    """Run on disks that are too small by more or less, then on a large one."""
    for size in sizes:
        with small_disk(at / f"disk-{size}", size) as disk:
            if disk is None:
                return
            folder = disk / "out"

            def work(folder: Path = folder) -> str:
                return outcome(
                    lambda: user.work(folder), lambda found: user.same(found, expected), folder
                )

            tally.add("full disk", forked(work), f"{size} kB")
            if folder.exists():
                shutil.copytree(folder, at / f"room-{size}")
        tally.add("then room", go_on(user, expected, at / f"room-{size}"), f"{size} kB")


@contextmanager
def small_disk(at: Path, kilobytes: int) -> Iterator[Path | None]:
    """A file system of this size, or None where it may not be mounted."""
    at.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(at)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def damage_every_file(
    user: User,
    expected: Any,
    whole: Path,
    at: Path,
    flips: int,
    rng: random.Random,
    tally: Tally,
    only: float = 1.0,
) -> None:
    """Truncate, flip, delete and empty each file of a folder; `only`: share of the damages that is
    made.
    """
    expected_read = user.read(whole) if user.read else None
    for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        data = (whole / file).read_bytes()
        damages: dict[str, list[bytes | None]] = {"deleted": [None], "emptied": [b""]}
        if data:
            cut = rng.randrange(len(data))
            places = {rng.randrange(len(data)) for _ in range(flips)}
            damages |= {
                "truncated": [data[:cut]],
                "flipped": [flipped(data, place, rng) for place in places],
            }
        for harm, contents in damages.items():
            for content in contents:
                if rng.random() >= only:
                    continue
                shutil.copytree(whole, at)
                (at / file).unlink()
                if content is not None:
                    (at / file).write_bytes(content)
                read_back(user, expected_read, at, f"{harm}, read", file, tally)
                tally.add(
                    harm,
                    outcome(lambda: user.work(at), lambda found: user.same(found, expected), at),
                    file,
                )
                shutil.rmtree(at)


def read_back(
    user: User,
    expected: dict[str, torch.Tensor] | None,
    folder: Path,
    harm: str,
    what: object,
    tally: Tally,
) -> None:
    """Open a folder without writing; where nothing is expected, any whole state is right."""
    if (read := user.read) is not None:
        tally.add(
            harm,
            outcome(
                lambda: read(folder), lambda found: same_tensors(found, expected or found), folder
            ),
            what,
        )


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Raise AssertionError unless two mappings hold equal tensors."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def flipped(data: bytes, place: int, rng: random.Random) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def start_two(user: User, expected: Any, at: Path, times: int, tally: Tally) -> None:
    """Start two processes on one folder at once: each is right or refused in a sentence, and one at
    least is right.
    """
    for number in range(times):
        folder = at / str(number)
        pipes = []
        for _ in range(2):
            receive, send = os.pipe()
            if os.fork() == 0:
                found = "died"
                try:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                    torch.set_num_threads(1)
                    found = outcome(
                        partial(user.work, folder), lambda found: user.same(found, expected), folder
                    )
                finally:
                    os.write(send, found.encode()[:4000])
                    os._exit(0)
            os.close(send)
            pipes.append(receive)
        both = []
        for receive in pipes:
            with os.fdopen(receive, "rb") as pipe:
                both.append(pipe.read().decode())
            os.wait()
        for found in both:
            tally.add("two at once", found)
        if RIGHT not in both:
            tally.add("two at once", f"neither was right: {both}")
        tally.add("then alone", go_on(user, expected, folder))


def go_on(user: User, expected: Any, folder: Path) -> str:
    """Outcome of a run that goes on in a folder: here, the right result alone will do."""
    found = outcome(lambda: user.work(folder), lambda found: user.same(found, expected), folder)
    return found if found != SENTENCE else "does not go on"
