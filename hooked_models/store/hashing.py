"""Hashes of content: equal in every process, under every hash seed and Python version.

Tensors and arrays count by their bytes; functions by their syntax tree, with the globals, defaults
and closure that they read; objects by their class and state. A pickle would not do: that of a
tensor holds an address, that of a set the order of the process's hash seed, and that of a function
the bytecode of one Python version (`joblib.hash` and cloudpickle are pickles).

This module needs the standard library alone.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import linecache
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cached_property, lru_cache, partial
from importlib.machinery import SourceFileLoader
from inspect import unwrap
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

OWN_PACKAGES = ("dit_lens", "hooked_models")
ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...))
SKIPPED_FIELDS = ("ctx", "kind", "type_comment")
"""Fields of a syntax tree that follow from its other fields, or change nothing."""


def digest(*parts: Any) -> str:
    """Hash text, bytes, tensors and arrays.

    16 hexadecimal digits, equal for equal values, types, shapes and borders.

    Args:
        parts: any number of `str`, `bytes`, torch tensors and NumPy arrays.

    Example:
        >>> digest("a", "bc") == digest("ab", "c")
        False
    """
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, (str, bytes)):
            data = part.encode() if isinstance(part, str) else part
            found.update(f"{len(data)}:".encode() + data)
        else:
            for piece in _array(part):
                found.update(piece)
    return found.hexdigest()


def fingerprint(value: Any) -> str:
    """Hash a value of any kind by its content: 16 hexadecimal digits.

    A function counts by its code (docstrings and comments do not), its defaults, its closure, and
    the names it reads of its module: data, and functions of the same module or of the user's own
    code, which count in the same way. Functions and classes of installed libraries count by name.
    An object with a method `__fingerprint__` counts by its result.

    Raises:
        TypeError: the value holds something without comparable content, such as a lock or an open
            file.

    Example:
        >>> fingerprint({"b", "a"}) == fingerprint({"a", "b"})
        True
        >>> fingerprint(lambda x: x + 1) == fingerprint(lambda x: x + 2)
        False
    """
    return _Reader().hash(value)


class _Reader:
    """Walks over a value; functions and classes met before count by their order."""

    def __init__(
        self, met: Mapping[int, tuple[int, Any]] | None = None, above: Sequence[int] = ()
    ) -> None:
        self.met = dict(met or {})
        self.above = list(above)

    def hash(self, value: Any) -> str:
        if isinstance(value, ATOMS) and type(value) in ATOMS:
            return digest(type(value).__name__, ascii(value))
        if _is_array(value):
            return digest("array", value)
        if id(value) in self.met:
            return digest("met", str(self.met[id(value)][0]))
        if id(value) in self.above:
            return digest("within", str(self.above[::-1].index(id(value))))
        if isinstance(value, (FunctionType, type)):
            self.met[id(value)] = (len(self.met), value)
        self.above.append(id(value))
        try:
            return self._composed(value)
        finally:
            self.above.pop()

    def all(self, *values: Any) -> list[str]:
        return [self.hash(value) for value in values]

    def _composed(self, value: Any) -> str:
        """The hash of a value that is made of others."""
        for kinds, read in self._readers():
            if isinstance(value, kinds):
                return read(value)
        if hasattr(type(value), "__fingerprint__"):
            return digest(type(value).__name__, self.hash(value.__fingerprint__()))
        if (torch := sys.modules.get("torch")) is not None and isinstance(value, torch.nn.Module):
            return self._module(value)
        if "__wrapped__" in getattr(value, "__dict__", ()):  # functools.cache
            return self.hash(value.__wrapped__)
        return self._object(value)

    def _readers(self) -> Iterator[tuple[Any, Any]]:
        yield Enum, lambda e: digest("enum", type(e).__qualname__, e.name)
        yield PurePath, lambda path: digest("path", path.as_posix())
        yield (slice, range), lambda s: digest(type(s).__name__, *self.all(s.start, s.stop, s.step))
        yield (
            Mapping,
            lambda m: digest("mapping", *self.all(*(part for item in m.items() for part in item))),
        )
        yield (list, tuple), lambda s: digest("sequence", *self.all(*s))
        yield (
            (set, frozenset),
            lambda s: digest("set", *sorted(_Reader(self.met, self.above).hash(one) for one in s)),
        )
        yield (
            partial,
            lambda p: digest(
                "partial", *self.all(p.func, p.args, dict(sorted(p.keywords.items())))
            ),
        )
        yield MethodType, lambda m: digest("method", *self.all(m.__self__, m.__func__))
        yield FunctionType, self._function
        yield BuiltinFunctionType, self._builtin
        yield ModuleType, lambda module: digest("module", module.__name__)
        yield CodeType, self._bytecode
        yield (staticmethod, classmethod), lambda m: self.hash(m.__func__)
        yield property, lambda p: digest("property", *self.all(p.fget, p.fset, p.fdel))
        yield cached_property, lambda p: digest("property", self.hash(p.func))
        yield type, self._class

    def _function(self, function: FunctionType) -> str:
        code, home = function.__code__, function.__globals__.get("__name__", "")
        cells = {
            name: _content(cell)
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
        }
        if _is_library(home) and home.partition(".")[0] not in OWN_PACKAGES:
            if "__wrapped__" in vars(function):  # a decorator's, such as torch.no_grad's
                return self.hash(vars(function)["__wrapped__"])
            return digest("library", home, code.co_qualname, self.hash(cells))
        tree = source_tree(code, home)
        own = self.hash(code) if tree is None else digest("source", tree_text(tree))
        return digest(
            "function",
            own,
            *self.all(function.__defaults__, function.__kwdefaults__, cells),
            *self._read_of(function),
        )

    def _read_of(self, function: FunctionType) -> list[str]:
        """Hashes of the names that a function reads of its module.

        Things without comparable content count by type.
        """
        found = []
        for name, value in globals_read(function).items():
            if isinstance(value, (FunctionType, type)) and not _followed(value, function):
                continue
            if isinstance(value, ModuleType):
                continue
            try:
                found += [name, self.hash(value)]
            except TypeError:
                found += [name, type(value).__qualname__]
        return found

    def _builtin(self, function: BuiltinFunctionType) -> str:
        owner = function.__self__
        return digest(
            "builtin",
            function.__qualname__,
            "" if isinstance(owner, ModuleType) else self.hash(owner),
        )

    def _bytecode(self, code: CodeType) -> str:
        """Code without source (typed in, or changed since): equal under one Python version only."""
        version = "{}.{}".format(*sys.version_info)
        return digest(
            "code",
            version,
            code.co_code,
            *code.co_names,
            *code.co_varnames,
            *self.all(*code.co_consts),
        )

    def _class(self, cls: type) -> str:
        if _is_library(cls.__module__):
            return digest("class", cls.__module__.partition(".")[0], cls.__qualname__)
        own = {
            name: value
            for name, value in vars(cls).items()
            if (isinstance(value, FunctionType) and _is_written(value))
            or isinstance(value, (staticmethod, classmethod, property, cached_property))
            or (
                isinstance(value, (*ATOMS, list, tuple, set, frozenset, dict))
                and not name.startswith("__")
            )
        }
        return digest("class", cls.__qualname__, *self.all(*cls.__bases__, own))

    def _module(self, module: Any) -> str:
        """A torch module: classes and plain settings of its parts, parameters and buffers."""
        parts = []
        for name, part in module.named_modules():
            plain = {
                k: v
                for k, v in vars(part).items()
                if k[0] != "_" and isinstance(v, (*ATOMS, list, tuple))
            }
            parts += [name, *self.all(type(part), plain)]
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return digest("torch module", *parts, *(part for item in tensors.items() for part in item))

    def _object(self, value: Any) -> str:
        """An object as pickle would take it apart, without values of `cached_property`."""
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # of a lock, a file, a generator, …
            raise TypeError(
                f"A {type(value).__qualname__} has no content that could be compared between "
                "processes: use numbers, text, tensors, and functions or objects made of these."
            ) from None
        if isinstance(reduced, str):
            return digest("global", type(value).__module__, reduced)
        make, arguments, state, *items = (*reduced, None, None, None)[:5]
        if isinstance(state, dict):
            cached = {
                name
                for name in state
                if isinstance(getattr(type(value), name, None), cached_property)
            }
            state = {name: part for name, part in sorted(state.items()) if name not in cached}
        return digest(
            "object",
            *self.all(make, arguments, state),
            *(self.hash(list(part or ())) for part in items),
        )


# Arrays


def _is_array(value: Any) -> bool:
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        return True
    return (
        numpy is not None
        and isinstance(value, (numpy.ndarray, numpy.generic))
        and value.dtype.kind in "biufc"
    )


def _array(value: Any) -> Iterator[Any]:
    """The type and shape, then the bytes, of a tensor or array."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.is_meta:
            raise TypeError(
                "A tensor on the meta device has no values to compare: load the model with its "
                "weights."
            )
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif _is_array(value):
        yield f"torch.{value.dtype.name}{tuple(value.shape)}".encode()
        yield value.astype(value.dtype.newbyteorder("<")).tobytes()
    else:
        raise TypeError(
            "digest takes text, bytes, tensors and arrays of numbers, not a "
            f"{type(value).__name__}: see fingerprint."
        )


