"""One hook inside a run: the rows that it is given, and the tensor that it may give back."""

from __future__ import annotations

import pytest

from ..pipelines import PROMPTS

Z = "blocks.1.cross_attn.hook_z"


@pytest.mark.parametrize(
    "change", [lambda z: z[:, 1].zero_(), lambda z: z.mean(1), lambda z: 0.0, lambda z: z[:, :, :1]]
)
def test_a_hook_returns_the_whole_tensor(model, change):
    with pytest.raises(
        ValueError,
        match=r"steps\.0\.cond\.blocks\.1\.cross_attn\.hook_z got \[2, 4, .*return the whole tensor",
    ):
        model.run_with_hooks(
            PROMPTS, num_steps=1, fwd_hooks=[(f"steps.0.cond.{Z}", lambda z, hook: change(z))]
        )
