"""Oracles of the tools: plain hooks, written here by hand, on the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedDiT
from hooked_models.pixart.cache import DiTCache

TIMESTEP = 437.0
ROWS = 6
"""Pairs of a clean and a corrupted input."""

TESTS = pytest.StashKey[list[pytest.Item]]()
"""Every test of this folder, those included that a run leaves out."""


def tool(
    name: str, on: str, verdict: str = "exact", *, check: str, note: str = ""
) -> pytest.MarkDecorator:
    """Says what a test establishes: which tool, on which models (of `table.MODELS`), how it fares,
    and against what.
    """
    return pytest.mark.tool(name, on=on.split(), verdict=verdict, check=check, note=note)


def equal(actual: Any, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def per_example(out: Tensor) -> Tensor:
    return (out + out.pow(2)).flatten(1).mean(1)


def metric(out: Tensor) -> Tensor:
    return per_example(out).mean()


@dataclass(frozen=True)
class Bound:
    """A view of some inputs, and the same inputs as the model itself takes them."""

    dit: HookedDiT
    view: Any
    tokens: Tensor
    call: dict[str, Any]

    @property
    def clean(self) -> Tensor:
        return self.tokens[:ROWS]

    @property
    def corrupted(self) -> Tensor:
        return self.tokens[ROWS:]

    @cached_property
    def clean_cache(self) -> DiTCache:
        with torch.no_grad():
            return self.view.run_with_cache(self.clean)[1]

    @cached_property
    def corrupted_cache(self) -> DiTCache:
        with torch.no_grad():
            return self.view.run_with_cache(self.corrupted)[1]

    def plain(self, rows: slice = slice(ROWS, None), hooks: Any = ()) -> Tensor:
        """The model itself on the corrupted rows (or others), with plain hooks; no view, no text
        computed in advance.
        """
        call = {name: None if value is None else value[rows] for name, value in self.call.items()}
        out = self.dit.run_with_hooks(**call, fwd_hooks=list(hooks), return_dict=False)[0]
        return self.dit.patches(out) if self.view.returns == "patches" else out

    def patched(self, name: str, index: tuple[Any, ...]) -> Tensor:
        """The corrupted rows with `tensor[index]` of one hook taken from the clean ones, cached
        without a view.
        """
        return self.plain(hooks=[(name, writes(self.plain_cache[name], index))])

    @cached_property
    def plain_cache(self) -> dict[str, Tensor]:
        """The clean rows' activations."""
        call = {name: None if value is None else value[:ROWS] for name, value in self.call.items()}
        with torch.no_grad():
            return dict(self.dit.run_with_cache(**call)[1].cache_dict)


def writes(value: Tensor, index: tuple[Any, ...]) -> Callable[..., Tensor]:
    """A hook that writes `value[index]`, in a copy."""

    def hook(tensor: Tensor, hook: Any) -> Tensor:
        changed = tensor.clone()
        changed[index] = value[index]
        return changed

    return hook


def bind(dit: HookedDiT, **options: Any) -> Bound:
    """Inputs that differ in latents, text and mask."""
    generator = torch.Generator().manual_seed(5)
    rows = 2 * ROWS
    latents = torch.randn(rows, 4, 4, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(rows, 3, dit.cfg.d_text, generator=generator, dtype=torch.float64)
    mask = torch.ones(rows, 3, dtype=torch.long)
    mask[1::2, -1] = 0
    view, tokens = dit.bind(latents, TIMESTEP, text, mask, **options)
    times = torch.full((rows,), TIMESTEP, dtype=torch.float64)
    call = {
        "hidden_states": latents,
        "timestep": times,
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
    }
    return Bound(dit, view, tokens, call)


def nudged(run: Callable[[list[Any]], Tensor], name: str, like: Tensor) -> Tensor:
    """d metric / d tensor at a hook, by autograd: the derivative by something added there."""
    nudge = torch.zeros_like(like).requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(
            metric(run([(name, lambda tensor, hook: tensor + nudge)])), nudge
        )[0]
