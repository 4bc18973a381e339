"""Two runs that differ in their text, cut into pieces that can be repeated, and gradients through a whole generation.

A generation under autograd holds the graph of every denoising step. Here a run is a chain of segments (one a step, then the
codec) of which only the inputs are kept: latents, the solver's memory and the text. Backwards, each segment is run once more
from its inputs and its vector-Jacobian product taken, so that one step's graph is alive at a time (Griewank & Walther 2008,
"Evaluating Derivatives", chapter 12, with one checkpoint a step). The result equals plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient, capture_writer_outputs

from hooked_models import HookedDiT, Trajectory
from hooked_models.pixart.text_state import TextState
from hooked_models.generation.names import FINAL
from hooked_models.generation.sampling import SamplerState
from hooked_models.generation.views import DenoiserView

Metric = Callable[[Tensor], Tensor]
"""Differentiable; from the output [batch …] to one number for each prompt [batch] (a scalar will do for a single prompt)."""
Tensors = tuple[Tensor, ...]
LATENT = "latent"
"""What a denoising step ends with, in `chain`; no hook has it."""


@dataclass(frozen=True)
class Run:
    """A forward pass in segments: `advance(i, inputs[i])` gives `inputs[i + 1]`, and after the last segment (output,).

    `inputs[i][0]` is always the text, handed on unchanged, so that its gradient adds up over the segments.
    """

    model: Any
    """Whose `hooks` attach to every segment."""
    advance: Callable[[int, Sequence[Tensor]], Tensors]
    segments: int
    inputs: tuple[Tensors, ...]
    output: Any = None
    """[batch …]; None only before the first `replay`."""
    text_bias: Tensor | None = None

    def replay(self, start: int = 0, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]] = ()) -> Run:
        """Repeated from a segment on, without a graph; the segments before it are shared."""
        inputs = list(self.inputs[: start + 1])
        with torch.no_grad(), self.model.hooks(fwd_hooks):
            for index in range(start, self.segments):
                inputs.append(self.advance(index, inputs[-1]))
        return replace(self, inputs=tuple(inputs[:-1]), output=inputs[-1][0])

    def activations(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """What passes the hooks `names` of one segment, copied."""
        return capture_writer_outputs(_Segment(self, index, names), self.inputs[index][0], names)

    def pull_back(
        self, index: int, names: Sequence[str], objective: Callable[[Tensors], Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Gradients of `objective(outputs of the segment)` at the hooks `names`, and at the segment's inputs.

        A hook that has no influence has a gradient of 0, such an input None.
        """
        segment = _Segment(self, index, names)
        with torch.enable_grad():
            found = cache_activation_and_gradient(segment, self.inputs[index][0], objective, lambda name: True)
        at = {name: torch.zeros_like(found.activations[name]) if (g := found.gradients[name]) is None else g for name in names}
        return at, [found.gradients[point.name] for point in segment.inputs]


class _Segment(HookedRootModule):
    """One segment as the `model` of TransformerLens' `cache_activation_and_gradient`: its inputs are hook points too.

    That is what the function lacks for a chain: the gradient at the latents *and* at the solver's memory. It also lets a
    backward hook on one guidance branch fire, which autograd would otherwise prune as leading nowhere.
    """

    inputs: Any

    def __init__(self, run: Run, index: int, names: Sequence[str]) -> None:
        super().__init__()
        self.run, self.index = run, index
        self.inputs = nn.ModuleList(HookPoint() for _ in run.inputs[index])
        self.setup()
        self.hook_dict.update(dict.fromkeys(names, HookPoint()))  # the names are what is read, the points are elsewhere

    @contextmanager
    def hooks(self, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any) -> Iterator[_Segment]:
        ours = [[hook for hook in hooks if hook[0] in self.mod_dict] for hooks in (fwd_hooks, bwd_hooks)]
        others = [[hook for hook in hooks if hook[0] not in self.mod_dict] for hooks in (fwd_hooks, bwd_hooks)]
        with super().hooks(*ours, *args, **kwargs), self.run.model.hooks(*others):
            yield self

    def forward(self, _: Tensor) -> Tensors:
        stored = self.run.inputs[self.index]
        leaves = [point(tensor.detach().requires_grad_()) for point, tensor in zip(self.inputs, stored, strict=True)]
        return self.run.advance(self.index, leaves)


