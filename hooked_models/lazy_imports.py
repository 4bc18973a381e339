"""Public names imported on first use, and import paths that moved.

A package lists its public names once, in the `if TYPE_CHECKING:` imports of its `__init__`, for
type checkers, and in a table for `attach`, so that `import package` costs nothing until a name is
used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def attach(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Module-level `__getattr__` and `__dir__` that import public names on first use (PEP 562).

    Args:
        package: the package's `__name__`.
        names: public name → "module" (the module itself) or "module:attribute", relative to the
            package; a leading "/" makes the module absolute.

    Example:
        >>> get, names = attach("hooked_models", {"PatchCodec": "pipelines.codec:PatchCodec"})
        >>> get("PatchCodec").__name__, names()
        ('PatchCodec', ['PatchCodec'])
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = names[name].partition(":")
        found = importlib.import_module(
            f"{package}.{module}" if not module.startswith("/") else module[1:]
        )
        value = attrgetter(attribute)(found) if attribute else found
        return value

    return get, lambda: sorted(names)


def renamed(module: str, moved: Mapping[str, str]) -> Callable[[str], Any]:
    """Module-level `__getattr__` that finds names which moved, with a DeprecationWarning.

    It gives the new place.

    Args:
        module: the module's `__name__`.
        moved: old name → "module:name", absolute.

    Example:
        >>> import warnings
        >>> old = renamed("shapes", {"Ratio": "fractions:Fraction"})
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     old("Ratio")(1, 2)
        Fraction(1, 2)
        >>> str(caught[-1].message)
        'shapes.Ratio is now fractions.Fraction; the old name goes in version 0.3.'
    """
    get, _ = attach(module, {old: f"/{new}" for old, new in moved.items()})

    def find(name: str) -> Any:
        value = get(name)
        message = f"{module}.{name} is now {moved[name].replace(':', '.')}"
        warnings.warn(
            f"{message}; the old name goes in version 0.3.", DeprecationWarning, stacklevel=2
        )
        return value

    return find


def renamed_arguments(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator that lets a function take arguments by old names, with a DeprecationWarning.

    Args:
        **names: old name → new name.

    Example:
        >>> import warnings
        >>> @renamed_arguments(ks="doses")
        ... def largest(doses):
        ...     return max(doses)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     largest(ks=(1, 2))
        2
        >>> str(caught[-1].message)
        'largest: ks is now doses; the old name goes in version 0.3.'
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def renaming(*args: P.args, **kwargs: P.kwargs) -> T:
            for old, new in names.items():
                if old in kwargs:
                    message = f"{function.__name__}: {old} is now {new}"
                    warnings.warn(
                        f"{message}; the old name goes in version 0.3.",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return renaming

    return decorate


class RenamedAttribute:
    """Attribute of a class under its old name, with a DeprecationWarning.

    Args:
        new: the name of the attribute now.

    Example:
        >>> import warnings
        >>> class Edit:
        ...     exchange_group = 3
        ...     alike = RenamedAttribute("exchange_group")
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     Edit().alike
        3
        >>> str(caught[-1].message)
        'Edit.alike is now exchange_group; the old name goes in version 0.3.'
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        message = f"{owner.__name__}.{self.old} is now {self.new}"
        warnings.warn(
            f"{message}; the old name goes in version 0.3.", DeprecationWarning, stacklevel=2
        )
        return getattr(owner if instance is None else instance, self.new)


def redirect(package: str, moved: Mapping[str, str]) -> None:
    """Keep old import paths of a package working, with a DeprecationWarning that names the new one.

    Args:
        package: absolute name of the package, such as its `__name__`.
        moved: old module → new module, both relative to the package.

    Example:
        >>> redirect("hooked_models", {"patch_codec": "pipelines.codec"})
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     from hooked_models.patch_codec import PatchCodec
        >>> str(caught[-1].message)
        'hooked_models.patch_codec is now hooked_models.pipelines.codec; the old path goes ...
    """
    table = {f"{package}.{old}": f"{package}.{new}" for old, new in moved.items()}
    # first: a folder that git left behind for its __pycache__ would pass for a namespace package
    sys.meta_path.insert(0, _MovedModules(table))


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a moved module under its old name."""

    def __init__(self, table: Mapping[str, str]) -> None:
        self.table = table

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self.table else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, self.table[module.__name__]
        message = f"{old} is now {new}; the old path goes in version 0.3."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)
