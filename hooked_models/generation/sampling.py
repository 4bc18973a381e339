"""A diffusers scheduler as a loop uses it.

How many steps it takes, their noise levels, and its own arithmetic. Every run gets a fresh copy of
the prepared scheduler and goes through all of its steps, so its memory of earlier steps (multistep
solvers) and its noise (ancestral ones) simply happen again. Before a scheduler is used it is tried
on a few numbers with a known answer: one that does not draw, or whose rows depend on one another,
is refused by its behavior, not by its name.
"""

from __future__ import annotations

import copy
import inspect
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import integer
from ..lazy_imports import renamed

__getattr__ = renamed(
    __name__,
    {
        "Seeds": "hooked_models.generation.noise:Seeds",
        "seed_of_each": "hooked_models.generation.noise:seed_of_each",
        "seeded_noise": "hooked_models.generation.noise:seeded_noise",
    },
)


Latents = Float[Tensor, "batch channel rows columns"]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]

CHOOSE = "load the pipeline with another scheduler, such as DPMSolverMultistepScheduler"
TRIED = (2, 4, 4, 4)
"""The latents on which a scheduler is tried."""
_PREPARING = threading.Lock()
_PREPARED: OrderedDict[Any, tuple[Any, Solver]] = OrderedDict()
REMEMBERED = 32
_FILTERS = threading.Lock()
"""Filters of warnings are the process's, not a thread's."""


@dataclass(frozen=True)
class Solver:
    """A scheduler prepared for runs of `num_steps`; made by `solver_of`, which also tries it.

    A step is one evaluation of the denoiser: `len(solver)` of them, more than `num_steps` for
    solvers of higher order.
    """

    scheduler: Any
    """Prepared, never stepped."""
    num_steps: int
    """As requested of the scheduler."""
    takes: frozenset[str]
    """The optional arguments of its `step`."""
    prediction: Prediction = "epsilon"
    input_scales: tuple[float, ...] = ()
    """Per step: the factor between the latents and the denoiser's input."""
    noise_levels: tuple[tuple[float, float], ...] = ()
    """(α, σ) per step, where latent = α·x0 + σ·ε; empty if the scheduler's clean-image prediction
    is unknown.
    """
    draws: bool = False
    """True if steps draw noise, from each row's own generator."""

    def __len__(self) -> int:
        return len(self.scheduler.timesteps)

    @property
    def name(self) -> str:
        """The scheduler's class."""
        return type(self.scheduler).__name__

    @property
    def forms_x0(self) -> bool:
        """True if the scheduler is known to go on from `x0` and `out`."""
        return bool(self.noise_levels)

    @property
    def initial_scale(self) -> float | Tensor:
        """The factor between standard normal noise and the first latents."""
        return getattr(self.scheduler, "init_noise_sigma", 1.0)

    def fresh(self) -> Any:
        """A copy of the scheduler before its first step, for one pass through a loop."""
        return copy.deepcopy(self.scheduler)

    def timestep(self, step: int) -> Tensor:
        """The time that the denoiser is given at a step.

        A scalar in the scheduler's own units and dtype.
        """
        return self.scheduler.timesteps[step]

    def network_input(self, scheduler: Any, step: int, latent: Tensor) -> Tensor:
        """The latents as the denoiser reads them; call it once a step, before `advance`."""
        scale = getattr(scheduler, "scale_model_input", None)
        return latent if scale is None else scale(latent, self.timestep(step))

    def scaled(self, step: int, latent: Tensor) -> Tensor:
        """As `network_input`, of any step and without a scheduler; equal to rounding."""
        scale = self.input_scales[step]
        return latent if scale == 1.0 else latent * scale

    def advance(
        self,
        scheduler: Any,
        step: int,
        latent: Tensor,
        out: Tensor,
        generators: Sequence[torch.Generator] = (),
    ) -> Tensor:
        """The latents after a step of a `fresh` scheduler that has made all earlier steps."""
        # as pipelines pass
        arguments: dict[str, Any] = {
            "return_dict": False,
            "generator": list(generators) or None,
            "eta": 0.0,
        }
        arguments = {name: value for name, value in arguments.items() if name in self.takes}
        with _quiet():
            found = scheduler.step(out, self.timestep(step), latent, **arguments)
        after = found[0] if isinstance(found, tuple) else found.prev_sample
        return after.to(latent.dtype)

    def x0(self, step: int, latent: Tensor, out: Tensor) -> Tensor:
        """The clean image that a prediction implies at a step.

        Latents, prediction and result have one shape.
        """
        alpha, sigma = self.noise_levels[step]
        match self.prediction:
            case "epsilon":
                return (latent - sigma * out) / alpha
            case "v_prediction":
                square = _square(alpha, sigma)
                return alpha / square * latent - sigma / math.sqrt(square) * out
            case "flow_prediction":
                return latent - sigma * out
        return out

    def out(self, step: int, latent: Tensor, x0: Tensor) -> Tensor:
        """The prediction that implies a clean image: the inverse of `x0`, at least in float32."""
        alpha, sigma = self.noise_levels[step]
        wide = torch.promote_types(latent.dtype, torch.float32)
        latent, x0 = latent.to(wide), x0.to(wide)
        match self.prediction:
            case "epsilon":
                return (latent - alpha * x0) / sigma
            case "v_prediction":
                square = _square(alpha, sigma)
                return (alpha / square * latent - x0) * (math.sqrt(square) / sigma)
            case "flow_prediction":
                return (latent - x0) / sigma
        return x0


