"""Measure how the code is built: circles, size, complexity, privacy, prose, examples.

    python tools/house.py                 the figures of the working tree
    python tools/house.py --rev v0.1.0    of a commit, beside those of the working tree
    python tools/house.py --list prose    every place behind one figure

Only the standard library and git are needed. Figures count `hooked_models` and `dit_lens` alone,
those of prose also `recipes` and `benchmarks`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import PurePosixPath

PACKAGES = ("hooked_models", "dit_lens")
CALLERS = (*PACKAGES, "recipes", "benchmarks")
DRAWING = {
    "forward",
    "run_with_cache",
    "run_with_hooks",
    "at",
    "trajectory",
    "__call__",
    "estimate",
}
"""Public calls that draw (or estimate that), and so may take many arguments; the command line may,
too.
"""
FOREIGN = {
    "hooked_models/pipelines/pipeline_model.py from_pretrained",  # diffusers'
    "hooked_models/families/kernel_tap.py run",  # torch's scaled_dot_product_attention
}
"""Functions that have the signature of another library's."""
PRAGMA = re.compile(r"\s+# (type: ignore|noqa).*")
"""End of a line that ruff does not count, either."""
RIDDLE = re.compile(r"(?:\A|(?<=[.!?])\s+|\n\n\s*)(What|Who|Whether|Of|That)\b")


class Tree:
    """The Python files of a commit, or of the working tree."""

    def __init__(self, rev: str | None) -> None:
        listing = ["git", "ls-tree", "-r", "--name-only", rev] if rev else ["git", "ls-files"]
        names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        self.names = [name for name in names if name]
        self.source: dict[str, str] = {}
        for name in self.names:
            if name.endswith(".py") and name.split("/")[0] in (*CALLERS, "tests", "tools"):
                self.source[name] = _show(rev, name)
        self.parsed = {name: ast.parse(text) for name, text in self.source.items()}
        self.modules = {_module(name): name for name in self.source}

    def of(self, *packages: str) -> Iterator[tuple[str, ast.Module]]:
        """(file, syntax tree) of each file of the packages."""
        for name, tree in self.parsed.items():
            if name.split("/")[0] in packages:
                yield name, tree


def _show(rev: str | None, name: str) -> str:
    if rev is None:
        with open(name, encoding="utf-8") as file:
            return file.read()
    return subprocess.run(
        ["git", "show", f"{rev}:{name}"], capture_output=True, text=True, check=True
    ).stdout


def _module(name: str) -> str:
    path = PurePosixPath(name).with_suffix("")
    parts = path.parts[:-1] if path.name == "__init__" else path.parts
    return ".".join(parts)


def imports(tree: Tree, name: str) -> set[str]:
    """Files that a file imports when it runs; imports for type checkers alone do not count."""
    module = _module(name)
    package = module if name.endswith("__init__.py") else module.rpartition(".")[0]
    found: set[str] = set()
    for node in _runtime_nodes(tree.parsed[name]):
        if isinstance(node, ast.ImportFrom):
            base = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.add(tree.modules.get(full) or tree.modules.get(source, ""))
        elif isinstance(node, ast.Import):
            found |= {tree.modules.get(alias.name, "") for alias in node.names}
    return found - {"", name}


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _runtime_nodes(node)


def circles(tree: Tree) -> list[str]:
    """Groups of files that import each other, imports inside functions included (Tarjan's
    components).
    """
    graph = {name: imports(tree, name) for name, _ in tree.of(*PACKAGES)}
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[str] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other in graph and other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == name:
                    break
            if len(group) > 1:
                found.append(" ⇄ ".join(sorted(group)))

    for name in graph:
        if name not in order:
            visit(name)
    return found


def top_level(tree: Tree, package: str) -> list[str]:
    """Files and folders directly in a package."""
    inside = {name.split("/")[1] for name in tree.names if name.startswith(package + "/")}
    return sorted(inside - {"__init__.py", "__init__.pyi", "py.typed"})


