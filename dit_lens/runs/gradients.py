"""Gradients through a run, holding the graph of one denoiser call at a time.

A generation under autograd holds the graphs of all its denoiser calls. Here the loop is run once
with every prediction taken from the record, as a leaf: its graph is the scheduler's arithmetic
alone, a few tensors of the latents' size a step. Backwards, each call is run once more and its
vector-Jacobian product taken (Griewank & Walther 2008, "Evaluating Derivatives", chapter 12, with
one checkpoint a call). The result equals plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models.generation.loops import Call
from hooked_models.generation.names import IMAGE_HOOK

from .chains import LATENT, CallChain, Chain, Hooks, RunChain, hooks_between, keep_copy

Metric = Callable[[Tensor], Tensor]
"""Differentiable; from the output [batch …] to one number for each prompt [batch] (a scalar will do
for a single prompt).
"""
PROGRESS_FROM = 4
"""Steps from which a progress bar is shown."""


@dataclass(frozen=True)
class _CallBackward:
    chain: CallChain
    objective: Callable[[Tensor], Tensor]

    def pull(self, step: int, names: Sequence[str], read: Sequence[str] = ()) -> Pulled:
        """As `_RunBackward.pull`."""
        view = self.chain.view
        kept: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        with torch.enable_grad(), view.dit.hooks(_keeping(names, kept, read, values)):
            total = self.objective(view(view.to_tokens()))
        return Pulled(_gradients(total, None, kept), values)


class Pulled(NamedTuple):
    """Gradients at hooks of one step, and the tensors there.

    Example:
        >>> Pulled({"hook_out": torch.ones(1)}, {}).gradients["hook_out"]
        tensor([1.])
    """

    gradients: dict[str, Tensor]
    values: dict[str, Tensor]


class _RunBackward:
    """The scheduler's arithmetic as a graph over recorded predictions.

    Cotangents are completed step by step: `pull` is called for the last step first.

    Args:
        objective: a scalar of the chain's output.
        names: step → all hooks that `pull` will be called with.
    """

    def __init__(
        self,
        chain: RunChain,
        objective: Callable[[Tensor], Tensor],
        names: Mapping[int, Sequence[str]],
    ) -> None:
        self.chain, self.run = chain, chain.run
        self.calls: dict[int, list[tuple[Call, Tensor, Tensor, Any, Tensor]]] = {}
        self.kept: dict[str, Tensor] = {}
        self.cotangents: dict[int, Tensor] = {}
        run, model = chain.run, chain.run.model
        between = [
            name
            for several in names.values()
            for name in several
            if model.names.site(name).part == "sampler"
        ]
        seen: dict[str, Tensor] = {}
        keepers: Hooks = [(name, partial(_keep, kept=self.kept, name=name)) for name in between]
        hooks: Hooks = [*keepers, *hooks_between(chain.last, chain.read, seen, _keep)]
        none = torch.arange(0)
        with torch.enable_grad(), model.hooks(hooks):
            rows = lambda step: none if step < chain.first else None  # noqa: E731
            made = model.run(
                run.inputs, run.record, until=chain.until, rows=rows, denoise=self._answer
            )
            tensors = {**seen, LATENT: made.latent}
            if IMAGE_HOOK in chain.read:
                tensors[IMAGE_HOOK] = made.images
            total = objective(chain.combine(tensors))
        self._add(total, None)

    def _answer(self, call: Call, rows: Any, x: Tensor, timestep: Tensor, text: Any) -> Tensor:
        leaf = self.run.record.predictions[call.step, call.branches].detach().requires_grad_()
        self.calls.setdefault(call.step, []).append((call, x, timestep, text, leaf))
        return leaf

    def _add(self, of: Tensor, cotangent: Tensor | None) -> None:
        """Add a vector-Jacobian product to the cotangents of all that `of` is made from."""
        targets = [
            *(leaf for calls in self.calls.values() for *_, leaf in calls),
            *self.kept.values(),
        ]
        if not targets:
            return
        found = torch.autograd.grad(of, targets, cotangent, retain_graph=True, allow_unused=True)
        for target, gradient in zip(targets, found, strict=True):
            if gradient is not None:
                before = self.cotangents.get(id(target))
                self.cotangents[id(target)] = gradient if before is None else before + gradient

    def pull(self, step: int, names: Sequence[str], read: Sequence[str] = ()) -> Pulled:
        """∂ objective / ∂ tensor at each hook of a step, and the tensors at the hooks `read`.

        0 where a tensor has no influence. All later steps must have been pulled.
        """
        site = self.run.model.names.site
        found: dict[str, Tensor] = {}
        values = {name: self.kept[name].detach() for name in read if name in self.kept}
        for call, x, timestep, text, leaf in reversed(self.calls.pop(step)):
            gradient = self.cotangents.pop(id(leaf), None)
            here, also = (
                [n for n in several if n not in self.kept and site(n).branch in call.branches]
                for several in (names, read)
            )
            if gradient is None and not here and not also:
                continue
            cotangent = torch.zeros_like(leaf) if gradient is None else gradient
            kept: dict[str, Tensor] = {}
            hooks = _keeping(here, kept, also, values)
            at, towards_x = self._call(call, (x, timestep, text), cotangent, hooks, kept)
            found |= at
            if x.requires_grad and towards_x is not None:
                self._add(x, towards_x)
        return Pulled(found | self._written(names), values)

    def _written(self, names: Sequence[str]) -> dict[str, Tensor]:
        """∂ objective / ∂ tensor at the hooks between calls."""
        kept = {name: self.kept[name] for name in names if name in self.kept}
        zeros = {name: torch.zeros_like(x) for name, x in kept.items()}
        return {name: self.cotangents.get(id(x), zeros[name]) for name, x in kept.items()}

    def _call(
        self,
        call: Call,
        arguments: tuple[Tensor, Tensor, Any],
        cotangent: Tensor,
        hooks: Hooks,
        kept: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        run, (x, timestep, text) = self.run, arguments
        with torch.enable_grad():
            x, text = x.detach().requires_grad_(), run.model.opened(text)
            with run.model.hooks(hooks):
                prediction = run.model.step(run.inputs, call, x, timestep, text)
        found = _gradients(prediction, cotangent, {**kept, "": x})
        return found, found.pop("")


def _gradients(of: Tensor, cotangent: Tensor | None, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
    differentiable = [tensor for tensor in at.values() if tensor.requires_grad]
    found = iter(
        torch.autograd.grad(of, differentiable, cotangent, allow_unused=True)
        if differentiable
        else ()
    )
    products = {name: next(found) if tensor.requires_grad else None for name, tensor in at.items()}
    return {
        name: torch.zeros_like(at[name]) if product is None else product
        for name, product in products.items()
    }


def _keeping(
    names: Sequence[str], kept: dict[str, Tensor], read: Sequence[str], values: dict[str, Tensor]
) -> Hooks:
    """Hooks that leave tensors in `kept`, to be differentiated by, and copies in `values`.

    Those at `names`, and those at `read`.
    """
    copying = [(name, partial(keep_copy, kept=values, name=name)) for name in read]
    return [*copying, *((name, partial(_keep, kept=kept, name=name)) for name in names)]


def _keep(tensor: Tensor, hook: HookPoint, kept: dict[str, Tensor], name: str) -> Tensor:
    # a view: without guidance a prediction is hook_out itself, and each has its own gradient
    kept[name] = (
        tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
    )
    return kept[name]


def checked_metric(metric: Metric, output: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """The metric, checked.

    Raises:
        TypeError: it returns no tensor, or cannot be differentiated.
        ValueError: it does not return one number for each prompt.

    Example:
        >>> checked_metric(lambda output: output.sum(dim=1), torch.ones(2, 3))
        tensor([3., 3.])
    """
    not_differentiable = (
        "This metric cannot be differentiated: attribution needs one made of torch operations on "
        "the output, without detach, numpy or thresholds (scenes.evaluate counts objects: use it "
        "to check a patch, not to attribute)."
    )
    try:
        value = metric(output)
    except RuntimeError as error:
        if "requires grad" in str(error):  # Tensor.numpy()
            raise TypeError(not_differentiable) from error
        raise
    if not isinstance(value, Tensor):
        raise TypeError(f"The metric must return a tensor, not {type(value).__name__}.")
    if value.shape != output.shape[:1] and not (value.ndim == 0 and len(output) == 1):
        raise ValueError(
            f"The metric must return one number for each prompt, shape {tuple(output.shape[:1])}, "
            f"not {tuple(value.shape)}."
        )
    if output.requires_grad and not value.requires_grad:
        raise TypeError(not_differentiable)
    return value.reshape(len(output))


def gradients(
    chains: Sequence[tuple[Chain, float]],
    names: Mapping[int, Sequence[str]],
    metric: Metric,
    read: Mapping[int, Sequence[str]] | None = None,
) -> Iterator[tuple[int, Pulled]]:
    """(step, ∂ Σ metric / ∂ each of `names[step]`), last step first, summed over `chains`.

    The sum is weighted. With it come the weighted sums of the tensors at `read[step]`, which cost
    no further run. Each prompt's metric depends on its own row alone, so row b of a gradient is
    that of prompt b.
    """

    def total(output: Tensor) -> Tensor:
        return checked_metric(metric, output).sum()

    passes = [
        (
            _RunBackward(one, total, names)
            if isinstance(one, RunChain)
            else _CallBackward(one, total),
            weight,
        )
        for one, weight in chains
    ]
    steps = range(max(one.last_call for one, _ in chains), min(names) - 1, -1)
    quiet = len(steps) < PROGRESS_FROM
    for step in track(
        steps, "gradients", transient=True, disable=quiet, console=Console(stderr=True)
    ):
        here, also = names.get(step, ()), (read or {}).get(step, ())
        summed = Pulled({}, {})
        for one, weight in passes:
            pulled = one.pull(step, here, also)
            for sums, parts in zip(summed, pulled, strict=True):
                for name, part in parts.items():
                    sums[name] = weight * part + sums[name] if name in sums else weight * part
        if here:
            yield step, summed


def modulates(name: str) -> bool:
    """True for a denoiser's tensor that depends on no prompt."""
    return ".adaln." in name or name in ("hook_t_emb", "hook_t_mod", "hook_pos_embed")
