"""Arguments that are described once."""

from __future__ import annotations

import inspect
import re

import pytest

from dit_lens import ablation, scenes, steering
from dit_lens.runs.drawing import Drawing, Keeping, Planning


@pytest.mark.parametrize("kind", [Drawing, Planning, Keeping])
def test_every_argument_is_described(kind):
    described = re.findall(r"^ {4}(\w+): ", inspect.getdoc(kind), flags=re.M)
    assert described == list(kind.__annotations__)


def test_functions_that_draw_take_them(trained_nano):
    drawn = scenes.sample(1, seed=0)
    doses = steering.dose_response(
        trained_nano, drawn, doses=(0,), draws=0, **Drawing(num_steps=1, guidance=1.0, batch_size=1)
    )
    assert doses["x1" if "x1" in doses else "shape"].shape[-2:] == (1, 1)
    found = ablation.ablation_effects(
        trained_nano, drawn, {}, [0], **Planning(num_steps=1, guidance=1.0, batch=1, rng=0)
    )
    assert found["condition"].values.tolist() == ["none"]
