"""A generation as a loop over denoiser calls: any diffusers pipeline's own `__call__`.

A shallow copy of the pipeline runs, with its own scheduler and stand-ins for `encode_prompt` (hands out the text that was encoded
once, row by row), `prepare_latents` and `scheduler.step` (show the tensors between calls to a visitor) and the transformer (whose
predictions the visitor gives). No pipeline's loop is written again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .loops import Call, Visitor
from .names import Branch
from .sampling import Solver, solver_prepared
from .trajectory import Stamp


class _Stop(Exception):
    """The latents that a loop ends with, before the pipeline does."""

    def __init__(self, latent: Tensor) -> None:
        super().__init__()
        self.latent = latent


def rows_of(value: Any, index: Int[Tensor, " row"], of: int) -> Any:
    """Some rows of a tensor or list of `of` rows; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim and len(value) == of:
        return value[index.to(value.device)]
    if isinstance(value, (list, tuple)) and len(value) == of and all(isinstance(each, (Tensor, str)) for each in value):
        return type(value)(value[i] for i in index.tolist())
    if isinstance(value, dict):
        return {key: rows_of(each, index, of) for key, each in value.items()}
    return value


@dataclass(frozen=True)
class Bound:
    """The arguments of one call of a transformer, apart from its latents."""

    arguments: Mapping[str, Any]
    rows: int

    def take(self, index: Int[Tensor, " row"]) -> Bound:
        """Those of some rows."""
        return Bound({key: rows_of(value, index, self.rows) for key, value in self.arguments.items()}, len(index))

    def expanded(self) -> Bound:
        """With one row of text for each row of the latents, where a pipeline relies on broadcasting."""

        def row_each(key: str, value: Any) -> Any:
            one = isinstance(value, Tensor) and value.ndim > 1 and len(value) == 1 and key.startswith("encoder_hidden_states")
            return value.expand(self.rows, *value.shape[1:]) if one else value

        return Bound({key: row_each(key, value) for key, value in self.arguments.items()}, self.rows)


@dataclass(frozen=True)
class PipelineInputs:
    """Everything that a pipeline's generation is computed from; the counterpart of `trajectory.Inputs`."""

    pipe: Any
    prompts: tuple[str, ...]
    options: Mapping[str, Any]
    """Further arguments of the pipeline's call."""
    seeds: tuple[int, ...]
    latents: Tensor | None
    """The pipeline's own argument; None: drawn from each row's generator."""
    encoded: tuple[Any, ...] = ()
    """Results of `encode_prompt`, call by call."""
    solver: Solver | None = field(default=None, repr=False)
    branches: tuple[Branch, ...] = ("cond",)
    weights: Stamp = ()

    def __len__(self) -> int:
        """Rows."""
        return len(self.prompts)

    @property
    def guided(self) -> bool:
        return "uncond" in self.branches

    @property
    def guidance(self) -> float:
        """More than 1 if there is an unconditional branch; the number is the pipeline's own."""
        return 2.0 if self.guided else 1.0

    @property
    def num_steps(self) -> int:
        """As requested of the pipeline."""
        return int(self.options["num_inference_steps"])

    def take(self, rows: Int[Tensor, " row"]) -> PipelineInputs:
        """The inputs of some rows; rows may repeat."""
        some, of = rows.tolist(), len(self)
        encoded = tuple(
            tuple(rows_of(part, rows, of) for part in one) if isinstance(one, tuple) else rows_of(one, rows, of)
            for one in self.encoded
        )
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in some),
            options={key: rows_of(value, rows, of) for key, value in self.options.items()},
            seeds=tuple(self.seeds[row] for row in some),
            latents=None if self.latents is None else self.latents[rows.to(self.latents.device)],
            encoded=encoded,
        )