def private_uses(tree: Tree) -> list[str]:
    """Names that begin with an underscore, defined in one package and used in another."""
    owned: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for name, parsed in tree.of(*PACKAGES):
        for node in ast.walk(parsed):
            if isinstance(node, ast.AnnAssign) and _private(getattr(node.target, "id", "")):
                owned[name.split("/")[0]].add(ast.unparse(node.target))
            elif isinstance(node, ast.FunctionDef) and _private(node.name):
                owned[name.split("/")[0]].add(node.name)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and _private(node.attr)
            ):
                owned[name.split("/")[0]].add(node.attr)
    found = []
    for name, parsed in tree.of(*CALLERS):
        package = name.split("/")[0]
        own = {f.name for f in ast.walk(parsed) if isinstance(f, ast.FunctionDef)} | owned.get(
            package, set()
        )
        foreign = {
            attr for other, attrs in owned.items() if other != package for attr in attrs
        } - own
        for node in ast.walk(parsed):
            if isinstance(node, ast.Attribute) and node.attr in foreign:
                found.append(f"{name}:{node.lineno} {ast.unparse(node)[:60]}")
            elif isinstance(node, ast.ImportFrom) and not node.level:
                source = (node.module or "").split(".")[0]
                if source in PACKAGES and source != package:
                    found += [
                        f"{name}:{node.lineno} {a.name}" for a in node.names if _private(a.name)
                    ]
    return found


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def functions(tree: Tree) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(file, function) of every function and method of the packages."""
    for name, parsed in tree.of(*PACKAGES):
        for node in ast.walk(parsed):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, node


def complexity(function: ast.AST) -> int:
    """McCabe's number of paths: one, and one for each branch, loop, handler and comprehension,
    nested functions included.
    """
    kinds = (
        ast.If,
        ast.IfExp,
        ast.For,
        ast.While,
        ast.ExceptHandler,
        ast.comprehension,
        ast.Assert,
    )
    count = 1
    for node in ast.walk(function):
        count += isinstance(node, kinds)
        count += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        count += len(node.ifs) if isinstance(node, ast.comprehension) else 0
        count += isinstance(node, ast.match_case)
    return count


def complex_functions(tree: Tree, least: int) -> list[str]:
    """Functions with at least `least` paths."""
    rows = [(complexity(f), f"{name}:{f.lineno} {f.name}") for name, f in functions(tree)]
    return [f"{count} {where}" for count, where in sorted(rows, reverse=True) if count >= least]


def long_signatures(tree: Tree, least: int) -> list[str]:
    """Functions with at least `least` parameters, but for the command line and the public calls
    that draw.
    """
    found = []
    for name, f in functions(tree):
        count = len([*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs])
        ours = f.name not in DRAWING and f"{name} {f.name}" not in FOREIGN and "/cli/" not in name
        if count >= least and ours:
            found.append(f"{count} {name}:{f.lineno} {f.name}")
    return sorted(found, reverse=True)


def docstrings(tree: Tree, *packages: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every docstring, those of attributes and constants included."""
    for name, parsed in tree.of(*packages):
        for node in ast.walk(parsed):
            text = getattr(node.value, "value", None) if isinstance(node, ast.Expr) else None
            if isinstance(text, str):
                yield f"{name}:{node.lineno}", inspect.cleandoc(text)


def prose(tree: Tree) -> list[tuple[str, str]]:
    """(place, text) of every docstring and comment."""
    found = list(docstrings(tree, *CALLERS))
    for name, _ in tree.of(*CALLERS):
        for token in tokenize.generate_tokens(io.StringIO(tree.source[name]).readline):
            if token.type == tokenize.COMMENT:
                found.append((f"{name}:{token.start[0]}", token.string.lstrip("# ")))
    return found


def public(tree: Tree) -> Iterator[tuple[str, str, ast.AST]]:
    """(file, name, definition) of public functions and classes.

    They are the names in `__all__` of a public package or module, wherever they are defined, and
    those without an underscore in a public module that has no `__all__`. Public modules are the
    lower-case names in `__all__` of the two packages.
    """
    seen: set[tuple[str, str]] = set()
    for package in PACKAGES:
        for name in exported(tree, f"{package}/__init__.py"):
            for found in resolved(tree, f"{package}/__init__.py", name):
                if found[:2] not in seen:
                    seen.add(found[:2])
                    yield found


def exported(tree: Tree, file: str) -> list[str]:
    """Names in a file's `__all__`, or its definitions without an underscore."""
    for node in tree.parsed[file].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [
        node.name
        for node in tree.parsed[file].body
        if isinstance(node, kinds) and not _private(node.name)
    ]


