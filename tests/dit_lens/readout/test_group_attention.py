"""Attention between groups equals sums over whole patterns, and makes none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_lens import synopsis
from dit_lens.intervene.interventions import Intervention
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline
from .groups import GROUPS, POSITIONS, PROMPTS, RUN, by_hand, masks


def test_more_groups_than_a_head_is_wide(model, cache):
    text = {f"token {i}": torch.arange(7) == i for i in range(7)} | {
        f"not {i}": torch.arange(7) != i for i in range(7)
    }
    assert len(text) > model.cfg.d_head
    seen = synopsis.attention_synopsis(model, PROMPTS, **RUN, text_groups=text)
    for name, keys in text.items():
        everywhere = torch.ones(3, POSITIONS)
        expected = by_hand(
            model, cache, "cross_attn", "cond", everywhere, keys.expand(3, -1), "sum"
        )
        np.testing.assert_allclose(
            seen.sel(branch="cond", text_group=name).values[..., 0], expected, atol=1e-12
        )
    assert seen.sel(branch="uncond").isnull().all()


def test_attention_is_shared_out_in_single_precision_too():
    single = HookedTextToImage.from_pipeline(tiny_pipeline(grid=8))
    seen = synopsis.attention_synopsis(single, PROMPTS, **RUN, reduce="mass")
    assert float(abs(seen.sum("text_group") - 1).max()) < 1e-6
    halves = {"left": GROUPS["left"], "right": ~GROUPS["left"]}
    seen = synopsis.attention_synopsis(
        single, PROMPTS, **RUN, sublayer="attn", image_groups=halves, reduce="mass"
    )
    assert float(abs(seen.sum("key_group") - 1).max()) < 1e-6
    unguided = synopsis.attention_synopsis(single, PROMPTS, **RUN, guidance=1.0)
    assert list(unguided["branch"].values) == ["cond"]


class PatternsMade(TorchDispatchMode):
    """Counts results of the size of a whole pattern."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.shapes, self.made = shapes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.made += (
                isinstance(tensor, Tensor)
                and tuple(tensor.shape[-2:]) in self.shapes
                and tensor.ndim >= 3
            )
        return result


@pytest.mark.parametrize("sublayer", ["cross_attn", "attn"])
def test_no_pattern_is_ever_made(sublayer):
    """Take more keys than a head has channels (8): a smaller one is smaller than the queries."""
    # 36 positions, which nothing else is
    model = HookedTextToImage.from_pipeline(tiny_pipeline(grid=12))
    prompts = ["red circle is above left of above left of blue square"] * 3
    pattern = (36, 36) if sublayer == "attn" else (36, model.to_tokens(prompts).shape[1])
    shapes = (pattern, pattern[::-1])
    groups = {"some": torch.arange(36) % 3 == 0, "rest": torch.arange(36) % 3 > 0}
    with PatternsMade(*shapes) as fused:
        synopsis.attention_synopsis(model, prompts, **RUN, sublayer=sublayer, image_groups=groups)
    with PatternsMade(*shapes) as whole, torch.no_grad():
        model.run_with_cache(
            prompts, **RUN, names_filter=lambda name: name.endswith(f".{sublayer}.hook_pattern")
        )
    with PatternsMade(*shapes) as rows:
        synopsis.attention_synopsis(
            model, prompts, **RUN, sublayer="attn", image_groups=groups, reduce="max"
        )
    assert whole.made > 0
    assert fused.made == 0
    # chunks of rows, no larger than the queries: 16 wide heads, 36 keys
    assert sublayer == "cross_attn" or rows.made == 0


def test_attention_is_read_as_interventions_leave_it(model):
    hide = Intervention(
        "blocks.0.cross_attn.hook_pattern", heads=[1], tokens="shape1", steps=1, action="knockout"
    )
    swap = Intervention("text_encoder.blocks.0.hook_attn_out", action="zero")
    look = {"names_filter": lambda name: name.endswith("cross_attn.hook_pattern"), "branch": "both"}
    with (
        torch.no_grad(),
        model.hooks(
            [*hide.hooks(model, PROMPTS, num_steps=2), *swap.hooks(model, PROMPTS, num_steps=2)]
        ),
    ):
        edited = model.run_with_cache(PROMPTS, **RUN, **look)[1]
    for reduce in ("sum", "max"):
        seen = synopsis.attention_synopsis(
            model, PROMPTS, **RUN, reduce=reduce, interventions=[hide, swap]
        )
        assert (
            float(abs(seen.sel(layer=0, head=1, step=1, branch="cond", text_group="shape1")).max())
            == 0
        )
        for role, keys in masks(model, PROMPTS).items():
            expected = by_hand(
                model, edited, "cross_attn", "cond", torch.ones(3, POSITIONS), keys, reduce
            )
            np.testing.assert_allclose(
                seen.sel(branch="cond", text_group=role).values[..., 0], expected, atol=1e-12
            )