def _square(alpha: float, sigma: float) -> float:
    square = alpha**2 + sigma**2
    return 1.0 if abs(square - 1) < 1e-6 else square


def solver_of(
    scheduler: Any, num_steps: SupportsIndex, device: torch.device | str = "cpu"
) -> Solver:
    """A scheduler prepared for runs of `num_steps`, and tried.

    Remembered for as long as the scheduler stays as it is.

    Raises:
        ValueError: `num_steps` is no count, or more than the scheduler has timesteps; or the
            scheduler cannot draw here.

    Example:
        >>> from diffusers import HeunDiscreteScheduler
        >>> len(solver_of(HeunDiscreteScheduler(), 5))
        9
    """
    steps = integer("num_steps", num_steps, 1)
    state = dict(vars(scheduler))
    key = (
        id(scheduler),
        steps,
        str(device),
        *((n, id(v), getattr(v, "_version", None)) for n, v in state.items()),
    )
    with _PREPARING:
        if key not in _PREPARED:
            # `state` keeps these ids in use
            _PREPARED[key] = state, _prepared(scheduler, steps, torch.device(device))
        _PREPARED.move_to_end(key)
        while len(_PREPARED) > REMEMBERED:
            _PREPARED.popitem(last=False)
        return _PREPARED[key][1]


def _prepared(scheduler: Any, num_steps: int, device: torch.device) -> Solver:
    name = type(scheduler).__name__
    trained = scheduler.config.get("num_train_timesteps")
    if trained is not None and num_steps > trained and hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"num_steps={num_steps}: {name} has {trained} timesteps, so that steps would be the "
            "same; take fewer."
        )
    step = getattr(scheduler, "step", None)
    if step is None or not hasattr(scheduler, "set_timesteps"):
        raise ValueError(
            f"{name} has no step(output, timestep, latents), by which images are drawn: {CHOOSE}."
        )
    takes = frozenset(inspect.signature(step).parameters)
    try:
        solver = _tried(
            Solver(_with_timesteps(scheduler, num_steps, torch.device("cpu")), num_steps, takes)
        )
    except _NotUsable as error:
        raise ValueError(f"{name} cannot be used here: {error}. Please {CHOOSE}.") from None
    except Exception as error:
        reason = (
            f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:100]}"
        )
        raise ValueError(
            f"{name} cannot draw in {num_steps} steps here ({reason}). Please {CHOOSE}."
        ) from error
    return (
        solver
        if device.type == "cpu"
        else replace(solver, scheduler=_with_timesteps(scheduler, num_steps, device))
    )


def solver_prepared(scheduler: Any, num_steps: int) -> Solver:
    """A scheduler that a pipeline has prepared for a run, tried as in `solver_of`.

    Raises:
        ValueError: it cannot be repeated.
    """
    prepared = copy.deepcopy(scheduler)
    vars(prepared).pop("step", None)  # a pipeline's stand-in
    for name, value in vars(prepared).items():
        if name in ("_begin_index", "_step_index"):
            setattr(prepared, name, None)
        elif isinstance(value, Tensor):
            setattr(prepared, name, value.cpu())
    takes = frozenset(inspect.signature(prepared.step).parameters)
    try:
        return _tried(Solver(prepared, num_steps, takes))
    except _NotUsable as error:
        raise ValueError(
            f"{type(scheduler).__name__} cannot be used here: {error}. Please {CHOOSE}."
        ) from None