class _Transformer:
    """Stands in for the transformer of a running pipeline."""

    def __init__(self, running: Running, module: Any) -> None:
        self._running, self._module = running, module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Names the branch of the calls inside, where the pipeline does."""
        self._running.named = name if name in ("cond", "uncond") else None
        try:
            with getattr(self._module, "cache_context", lambda name: nullcontext())(name):
                yield
        finally:
            self._running.named = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(type(self._module).forward).bind(self._module, *args, **kwargs).arguments
        bound.pop("self")
        returns_dict = bound.pop("return_dict", True)
        prediction = self._running.denoise(dict(bound))
        if not returns_dict:
            return (prediction,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=prediction)


class Running:
    """One pass of a pipeline's call with its stand-ins."""

    def __init__(self, inputs: PipelineInputs, visitor: Visitor, until: int | None) -> None:
        self.inputs, self.visitor, self.until = inputs, visitor, until
        self.step, self.calls, self.encodings = 0, 0, 0
        self.named: Any = None
        self.latent: Any = None
        self.encoded: list[Any] = []
        self.solver: Solver | None = None
        self.branches: dict[Branch, None] = {}
        pipe = copy.copy(inputs.pipe)
        own = vars(pipe)
        own["scheduler"] = copy.deepcopy(inputs.pipe.scheduler)
        own["transformer"] = _Transformer(self, inputs.pipe.transformer)
        own["encode_prompt"] = self._encoding(inputs.pipe.encode_prompt)
        own["prepare_latents"] = self._preparing(pipe.prepare_latents)
        own["scheduler"].step = self._stepping(own["scheduler"].step)
        self.pipe = pipe

    def run(self, **more: Any) -> Any:
        """The pipeline's output, or the latents before step `until`."""
        inputs, call = self.inputs, type(self.inputs.pipe).__call__
        if torch.is_grad_enabled():
            call = getattr(call, "__wrapped__", call)
        arguments = {**inputs.options, **more, "generator": [torch.Generator().manual_seed(seed) for seed in inputs.seeds]}
        if inputs.latents is not None:
            arguments["latents"] = inputs.latents
        if not any(key.startswith("prompt_embeds") for key in arguments):
            arguments["prompt"] = list(inputs.prompts)
        try:
            return call(self.pipe, **arguments)
        except _Stop as stop:
            return stop.latent

    def _encoding(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            known = self.inputs.encoded
            found = known[self.encodings] if self.encodings < len(known) else encode(*args, **kwargs)
            self.encodings += 1
            self.encoded.append(found)
            return found

        return encode_prompt

    def _preparing(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            found = prepare(*args, **kwargs)
            first = found[0] if isinstance(found, tuple) else found
            self._stop_at(first)
            latent = self.visitor.latent(0, first)
            return (latent, *found[1:]) if isinstance(found, tuple) else latent

        return prepare_latents

    def _stepping(self, advance: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(advance)  # pipelines read from its signature if they may pass a generator
        def step(out: Tensor, timestep: Any, latent: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.solver is None:
                self.solver = self.inputs.solver or solver_prepared(vars(self.pipe)["scheduler"], self.inputs.num_steps)
            returns_dict = kwargs.pop("return_dict", True)
            out = self.visitor.out(self.step, latent, out)
            after = advance(out, timestep, latent, *args, **kwargs, return_dict=False)[0].to(latent.dtype)
            self.visitor.after(self.step, after)
            self.step, self.calls = self.step + 1, 0
            self._stop_at(after)
            if self.step < len(self.solver):
                after = self.visitor.latent(self.step, after)
            self.latent = after
            if not returns_dict:
                return (after,)
            from diffusers.schedulers.scheduling_utils import SchedulerOutput

            return SchedulerOutput(prev_sample=after)

        return step

    def _stop_at(self, latent: Tensor) -> None:
        if self.until is not None and self.step >= self.until:
            raise _Stop(latent)

    def denoise(self, arguments: dict[str, Any]) -> Tensor:
        """The visitor's prediction for one call."""
        x, n = arguments.pop("hidden_states", None), len(self.inputs)
        if not isinstance(x, Tensor) or len(x) not in (n, 2 * n):
            raise NotImplementedError(
                f"{type(self.inputs.pipe).__name__} gives its transformer latents that are not rows of its prompts: whole "
                "generations of it are not hooked; hooked_models.families.hook(pipe.transformer) hooks its calls."
            )
        branches: tuple[Branch, ...] = ("uncond", "cond") if len(x) == 2 * n else (self.named or ("cond", "uncond")[self.calls],)
        self.branches.update(dict.fromkeys(branches))
        self.calls += 1
        timestep = arguments.get("timestep")
        return self.visitor.denoise(Call(self.step, branches, n), x, timestep, Bound(arguments, len(x)))  # type: ignore[arg-type]


class Trial:
    """A visitor that finds out which calls a pipeline makes, by default without computing them."""

    def __init__(self, transformer: Any = None) -> None:
        self.transformer = transformer

    def latent(self, step: int, latent: Tensor) -> Tensor:
        return latent

    def denoise(self, call: Call, x: Tensor, timestep: Any, text: Any) -> Tensor:
        if self.transformer is None:
            return torch.zeros_like(x)
        return self.transformer(hidden_states=x, **text.arguments, return_dict=False)[0]

    def out(self, step: int, latent: Tensor, out: Tensor) -> Tensor:
        return out

    def after(self, step: int, latent: Tensor) -> None:
        pass


class _Answers(Trial):
    """A visitor of a finished run, whose last latents are put in the place of what the scheduler makes."""

    def __init__(self, predictions: Mapping[Any, Tensor]) -> None:
        super().__init__()
        self.predictions = predictions

    def denoise(self, call: Call, x: Tensor, timestep: Any, text: Any) -> Tensor:
        return self.predictions[call.step, call.branches]


class PipelineLoop:
    """A diffusers pipeline's own loop."""

    def __call__(self, inputs: PipelineInputs, visitor: Visitor, until: int) -> Float[Tensor, "batch ..."]:
        """The latents before step `until`, in the pipeline's own layout."""
        return Running(inputs, visitor, until).run(output_type="latent")

    @torch.no_grad()
    def prepare(self, inputs: PipelineInputs) -> PipelineInputs:
        """The inputs with text encoded, the scheduler as the pipeline prepares it, and the branches of its calls."""
        try:
            running = Running(inputs, Trial(), 1)
            running.run(output_type="latent")
        except RuntimeError:  # the prediction has another shape than the latents: one step of the transformer itself
            running = Running(inputs, Trial(inputs.pipe.transformer), 1)
            running.run(output_type="latent")
        order = ("uncond", "cond") if list(running.branches) == ["uncond", "cond"] else tuple(running.branches)
        return replace(inputs, encoded=tuple(running.encoded), solver=running.solver, branches=order)

    def decode(self, inputs: PipelineInputs, record: Any, latent: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """Images in [0, 1], by the pipeline's own decoding of the last latents."""
        running = Running(inputs, _Answers(record.predictions), None)
        scheduler, last = vars(running.pipe)["scheduler"], len(record) - 1
        step = scheduler.step

        @wraps(step)
        def answered(out: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            found = step(record.outs[running.step].to(out), timestep, sample, *args, **kwargs)
            return ((latent,) if isinstance(found, tuple) else type(found)(prev_sample=latent)) if running.step > last else found

        scheduler.step = answered
        output = running.run(output_type="pt")
        if not hasattr(output, "images"):
            raise TypeError(f"{type(inputs.pipe).__name__} draws no images: its runs have latents and caches alone.")
        return output.images
