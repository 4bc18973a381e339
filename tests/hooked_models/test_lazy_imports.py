"""Every public name is there, costs nothing until used, and moved modules are found under their old
names.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_of_the_first_edition_are_still_there():
    """Functions and classes, at their place of then; those that moved, with a warning."""
    names = json.loads((Path(__file__).parents[1] / "data/public_names.json").read_text())
    missing = [
        f"{module}.{name}"
        for module, listed in names.items()
        for name in listed.split()
        if not hasattr(importlib.import_module(module), name)
    ]
    assert not missing


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_old_path_hides_no_module_of_a_new_package():
    """An import binds its module's name in the parent, which may be a package that moved, too."""
    for finder in sys.meta_path:
        for old in getattr(finder, "table", ()):
            importlib.import_module(old)
    for name, module in list(sys.modules.items()):
        parent, _, child = name.rpartition(".")
        if parent.startswith(("dit_lens", "hooked_models")) and module.__name__ == name:
            found = getattr(sys.modules[parent], child)
            assert not isinstance(found, ModuleType) or found is module, name


@pytest.mark.parametrize(
    ("module", "name", "now"),
    [
        ("hooked_models.generation.views", "DenoiserView", "hooked_models.pixart.views"),
        ("hooked_models.pixart.folding", "FoldedDiT", "hooked_models.pixart.dit"),
        ("dit_lens.training.loop", "all_captions", "dit_lens.task.sentences"),
    ],
)
def test_names_that_moved_say_where_to(module, name, now):
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} is now {now}.{name}; the old"):
        old = getattr(importlib.import_module(module), name)
    assert old is getattr(importlib.import_module(now), name)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("dit_lens.store", "refuse_other_settings", "hooked_models.store.check_settings"),
        ("dit_lens.task", "word", "dit_lens.task.captions.render_caption"),
        ("hooked_models.hooks", "NoLanguageModel", "hooked_models.hooks.LanguageToolGuard"),
        (
            "hooked_models.pipelines.checks",
            "refuse",
            "hooked_models.pipelines.checks.raise_failures",
        ),
    ],
)
def test_names_that_changed_say_their_new_one(module, old, new):
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is now {new}; the old"):
        assert getattr(importlib.import_module(module), old).__name__ == new.rpartition(".")[2]


def test_arguments_that_changed_say_their_new_name():
    with (
        pytest.warns(DeprecationWarning, match="dose_response: ks is now doses; the old name"),
        pytest.raises(TypeError, match=r"missing .*: 'scenes'"),
    ):
        dit_lens.steering.dose_response(None, ks=(0, 1))


def test_attributes_that_changed_say_their_new_name():
    """A method, and fields of two dataclasses."""
    model = hooked_models.HookedTextToImage.from_pretrained("rte-nano", weights=False)
    red = dit_lens.Intervention("blocks.0.hook_mlp_out", steps=0)
    plan = dit_lens.sweep.plan(model, "red circle", 0, red, {"m": len}, num_steps=1, batch=1)
    (edit,) = plan.conditions[0].edits
    for one, old, new in (
        (model, "refuse_hooks", "check_no_hooks"),
        (plan, "treatments", "conditions"),
        (edit, "alike", "exchange_group"),
    ):
        with pytest.warns(DeprecationWarning, match=rf"\.{old} is now {new}; the old"):
            assert getattr(one, old) == getattr(one, new)