@dataclass(frozen=True)
class Context:
    """One denoiser call of a run: where its hooks are and what its labels are."""

    segment: int
    prefix: str
    """Of hook names, such as "steps.3.cond."."""
    coords: Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """An original run and a source run, and the denoiser calls that a question is about."""

    dit: HookedDiT = field(repr=False)
    original: Run = field(repr=False)
    source: Run = field(repr=False)
    contexts: tuple[Context, ...]

    def interpolated(self, alpha: float) -> Run:
        """The run whose inputs lie at original + α·(source − original): the text, and the latents where they differ.

        Raises:
            ValueError: the two texts differ in length, so that no run lies between them.
        """
        if not _equal(self.original.text_bias, self.source.text_bias):
            raise ValueError("Nothing lies between these runs: original and source text have different numbers of tokens.")
        ends = zip(self.original.inputs[0], self.source.inputs[0], strict=True)
        return replace(self.original, inputs=(tuple(torch.lerp(a, b, alpha) for a, b in ends),)).replay()

    def differences(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Source minus original at the hooks `names` of one segment."""
        original = self.original.activations(index, names)
        return {name: value.sub_(original[name]) for name, value in self.source.activations(index, names).items()}


def evaluate(metric: Metric, output: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """The metric, checked.

    Raises:
        TypeError: it returns no tensor, or cannot be differentiated.
        ValueError: it does not return one number for each prompt.
    """
    not_differentiable = (
        "This metric cannot be differentiated: attribution needs one made of torch operations on the output, without detach, "
        "numpy or thresholds (scenes.evaluate counts objects: use it to check a patch, not to attribute)."
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
            f"The metric must return one number for each prompt, shape {tuple(output.shape[:1])}, not {tuple(value.shape)}."
        )
    if output.requires_grad and not value.requires_grad:
        raise TypeError(not_differentiable)
    return value.reshape(len(output))


def gradients(
    runs: Sequence[tuple[Run, float]], names: Mapping[int, Sequence[str]], metric: Metric
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(segment, ∂ Σ metric / ∂ each of `names[segment]`), last segment first, as the weighted sum over `runs`.

    Each prompt's metric depends on its own row alone, so row b of a gradient is that of prompt b.
    """
    cotangents: list[list[Tensor | None]] = [[] for _ in runs]

    def last(outputs: Tensors) -> Tensor:
        return evaluate(metric, outputs[0]).sum()

    def product(vectors: list[Tensor | None], outputs: Tensors) -> Tensor:
        terms = [(vector * out).sum() for vector, out in zip(vectors, outputs, strict=True) if vector is not None]
        return torch.stack(terms).sum()

    final = runs[0][0].segments - 1
    for index in range(final, min(names) - 1, -1):
        here = names.get(index, ())
        total: dict[str, Tensor] = {}
        for which, (run, weight) in enumerate(runs):
            objective = last if index == final else partial(product, cotangents[which])
            found, cotangents[which] = run.pull_back(index, here, objective)
            total = {name: weight * g + total.get(name, 0) for name, g in found.items()}
        if here:
            yield index, total


def modulates(name: str) -> bool:
    """Whether a denoiser's tensor depends on the timestep or the position alone, so that no gradient is about it."""
    return ".adaln." in name or name in ("hook_t_emb", "hook_t_mod", "hook_pos_embed")


# Runs of a model, as segments


def pair(
    original: Trajectory | DenoiserView,
    source: Trajectory | DenoiserView,
    *,
    steps: int | Sequence[int] | None = None,
    branch: Literal["cond", "uncond", "both"] = "cond",
    returns: Literal["images", "x0", "out"] = "images",
) -> Pair:
    """Two runs of one model, row by row: `model.trajectory(prompts, seed=0)` or the view of `dit.bind(…)`, for one call.

    They differ in their text, and in their latents if their noise does. A metric sees what the view returns, or `returns`.

    Args:
        steps: the denoising steps that are asked about; all of them unless said.
        branch: and the guidance branches.
        returns: what a metric sees: the final "images" [batch 3 height width] in [0, 1] (clamped: a saturated pixel has no
            gradient), or of a single step the "x0" it predicts or the (guided) "out"; then gradients go through that step only,
            from where each of the runs stands before it.

    Raises:
        TypeError: the runs are not of one kind.
        ValueError: the runs do not fit together, or have no such step, branch or prediction.
    """
    if isinstance(original, DenoiserView) and isinstance(source, DenoiserView):
        _check(original.dit is source.dit, "model")
        _check(_equal(original.timestep, source.timestep) and _equal(original.sizes, source.sizes), "timesteps and sizes")
        _check(original.text.text.shape == source.text.text.shape and original.latents.shape == source.latents.shape, "shapes")
        one, other = (
            _run(view.dit, partial(_call, view), 1, (view.text.text, view.latents), view.text) for view in (original, source)
        )
        return Pair(original.dit, one, other, (Context(0, "", {}),))
    if not (isinstance(original, Trajectory) and isinstance(source, Trajectory)):
        raise TypeError("Pair two trajectories (model.trajectory), or two views of denoiser calls (dit.bind).")

    model, inputs = original.model, original.inputs
    _check(model is source.model, "model")
    _check(original.states[0].latent.shape == source.states[0].latent.shape, "number of prompts and size")
    _check(inputs.guidance == source.inputs.guidance, "guidance")
    _check(torch.equal(inputs.sampler.scheduler.timesteps, source.inputs.sampler.scheduler.timesteps), "timesteps")
    if not inputs.guided and branch != "cond":
        raise ValueError(f"There is no unconditional branch at guidance {inputs.guidance:g}.")
    chosen = list(range(inputs.sampler.num_steps)) if steps is None else [steps] if isinstance(steps, int) else list(steps)
    last = min(inputs.sampler.num_steps, len(original.states), len(source.states)) - 1
    if outside := [step for step in chosen if not 0 <= step <= last]:
        raise ValueError(f"steps={outside} lie outside of these runs, which have steps 0 to {last}.")
    if returns != "images" and len(chosen) != 1:
        raise ValueError(f"returns={returns!r} is what a single step predicts: say which, steps=0 to {last}.")
    if returns == "images" and last + 1 < inputs.sampler.num_steps:
        raise ValueError(f"There are no images: a trajectory was stopped before step {last}.")
    if returns == "x0" and not inputs.sampler.predicts_x0:
        raise ValueError(f"{type(model.scheduler).__name__} forms no clean-image prediction: use returns='out'.")

    first, end = (0, inputs.sampler.num_steps) if returns == "images" else (chosen[0], chosen[0])
    read = FINAL if returns == "images" else f"hook_{returns}"
    length = max(run.inputs.tokens.shape[1] for run in (original, source))
    one, other = (chain(_padded(run, length), first, end, [read], itemgetter(read)) for run in (original, source))
    branches = ("cond", "uncond") if branch == "both" else (branch,)
    contexts = tuple(Context(s - first, f"steps.{s}.{b}.", {"step": s, "branch": b}) for s in chosen for b in branches)
    return Pair(model.dit, one, other, contexts)


def _check(same: bool, what: str) -> None:
    if not same:
        raise ValueError(f"The two runs must have the same {what}.")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


def _padded(run: Trajectory, length: int) -> Trajectory:
    """The same with a longer text: as everywhere, nothing attends to pads."""
    old = run.inputs.text
    assert old.bias is not None  # a generation always has a mask
    more = length - old.text.shape[1]
    with torch.no_grad():
        text = run.model.dit.encode_text(F.pad(old.text, (0, 0, 0, more)), F.pad(old.bias, (0, more), value=-10000.0))
    return replace(run, inputs=replace(run.inputs, text=text))


def _run(model: Any, advance: Any, segments: int, inputs: Tensors, text: TextState) -> Run:
    first = tuple(tensor.detach() for tensor in inputs)
    return Run(model, advance, segments, (first,), text_bias=text.bias).replay()


def _call(view: DenoiserView, _: int, inputs: Sequence[Tensor]) -> Tensors:
    """One denoiser call."""
    text, latents = inputs
    state = view.dit.encode_text(text, view.text.bias)  # keys and values anew, so that they depend on `text`
    here = DenoiserView(view.dit, latents, view.timestep, state, view.sizes, view.pos, view.returns)
    return (here(here.to_tokens()),)


def chain(
    run: Trajectory, first: int, last: int, between: Sequence[str], output: Callable[[Mapping[str, Tensor]], Tensor]
) -> Run:
    """A generation from the state before step `first` on, as segments; the last is step `last`, or the codec after all steps.

    Args:
        between: hooks between denoiser calls at step `last` ("hook_x0"); "latent", what the step ends with; or "hook_image".
        output: what a metric sees, made of these.
    """
    start = (run.inputs.text.text, *_tensors(run.states[first]))
    advance = partial(_advance, run, first, last, tuple(between), output)
    return _run(run.model, advance, last - first + 1, start, run.inputs.text)


def _advance(
    run: Trajectory,
    first: int,
    last: int,
    between: Sequence[str],
    output: Callable[[Mapping[str, Tensor]], Tensor],
    index: int,
    inputs: Sequence[Tensor],
) -> Tensors:
    """One segment of a generation: a denoising step, or the codec after the last."""
    text, *rest = inputs
    model, step = run.model, first + index
    if step == run.inputs.sampler.num_steps:
        return (output({FINAL: model.decode(rest[0])}),)
    here = replace(run.inputs, text=model.dit.encode_text(text, run.inputs.text.bias))
    seen: dict[str, Tensor] = {}

    def see(tensor: Tensor, hook: HookPoint, name: str) -> None:
        seen[name] = tensor

    watched = [name for name in between if step == last and name != LATENT]
    with model.hooks([(f"steps.{step}.{name}", partial(see, name=name)) for name in watched]):
        state = model._step(here, _with_tensors(run.states[step], rest))
    return (output({**seen, LATENT: state.latent}),) if step == last else (text, *_tensors(state))


# What a sampler's state is made of. Of its memory, tensors of the latents' shape are earlier predictions and samples; the rest
# (sigmas, timesteps, counters) depends on no prompt.


def _leaves(state: SamplerState) -> tuple[list[Any], Any, list[int]]:
    leaves, spec = tree_flatten(dict(state.memory))
    kept = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape == state.latent.shape]
    return leaves, spec, kept


def _tensors(state: SamplerState) -> Tensors:
    leaves, _, kept = _leaves(state)
    return (state.latent, *(leaves[i] for i in kept))


def _with_tensors(template: SamplerState, tensors: Sequence[Tensor]) -> SamplerState:
    leaves, spec, kept = _leaves(template)
    for i, tensor in zip(kept, tensors[1:], strict=True):
        leaves[i] = tensor
    return SamplerState(template.step, tensors[0], tree_unflatten(leaves, spec))
