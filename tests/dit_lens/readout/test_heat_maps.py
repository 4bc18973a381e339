"""Heat maps equal sums over cached patterns, in PixArt and in pipelines of several families."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_lens import Intervention, prompts
from dit_lens.readout.heat_maps import heatmap, kept_dims
from hooked_models import HookedTextToImage
from hooked_models.families import kernel_tap
from hooked_models.pixart import attention

from ...hooked_models.hooks.test_scopes import PeakBytes
from ...hooked_models.pipelines import PROMPTS
from ...hooked_models.pipelines import tiny_pipeline as tiny_pixart
from ...hooked_models.tiny_pipelines import tiny_pipeline

SEEDS = [3, 4]
FAMILIES = [
    "PixArt",
    "FLUX.1 true CFG",
    "SD3",
    "SANA DPM++",
    "Qwen-Image",
    "Lumina 2",
    "HunyuanDiT",
    "PRX",
    "Krea 2",
    "Z-Image",
    "AuraFlow",
]


def opened(name: str) -> tuple[HookedTextToImage, int, dict[str, Any]]:
    """A tiny model, the number of steps and the other arguments of its call."""
    if name == "PixArt":
        return HookedTextToImage.from_pipeline(tiny_pixart("t5")), 3, {}
    pipe, call = tiny_pipeline(name)
    options = {
        key: value
        for key, value in call.items()
        if key not in ("num_inference_steps", "output_type")
    }
    return HookedTextToImage.from_pipeline(pipe), call["num_inference_steps"], options


@pytest.mark.parametrize("name", FAMILIES)
def test_a_heat_map_is_the_sum_over_the_words_keys(name: str) -> None:
    model, n_steps, options = opened(name)
    found = heatmap(
        model,
        PROMPTS,
        ["circle", "blue square"],
        SEEDS,
        n_steps,
        by=["layer", "head", "step"],
        **options,
    )
    _, cache = model.run_with_cache(
        PROMPTS, SEEDS, n_steps, names_filter=lambda n: n.endswith("hook_pattern"), **options
    )
    own = {} if name == "PixArt" else options
    mask = prompts.token_mask(model, PROMPTS, prompts.word("blue square"), **own)
    text = "cross_attn" if "steps.0.cond.blocks.0.cross_attn.hook_pattern" in cache else "attn"
    for layer in found["layer"].values:
        for step in range(n_steps):
            pattern = cache[f"steps.{step}.cond.blocks.{layer}.{text}.hook_pattern"]
            n_image = found.sizes["y"] * found.sizes["x"]
            start = n_image if text == "attn" else 0
            sums = [
                pattern[i, :, :n_image, start + mask[i].nonzero().flatten()].sum(-1)
                for i in range(2)
            ]
            ours = torch.from_numpy(
                found.sel(layer=layer, step=step, word="blue square").values
            ).flatten(2)
            assert torch.allclose(ours, torch.stack(sums), atol=1e-5)
            assert ours.max() > 1e-3
    assert found["layer"].size == model.cfg.n_layers
    mean = heatmap(model, PROMPTS, prompts.word("circle"), SEEDS, n_steps, **options)
    assert mean.dims == ("prompt", "word", "y", "x")
    ours = found.sel(word="circle").mean(("layer", "head", "step"))
    assert abs(mean.sel(word="word('circle')") - ours).max() < 1e-6
    last = heatmap(
        model, PROMPTS[0], "circle", SEEDS[:1], n_steps, by=["head"], steps=-1, **options
    )
    ours = found.sel(word="circle", step=n_steps - 1)[:1].mean("layer")
    assert abs(last.values[:, 0] - ours.transpose("prompt", "head", "y", "x").values).max() < 1e-5


def test_hooks_act_and_an_explicit_pattern_is_read_after_them() -> None:
    model, n_steps, options = opened("SD3")

    def sharper(pattern: Tensor, hook: Any) -> Tensor:
        return pattern.square()

    names = ("attn.hook_pattern",)
    with model.hooks([(lambda name: name.endswith(names) and "image_attn" not in name, sharper)]):
        found = heatmap(model, PROMPTS, "circle", SEEDS, n_steps, by=["layer", "step"], **options)
        cached = model.run_with_cache(
            PROMPTS, SEEDS, n_steps, names_filter=lambda n: n.endswith(names), **options
        )[1]
    pattern = cached["steps.1.cond.blocks.1.attn.hook_pattern"]  # cached after the hooks before it
    mask = prompts.token_mask(model, PROMPTS, prompts.word("circle"), **options)
    sums = torch.stack(
        [pattern[i, :, :16, 16 + mask[i].nonzero().flatten()].sum(-1) for i in range(2)]
    ).mean(1)
    assert (
        abs(found.sel(layer=1, step=1, word="circle").values.reshape(2, 16) - sums.numpy()).max()
        < 1e-6
    )
    model, n_steps, _ = opened("PixArt")
    hide = Intervention(
        "blocks.1.cross_attn.hook_pattern", tokens=prompts.word("circle"), action="knockout"
    )
    with model.hooks(hide.hooks(model, PROMPTS, num_steps=n_steps)):
        found = heatmap(model, PROMPTS, "circle", SEEDS, n_steps, by=["layer"])
    assert found.sel(layer=1).max() == 0
    assert found.sel(layer=0).min() > 0


def test_a_word_that_no_prompt_has_is_an_error() -> None:
    model, n_steps, options = opened("FLUX.1 true CFG")
    with pytest.raises(ValueError, match=r"has no 'dog'\. Its words are red \(color1\), circle"):
        heatmap(model, PROMPTS, "dog", SEEDS, n_steps, **options)
    with pytest.raises(ValueError, match="by="):
        kept_dims(["width"], ("layer", "head"))


@pytest.mark.parametrize("name", ["PixArt", "SD3", "SANA DPM++", "Z-Image"])
def test_a_heat_map_without_the_kernels_sums(name: str, monkeypatch: Any) -> None:
    """Kernels that tell no log-sum-exp: the same map, and either way the same images."""
    model, n_steps, options = opened(name)
    told: list[Tensor | None] = []
    add = attention.fused_attention

    def watched(*args: Any, with_sums: Any = None, **how: Any) -> Tensor:
        listen = with_sums and (lambda sums: (told.append(sums), with_sums(sums)))
        return add(*args, **how, with_sums=listen)

    def silent(*args: Any, with_sums: Any = None, **how: Any) -> Tensor:
        z = add(*args, **how)
        if with_sums:
            with_sums(None)
        return z

    found = []
    for kernel in (watched, silent):
        for module in (attention, kernel_tap):
            monkeypatch.setattr(module, "fused_attention", kernel)
        found.append(heatmap(model, PROMPTS, "circle", SEEDS, n_steps, **options))
    assert told
    assert all(sums is not None for sums in told)
    assert float(abs(found[0] - found[1]).max()) < 1e-6


def test_sums_of_the_fused_kernel() -> None:
    """Bitwise torch's own output, for every kind of mask, and the log-sum-exp of the scores."""
    q, k, v = (torch.randn(2, 3, n, 16) for n in (40, 50, 50))
    hidden = torch.rand(2, 1, 40, 50) > 0.3
    for mask in (None, torch.randn(2, 1, 1, 50), torch.randn(40, 50), hidden):
        told: list[Tensor | None] = []
        z = attention.fused_attention(q, k, v, mask, with_sums=told.append)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.equal(z, wanted)
        bias = 0 if mask is None else mask
        if mask is hidden:
            bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        sums = (q @ k.mT / 4 + bias).logsumexp(-1)
        assert torch.allclose(told[0], sums, atol=1e-5)
    hidden[0, 0, 0] = False  # a query that attends to nothing
    attention.fused_attention(q, k, v, hidden, with_sums=told.append)
    assert told[-1] is None


@pytest.mark.parametrize("name", ["FLUX.1", "SD3"])
def test_a_heat_map_takes_a_plain_calls_memory_and_keeps_nothing(name: str) -> None:
    model, n_steps, options = opened(name)
    weights = nn.ModuleList(
        part for part in model.pipe.components.values() if isinstance(part, nn.Module)
    )

    @torch.no_grad()
    def counted(run: Any) -> PeakBytes:
        run()  # drafts and the layout of the last call are kept
        gc.collect()
        gc.disable()
        try:
            with PeakBytes(weights) as found:
                run()
            kept = found.now
            gc.collect()
            assert found.now == kept, "tensors in cycles of references"
            return found
        finally:
            gc.enable()

    mapped = counted(lambda: heatmap(model, PROMPTS, "circle", SEEDS, n_steps, **options))
    plain = counted(lambda: model(PROMPTS, SEEDS, n_steps, **options))
    assert mapped.peak <= 1.1 * plain.peak
