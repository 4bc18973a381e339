"""Interchange of words between prompts: against prompts themselves, and against planted circuits
whose heads are known.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dit_lens import scenes
from dit_lens.intervene.interchange import Interchange, matched_sets
from hooked_models import HookedTextToImage

WANTED = [
    s
    for s in scenes.sample(60, seed=2, split="all", color_words="both")
    if scenes.axis_of(s.relation) != "diagonal"
][:6]


@pytest.fixture(scope="module")
def nano() -> HookedTextToImage:
    return HookedTextToImage.from_pretrained("rte-nano")


def test_every_word_in_every_head_is_the_source_prompt(nano):
    others = [scenes.opposite(s) for s in WANTED]
    swap = Interchange(nano, WANTED, others)
    with torch.no_grad():
        got = nano.run_with_hooks(swap.texts, seed=0, fwd_hooks=swap.hooks(None))
        expected = nano([scenes.caption(s) for s in others], seed=0)
        untouched = nano.run_with_hooks(swap.texts, seed=0, fwd_hooks=swap.hooks(None, "color2"))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(untouched, nano(swap.texts, seed=0), rtol=0, atol=1e-5)


def test_planted_relation_heads_of_one_axis_turn_that_axis_alone(planted_model):
    model, truth = planted_model("two-stage", 0)
    swap = Interchange(model, WANTED, [scenes.opposite(s) for s in WANTED])
    axes = np.array([scenes.axis_of(s.relation) for s in WANTED])
    assert {"vertical", "horizontal"} == set(axes)
    for axis in ("vertical", "horizontal"):
        heads = [f"L{h.layer}H{h.head}" for h in truth.relation_heads if h.what.startswith(axis)]
        assert len(heads) == 2
        with torch.no_grad():
            images = model.run_with_hooks(
                swap.texts, seed=0, fwd_hooks=swap.hooks(heads, "relation")
            )
        turned = scenes.layout(images, [scenes.opposite(s) for s in WANTED])["layout"].values
        kept = scenes.layout(images, WANTED)["layout"].values
        np.testing.assert_array_equal(turned, axes == axis)
        np.testing.assert_array_equal(kept, axes != axis)


def test_every_prompt_can_have_its_own_heads(nano):
    swap = Interchange(nano, WANTED[:2], [scenes.opposite(s) for s in WANTED[:2]])
    every = [f"L{layer}H{head}" for layer in range(3) for head in range(3)]
    hooks = [
        hook
        for one in swap.of_each([every, ["L2H2"]], "relation")
        for hook in one.hooks(nano, swap.texts)
    ]
    with torch.no_grad():
        got = nano.run_with_hooks(swap.texts, seed=0, fwd_hooks=hooks)
        first = nano(scenes.caption(scenes.opposite(WANTED[0])), seed=0)
        second = nano.run_with_hooks(
            swap.texts, seed=0, fwd_hooks=swap.hooks(["L2H2"], "relation")
        )[1:]
    torch.testing.assert_close(got, torch.cat([first, second]), rtol=0, atol=1e-4)


def test_prompts_of_unequal_length_are_refused(nano):
    above, left = (
        next(s for s in WANTED if s.relation in pair)
        for pair in (("above", "below"), ("left", "right"))
    )
    if len(above.phrase.split()) != len(left.phrase.split()):
        with pytest.raises(ValueError, match="equal length"):
            Interchange(nano, [above], [left])


def test_matched_sets_are_of_the_same_layers_and_of_no_head_found():
    model = HookedTextToImage.from_pretrained("rte-micro")
    heads = ["L2H1", "L1H0", "L2H2", "L1H1"]
    drawn = list(matched_sets(model, heads, 10, np.random.default_rng(0), exclude=["L0H0"]))
    assert len(drawn) == 10
    assert len({tuple(sorted(one)) for one in drawn}) > 3
    for one in drawn:
        assert len(set(one)) == 4
        assert not set(one) & {*heads, "L0H0"}
        # all that is left of them
        assert sum(head[:2] == "L2" for head in one) == sum(head[:2] == "L1" for head in one) == 1
    every = [f"L{layer}H{head}" for layer, head in itertools.product(range(6), range(3))]
    with pytest.raises(ValueError, match="too few"):
        next(matched_sets(model, heads, 1, np.random.default_rng(0), exclude=every[:16]))