# Functions


def globals_read(function: FunctionType) -> dict[str, Any]:
    """Globals that a function reads by name, and attributes of the user's modules.

    Those of functions defined inside of it count, too.

    Example:
        >>> globals_read(lambda name: name in OWN_PACKAGES)
        {'OWN_PACKAGES': ('dit_lens', 'hooked_models')}
    """
    found: dict[str, Any] = {}
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        module: ModuleType | None = None
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                value = function.__globals__.get(step.argval, ...)
                if value is not ...:
                    found[step.argval] = value
                module = (
                    value
                    if isinstance(value, ModuleType) and not _is_library(value.__name__)
                    else None
                )
                continue
            if (
                module is not None
                and step.opname in ("LOAD_ATTR", "LOAD_METHOD")
                and hasattr(module, step.argval)
            ):
                found[f"{module.__name__}.{step.argval}"] = getattr(module, step.argval)
            module = None
    return dict(sorted(found.items()))


def _followed(value: FunctionType | type, reader: FunctionType) -> bool:
    """True if a function's or class's own code counts where `reader` reads it."""
    return value.__module__ == reader.__module__ or not _is_library(value.__module__)


def _is_library(name: str) -> bool:
    """True if a module is part of the standard library, an installed package or this project."""
    top = name.partition(".")[0]
    if top in OWN_PACKAGES or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _is_written(method: Any) -> bool:
    """True for a method that was written, and not made by `dataclass`."""
    method = unwrap(method)
    home = getattr(method, "__globals__", {}).get("__name__", "")
    return (
        isinstance(method, FunctionType)
        and method.__code__.co_filename != "<string>"
        and not _is_library(home)
    )


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def source_tree(code: CodeType, module: str) -> ast.AST | None:
    """Syntax tree of a function's code, or None if its file is gone or has changed."""
    trees, codes = _parsed("".join(linecache.getlines(code.co_filename)), code.co_filename)
    near = [
        tree
        for tree in trees
        if _first_line(tree) == code.co_firstlineno and _name(tree) == code.co_name
    ]
    if not near or not (code in codes or _compiled_by_hook(module)):
        return None
    if len(near) == 1:
        return near[0]
    column = _first_column(code)
    return max(
        (tree for tree in near if tree.col_offset <= column),
        key=lambda tree: tree.col_offset,
        default=None,
    )


