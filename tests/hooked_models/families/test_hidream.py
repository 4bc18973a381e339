"""HiDream's text by rows and back, the experts' gradients, the size of its images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel

from hooked_models import HookedTextToImage, families
from hooked_models.families import hidream

from ..pipelines import PROMPTS
from ..tiny_pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def live() -> Any:
    torch.manual_seed(0)
    return hidream.FAMILY.small().eval()


@pytest.mark.parametrize("last", [0, 1, 2, -1])
def test_arguments_by_row_and_back(live: Any, last: int) -> None:
    given = hidream.inputs(live) | {hidream.LLAMA: torch.randn(3, 2, 5, 8)}
    config = dict(live.config) | {"llama_layers": (0, last)}
    other = HiDreamImageTransformer2DModel.from_config(config)
    rows = hidream.by_row(other, given)
    assert {len(value) for value in rows.values()} == {2}
    assert torch.equal(rows[hidream.LAST], given[hidream.LLAMA][last])
    back = hidream.as_called(other, rows)
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], given[name]) for name in given)


def test_rows_of_the_encoded_text_are_its_first_axis() -> None:
    text, llama = torch.randn(2, 5, 4), torch.randn(3, 2, 5, 4)
    kept = hidream.turned((text, None, llama))
    assert [None if x is None else len(x) for x in kept] == [2, None, 2]
    assert torch.equal(hidream.turned(kept)[2], llama)


def test_gradients_pass_through_experts_and_nothing_else_changes(live: Any) -> None:
    model, given = families.hook(live), hidream.inputs(live)
    reference = live(**given)[0]
    x = given["hidden_states"].clone().requires_grad_()
    modes = [module.training for module in live.modules()]
    with torch.enable_grad():
        out = model(**given | {"hidden_states": x})[0]
        assert torch.allclose(out, reference, atol=1e-5)
        (slope,) = torch.autograd.grad(out.square().sum(), x)
    assert [module.training for module in live.modules()] == modes
    step = 1e-2 * torch.sign(slope)
    two = [live(**given | {"hidden_states": x.detach() + sign * step})[0] for sign in (1, -1)]
    difference = (two[0].square().sum() - two[1].square().sum()) / 2
    assert difference.item() == pytest.approx((slope * step).sum().item(), rel=2e-2)


def test_images_are_of_the_size_that_is_declared() -> None:
    pipe, call = tiny_pipeline("HiDream")
    model = HookedTextToImage.from_pipeline(pipe)
    for size, drawn in (((8, 8), (16, 16)), ((8, 32), (8, 32))):
        asked = dict(zip(("height", "width"), size, strict=True))
        images = pipe(prompt=list(PROMPTS), **call | asked).images
        draft = model.draft(PROMPTS, max_sequence_length=12, **asked)
        assert draft.shapes["hook_image"] == tuple(images.shape) == (2, 3, *drawn)
