"""The store is ground floor: it loads no model code."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest

MODELS = ("torch", "diffusers", "transformers", "transformer_lens", "accelerate", "safetensors", "pandas", "sklearn")


def test_the_store_loads_no_model_code():
    script = (
        "import sys, dit_lens.store; "
        "print(sorted({m for m in sys.modules if m.startswith(('dit_lens', 'hooked_models'))})); "
        f"print([m for m in {MODELS} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    own, others = done.stdout.splitlines()
    assert others == "[]"
    assert set(eval(own)) == {
        *("dit_lens", "dit_lens.store", "hooked_models", "hooked_models.lazy_imports", "hooked_models.store"),
        *(f"hooked_models.store.{name}" for name in ("folder", "hashing", "writing")),
    }


@pytest.mark.parametrize("name", ["folder", "hashing", "writing"])
def test_examples_run(name):
    found = doctest.testmod(importlib.import_module(f"hooked_models.store.{name}"))
    assert found.attempted > 2
    assert not found.failed
