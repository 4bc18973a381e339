"""The README's examples run, in order, on the bundled model; its badges say what pyproject.toml
says; it stays short.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PICTURE = ROOT / "docs/_static/relation_heads.webp"


def test_the_examples_run_and_print_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text()
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(code, str(README), "exec"), names)
    printed = capsys.readouterr().out.strip()
    assert printed.count("\n") == 2
    assert f"```\n{printed}\n```" in text  # the output under the ten lines is real


def test_badges_are_true() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    badges = dict(
        re.findall(r"!\[(.*?)\]\(https://img.shields.io/badge/(.*?)-\w+\)", README.read_text())
    )
    assert list(badges) == [
        f"python {project['requires-python'].replace('>=', '≥ ')}",
        f"version {project['version']}",
        f"license {project['license']}",
    ]
    assert [unquote(path).replace("-", " ") for path in badges.values()] == list(badges)


def test_one_screen_and_a_picture() -> None:
    text = README.read_text()
    assert text.count("\n") <= 120
    assert str(PICTURE.relative_to(ROOT)) in text
    assert PICTURE.stat().st_size <= 1_000_000
    assert getattr(Image.open(PICTURE), "n_frames", 1) == 15


def test_what_readers_are_asked_stands_on_the_page() -> None:
    """Each call in an answer of CONTRIBUTING.md is one that README names."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Read the first page anew")[1]
    answers = re.findall(r"^\| .*\? \| (.*) \|$", table, flags=re.M)
    assert len(answers) == 10
    called = [name for answer in answers for name in re.findall(r"`([\w.]+|make demo)[(`]", answer)]
    assert len(called) > 8
    assert not [name for name in called if name not in README.read_text()]
