"""Hashes by content: the same in every process, under every hash seed and Python version; other
content, another hash.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dit_lens.intervene.interventions import Replace
from hooked_models import HookedTextToImage
from hooked_models.store import digest, fingerprint
from hooked_models.store.hashing import globals_read, source_tree, tree_text

from ..pipelines import PROMPTS, tiny_pipeline
from . import hashed

FILE = Path(sys.modules["hooked_models.store.hashing"].__file__)
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
SCALE = 2.0


def printed(python: str | Path, seed: str) -> list[str]:
    command = [str(python), str(Path(hashed.__file__)), str(FILE)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_hashes_are_the_same_in_every_process_and_python_version():
    here = printed(sys.executable, "0")
    assert len({line.split()[0] for line in here}) == len(here) == len(hashed.VALUES)
    assert digest(*here) == "f67b01e0311207c8"  # whatever Python this is
    others = [sys.executable, *PYENV.glob("3.1[1-9]*/bin/python")]
    for python in others:
        assert printed(python, "1") == here, python


def test_tensors_have_known_hashes():
    ramp = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert digest(ramp) == digest(ramp.numpy()) == "f80fbbc2a0477ae4"
    assert digest(ramp.bfloat16()) == "a6661de02d9fb6e2"
    assert fingerprint({"vector": ramp, "heads": (1, 2)}) == "a8781811a2ab3054"


def test_digests_tell_types_shapes_and_borders_apart():
    zeros = torch.zeros(2, 2)
    assert digest(zeros) == digest(zeros.clone().T)
    assert (
        len(
            {
                digest(zeros),
                digest(zeros[0]),
                digest(zeros.int()),
                digest("ab", "c"),
                digest("a", "bc"),
                digest(),
            }
        )
        == 6
    )
    with pytest.raises(TypeError, match="see fingerprint"):
        digest(3)
    with pytest.raises(TypeError, match="meta device"):
        digest(torch.zeros(1, device="meta"))


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * SCALE


def different(*values: object) -> bool:
    return len({fingerprint(value) for value in values}) == len(values)


def test_a_functions_hash_is_that_of_all_that_it_reads(monkeypatch):
    before = fingerprint(scaled)
    assert fingerprint(partial(map, scaled)) == fingerprint(partial(map, scaled))
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert fingerprint(scaled) != before
    assert different(hashed.outer(torch.ones(1)), hashed.outer(torch.zeros(1)))
    assert different(hashed.first, hashed.second)
    before = fingerprint(lambda: hashed.helper([]))  # of another module of the user's own
    monkeypatch.setattr(hashed, "WORDS", {"red"})
    assert fingerprint(lambda: hashed.helper([])) != before
    assert "hashed" not in str(globals_read(different))


def test_decorated_functions_count_as_what_they_decorate():
    def plain(x):
        return x

    def other(x):
        return x + 1

    assert different(torch.no_grad()(plain), torch.no_grad()(other))
    assert fingerprint(torch.no_grad()(plain)) == fingerprint(torch.no_grad()(plain))


def test_comments_docstrings_and_places_do_not_count(tmp_path):
    texts = [
        "def f(x):\n    return x + 1\n",
        '# c\n\n\ndef f(x):\n    """d"""\n    return (x +   1)  # c\n',
        "def f(x): return x + 2\n",
    ]
    found = []
    for number, text in enumerate(texts):
        (file := tmp_path / f"m{number}.py").write_text(text)
        exec(
            compile(text, str(file), "exec", dont_inherit=True), space := {"__name__": f"m{number}"}
        )
        assert source_tree(space["f"].__code__, "m") is not None
        found.append(fingerprint(space["f"]))
    assert found[0] == found[1] != found[2]
    assert "Return" in tree_text(source_tree(space["f"].__code__, "m"))
    # a file that changed after its import is not what runs
    file.write_text("def f(x): return x + 3\n")
    module_cache = sys.modules["linecache"]
    module_cache.checkcache(str(file))
    assert source_tree(space["f"].__code__, "m") is None
    assert fingerprint(space["f"]) not in found


class Tail:
    def __init__(self, module: nn.Module) -> None:
        self.module, self.me = module, self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def test_modules_objects_and_arrays_count_by_content():
    torch.manual_seed(0)
    linear = nn.Linear(2, 2)
    before = fingerprint(Tail(linear))
    assert fingerprint(Tail(linear)) == before
    with torch.no_grad():
        linear.weight[0, 0] += 1e-6
    assert fingerprint(Tail(linear)) != before
    assert different(
        nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh()), nn.Dropout(0.1), nn.Dropout(0.2)
    )
    assert different(
        np.float32(1), np.float64(1), np.arange(2), np.arange(2.0), np.array(["a"]), np.array(["b"])
    )
    assert different(
        np.random.default_rng(0), np.random.default_rng(1), torch.float32, torch.device("cpu")
    )


def test_what_has_no_content_is_refused():
    with pytest.raises(
        TypeError, match="A lock has no content that could be compared between processes"
    ):
        fingerprint({"lock": threading.Lock()})


def test_a_cache_counts_by_its_tensors(tmp_path):
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    settings = {"num_steps": 1, "names_filter": "blocks.0.attn.hook_z"}
    caches = [model.run_with_cache(PROMPTS, seed, **settings)[1] for seed in (0, 0, 1)]
    caches.append(model.run_with_cache(PROMPTS, 0, **settings, out=tmp_path)[1])
    first, again, other, on_disk = (fingerprint(Replace(cache)) for cache in caches)
    assert first == again == on_disk != other
