"""Content of caches: chosen heads, summaries of patterns, tensors on disk; always against the whole
cache in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_models import GenerationCache, HookedTextToImage
from hooked_models.generation.cache_estimate import estimate
from hooked_models.generation.capture import heads_by_layer

from ..pipelines import PROMPTS, tiny_pipeline
from .watching import STEPS, is_pattern, run

SUBLAYERS = ("attn", "cross_attn")


# Heads and summaries


@pytest.mark.parametrize(
    ("heads", "kept"),
    [((0, 1), {0: [1]}), (["L0H0", "L1H1", "L1H0"], {0: [0], 1: [0, 1]})],
)
def test_chosen_heads_are_those_of_the_whole_cache(exact, whole, heads, kept) -> None:
    others = {name for name in whole if name.endswith("resid_post") or "text_encoder." in name}
    per_head = {name for name in whole if "attn.hook_" in name} - others
    cache = run(
        exact, heads=heads, branch="both", names_filter=lambda name: name in per_head | others
    )
    assert set(cache) == others | {name for name in per_head if int(name.split(".")[4]) in kept}
    for name, tensor in cache.items():
        expected = whole[name]
        if name in per_head:
            axis = 1 if name.endswith(("pattern", "scores")) else 2
            expected = expected.index_select(axis, torch.tensor(kept[int(name.split(".")[4])]))
        assert tensor.shape == expected.shape
        assert torch.allclose(tensor, expected, rtol=1e-9, atol=1e-9), name


def test_ways_to_name_heads(exact) -> None:
    assert heads_by_layer(None, 2, 2) is None
    assert heads_by_layer("L1H0", 2, 2) == heads_by_layer((1, 0), 2, 2) == {1: [0]}
    assert heads_by_layer(1, 2, 2) == {0: [1], 1: [1]}
    assert heads_by_layer([0, "L1H1"], 2, 2) == {0: [0], 1: [0, 1]}
    for head in ("L2H0", "L0H2", 2):
        with pytest.raises(
            ValueError, match=f"There is no head {head}: the model has 2 layers of 2 heads"
        ):
            run(exact, heads=head)
    with pytest.raises(ValueError, match="no tensor in common"):
        run(exact, heads="L1H0", names_filter="blocks.0.attn.hook_z")


@pytest.mark.parametrize(
    ("patterns", "heads"),
    [("entropy", None), ("largest", "L1H1"), ("received", None), ("received", "L1H1")],
)
def test_summaries_are_those_of_whole_patterns(exact, whole, patterns, heads) -> None:
    cache = run(exact, names_filter=is_pattern, branch="both", patterns=patterns, heads=heads)
    assert len(cache) == (2 if heads is None else 1) * len(SUBLAYERS) * 2 * STEPS
    for name, summary in cache.items():
        pattern = whole[name].double() if heads is None else whole[name][:, [1]].double()
        expected = {
            "entropy": lambda p: torch.from_numpy(scipy.stats.entropy(p.numpy(), axis=-1)),
            "largest": lambda p: p.amax(-1),
            "received": lambda p: p.sum(2),
        }[patterns](pattern)
        assert summary.shape == expected.shape
        assert (summary - expected).abs().max() < 1e-5, name  # kept in float32


def test_scores_have_no_summary(exact) -> None:
    with pytest.raises(ValueError, match="scores before the softmax have no such summary"):
        run(exact, names_filter="blocks.0.attn.hook_attn_scores", patterns="entropy")


class Largest(TorchDispatchMode):
    """The largest tensor that anything makes."""

    numel = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(
    "settings", [{"patterns": "entropy"}, {"patterns": "received", "heads": "L1H1"}]
)
def test_no_pattern_is_made_to_be_summarised(settings) -> None:
    # 256 positions: 2 × 2 × 256² in a pattern
    model = HookedTextToImage.from_pipeline(tiny_pipeline("rte", grid=32))
    plain, summarised, explicit = Largest(), Largest(), Largest()
    chosen = {"num_steps": 1, "names_filter": is_pattern}
    with plain:
        images = model(PROMPTS[:1], num_steps=1)
    with summarised:
        seen, _ = model.run_with_cache(PROMPTS[:1], **chosen, **settings)
    with explicit:
        model.run_with_cache(PROMPTS[:1], **chosen)
    assert torch.equal(images, seen)  # the attention was not made explicit
    assert summarised.numel <= plain.numel < 2 * 2 * 256**2 <= explicit.numel


def test_a_summary_is_of_the_pattern_that_others_have_edited(exact, whole) -> None:
    name = "steps.1.cond.blocks.0.cross_attn.hook_pattern"
    with exact.hooks([(name, lambda pattern, hook: torch.ones_like(pattern) / pattern.shape[-1])]):
        cache = run(exact, names_filter=[name], patterns="largest", heads="L0H1")
    assert torch.equal(
        cache[name], torch.full_like(whole[name][:, [1], :, 0], 1 / whole[name].shape[-1])
    )


# The text's keys and values


def test_keys_and_values_of_the_text_are_kept_once(exact, whole) -> None:
    names = ["blocks.1.cross_attn.hook_k", "blocks.1.cross_attn.hook_v"]
    cache = run(exact, names_filter=names)
    assert len(cache) == 2 * STEPS
    assert cache["k", 1, "cross_attn", 1].data_ptr() == cache["k", 1, "cross_attn", 0].data_ptr()
    assert cache.nbytes == sum(cache[name, 1, "cross_attn", 0].nbytes for name in ("k", "v"))
    with exact.hooks([("steps.1.cond.blocks.1.cross_attn.hook_k", lambda k, hook: 2 * k)]):
        edited = run(exact, names_filter=names)
    assert torch.allclose(edited["k", 1, "cross_attn", 1], 2 * whole["k", 1, "cross_attn", 1])
    assert torch.allclose(edited["k", 1, "cross_attn", 0], whole["k", 1, "cross_attn", 0])


# Estimates


@pytest.mark.parametrize(
    ("grid", "prompts", "dtype", "settings"),
    [
        (8, 2, torch.float32, {"steps": 0, "num_steps": 1}),
        pytest.param(
            *(
                16,
                1,
                torch.bfloat16,
                {"steps": 0, "num_steps": 1, "branch": "both", "heads": ["L0H1", "L1H0"]},
            ),
            marks=pytest.mark.slow,
        ),
        (
            32,
            2,
            torch.bfloat16,
            {"names_filter": lambda name: name.endswith(("pattern", "_v")), "patterns": "received"},
        ),
        (
            32,
            1,
            torch.float32,
            {"names_filter": is_pattern, "patterns": "entropy", "branch": "uncond"},
        ),
        (32, 1, torch.float32, {"names_filter": ["blocks.1.hook_resid_post", "hook_image"]}),
    ],
)
def test_the_estimate_is_what_is_used(tmp_path: Path, grid, prompts, dtype, settings) -> None:
    model = HookedTextToImage.from_pipeline(tiny_pipeline("t5", grid=grid, dtype=dtype))
    settings = {"num_steps": STEPS, **settings}
    expected = estimate(model, PROMPTS[:prompts], **settings)
    _, cache = model.run_with_cache(PROMPTS[:prompts], **settings)
    assert {name: tensor.nbytes for name, tensor in cache.items()} == expected.sizes
    assert cache.nbytes == expected.nbytes
    model.run_with_cache(PROMPTS[:prompts], out=tmp_path / "out", **settings)
    assert GenerationCache.load(tmp_path / "out", model).nbytes == expected.nbytes
    files = [file for file in (tmp_path / "out").glob("*.safetensors") if file.stem != "images"]
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert sum(file.stat().st_size for file in files) - headers == expected.nbytes
    assert max(file.stat().st_size for file in files) <= expected.largest_step + headers


def test_a_plan_needs_no_weights_and_no_prompt(exact) -> None:
    by_text = estimate(exact, PROMPTS, names_filter=is_pattern)
    by_size = estimate(exact, (2, exact.to_tokens(PROMPTS).shape[1]), names_filter=is_pattern)
    assert by_text == by_size
    assert (
        estimate(exact, PROMPTS, names_filter=is_pattern, grid=(8, 16)).nbytes > 2 * by_text.nbytes
    )
    assert "hook_pattern" in str(by_text)
