"""`HookedPipeline`: one interface around every pipeline; families are compared in
tests/conformance.
"""

from __future__ import annotations

import pytest
import torch

from dit_lens.readout.text_layers import blocks_of
from hooked_models import HookedTextToImage
from hooked_models.generation.pipeline import HookedPipeline

from ..pipelines import PROMPTS
from ..tiny_pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def sd3() -> HookedTextToImage:
    pipe, call = tiny_pipeline("SD3")
    model = HookedTextToImage.from_pipeline(pipe)
    model.call = call
    return model


@torch.no_grad()
def test_images_are_the_pipelines_by_seed_and_guidance(sd3):
    call = dict(sd3.call)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = sd3.pipe(list(PROMPTS), generator=generators, **call).images
    steps, guidance = call.pop("num_inference_steps"), call.pop("guidance_scale", None)
    call.pop("output_type")
    found = sd3(list(PROMPTS), (3, 4), steps, guidance, **call)
    assert isinstance(sd3, HookedPipeline)
    assert torch.equal(found, expected)


def test_what_pixart_alone_has_is_refused_in_a_sentence(sd3):
    for name in ("noise", "encode", "decode"):
        with pytest.raises(AttributeError, match=name):
            getattr(sd3, name)
    with pytest.raises(TypeError, match="has no transformer"):
        HookedTextToImage.from_pipeline(object())


@torch.no_grad()
def test_the_digest_tells_weights_apart(sd3):
    before = sd3.digest()
    weight = next(sd3.pipe.transformer.parameters())
    weight += 1
    assert sd3.digest() != before
    weight -= 1


@torch.no_grad()
def test_the_text_is_encoded_once_for_runs_of_any_length(sd3, monkeypatch):
    encode, calls = sd3.pipe.encode_prompt, []

    def counted(*args, **kwargs):
        calls.append(1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(sd3.pipe, "encode_prompt", counted, raising=False)
    drafts = [sd3.draft(["red circle"], 0, steps) for steps in (1, 2)]
    assert len(calls) == 1
    assert [len(draft.solver) for draft in drafts] == [1, 2]
    expected = encode("red circle", None, None)[0]
    assert all(torch.equal(draft.encoded[0][0], expected) for draft in drafts)


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_3"])
@torch.no_grad()
def test_torchs_hooks_on_a_text_encoders_layer_act_in_the_next_run(sd3, encoder):
    call = dict(sd3.call)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    options = {key: value for key, value in call.items() if key != "output_type"}
    options["num_steps"] = options.pop("num_inference_steps")
    before, text = sd3(list(PROMPTS), (3, 4), **options), sd3.text_entering(list(PROMPTS))
    layer, kept = blocks_of(getattr(sd3.pipe, encoder))[0], []

    def halved(module, args, output):
        kept.append(output)
        return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2

    handle = layer.register_forward_hook(halved, prepend=True)  # before transformers' recorders
    found = sd3(list(PROMPTS), (3, 4), **options)
    assert kept
    assert torch.equal(found, sd3.pipe(list(PROMPTS), generator=generators, **call).images)
    assert not torch.equal(sd3.text_entering(list(PROMPTS)), text)
    handle.remove()
    assert not torch.equal(found, before)
    assert torch.equal(sd3(list(PROMPTS), (3, 4), **options), before)