def resolved(tree: Tree, file: str, name: str) -> Iterator[tuple[str, str, ast.AST]]:
    """Definitions behind a name of a file: its own, an imported one, or all that an imported module
    exports.
    """
    package = _module(file) if file.endswith("__init__.py") else _module(file).rpartition(".")[0]
    for node in ast.walk(tree.parsed[file]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            yield file, name, node
            return
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) != name:
                    continue
                base = (
                    package.split(".")[: len(package.split(".")) - node.level + 1]
                    if node.level
                    else []
                )
                source = ".".join([*base, *([node.module] if node.module else [])])
                if module := tree.modules.get(f"{source}.{alias.name}"):
                    for inner in exported(tree, module):
                        yield from resolved(tree, module, inner)
                elif source in tree.modules:
                    yield from resolved(tree, tree.modules[source], alias.name)
                return


def without_example(tree: Tree) -> list[str]:
    """Public functions and classes whose docstring has no example."""
    found = []
    for name, what, node in public(tree):
        text = ast.get_docstring(node) or ""  # type: ignore[arg-type]
        if ">>>" not in text and not re.search(r"^Example", text, re.M):
            found.append(f"{name}:{node.lineno} {what}")  # type: ignore[attr-defined]
    return found


def untested(tree: Tree) -> list[str]:
    """Modules without a test file of their name in the mirrored folder, or of their folder's
    name.
    """
    found = []
    for name, _ in tree.of(*PACKAGES):
        path = PurePosixPath(name)
        folder = path.parent.name
        tests = (
            f"tests/{path.parent}/test_{path.name}",
            f"tests/{path.parent}/test_{folder}.py",
            f"tests/{folder}/test_{folder}.py",
        )
        if path.name != "__init__.py" and not any(test in tree.source for test in tests):
            found.append(name)
    return found


def figures(tree: Tree) -> dict[str, tuple[float, list[str]]]:
    """Every figure with the places behind it."""
    texts = prose(tree)
    words = sum(len(text.split()) for _, text in texts) or 1
    whats = [
        f"{place} {text[:80]!r}" for place, text in texts if re.search(r"\bwhat\b", text, re.I)
    ]
    count = sum(len(re.findall(r"\bwhat\b", text, re.I)) for _, text in texts)
    riddles = [
        f"{place} {text[found.start() :][:80].strip()!r}"
        for place, text in [*texts, *docstrings(tree, "tests", "tools")]
        for found in RIDDLE.finditer(text)
        if found.start() == 0 or not place.startswith("tests/")
    ]
    sizes = [(len(tree.source[name].splitlines()), name) for name, _ in tree.of(*PACKAGES)]
    rows: dict[str, tuple[float, list[str]]] = {}

    def add(what: str, places: list[str], value: float | None = None) -> None:
        rows[what] = (len(places) if value is None else value, places)

    add("import circles", circles(tree))
    for package in PACKAGES:
        add(f"top-level entries of {package}", top_level(tree, package))
    add("private names used across packages", private_uses(tree))
    add("functions of complexity 15 or more", complex_functions(tree, 15))
    add("functions of 9 or more arguments", long_signatures(tree, 9))
    add(
        "files over 400 lines",
        [f"{n} {name}" for n, name in sorted(sizes, reverse=True) if n > 400],
    )
    add(
        "lines",
        [f"{n} {name}" for n, name in sorted(sizes, reverse=True)],
        sum(n for n, _ in sizes),
    )
    long = [
        f"{n}:{i}"
        for n, _ in tree.of(*PACKAGES)
        for i, x in enumerate(tree.source[n].splitlines(), 1)
        if len(PRAGMA.sub("", x)) > 100
    ]
    add("lines over 100 columns", long)
    add('"what" in 10,000 words', whats, round(1e4 * count / words, 1))
    add("prose that begins with What, Who, Whether, Of, That", riddles)
    add("public functions and classes without an example", without_example(tree))
    add("modules without a test file of their name", untested(tree))
    return rows


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rev", help="a commit to compare with")
    parser.add_argument("--list", help="a part of a figure's name: print the places behind it")
    options = parser.parse_args()
    now = figures(Tree(None))
    before = figures(Tree(options.rev)) if options.rev else {}
    for what, (value, places) in now.items():
        if options.list and options.list.lower() in what.lower():
            print(*places, sep="\n")
        if not options.list:
            old = f"{before[what][0]:>10,}" if before else ""
            print(f"{what:<55}{old}{value:>10,}")


if __name__ == "__main__":
    main()
