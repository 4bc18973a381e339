"""The store is ground floor: it loads no model code."""

from __future__ import annotations

import subprocess
import sys

MODELS = (
    "torch",
    "diffusers",
    "transformers",
    "transformer_lens",
    "accelerate",
    "safetensors",
    "pandas",
    "sklearn",
)


def test_the_store_loads_no_model_code():
    script = (
        "import sys, dit_lens.store; "
        "print(sorted({m for m in sys.modules if m.startswith(('dit_lens', 'hooked_models'))})); "
        f"print([m for m in {MODELS} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    own, others = done.stdout.splitlines()
    assert others == "[]"
    assert set(eval(own)) == {
        *(
            "dit_lens",
            "dit_lens.store",
            "hooked_models",
            "hooked_models.lazy_imports",
            "hooked_models.store",
        ),
        *(f"hooked_models.store.{name}" for name in ("folder", "hashing", "writing")),
    }
