"""Every user of the store is killed, damaged, starved of disk and started twice: the right result,
or a sentence.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from hooked_models.store import folder

from .harness import (
    Tally,
    User,
    damage_every_file,
    fail_at_operations,
    fill_the_disk,
    kill_at_operations,
    kill_at_times,
    start_two,
)
from .users import users

NAMES = ("sweep", "cache", "synopsis", "evaluation", "stage", "training", "saving")
UNLISTED = ("saving",)
"""Writes a folder that plain diffusers reads and may write to, so there are no digests in it."""


@pytest.fixture(scope="module")
def all_users() -> dict[str, User]:
    with pytest.MonkeyPatch.context() as patch:
        yield users(patch)


def harmed(
    user: User,
    at: Path,
    *,
    kills: int,
    moments: int,
    failures: int,
    disks: int,
    flips: int,
    twice: int,
    only: float,
) -> Tally:
    """The counts of a user's harms."""
    rng, tally = random.Random(user.name), Tally(user.name)
    expected = user.work(at / "whole")
    size = (
        sum(path.stat().st_size for path in (at / "whole").rglob("*") if path.is_file()) // 1024 + 1
    )
    kill_at_operations(user, expected, at / "kills", kills, rng, tally)
    kill_at_times(user, expected, at / "moments", moments, rng, tally)
    fail_at_operations(user, expected, at / "failures", failures, rng, tally)
    largest = max(48, round(1.5 * size))
    fill_the_disk(
        user, expected, at / "disks", [4 + (largest - 4) * i // disks for i in range(disks)], tally
    )
    start_two(user, expected, at / "twice", twice, tally)
    if user.name not in UNLISTED:
        damage_every_file(user, expected, at / "whole", at / "damaged", flips, rng, tally, only)
    shutil.rmtree(at)
    return tally


@pytest.mark.parametrize("name", NAMES)
def test_a_few_harms(all_users, name, tmp_path, capsys):
    few = {"kills": 2, "moments": 1, "failures": 1, "disks": 1, "flips": 1, "twice": 1, "only": 0.2}
    if name == "training":  # by far the slowest, with by far the most files
        few |= {"kills": 1, "moments": 0, "disks": 0, "only": 0.02}
    tally = harmed(all_users[name], tmp_path / "out", **few)
    with capsys.disabled():
        print(f"\n{tally}", end="")  # noqa: T201
    assert not tally.wrong, "\n".join(tally.wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_harms(all_users, name, tmp_path, capsys):
    many = {
        "kills": 60,
        "moments": 20,
        "failures": 20,
        "disks": 12,
        "flips": 4,
        "twice": 4,
        "only": 1.0,
    }
    tally = harmed(all_users[name], tmp_path / "out", **many)
    with capsys.disabled():
        print(f"\n{tally}", end="")  # noqa: T201
    assert not tally.wrong, "\n".join(tally.wrong)


def test_the_harness_finds_what_is_wrong(all_users, tmp_path, monkeypatch):
    """Without digests, flips are read as they are; without whole writes, a kill leaves half a
    file.
    """
    user, tally = all_users["cache"], Tally("cache")
    expected = user.work(tmp_path / "whole")
    monkeypatch.setattr(folder, "_wrong_file", lambda path, entry: None)
    damage_every_file(
        user, expected, tmp_path / "whole", tmp_path / "damaged", 3, random.Random(0), tally
    )
    assert any("silently wrong" in what for what in tally.wrong)
    assert any("raw" in what for what in tally.wrong)