def _with_timesteps(scheduler: Any, num_steps: int, device: torch.device) -> Any:
    prepared = copy.deepcopy(scheduler)
    with _quiet():
        prepared.set_timesteps(num_steps, device=device)
    return prepared


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings on tensors that schedulers convert by numpy's older protocol."""
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "__array(_wrap)?__ (implementation doesn't|must) accept", DeprecationWarning
        )
        yield


# Trying a scheduler


class _NotUsable(Exception):
    """Why a scheduler cannot be used."""


def _tried(solver: Solver) -> Solver:
    """The solver with the results of a trial.

    Input scales, noise levels, and the source of its noise.

    Raises:
        _NotUsable: its rows depend on one another, on torch's global generator, or are not finite.
    """
    together, scales = _pass(solver, seeds=(1, 2), rows=(0, 1))
    alone, _ = _pass(solver, seeds=(2,), rows=(1,))
    other, _ = _pass(solver, seeds=(3, 4), rows=(0, 1))
    if together.shape != torch.Size(TRIED) or not bool(together.isfinite().all()):
        raise _NotUsable(
            "its steps do not lead to finite latents of the shape that they were given"
        )
    if not torch.allclose(together[1:], alone, rtol=1e-5, atol=1e-6):
        raise _NotUsable(
            "its noise does not come from the row's own generator, so that no run could be repeated"
        )
    solver = replace(solver, input_scales=scales, draws=not torch.equal(together, other))
    levels = _levels(solver)
    kind = solver.scheduler.config.get("prediction_type", "flow_prediction")
    if levels is None or kind not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        return solver
    known = replace(solver, noise_levels=levels, prediction=kind)
    return known if _goes_on_from_x0(known) else solver


def _pass(
    solver: Solver, seeds: Sequence[int], rows: Sequence[int], x0: Tensor | None = None
) -> tuple[Tensor, tuple[float, ...]]:
    """The last latents of random rows, by a made-up prediction.

    It is a fixed function of the latents, or implies `x0`.
    """
    noise = torch.randn(TRIED, generator=torch.Generator().manual_seed(0))[list(rows)]
    scheduler, latent, scales = solver.fresh(), noise * solver.initial_scale, []
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for step in range(len(solver)):
        x = solver.network_input(scheduler, step, latent)
        scales.append(float(x.flatten()[0] / latent.flatten()[0]))
        out = x / 2 if x0 is None else solver.out(step, latent, x0)
        latent = solver.advance(scheduler, step, latent, out, generators)
    return latent, tuple(scales)


def _levels(solver: Solver) -> tuple[tuple[float, float], ...] | None:
    """(α, σ) per step, from the scheduler's own functions; None if it has none of them."""
    scheduler, steps = solver.scheduler, range(len(solver))
    # latent = x0 + σ·ε, scaled to unit variance for the network
    if any(abs(scale - 1) > 1e-6 for scale in solver.input_scales):
        return tuple((1.0, math.sqrt(max(1 / scale**2 - 1, 0.0))) for scale in solver.input_scales)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t") and len(
        getattr(scheduler, "sigmas", ())
    ) >= len(solver):
        pairs = [scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[step]) for step in steps]
        return tuple((float(alpha), float(sigma)) for alpha, sigma in pairs)
    mix = getattr(scheduler, "add_noise", None)
    if mix is None and (flow := getattr(scheduler, "scale_noise", None)) is not None:

        def mix(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
            return flow(clean, times, noise)

    if mix is None:
        return None
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    try:
        times = [solver.timestep(step)[None] for step in steps]
        return tuple(
            (float(mix(one, zero, t).flatten()[0]), float(mix(zero, one, t).flatten()[0]))
            for t in times
        )
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError):
        # these levels are tried on numbers afterwards; a scheduler without them forms no x0
        return None


def _goes_on_from_x0(solver: Solver) -> bool:
    """True if predictions that imply one clean image at every step end at that image."""
    # the one that is defined where nothing of the clean image is left
    flow = solver.prediction == "flow_prediction"
    if any(
        not (math.isfinite(a + s) and s > 0 and (a > 0 or flow)) for a, s in solver.noise_levels
    ):
        return False
    ones = torch.ones(TRIED)
    # the rest of the noise cancels
    low, high = (_pass(solver, (1, 2), (0, 1), ones * value)[0] for value in (-0.4, 0.4))
    return bool(((high - low) / 0.8 - 1).abs().max() < 0.02)


# Noise
