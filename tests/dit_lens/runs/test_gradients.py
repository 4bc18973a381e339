"""Gradients taken step by step equal those of one graph, in constant memory."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from rich.console import Console
from torch import Tensor

from dit_lens import attribution
from dit_lens.runs.gradients import gradients
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline
from ..pairs import KINDS, ORIGINAL, SOURCE, by_autograd, generations, metric

SCHEDULERS = {
    "flow": DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True),
    "third order": DPMSolverMultistepScheduler(solver_order=3),
    "unipc": UniPCMultistepScheduler(),
}


def test_long_ones_show_how_far_they_are(monkeypatch, tiny_model):
    """On the error stream, if it is a terminal."""
    shown = io.StringIO()
    monkeypatch.setattr(
        "dit_lens.runs.gradients.Console", lambda stderr: Console(file=shown, force_terminal=True)
    )
    for steps, bar in ((2, False), (4, True)):
        pair = attribution.pair(*generations(tiny_model, num_steps=steps, seed=[3, 4]))
        attribution.nodes(pair, metric, ["mlp"])
        assert ("gradients" in shown.getvalue()) == bar


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_step_by_step_gradients_equal_the_whole_graphs(scheduler):
    model = HookedTextToImage.from_pipeline(
        tiny_pipeline(dtype=torch.float64, scheduler=SCHEDULERS[scheduler])
    )
    call = {"num_steps": 4, "seed": [3, 4]}
    found = attribution.nodes(
        attribution.pair(*generations(model, **call), branch="both"), metric, KINDS
    ).scores
    names = {kind: attribution.NODES[kind] for kind in KINDS}
    full = [
        f"steps.{step}.{branch}.{name.format(layer=layer)}"
        for name in names.values()
        for step in range(4)
        for branch in ("cond", "uncond")
        for layer in (0, 1)
    ]
    full = list(dict.fromkeys(full))
    gradient = by_autograd(lambda: model(ORIGINAL, **call), model.hooks, full)
    with torch.no_grad():
        original, source = (
            model.run_with_cache(prompts, **call, names_filter=full, branch="both")[1]
            for prompts in (ORIGINAL, SOURCE)
        )
    largest, reference = 0.0, 0.0
    for kind, name in names.items():
        for cell in (
            found[kind]
            .sum("head" if "head" in found[kind].dims else [])
            .transpose("prompt", ...)
            .stack(at=[d for d in found[kind].dims if d not in ("prompt", "head", "text_pos")])
            .transpose("at", ...)
        ):
            at = {
                dim: cell[dim].item() for dim in ("step", "branch", "layer") if dim in cell.coords
            }
            where = f"steps.{at['step']}.{at['branch']}.{name.format(layer=at.get('layer'))}"
            product = ((source[where] - original[where]) * gradient[where]).detach()
            expected = product.flatten(2).sum(2) if kind == "text" else product.flatten(1).sum(1)
            assert cell.shape == expected.shape
            largest = max(largest, float(np.abs(cell.to_numpy() - expected.numpy()).max()))
            reference = max(reference, float(expected.abs().max()))
    assert reference > 1e-3
    # DPM-Solver steps in float32, through which cotangents are rounded
    tolerance = 1e-11 if scheduler == "unipc" else 1e-6
    assert largest < tolerance * reference
    assert float(np.abs(found["mlp"].sel(branch="uncond", step=slice(1, None))).max()) > 1e-6


def peak_saved_bytes(run: Callable[[], Any], weights: set[int]) -> int:
    """The most that autograd keeps for backward at a time, without the weights; each storage
    once.
    """
    kept: dict[int, list[int]] = {}
    peak = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal peak
            self.tensor, self.storage = tensor, tensor.untyped_storage().data_ptr()
            if self.storage not in weights:
                kept.setdefault(self.storage, [0, tensor.untyped_storage().nbytes()])[0] += 1
                peak = max(peak, sum(size for _, size in kept.values()))

        def __del__(self) -> None:
            if self.storage in kept:
                kept[self.storage][0] -= 1
                if kept[self.storage][0] == 0:
                    del kept[self.storage]

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return peak


def test_memory_does_not_grow_with_the_number_of_steps(model):
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def step_by_step(steps: int) -> int:
        pair = attribution.pair(*generations(model, num_steps=steps))
        return peak_saved_bytes(lambda: attribution.nodes(pair, metric), weights)

    def whole(steps: int) -> int:
        def run() -> None:
            with torch.enable_grad():
                latents = model.noise(0, len(ORIGINAL)).to(model.dit.dtype).requires_grad_()
                metric(model(ORIGINAL, num_steps=steps, latents=latents)).sum().backward()

        return peak_saved_bytes(run, weights)

    few, many = step_by_step(2), step_by_step(14)
    assert many < 1.05 * few
    assert whole(14) > 5 * whole(2)
    assert many < whole(14) / 5
    model.zero_grad()


def test_the_tensors_of_a_backward_pass_are_those_of_the_run(images: attribution.Pair) -> None:
    name = "steps.1.cond.blocks.1.attn.hook_z"
    read = [name, "steps.1.hook_x0"]
    found = dict(gradients([(images.original, 1.0)], {1: [name]}, metric, {1: [name]}))
    expected = images.original.activations(1, read)
    assert torch.equal(found[1].values[name], expected[name])
    between = dict(gradients([(images.original, 1.0)], {1: read}, metric, {1: read}))
    assert torch.equal(between[1].values["steps.1.hook_x0"], expected["steps.1.hook_x0"])
    assert found[1].gradients.keys() == {name}
