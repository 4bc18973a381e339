"""The store itself: whole or nothing, settings, digests, locks, a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hooked_models.store import Index, Store, replace_folder, write_json, write_whole, writing

from ...killing import killed

SETTINGS = {"model": "0123456789abcdef", "num_steps": 2, "names": ["a"]}


def text(content: str):
    return lambda path: path.write_text(content)


def test_a_file_or_folder_is_replaced_whole(tmp_path):
    for replaced, inner in ((write_whole, ""), (replace_folder, "x")):
        for call in (1, 2):  # after the content was written, before and after it is in its place
            target = tmp_path / f"{replaced.__name__}{call}"

            def write(path: Path, content: str, inner: str = inner) -> None:
                (path / inner if inner else path).write_text(content)

            replaced(target, lambda path: write(path, "old"))
            killed(lambda: replaced(target, lambda path: write(path, "new")), os, "fsync", call)  # noqa: B023
            assert (target / inner if inner else target).read_text() in ("old", "new")[
                : call + (inner != "x")
            ]
            replaced(target, lambda path: write(path, "new"))
            assert (target / inner if inner else target).read_text() == "new"


def test_without_an_exchange_a_folder_is_renamed_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_exchanged", lambda a, b: False)
    for content in ("old", "new"):
        replace_folder(tmp_path / "f", lambda path: (path / "a").write_text(content))  # noqa: B023
        assert [(path.name, path.read_text()) for path in (tmp_path / "f").iterdir()] == [
            ("a", content)
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_other_settings_are_refused(tmp_path):
    Store(tmp_path, SETTINGS).close()
    Store(tmp_path, {**SETTINGS, "names": ("a",)}).close()  # JSON knows no tuples
    for changed, said in (
        ({"num_steps": 3}, r"num_steps \(2, now 3\)"),
        ({"model": "fedcba9876543210"}, "model"),
        ({"new": 1}, "new"),
    ):
        with pytest.raises(ValueError, match=f"other {said}.*choose another folder, or delete it"):
            Store(tmp_path, SETTINGS | changed)
    Store(tmp_path, SETTINGS | {"num_steps": 3}, may_change=["num_steps"]).close()
    assert Index.read(tmp_path).settings["num_steps"] == 3


def test_a_second_process_is_refused_or_waits(tmp_path):
    with Store(tmp_path, {}) as store:
        with pytest.raises(ValueError, match=f"Another run is writing to {tmp_path}: wait"):
            Store(tmp_path, {})
        opened = f"Store({str(tmp_path)!r}, {{}}, wait=True)"
        script = f"from hooked_models.store import Store; print({opened}.path('a').read_text())"
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
        ) as other:
            store.put("a", text("from the first"))
            store.close()
            assert other.communicate(timeout=120)[0] == "from the first\n"


def test_every_file_is_listed_and_checked(tmp_path):
    with Store(tmp_path, SETTINGS, facts={"where": "here"}) as store:
        store.put("sub/a", text("one"))
        store.put_folder("f", lambda path: ((path / "d").mkdir(), (path / "d/b").write_text("two")))
        store.put_json("c.json", {"x": 1})
        store.record(batch=4)
        assert store.names() == ["c.json", "f", "sub/a"]
        (tmp_path / "foreign").write_text("is not listed, so it is not there")
        assert "foreign" not in store
    index = Index.read(tmp_path)
    assert index.facts == {"where": "here", "batch": 4}
    assert index.path("sub/a").read_text() == "one"
    assert index.path("f") == tmp_path / "f"
    assert json.loads(index.path("c.json").read_text()) == {"x": 1}
    (tmp_path / "f/d/b").write_text("owt")
    assert index.path("f")  # checked once
    with pytest.raises(
        OSError,
        match=r"f/d/b is damaged: its 3 bytes are not those that were written; delete it and run again\.$",
    ):
        Index.read(tmp_path).path("f")
    (tmp_path / "sub/a").unlink()
    with pytest.raises(FileNotFoundError, match=r"sub/a is missing: restore it, or run again\.$"):
        Index.read(tmp_path).path("sub/a")
    with pytest.raises(FileNotFoundError, match=r"foreign is not among the files"):
        Index.read(tmp_path).path("foreign")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"content": {}}', None])
def test_a_damaged_index_is_named(tmp_path, damage):
    Store(tmp_path, SETTINGS, facts={"levels": [1.25]}).close()
    whole = (tmp_path / "index.json").read_bytes()
    (tmp_path / "index.json").write_bytes(
        whole.replace(b"1.25", b"1.35") if damage is None else damage
    )
    for opened in (lambda: Index.read(tmp_path), lambda: Store(tmp_path, SETTINGS)):
        with pytest.raises(OSError, match=r"index\.json is damaged.*: delete it and run again\.$"):
            opened()
    (tmp_path / "index.json").unlink()
    Store(tmp_path, {}).close()  # and the lock was let go


def test_a_file_is_made_once_and_again_if_it_is_gone(tmp_path):
    made = []

    def value(store: Store) -> str:
        return store.load_or(
            "v", lambda: made.append(1) or "v", lambda v, path: path.write_text(v), Path.read_text
        )

    with Store(tmp_path, {}) as store:
        assert [value(store) for _ in range(2)] == ["v", "v"]
        (tmp_path / "v").unlink()
        assert value(store) == "v"
        assert len(made) == 2
    (tmp_path / "v").write_text("w")
    with Store(tmp_path, {}) as store, pytest.raises(OSError, match="v is damaged"):
        value(store)


@pytest.mark.parametrize("call", range(1, 9))
def test_a_kill_while_files_are_replaced_leaves_old_or_new(tmp_path, call):
    def work() -> None:
        with Store(tmp_path, {}) as store:
            store.put("a", text("new"))
            store.put_folder("f", lambda path: (path / "new").write_text("new"))

    with Store(tmp_path, {}) as store:
        store.put("a", text("old"))
        store.put_folder("f", lambda path: (path / "old").write_text("old"))
    killed(work, os, "fsync", call)
    index = Index.read(tmp_path)
    assert index.path("a").read_text() in ("old", "new")
    (only,) = index.path("f").iterdir()
    assert only.name == only.read_text()
    Store(tmp_path, {}).close()
    # no parts are left
    assert {path.name for path in tmp_path.iterdir()} == {"a", "f", "index.json", "lock"}


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_a_sentence_with_the_path(tmp_path, monkeypatch):
    with Store(tmp_path, {}) as store:
        store.put("a", text("old"))
        said = rf"{tmp_path}/a could not be written \(No space left on device\): make room, and run again\."
        with pytest.raises(OSError, match=said) as error:
            store.put("a", full)
        assert error.value.errno == errno.ENOSPC
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full)
            with pytest.raises(
                OSError, match=r"index\.json could not be written|a could not be written"
            ):
                store.put("a", text("new"))
        assert store.path("a").read_text() == "old"
        store.put("a", text("newer"))
    assert Index.read(tmp_path).path("a").read_text() == "newer"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "index.json", "lock"}


def test_errors_of_rust_are_sentences_too_and_others_stay(tmp_path):
    def storage_full(path: Path) -> None:  # what safetensors says on a full disk
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError,
        match=r"file/x could not be written \((Not a directory|File exists)\): choose another folder, and",
    ):
        write_json(tmp_path / "file" / "x", 1)
    with pytest.raises(
        OSError, match=r"could not be written \(No space left on device\): make room"
    ) as error:
        write_whole(tmp_path / "t", storage_full)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "t", lambda path: 1 / 0)


def test_digests_are_sha256_and_those_of_older_folders_still_hold(tmp_path):
    with Store(tmp_path, {}) as store:
        store.put("a.bin", lambda path: path.write_bytes(b"bytes"))
        (entry,) = store.files["a.bin"]
        assert entry == hashlib.sha256(b"bytes").hexdigest()[:40]
    older = [hashlib.blake2b(b"bytes", digest_size=16).hexdigest()]
    listed = Index(tmp_path, {}, {}, {"a.bin": older}, "")
    assert listed.path("a.bin").read_bytes() == b"bytes"
    (tmp_path / "a.bin").write_bytes(b"other")
    with pytest.raises(OSError, match="damaged"):
        Index(tmp_path, {}, {}, {"a.bin": older}, "").path("a.bin")
