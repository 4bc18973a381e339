"""Every public name is there, costs nothing until used, and moved modules are found under their old
names.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest

import dit_lens
import hooked_models
from hooked_models import lazy_imports


@pytest.mark.parametrize("package", [hooked_models, dit_lens])
def test_every_public_name_is_found(package):
    assert package.__all__ == dir(package)
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def test_importing_a_package_loads_no_torch():
    code = "import dit_lens, hooked_models, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "old",
    [name for name in sys.meta_path if isinstance(name, lazy_imports._MovedModules)],
    ids=lambda f: min(f.table),
)
def test_old_paths_are_the_new_modules(old):
    for name, new in old.table.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sys.modules.pop(name, None)
            assert importlib.import_module(name) is importlib.import_module(new)
        assert any(f"{name} is now {new}" in str(one.message) for one in caught)
