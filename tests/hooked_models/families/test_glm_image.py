"""GLM-Image's image tokens, drawn for each row, and its text, that in quotation marks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_lens import prompts
from hooked_models import HookedTextToImage

from ..pipelines import PROMPTS
from ..tiny_pipelines import tiny_pipeline

SEEDS = [3, 4]
OWN = {"height": 64, "width": 64, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def model() -> Any:
    found = HookedTextToImage.from_pipeline(tiny_pipeline("GLM-Image")[0])
    found.options = OWN
    return found


def test_a_prompt_alone_is_drawn_as_by_the_pipeline(model: Any) -> None:
    """The language model's draw included; no random number of the user's is taken."""
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        generator = torch.Generator().manual_seed(seed)
        how = {"num_inference_steps": 2, "output_type": "pt", **OWN}
        plain = model.pipe(prompt=prompt, generator=generator, **how).images
        before = torch.random.get_rng_state()
        assert torch.equal(model(prompt, seed, 2), plain)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_rows_have_the_tokens_of_their_own_prompt_and_seed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = model.trajectory(PROMPTS, SEEDS, 2)
    tokens = run.inputs.drawn["prior_token_ids"]
    assert tokens.shape == (2, 16)
    assert not torch.equal(tokens[0], tokens[1])
    for row in (0, 1):
        alone = model.trajectory(PROMPTS[row], SEEDS[row], 2).inputs.drawn["prior_token_ids"]
        assert torch.equal(alone[0], tokens[row])
        assert torch.equal(run.take(torch.tensor([row])).inputs.drawn["prior_token_ids"], alone)
    other = model.reseeded(run.inputs, SEEDS[::-1]).drawn["prior_token_ids"]
    assert not torch.equal(other, tokens)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tokens that are known are drawn again")

    monkeypatch.setattr(type(model.pipe), "generate_prior_tokens", fail)
    assert torch.equal(model.reseeded(run.inputs, SEEDS).drawn["prior_token_ids"], tokens)


def test_tokens_of_the_users_own_are_taken(model: Any) -> None:
    own = torch.arange(32).reshape(2, 16) % 16
    run = model.trajectory(PROMPTS, SEEDS, 2, prior_token_ids=own)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    how = {"num_inference_steps": 2, "output_type": "pt", "prior_token_ids": own, **OWN}
    plain = model.pipe(prompt=list(PROMPTS), generator=generators, **how).images
    assert torch.equal(run.images, plain)
    with pytest.raises(ValueError, match="no size of its own: give height= and width="):
        model(PROMPTS, SEEDS, 2, height=None)


def test_the_text_is_that_in_quotation_marks(model: Any) -> None:
    vars(model.pipe).pop("get_glyph_texts")
    text = "blue square 'red circle' is above \"blue square\""
    found = model.encoded_texts(text, prior_token_ids=torch.zeros(1, 16, dtype=torch.long))[0]
    words = [text[low:high] for low, high in found.spans if low < high]
    assert words == ["red", "circle", "blue", "square"]
    mask = prompts.token_mask(model, [text], prompts.word("circle"))
    assert [text[low:high] for (low, high), on in zip(found.spans, mask[0], strict=True) if on] == [
        "circle"
    ]
    with pytest.raises(ValueError, match="is encoded as ''"):
        model.encoded_texts("red circle")
