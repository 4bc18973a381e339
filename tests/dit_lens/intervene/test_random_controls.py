"""Random heads and tokens match those that they control for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_lens.intervene.ablation import (
    ablate_heads,
    knockout_role,
    random_heads,
    random_tokens,
)
from dit_lens.intervene.interventions import Intervention
from dit_lens.text.prompts import token_roles
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline

PROMPTS = [
    "red circle is above blue square",
    "red square is above left of blue circle",
    "circle is left of square",
]


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline().to(torch.float64))


@pytest.fixture(scope="module")
def trained(trained_micro) -> HookedTextToImage:
    return trained_micro


@pytest.mark.parametrize("heads", [["L2H2", "L1H0"], ["L3H1"], ["L4H0", "L4H1"], ["L0H0", "L5H2"]])
def test_random_heads_match(trained, heads):
    """As many, all others, in the same layers unless these have too few; and the same in everything
    else.
    """
    condition = knockout_role("relation", heads=heads, steps=[3, 4]) + ablate_heads(heads, "mean")
    drawn = set()
    for seed in range(100):
        control = random_heads(trained, condition, np.random.default_rng(seed))
        for action, tokens, steps in (("knockout", ("relation",), (3, 4)), ("mean", None, None)):
            picked = [i for i in control if i.action == action]
            assert all(
                i.tokens == tokens and i.steps == steps and ".cross_attn." in i.site for i in picked
            )
            names = [f"L{i.site.split('.')[1]}H{head}" for i in picked for head in i.heads]
            assert len(names) == len(set(names)) == len(heads)
            assert not set(names) & set(heads)
            assert sorted(names) == sorted(
                [
                    f"L{i.site.split('.')[1]}H{h}"
                    for i in control
                    if i.action == "mean"
                    for h in i.heads
                ]
            )
            drawn |= set(names)
    layers = [int(head[1]) for head in heads]
    margin = 1 if heads == ["L4H0", "L4H1"] else 0  # a single other head in layer 4
    allowed = range(min(layers) - margin, max(layers) + margin + 1)
    assert drawn == {f"L{layer}H{head}" for layer in allowed for head in range(3)} - set(heads)


def test_heads_that_were_found_too_are_no_control(trained):
    found = ["L2H1", "L2H2", "L1H0"]
    for seed in range(30):
        (control,) = random_heads(
            trained, ablate_heads("L2H1"), np.random.default_rng(seed), exclude=found
        )
        assert f"L{control.site.split('.')[1]}H{control.heads[0]}" not in found
    every = [f"L{layer}H{head}" for layer in range(6) for head in range(3)]
    # rather those than none
    assert random_heads(trained, ablate_heads("L2H1"), np.random.default_rng(0), exclude=every)


def test_places_of_an_image_and_of_a_sentence_are_drawn_apart(model):
    both = [
        Intervention("blocks.0.hook_resid_pre", tokens=[1, 2]),
        Intervention("hook_text", tokens=[1, 2]),
    ]
    image, text = random_tokens(model, PROMPTS[:1], both, np.random.default_rng(0))
    assert len(image.tokens[0]) != len(text.tokens[0])
    assert sum(image.tokens[0]) == sum(text.tokens[0]) == 2


def test_random_tokens_match(model):
    """As many in each prompt, none of those selected, no pads, EOS only if nothing else is left;
    equal roles get equal draws.
    """
    condition = [
        *knockout_role("relation", layers=[0, 1], branch="both"),
        Intervention("hook_text", tokens="shape1"),
    ]
    roles = [token_roles(model, prompt, length=9) for prompt in PROMPTS]
    drawn = [set() for _ in PROMPTS]
    for seed in range(30):
        one, two, three = random_tokens(model, PROMPTS, condition, np.random.default_rng(seed))
        assert one.tokens == two.tokens
        assert (one.branch, three.branch) == ("cond", "cond")
        for row, found in enumerate(roles):
            hidden = {i for i, there in enumerate(one.tokens[row]) if there}
            assert len(hidden) == found.count("relation")
            assert sum(three.tokens[row]) == found.count("shape1")
            drawn[row] |= hidden
    for row, found in enumerate(roles):
        assert drawn[row] == {
            i for i, role in enumerate(found) if role not in ("relation", "shape1", "eos", "pad")
        }
    words = ["color1", "shape1", "filler", "relation", "color2", "shape2"]
    with pytest.raises(ValueError, match="controls=0"):
        random_tokens(model, PROMPTS, knockout_role(words), np.random.default_rng(0))
    (eos,) = random_tokens(model, ["above"], knockout_role("relation"), np.random.default_rng(0))
    assert eos.tokens == ((False, True),)


@pytest.mark.parametrize("steps", [None, 0, [0, 2], slice(1), slice(None, None, 2)])
def test_controls_keep_the_steps(model, steps):
    """For every form of `steps`, slices among them: they are unhashable before Python 3.12."""
    condition = knockout_role("relation", "L1H1", steps=steps)
    rng = np.random.default_rng(0)
    for control in (
        random_heads(model, condition, rng),
        random_tokens(model, PROMPTS, condition, rng),
    ):
        assert [one.steps for one in control] == [condition[0].steps]
        assert (control[0].heads, control[0].tokens) != (condition[0].heads, condition[0].tokens)
