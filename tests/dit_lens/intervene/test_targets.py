"""Interventions act on the tokens, words and hooks that are named."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dit_lens.intervene.interventions import Intervention
from dit_lens.text.prompts import word
from hooked_models import UnknownHookError

from .by_hand import PROMPTS

# the first two have equally many tokens of every role, but in other places


def test_every_token_of_a_role_is_selected(model):
    """Not the first only, and where the tokenizer put it; a prompt without the role is an error, or
    stays as it is.
    """
    prompts = ["red circle is above left of blue square", "circle is red square"]
    strict = Intervention(
        "blocks.1.cross_attn.hook_pattern", "L1H0", "relation", steps=0, action="knockout"
    )
    with pytest.raises(
        ValueError,
        match=r"'circle is red square' has no relation token.*square \(shape2\).*missing='ignore'",
    ):
        strict.resolve(model, prompts)
    (edit,) = dataclasses.replace(strict, missing="ignore").resolve(model, prompts)
    tokens = model.to_str_tokens(model.to_tokens(prompts)[0])
    assert [token for token, there in zip(tokens, edit.where[0, 0, 0], strict=True) if there] == [
        "▁above",
        "▁left",
    ]
    assert edit.where[0, 0].any()
    assert not edit.where[0, 1].any()
    assert not edit.where[1].any()


def test_a_role_in_the_unconditional_branch_is_that_of_the_empty_prompt(model):
    """There is no relation in it, so "both" is "cond"; the encoder's unconditional side is that of
    the null prompt.
    """
    both = Intervention(
        "blocks.0.cross_attn.hook_v", tokens="relation", steps=0, branch="both"
    ).hooks(model, PROMPTS)
    assert [name for name, _ in both] == ["steps.0.cond.blocks.0.cross_attn.hook_v"]
    (edit,) = Intervention(
        "text_encoder.hook_out", tokens="eos", branch="uncond", action="zero"
    ).resolve(model, PROMPTS)
    assert edit.site.name == "null_text_encoder.hook_out"
    assert edit.where[:, 0].all()
    assert edit.where.sum() == len(PROMPTS)
    for missing, message in (
        ("error", "'' has no relation token. Its words are none"),
        ("ignore", "selects nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            Intervention("hook_text", tokens="relation", branch="uncond", missing=missing).hooks(
                model, PROMPTS
            )


def test_words_are_selected_in_each_prompt(model):
    """By the tokens of the word, in the branch that reads the prompt; the k-th of one prompt stands
    for another's k-th.
    """
    prompts = ["red circle is left of red square", "blue circle is above red square"]
    (edit,) = Intervention("blocks.0.cross_attn.hook_v", tokens=word("Red"), steps=0).resolve(
        model, prompts
    )
    assert [row.nonzero().flatten().tolist() for row in edit.where[:, :, 0, 0]] == [[0, 5], [4]]
    last = Intervention(
        "blocks.0.cross_attn.hook_v", tokens=[word("red", nth=2), "shape1"], steps=0, branch="both"
    )
    (edit,) = last.resolve(model, prompts)
    assert [row.nonzero().flatten().tolist() for row in edit.where[:, :, 0, 0]] == [[1, 5], [1]]
    mean = Intervention(
        "blocks.0.cross_attn.hook_v", tokens=word("circle"), steps=0, action="mean"
    ).resolve(model, prompts)[0]
    values = torch.randn(2, edit.where.shape[1], 2, 8, dtype=torch.float64)
    assert torch.allclose(mean(values)[:, 1], values[:, 1].mean(dim=0).expand(2, -1, -1))
    assert torch.equal(mean(values)[:, 2:], values[:, 2:])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("blocks.1.cross_attn.hook_patern", "blocks.1.cross_attn.hook_pattern"),
        ("text_encoder.blocks.0.atn.hook_z", "text_encoder.blocks.0.attn.hook_z"),
        ("hook_latnt", "hook_latent"),
    ],
)
def test_a_misspelt_site_suggests_the_nearest_one(model, wrong, right):
    with pytest.raises(UnknownHookError, match=right):
        Intervention(wrong).hooks(model, PROMPTS)
