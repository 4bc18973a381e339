"""Concept attention equals an independent one: a plain pipeline whose kernel is replaced, and
vectors compared by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_lens import prompts
from dit_lens.readout import concept_attention
from hooked_models import HookedTextToImage

from ...hooked_models.tiny_pipelines import tiny_pipeline

PROMPT, CONCEPTS = "red circle is above blue square", ["left", "square"]
FIRST_TEXT = {"FLUX.1": True, "SD3": False, "Qwen-Image": True}
"""Pipeline → True if the joint sequence begins with the text."""


class Kernel(TorchFunctionMode):
    """Lets the image of the first conditional row be that of all, and keeps what joint attention
    returns.
    """

    def __init__(self, n_image: int, text_first: bool, cond: slice) -> None:
        super().__init__()
        self.n_image, self.text_first, self.cond = n_image, text_first, cond
        self.outputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3] or [kwargs.pop(part) for part in ("query", "key", "value")]
        if q.shape[2] <= self.n_image:
            return func(q, k, v, *args[3:], **kwargs)
        image = slice(-self.n_image, None) if self.text_first else slice(self.n_image)
        k, v = k.clone(), v.clone()
        for x in (k, v):
            x[self.cond][1:, :, image] = x[self.cond][:1, :, image]
        z = func(q, k, v, *args[3:], **kwargs)
        ours = z[self.cond].transpose(1, 2).flatten(2)
        parts = (
            ours[:, image],
            ours[:, : -self.n_image] if self.text_first else ours[:, self.n_image :],
        )
        self.outputs.append(torch.cat(parts, dim=1))
        return z


@pytest.mark.parametrize("name", FIRST_TEXT)
def test_shares_are_those_of_a_plain_pipeline_by_hand(name: str) -> None:
    pipe, call = tiny_pipeline(name)
    options = {
        key: value
        for key, value in call.items()
        if key not in ("num_inference_steps", "output_type")
    }
    model = HookedTextToImage.from_pipeline(pipe)
    found = concept_attention(
        model, PROMPT, [*CONCEPTS, prompts.word("circle")], 3, 3, by=["layer", "step"], **options
    )
    n_image = found.sizes["y"] * found.sizes["x"]
    rows = [PROMPT, *CONCEPTS]
    # SD3: [uncond; cond]
    kernel = Kernel(n_image, FIRST_TEXT[name], slice(3, 6) if name == "SD3" else slice(0, 3))
    encode = pipe.encode_prompt

    def outside(*args: Any, **kwargs: Any) -> Any:  # text encoders have attention of their own
        with torch._C.DisableTorchFunction():
            return encode(*args, **kwargs)

    pipe.encode_prompt = outside
    with torch.no_grad(), kernel:
        pipe(
            prompt=rows,
            generator=[torch.Generator().manual_seed(3) for _ in rows],
            **{**call, "output_type": "latent"},
        )
    del pipe.encode_prompt
    n_layers = found.sizes["layer"]
    per_step = n_layers * (2 if name == "Qwen-Image" else 1)  # cond, then uncond
    masks = [
        prompts.token_mask(model, rows, prompts.word(one), missing="ignore", **options)
        for one in (*CONCEPTS, "circle")
    ]
    for step in range(3):
        for layer in range(n_layers):
            z = kernel.outputs[step * per_step + layer]
            means = [
                z[row, n_image + mask[row].nonzero().flatten()].mean(0)
                for row, mask in zip((1, 2, 0), masks, strict=True)
            ]
            by_hand = torch.stack([z[0, :n_image] @ mean for mean in means]).softmax(0)
            ours = torch.from_numpy(found.sel(layer=layer, step=step).values).flatten(1)
            assert torch.allclose(ours, by_hand, atol=1e-4)
            assert ours.std() > 1e-4
    whole = concept_attention(model, PROMPT, CONCEPTS, 3, 3, **options)
    assert whole.dims == ("concept", "y", "x")
    assert abs(whole.sum("concept") - 1).max() < 1e-5


def test_senseless_concepts_are_refused() -> None:
    pipe, call = tiny_pipeline("SD3")
    options = {
        key: value
        for key, value in call.items()
        if key not in ("num_inference_steps", "output_type")
    }
    model = HookedTextToImage.from_pipeline(pipe)
    with pytest.raises(ValueError, match="at least two"):
        concept_attention(model, PROMPT, ["circle"], 3, 3, **options)
    with pytest.raises(ValueError, match="has no 'dog'"):
        concept_attention(model, PROMPT, ["circle", prompts.word("dog")], 3, 3, **options)
    with pytest.raises(ValueError, match="read by cross-attention"):
        concept_attention(
            HookedTextToImage.from_pipeline(tiny_pipeline("SANA")[0]), PROMPT, CONCEPTS
        )
