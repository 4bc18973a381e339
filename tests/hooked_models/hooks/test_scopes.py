"""State belongs to a run: graphs, hooks in threads and in hooks, contexts, levels, and changes of a
wrapped module.
"""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..pipelines import PROMPTS
from .zeroed import PATTERN, STEPS, Z, zero


def test_a_plain_call_keeps_nothing_for_a_backward_pass(model):
    def pack(tensor: Tensor) -> Tensor:
        pytest.fail("a tensor was saved for a backward pass")

    assert torch.is_grad_enabled()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        images = model(PROMPTS, num_steps=STEPS)
        run = model.trajectory(PROMPTS, num_steps=STEPS)
        _, cache = model.run_with_cache(PROMPTS, num_steps=STEPS)
    images.numpy()
    assert not images.requires_grad
    assert not any(tensor.requires_grad for tensor in (*run.latents, *cache.values()))


class PeakBytes(TorchDispatchMode):
    """Largest sum of the bytes of live storages that operators gave, over a block; a module's
    weights apart.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weights = (*module.parameters(), *module.buffers())
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in weights}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if (
                isinstance(tensor, Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self.live
            ):
                self.live[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, key)
        self.peak = max(self.peak, self.now)
        return output

    def freed(self, key: int) -> None:
        self.now -= self.live.pop(key)


def test_a_plain_call_takes_the_memory_that_it_takes_without_gradients(model):
    def peak() -> int:
        with PeakBytes(model) as counted:
            model(PROMPTS, num_steps=STEPS)
        return counted.peak

    peak()  # what is encoded once and kept
    plain = peak()
    with torch.no_grad():
        assert peak() == plain
    model.dit.requires_grad_(True)
    assert peak() > 2 * plain


def test_a_graph_is_there_for_whoever_asks(model):
    latents = model.noise(0, 2).requires_grad_()
    model(PROMPTS, latents=latents, num_steps=STEPS).sum().backward()
    assert latents.grad.abs().sum() > 0
    model.dit.requires_grad_(True)
    model(PROMPTS, num_steps=STEPS).sum().backward()
    assert model.dit.blocks[0].attn.to_q.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name",
    [Z, PATTERN, "steps.0.hook_latent", "text_encoder.blocks.0.attn.hook_z", "steps.1.hook_out"],
)
def test_backward_hooks_fire_in_frozen_models(model, name):
    seen: list[Tensor] = []
    nudge: Tensor | None = None

    def run(hooks: Any) -> Tensor:
        return model.run_with_hooks(PROMPTS, num_steps=STEPS, **hooks).square().sum()

    with model.hooks(bwd_hooks=[(name, lambda gradient, hook: seen.append(gradient.clone()))]):
        model(PROMPTS, num_steps=STEPS).square().sum().backward()
    nudge = torch.zeros_like(seen[0]).requires_grad_()
    (expected,) = torch.autograd.grad(
        run({"fwd_hooks": [(name, lambda tensor, hook: tensor + nudge)]}), nudge
    )
    assert expected.abs().max() > 0
    assert torch.allclose(seen[0], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_threads_have_their_own_hooks(model):
    with torch.no_grad():
        plain = model(PROMPTS, num_steps=STEPS)
        zeroed = model.run_with_hooks(PROMPTS, num_steps=STEPS, fwd_hooks=[(Z, zero)])
        names = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_pattern"]
        caches = [
            model.run_with_cache(prompt, num_steps=STEPS, names_filter=names)[1]
            for prompt in PROMPTS
        ]
    barrier = threading.Barrier(3)

    def work(which: int) -> bool:
        with torch.no_grad():
            right = True
            for _ in range(4):
                barrier.wait()
                if which == 0:
                    right &= torch.equal(
                        model.run_with_hooks(PROMPTS, num_steps=STEPS, fwd_hooks=[(Z, zero)]),
                        zeroed,
                    )
                elif which == 1:
                    right &= torch.equal(model(PROMPTS, num_steps=STEPS), plain)
                else:
                    _, cache = model.run_with_cache(PROMPTS[1], num_steps=STEPS, names_filter=names)
                    right &= all(torch.equal(cache[name], caches[1][name]) for name in cache)
            return right

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [True] * 3
    assert model.attached == ()
    assert not model.has_hooks_inside


def test_denoiser_calls_in_threads_have_their_own_hooks_and_flags(model):
    latents, text = model.noise(0, 2), model.encode(model.to_tokens(PROMPTS), 1.0).text
    view, tokens = model.dit.bind(latents, 500.0, text)
    with torch.no_grad():
        plain, zeroed = (
            view(tokens),
            view.run_with_hooks(tokens, [("blocks.0.attn.hook_pattern", zero)]),
        )

    def work(hooked: bool) -> bool:
        with torch.no_grad():
            outs = [
                view.run_with_hooks(tokens, [("blocks.0.attn.hook_pattern", zero)])
                if hooked
                else view(tokens)
                for _ in range(8)
            ]
        return all(torch.equal(out, zeroed if hooked else plain) for out in outs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [True, False, True, False]))


def test_a_run_in_a_hook_is_a_run_of_its_own(model):
    inner: list[Tensor] = []

    def run_again(tensor: Tensor, hook: Any) -> Tensor:
        inner.append(model(PROMPTS, num_steps=STEPS))
        inner.append(model.run_with_hooks(PROMPTS, num_steps=STEPS, fwd_hooks=[(PATTERN, zero)]))
        return torch.zeros_like(tensor)

    with torch.no_grad():
        plain = model(PROMPTS, num_steps=STEPS)
        zeroed = model.run_with_hooks(PROMPTS, num_steps=STEPS, fwd_hooks=[(Z, zero)])
        other = model.run_with_hooks(PROMPTS, num_steps=STEPS, fwd_hooks=[(PATTERN, zero)])
        assert torch.equal(
            model.run_with_hooks(PROMPTS, num_steps=STEPS, fwd_hooks=[(Z, run_again)]), zeroed
        )
        assert torch.equal(inner[0], plain)
        assert torch.equal(inner[1], other)
        model.add_hook(Z, run_again)
        inner.clear()
        assert torch.equal(model(PROMPTS, num_steps=STEPS), zeroed)
        assert torch.equal(inner[0], plain)
        model.reset_hooks()


def test_generation_hooks_are_refused_around_a_pipelines_own_call(model):
    pipe = model.as_diffusers()
    pipe.set_progress_bar_config(disable=True)
    call = {
        "num_inference_steps": 1,
        "clean_caption": False,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    pipe(list(PROMPTS), **call)
    assert type(pipe).__name__ == "PixArtSigmaPipeline"
    with (
        model.hooks([(Z, zero)]),
        pytest.raises(ValueError, match="do not fire in a diffusers pipeline's own call"),
    ):
        pipe(list(PROMPTS), **call)
