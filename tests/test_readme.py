"""The README's examples run, in order, on the bundled model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run_and_print_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text()
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(code, str(README), "exec"), names)
    assert "upper half" in (printed := capsys.readouterr().out)
    assert printed.strip() in text  # the output under the ten lines is real
    assert isinstance(effects := names["effects"], torch.Tensor)
    assert effects.shape == (6, 3)
    assert names["folded"].folded_timestep == 999.0  # type: ignore[attr-defined]