def _compiled_by_hook(module: str) -> bool:
    """True if a module was compiled from a tree that an import hook changed."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return spec is not None and type(spec.loader) is not SourceFileLoader


def _first_column(code: CodeType) -> int:
    """Column of the first instruction in the code's first line, or −1."""
    for line, _, column, end in code.co_positions():
        if line == code.co_firstlineno and column is not None and column != end:
            return column
    return -1


@lru_cache(maxsize=64)
def _parsed(text: str, filename: str) -> tuple[list[Any], list[CodeType]]:
    """All functions in a file, as trees and as code."""
    try:
        tree = ast.parse(text)
        codes = [compile(tree, filename, "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return [], []
    for code in codes:  # grows meanwhile
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)], codes


def _first_line(tree: Any) -> int:
    return min(
        [tree.lineno, *(decorator.lineno for decorator in getattr(tree, "decorator_list", ()))]
    )


def _name(tree: Any) -> str:
    return getattr(tree, "name", "<lambda>")


def tree_text(tree: Any) -> str:
    """A syntax tree as text, without positions and docstrings.

    The same under every Python version (`ast.dump` is not).

    Example:
        >>> tree_text(ast.parse("f(x)  # comment", mode="eval").body)
        "Call(func=Name(id='f'), args=[Name(id='x')])"
    """
    if isinstance(tree, list):
        return f"[{', '.join(map(tree_text, tree))}]"
    if not isinstance(tree, ast.AST):
        return ascii(tree)
    fields = {
        name: getattr(tree, name, None) for name in tree._fields if name not in SKIPPED_FIELDS
    }
    if (
        isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and ast.get_docstring(tree, clean=False) is not None
    ):
        fields["body"] = tree.body[1:]
    if isinstance(tree, ast.JoinedStr):  # Python 3.12 ends some with an empty constant
        fields["values"] = [
            part
            for part in tree.values
            if not (isinstance(part, ast.Constant) and part.value == "")
        ]
    shown = [
        f"{name}={tree_text(value)}"
        for name, value in fields.items()
        if value is not None and value != []
    ]
    return f"{type(tree).__name__}({', '.join(shown)})"
