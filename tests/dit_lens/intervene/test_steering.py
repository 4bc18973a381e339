"""Embedding arithmetic against edits by hand."""

from __future__ import annotations

import pytest
import torch

from dit_lens import scenes, steering, variance
from dit_lens.task import DIRECTIONS
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import PROMPTS, tiny_pipeline

FAST = {"num_steps": 2}


@pytest.fixture(scope="module", params=["rte", "t5"])
def tiny(request) -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline(request.param))


@torch.no_grad()
def test_steering_text_is_an_edit_of_the_text_encoders_output(tiny):
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    out = (
        "text_encoder.hook_out"
        if "text_encoder.hook_out" in tiny.hook_dict
        else "text_encoder.ln_final.hook_normalized"
    )

    def edit(text, hook):
        text[0, 3] += 0.7 * vector  # above
        text[1, 3] += 0.7 * vector  # left

    expected = tiny.run_with_hooks(list(PROMPTS), seed=[3, 4], **FAST, fwd_hooks=[(out, edit)])
    found = steering.steer(tiny, PROMPTS, vector, "relation", k=0.7, seed=[3, 4], **FAST)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        steering.steer(tiny, PROMPTS, vector, [3], k=0.7, seed=[3, 4], **FAST),
        expected,
        atol=1e-5,
        rtol=0,
    )
    assert (found - tiny(list(PROMPTS), seed=[3, 4], **FAST)).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_steering_captions_edits_what_cross_attention_reads_in_one_branch(tiny):
    vectors = torch.zeros(2, 8, tiny.cfg.d_model)
    vectors[0, 5], vectors[1, 6] = torch.randn(
        2, tiny.cfg.d_model, generator=torch.Generator().manual_seed(0)
    )
    own, _ = variance.word_vectors(tiny, PROMPTS, "shape2", "caption")
    found = steering.steer(tiny, PROMPTS, vectors, at="caption", k=2.0, **FAST)

    def keys(attn, words):
        return torch.einsum("pd,hde->phe", words, attn.W_K) + attn.b_K

    def values(attn, words):
        return torch.einsum("pd,hde->phe", words, attn.W_V) + attn.b_V

    def put(project, layer):
        def hook_function(tensor, hook):
            attn = tiny.dit.blocks[layer].cross_attn
            changed = project(attn, own + 2.0 * vectors[[0, 1], [5, 6]])
            tensor[0, 5], tensor[1, 6] = changed

        return hook_function

    hooks = [
        (f"steps.{step}.cond.blocks.{layer}.cross_attn.hook_{name}", put(project, layer))
        for step in range(2)
        for layer in range(2)
        for name, project in (("k", keys), ("v", values))
    ]
    expected = tiny.run_with_hooks(list(PROMPTS), **FAST, fwd_hooks=hooks)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_batches_change_nothing_and_neither_does_a_dose_of_zero(tiny):
    prompts = [*PROMPTS, PROMPTS[0], "circle is above square", PROMPTS[1]]
    vector = torch.ones(16)
    whole = steering.steer(
        tiny, prompts, vector, ["shape1", "relation"], seed=[0, 1, 2, 3, 4], **FAST
    )
    parts = steering.steer(
        tiny, prompts, vector, ["shape1", "relation"], seed=[0, 1, 2, 3, 4], batch_size=2, **FAST
    )
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)
    none = steering.steer(tiny, prompts, vector, "shape2", k=0.0, **FAST)
    torch.testing.assert_close(none, tiny(prompts, **FAST), atol=1e-6, rtol=0)


def test_tokens_and_vectors_that_do_not_go_together_are_refused(tiny):
    vector = torch.ones(16)
    with pytest.raises(ValueError, match="which tokens"):
        steering.steer(tiny, PROMPTS, vector)
    with pytest.raises(ValueError, match="no tokens= beside it"):
        steering.steer(tiny, PROMPTS, torch.ones(2, 8, 16), "shape1")
    with pytest.raises(ValueError, match="'circle is above square' has no color1 token"):
        steering.steer(tiny, [*PROMPTS, "circle is above square"], vector, "color1")
    with pytest.raises(ValueError, match="no position 8"):
        steering.steer(tiny, PROMPTS, vector, [8])


def test_opposites_are_opposite():
    for relation, opposite in scenes.OPPOSITE.items():
        assert DIRECTIONS[opposite] == tuple(-step for step in DIRECTIONS[relation])
