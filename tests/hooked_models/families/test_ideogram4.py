"""Ideogram 4's two transformers, its text by rows, its guidance by default."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_lens.remote import RemotePipeline
from hooked_models import HookedTextToImage
from hooked_models.families import ideogram4

from ..pipelines import PROMPTS
from ..tiny_pipelines import tiny_pipeline

OWN = {"height": 16, "width": 16, "max_sequence_length": 48}


@pytest.fixture(scope="module")
def model() -> Any:
    found = HookedTextToImage.from_pipeline(tiny_pipeline("Ideogram 4")[0])
    found.options = OWN
    return found


def test_arguments_by_row_and_back() -> None:
    live = ideogram4.small()
    given = ideogram4.inputs(live)
    rows = ideogram4.by_row(live, given)
    assert rows["hidden_states"].shape == (2, 6, 4)
    text = rows["encoder_hidden_states"].transpose(2, 3).flatten(2)
    whole = given["encoder_hidden_states"]
    assert torch.equal(text[0], whole[0, :5])
    assert torch.equal(text[1, :3], whole[1, 2:5])  # its tokens first, then padding
    assert torch.equal(text[1, 3:], whole[1, :2])
    back = ideogram4.as_called(live, rows)
    assert torch.equal(live(**back)[0][:, 5:], live(**given)[0][:, 5:])
    assert torch.equal(back["encoder_hidden_states"][:, :5], whole[:, :5])
    assert torch.equal(back["hidden_states"][:, 5:], given["hidden_states"][:, 5:])


def test_each_branch_is_watched_in_its_own_transformer(model: Any) -> None:
    """Weights of one changed: the other's tensors are the same, its own are not."""
    names = ["blocks.0.attn.hook_q", "blocks.1.hook_resid_post"]
    run = {"names_filter": names, "branch": "both", "steps": 0}

    def kept() -> dict[str, Any]:
        cache = model.run_with_cache(PROMPTS, [3, 4], 2, 4.0, **run)[1]
        return {key: cache[key] for key in cache}

    clean = kept()
    assert clean["steps.0.cond.blocks.0.attn.hook_q"].shape[1] == 16 + 48
    assert clean["steps.0.uncond.blocks.0.attn.hook_q"].shape[1] == 16
    weight = model.pipe.unconditional_transformer.layers[0].attention.to_q.weight
    with torch.no_grad():
        weight.mul_(2)
        changed = kept()
        weight.div_(2)
    same = {key for key in clean if torch.equal(clean[key], changed[key])}
    assert same == {key for key in clean if ".cond." in key}
    second = model.dit.second
    assert second.blocks is model.dit.blocks
    assert second.wrapped is model.pipe.unconditional_transformer


def test_guidance_is_that_of_the_call_or_seven_or_a_schedule(model: Any) -> None:
    def plain(**how: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        more = {"num_inference_steps": 2, "output_type": "pt", **OWN, **how}
        return model.pipe(prompt=PROMPTS[0], generator=generator, **more).images

    seven = plain(guidance_scale=7.0, guidance_schedule=None)
    assert torch.equal(model(PROMPTS[0], 3, 2), seven)
    assert model.default_guidance == 7.0
    three = plain(guidance_scale=3.0, guidance_schedule=None)
    assert torch.equal(model(PROMPTS[0], 3, 2, 3.0), three)
    falling = plain(guidance_schedule=[5.0, 2.0])
    assert torch.equal(model(PROMPTS[0], 3, 2, guidance_schedule=torch.tensor([5.0, 2.0])), falling)


def test_a_trace_that_follows_one_transformer_says_so(model: Any) -> None:
    with pytest.raises(ValueError, match="draws with two transformers"):
        RemotePipeline.open_parts(SimpleNamespace(), model.pipe)  # type: ignore[arg-type]
