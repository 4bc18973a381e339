"""Helpers of the tests here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_models import HookedDiT, HookedTextToImage

from ..hooked_models.tiny import tiny_inputs

ORIGINAL = ("red circle is above blue square", "blue square is left of red circle")


SOURCE = ("blue square is above red circle", "red circle is left of blue square")


STEPS = 2


KINDS = ("attn", "cross_attn", "mlp", "resid_pre", "resid_post", "embed", "text")


def direction(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def metric(output: Tensor) -> Tensor:
    """One number for each row, curved: a linear one would hide a wrong gradient of the metric."""
    return (output * direction(*output.shape[1:])).flatten(1).mean(1).tanh()


def views(dit: HookedDiT, difference: float = 1.0, latents: bool = False) -> list[Any]:
    """Two denoiser calls of two rows, the last text tokens masked; their texts differ, and their
    latents if asked for.
    """
    arguments = tiny_inputs(dit.wrapped, pads=1)
    text, x = arguments["encoder_hidden_states"], arguments["hidden_states"]

    def view(difference: float) -> Any:
        other = text + difference * direction(*text.shape)
        moved = x + difference * direction(*x.shape) if latents else x
        return dit.bind(
            moved, arguments["timestep"].double(), other, arguments["encoder_attention_mask"]
        )[0]

    return [view(0), view(difference)]


def generations(model: HookedTextToImage, **call: Any) -> list[Any]:
    with torch.no_grad():
        return [
            model.trajectory(prompts, **{"num_steps": STEPS, "seed": 3, **call})
            for prompts in (ORIGINAL, SOURCE)
        ]


def by_autograd(
    run: Callable[[], Tensor], hooks: Callable[..., Any], names: list[str]
) -> dict[str, Tensor]:
    """∂ Σ metric(run()) / ∂ each named activation, with the whole graph, as the derivative in
    something added there.
    """
    added: dict[str, Tensor] = {}

    def add(tensor: Tensor, hook: Any) -> Tensor:
        added[hook.name] = torch.zeros_like(tensor, requires_grad=True)
        return tensor + added[hook.name]

    with torch.enable_grad(), hooks([(name, add) for name in names]):
        found = torch.autograd.grad(metric(run()).sum(), [*added.values()])
    return dict(zip(added, found, strict=True))


def close(a: Any, b: Any, tolerance: float = 1e-11) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return (
        a.shape == b.shape
        and np.abs(b).max() > 1e-6
        and np.abs(a - b).max() <= tolerance * np.abs(b).max()
    )


def edge(
    original: Any, source: Any, sender: str, receiver: str, scale: Tensor | float = 1.0
) -> tuple[str, Any]:
    """The hook that adds `scale` times a sender's difference to one receiver's input, and to
    nothing else.
    """
    name, head = _tensor(sender, "hook_result")
    change = source[name] - original[name]
    change = change if head is None else change[:, :, head]
    if sender.startswith("text"):
        change = change * (torch.arange(change.shape[1]) == int(sender[5]))[:, None]
    where, to = _tensor(receiver, f"hook_{receiver[-1]}_input")

    def add(tensor: Tensor, hook: Any) -> Tensor:
        if to is None:
            return tensor + scale * change
        return tensor + scale * change[:, :, None] * (torch.arange(tensor.shape[2]) == to)[:, None]

    return where, add


def _tensor(label: str, leaf: str) -> tuple[str, int | None]:
    """Hook and head of one end of an edge."""
    kind, _, rest = label.partition(".")
    if kind.startswith("text"):
        return "hook_caption", None
    if kind in ("embed", "output"):
        return {"embed": "hook_embed", "output": "blocks.1.hook_resid_post"}[kind], None
    if kind == "mlp":
        return f"blocks.{rest[1]}." + (
            "hook_mlp_out" if leaf == "hook_result" else "hook_mlp_in"
        ), None
    return f"blocks.{rest[1]}.{kind}.{leaf}", int(rest[3])


@contextmanager
def flags(dit: HookedDiT) -> Iterator[None]:
    """With all the hooks that edges are made of."""
    setters = dit.set_use_attn_result, dit.set_use_split_qkv_input, dit.set_use_hook_mlp_in
    for setter in setters:
        setter(True)
    yield
    for setter in setters:
        setter(False)
