"""Rows whose text is a single token: their cross-attention is not computed position by position
unless somebody looks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedDiT, HookedTextToImage
from hooked_models.pixart.fast import empty_prompts

from ...pipelines import PROMPTS, tiny_pipeline
from ...tiny import look, tiny_inputs, tiny_transformer


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def masked(*lengths: int, text_len: int = 5) -> tuple[HookedDiT, dict[str, Any]]:
    """A model in float64 with inputs of which each row attends to its first tokens."""
    transformer = tiny_transformer().double()
    inputs = tiny_inputs(transformer, batch=len(lengths), text_len=text_len)
    inputs["encoder_attention_mask"] = (
        torch.arange(text_len) < torch.tensor(lengths)[:, None]
    ).long()
    dit = HookedDiT(transformer)
    empty_prompts.skip(dit)
    return dit, inputs


@pytest.mark.parametrize(
    ("lengths", "n_empty"),
    [((1, 1, 4), 2), ((1, 3, 1), 1), ((3, 1), 0), ((1, 1), 2), ((0, 2), 0)],
    ids=str,
)
def test_the_prediction_is_the_wrapped_models(lengths, n_empty):
    dit, inputs = masked(*lengths)
    text, mask = inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask")
    state = dit.encode_text(text, mask)
    assert state.n_empty_prompts == n_empty
    expected = dit.wrapped(encoder_hidden_states=text, encoder_attention_mask=mask, **inputs).sample
    rows: list[int] = []
    queries = dit.blocks[1].cross_attn.queries
    dit.blocks[1].cross_attn.queries = lambda x: rows.append(len(x)) or queries(x)
    assert (dit(text_state=state, **inputs).sample - expected).abs().max() < 1e-12
    assert rows == [len(lengths) - n_empty]


def test_a_bias_that_leaves_other_keys_something_is_no_empty_text():
    dit, inputs = masked(1, 4)
    bias = torch.tensor([[[0.0, -20, -20, -20, -20]], [[0.0] * 5]]).double()
    text = inputs.pop("encoder_hidden_states")
    del inputs["encoder_attention_mask"]
    state = dit.encode_text(text, bias)
    assert state.n_empty_prompts == 0
    expected = dit.wrapped(encoder_hidden_states=text, encoder_attention_mask=bias, **inputs).sample
    assert (dit(text_state=state, **inputs).sample - expected).abs().max() < 1e-12
    assert dit.encode_text(text, None).n_empty_prompts == 0
    assert (
        dit.encode_text(text, torch.tensor([[1, 0, 0, 0, 0]] * 2))
        .take(torch.tensor([1, 0, 1]))
        .n_empty_prompts
        == 3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_generations_are_the_same_whoever_looks(dtype):
    """In bfloat16 too, where the bias is not quite -10000."""
    model = HookedTextToImage.from_pipeline(tiny_pipeline(dtype=dtype))
    images = model(PROMPTS, seed=0, num_steps=3)
    assert model.trajectory(PROMPTS, until=0).inputs.text.n_empty_prompts == len(PROMPTS)
    hooks = [(f"steps.{step}.uncond.blocks.0.cross_attn.hook_z", look) for step in range(3)]
    watched = model.run_with_hooks(PROMPTS, seed=0, num_steps=3, fwd_hooks=hooks)
    difference = (images.double() - watched.double()).abs()
    assert difference.max() < 1e-5 if dtype != torch.bfloat16 else difference.mean() < 2e-2
    assert (
        model(["", ""], seed=0, num_steps=2) - model(["", ""], seed=0, num_steps=2, guidance=1.0)
    ).abs().max() < 1e-2


@pytest.mark.parametrize(
    "point", ["q", "k", "v", "attn_scores", "pattern", "z", "result", "cross_attn_in"]
)
def test_hooks_see_all_rows(point):
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    model.dit.set_use_attn_result(point == "result")
    model.dit.set_use_attn_in(point == "cross_attn_in")
    inner = "hook_cross_attn_in" if point == "cross_attn_in" else f"cross_attn.hook_{point}"
    name = f"steps.1.uncond.blocks.1.{inner}"
    seen: list[Tensor] = []

    def change(tensor: Tensor, hook: Any) -> Tensor:
        seen.append(tensor.clone())
        return 2.0 * tensor + 1.0

    changed = model.run_with_hooks(PROMPTS, seed=0, num_steps=2, fwd_hooks=[(name, change)])
    assert [len(tensor) for tensor in seen] == [len(PROMPTS)]
    alike = ("q", "k", "attn_scores", "cross_attn_in")  # of which nothing follows, with one key
    differs = (changed - model(PROMPTS, seed=0, num_steps=2)).abs().max()
    assert differs < 1e-5 if point in alike else differs > 1e-3


def test_a_torch_hook_on_a_projection_sees_all_rows():
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    rows: list[int] = []
    handle = model.dit.blocks[0].cross_attn.to_q.register_forward_hook(
        lambda module, args, out: rows.append(len(out))
    )
    model(PROMPTS, seed=0, num_steps=1)
    handle.remove()
    assert rows == [2 * len(PROMPTS)]


def test_it_can_be_switched_off():
    dit, inputs = masked(1, 4)
    state = dit.encode_text(
        inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask")
    )
    rows: list[int] = []
    queries = dit.blocks[0].cross_attn.queries
    dit.blocks[0].cross_attn.queries = lambda x: rows.append(len(x)) or queries(x)
    fast = dit(text_state=state, **inputs).sample
    with empty_prompts.compute_all(dit):
        plain = dit(text_state=state, **inputs).sample
    dit(text_state=state, **inputs)
    assert rows == [1, 2, 1]
    assert (fast - plain).abs().max() < 1e-12
