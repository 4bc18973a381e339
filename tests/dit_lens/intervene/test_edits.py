"""Edits of some rows, with values of other prompts, and of numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_lens.intervene.edits import another_prompt
from dit_lens.intervene.interventions import Add, Intervention, Replace, Scale

from .by_hand import PROMPTS, read

# the first two have equally many tokens of every role, but in other places


GENERATOR = torch.Generator().manual_seed(9)


def test_resample_takes_another_prompts_image_side(model, run):
    """The same row at every site, of another prompt; rows of one prompt never serve each other."""
    names = ["steps.1.cond.blocks.1.attn.hook_z", "steps.1.uncond.blocks.1.attn.hook_z"]
    intervention = Intervention(
        "blocks.1.attn.hook_z", heads="L1H1", steps=1, branch="both", action="resample"
    )
    ours, plain = (
        read(run, intervention.hooks(model, PROMPTS, num_steps=2, seed=4), names),
        read(run, [], names),
    )
    source = intervention.resolve(model, PROMPTS, num_steps=2, seed=4)[0].sources
    assert sorted(source) == [0, 1, 2]
    assert not (source == torch.arange(3)).any()
    for name in names:
        assert torch.equal(ours[name][:, :, 1], plain[name][source][:, :, 1])
        assert torch.equal(ours[name][:, :, 0], plain[name][:, :, 0])


@pytest.mark.parametrize(
    "prompt", [[0, 1], [0, 0, 1, 1, 2], [2, 0, 1, 0, 3, 1, 2, 3], [0, 1, 1, 2]]
)
def test_another_prompt(prompt):
    prompt = np.array(prompt)
    drawn = {tuple(another_prompt(prompt, np.random.default_rng(seed))) for seed in range(20)}
    assert all(
        sorted(source) == list(range(len(prompt))) and (prompt[list(source)] != prompt).all()
        for source in drawn
    )
    assert len(drawn) > 1 or len(prompt) == 2
    with pytest.raises(ValueError, match="larger batch"):
        another_prompt(np.array([0, 0, 1]), np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["zero", "mean", "resample", "knockout", "add", "replace"])
def test_an_edit_acts_on_some_rows_of_a_larger_batch(model, kind):
    """Two copies of the prompts, rows shuffled: one copy is edited as in a batch of its own, the
    other not at all.
    """
    rows = torch.tensor([4, 0, 2])  # of a batch of 6, in which prompt i is row rows[i]
    per_prompt = torch.randn(3, 2, 4, 7, dtype=torch.float64, generator=GENERATOR)
    action = {"add": Add(per_prompt), "replace": Replace(per_prompt)}.get(kind, kind)
    prompts = [*PROMPTS[:2], "square red is above blue circle"]
    (edit,) = Intervention(
        "blocks.0.cross_attn.hook_pattern", [1], "shape1", steps=0, action=action
    ).resolve(model, prompts)
    batch = torch.rand(6, 2, 4, 7, dtype=torch.float64, generator=GENERATOR)
    alone = edit(batch[rows])
    together = edit.on(rows)(batch)
    assert torch.equal(together[rows], alone)
    assert not torch.equal(alone, batch[rows])
    others = [1, 3, 5]
    assert torch.equal(together[others], batch[others])

    # and rows of an edit are those of an intervention on these prompts alone
    taken = torch.tensor([2, 1])
    part = {"add": Add(per_prompt[taken]), "replace": Replace(per_prompt[taken])}.get(kind, kind)
    fewer = Intervention("blocks.0.cross_attn.hook_pattern", [1], "shape1", steps=0, action=part)
    (expected,) = fewer.resolve(model, [prompts[i] for i in taken])
    assert torch.equal(edit.take(taken)(batch[taken]), expected(batch[taken]))


@pytest.mark.parametrize("action", [Add, Replace])
def test_values_that_are_no_real_numbers_are_refused(action):
    for wrong in (
        torch.zeros(2, dtype=torch.complex64),
        torch.tensor(torch.nan),
        torch.ones(2, dtype=torch.bool),
    ):
        with pytest.raises(ValueError, match="real, finite numbers"):
            action(wrong)
    with pytest.raises(ValueError, match="factor=nan: give a finite number"):
        Scale(float("nan"))
