"""Verdicts of several conditions against images drawn one by one, and a call that is stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_lens.intervene.interventions import Intervention, Scale
from dit_lens.intervene.verdicts import verdicts

PROMPTS = ["red circle is above blue square", "circle is left of square"]
RUN = {"num_steps": 2, "guidance": 4.5}
CONDITIONS = {"none": [], "half": Intervention("blocks.1.hook_mlp_out", action=Scale(0.5))}


def judge(images, prompt):
    """A number, a truth and a count of each image, in three types."""
    red = images[:, 0].double().mean(dim=(1, 2)).numpy()
    return {"red": red, "bright": red > 0.5, "prompt": prompt + 1}


@torch.no_grad()
def test_they_are_those_of_runs_with_hooks(trained_nano):
    """Each prompt has its own seeds."""
    found = verdicts(trained_nano, PROMPTS, [[3, 4, 5], [6, 7, 8]], CONDITIONS, judge, **RUN)
    assert [found[name].dtype.kind for name in ("red", "bright", "prompt")] == ["f", "b", "i"]
    assert found["prompt"].tolist() == [[[1] * 3, [2] * 3]] * 2
    for condition, one in enumerate(CONDITIONS.values()):
        for row, prompt in enumerate(PROMPTS):
            hooks = one.hooks(trained_nano, [prompt] * 3, num_steps=2) if one else []
            seeds = [[3, 4, 5], [6, 7, 8]][row]
            images = trained_nano.run_with_hooks([prompt] * 3, seeds, **RUN, fwd_hooks=hooks)
            expected = judge(images, np.full(3, row))
            np.testing.assert_allclose(found["red"][condition, row], expected["red"], atol=1e-5)
    assert abs(found["red"][0] - found["red"][1]).max() > 1e-3


def test_a_stopped_call_goes_on(trained_nano, tmp_path, monkeypatch):
    """Cells that a folder holds are not drawn again."""
    first = verdicts(trained_nano, PROMPTS, [0], CONDITIONS, judge, out=tmp_path, **RUN)
    monkeypatch.setattr(type(trained_nano), "run", None)
    monkeypatch.setattr("dit_lens.sweep.execute.Execution.run", None)
    again = verdicts(trained_nano, PROMPTS, [0], CONDITIONS, judge, out=tmp_path, **RUN)
    for name, values in first.items():
        np.testing.assert_array_equal(again[name], values)


def test_a_judge_that_fails_is_an_error(trained_nano):
    def fails(images, prompt):
        if prompt.size and prompt[0] == 1:
            raise ValueError("no such prompt")
        return {"there": np.ones(len(images), dtype=bool)}

    with pytest.raises(ValueError, match=r"fails on an image.*no such prompt"):
        verdicts(trained_nano, PROMPTS, [0], {"none": []}, fails, batch=1, **RUN)
