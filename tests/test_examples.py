"""Every example in a docstring runs and gives the output that stands there."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import hooked_models

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/api/examples.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples() -> list[tuple[str, int, str]]:
    """(file, line, docstring) of each docstring with an example, read from the source: classes may
    name another module.
    """
    found = []
    for package in ("hooked_models", "dit_lens"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ">>>" in (
                    ast.get_docstring(node) or ""
                ):
                    where = (
                        str(file.relative_to(ROOT)),
                        getattr(node, "lineno", 1),
                        ast.get_docstring(node) or "",
                    )
                    found.append(where)
    return found


@cache
def load(name: str, **options: object) -> hooked_models.HookedTextToImage:
    """Bundled models are loaded once for all examples."""
    return from_pretrained(name, **options)


from_pretrained = hooked_models.HookedTextToImage.from_pretrained


@cache
def beginning() -> dict[str, ast.stmt]:
    """Name → the statement on the page of examples that makes it."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)[0]
    return {
        node.id if isinstance(node, ast.Name) else node.asname or node.name: statement
        for statement in ast.parse(code).body
        for part in (statement.targets if isinstance(statement, ast.Assign) else [statement])
        for node in ast.walk(part)
        if isinstance(node, ast.Name | ast.alias)
    }


def begin(code: str, names: dict[str, Any]) -> None:
    """Run the beginnings that code reads, and those that they read."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and (made := beginning().get(node.id)):
            if isinstance(made, ast.Assign):
                begin(ast.unparse(made.value), names)
            exec(ast.unparse(made), names)


@pytest.mark.parametrize(
    ("file", "line", "text"),
    [pytest.param(*each, id=f"{each[0]}:{each[1]}") for each in examples()],
)
def test_examples_run(
    file: str, line: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of its own, since examples may write into the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hooked_models.HookedTextToImage, "from_pretrained", load)
    torch.manual_seed(0)
    module = importlib.import_module(
        file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    )
    names = dict(vars(module))
    begin("".join(each.source for each in doctest.DocTestParser().get_examples(text)), names)
    test = doctest.DocTestParser().get_doctest(text, names, file, file, line)
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert result.attempted
    assert not result.failed, "".join(report)
