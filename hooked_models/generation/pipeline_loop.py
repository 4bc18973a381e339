"""A generation as a loop over denoiser calls: any diffusers pipeline's own `__call__`.

A shallow copy of the pipeline runs, with its own scheduler and stand-ins for `encode_prompt` (hands
out the text that was encoded once, row by row), `prepare_latents` and `scheduler.step` (show the
tensors between calls to a visitor) and the transformer (whose predictions the visitor gives). No
pipeline's loop is written again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..families.adapter import Family
from ..families.views import TIMES
from ..hooks.layout import Layout
from ..hooks.texts import text_size
from ..pipelines.weightless import has_weights_on, moved
from .loops import Call, Visitor
from .names import BRANCHES, IMAGE_HOOK, Branch
from .pipeline_inputs import Bound, PipelineInputs
from .sampling import Solver, solver_prepared


class _Stop(BaseException):  # which no pipeline reports as an error
    """The latents that a loop ends with, before the pipeline does."""

    def __init__(self, latent: Tensor) -> None:
        super().__init__()
        self.latent = latent


class _Transformer:
    """Stands in for the transformer of a running pipeline."""

    def __init__(self, running: Running, module: Any, family: Family, second: bool) -> None:
        self._running, self._module, self._family, self._second = running, module, family, second
        self._signature = inspect.signature(type(module).forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @contextmanager
    def cache_context(self, name: str, **more: Any) -> Iterator[None]:
        """Names the branch of the calls inside, where the pipeline does."""
        self._running.named = name if name in ("cond", "uncond") else None
        try:
            with getattr(self._module, "cache_context", lambda name, **more: nullcontext())(
                name, **more
            ):
                yield
        finally:
            self._running.named = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(self._module, *args, **kwargs).arguments
        bound.pop("self")
        returns_dict, family = bound.pop("return_dict", True), self._family
        before = family.before(bound)
        arguments = family.by_row(self._module, bound)
        latents = arguments.pop(family.image, None)
        listed = isinstance(latents, list)
        text = Bound(
            arguments,
            len(latents) if isinstance(latents, (Tensor, list)) else 0,
            family.image,
            listed,
            partial(family.as_called, self._module),
            before,
            self._second,
        )
        prediction: Any = self._running.denoise(torch.stack(latents) if listed else latents, text)
        if listed:
            prediction = list(prediction)
        elif before:
            prediction = torch.nn.functional.pad(prediction, (0, 0, before, 0))
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
        self.shapes: dict[str, tuple[int, ...]] = {}
        pipe = copy.copy(inputs.pipe)
        own = vars(pipe)
        own["scheduler"] = copy.deepcopy(inputs.pipe.scheduler)
        family = inputs.dit.family
        for name in filter(None, ("transformer", family.second)):
            own[name] = _Transformer(
                self, getattr(inputs.pipe, name), family, name == family.second
            )
        own["encode_prompt"] = self._encoding(pipe.encode_prompt)
        if inputs.dit.family.latents is None:
            own["prepare_latents"] = self._preparing(pipe.prepare_latents)
        own["scheduler"].step = self._stepping(own["scheduler"].step)
        self.pipe = pipe

    def quiet(self) -> Running:
        """The same, without the pipeline's progress bar."""
        self.pipe.set_progress_bar_config(disable=True)
        return self

    def run(self, **more: Any) -> Any:
        """The pipeline's output, or the latents before step `until`; it runs once."""
        try:
            return self._run(**more)
        except _Stop as stop:
            return stop.latent
        finally:  # stand-ins refer to this object, which would keep its tensors with them
            vars(vars(self.pipe)["scheduler"]).pop("step", None)
            vars(self.pipe).clear()

    def _run(self, **more: Any) -> Any:
        inputs, call = self.inputs, type(self.inputs.pipe).__call__
        if torch.is_grad_enabled():
            call = getattr(call, "__wrapped__", call)
        arguments = {
            **inputs.options,
            **inputs.drawn,
            **more,
            "generator": [torch.Generator().manual_seed(seed) for seed in inputs.seeds],
        }
        if inputs.latents is not None:
            arguments["latents"] = inputs.latents
        if inputs.dit.family.latents is not None:
            arguments["latents"] = self._preparing(self._drawn)(arguments)
        if not any(key.startswith("prompt_embeds") for key in arguments):
            arguments["prompt"] = list(inputs.prompts)
        return call(self.pipe, **arguments)

    def _drawn(self, arguments: Mapping[str, Any]) -> Tensor:
        """Noise of a pipeline that has no function for it."""
        from diffusers.utils.torch_utils import randn_tensor

        if arguments.get("latents") is not None:
            return arguments["latents"]
        pipe: Any = self.inputs.pipe
        shape = self.inputs.dit.family.latents(pipe, arguments)  # type: ignore[misc]
        how = {"device": pipe._execution_device, "dtype": pipe.transformer.dtype}
        return randn_tensor((len(self.inputs), *shape), arguments["generator"], **how)

    def _encoding(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            known, family = self.inputs.encoded, self.inputs.dit.family
            if self.encodings < len(known):
                kept = known[self.encodings]
                found = family.handed(kept)
            else:
                found = encode(*args, **kwargs)
                kept = family.kept(found)
            self.encodings += 1
            self.encoded.append(kept)
            return found

        return encode_prompt

    def _preparing(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            found = prepare(*args, **kwargs)
            first = found[0] if isinstance(found, tuple) else found
            self.shapes["hook_latent"] = tuple(first.shape)
            self._stop_at(first)
            latent = self.visitor.latent(0, first)
            return (latent, *found[1:]) if isinstance(found, tuple) else latent

        return prepare_latents

    def _stepping(self, advance: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(advance)  # pipelines read from its signature if they may pass a generator
        def step(out: Tensor, timestep: Any, latent: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.solver is None:
                self.solver = self.inputs.solver or solver_prepared(
                    vars(self.pipe)["scheduler"], self.inputs.num_steps
                )
            returns_dict = kwargs.pop("return_dict", True)
            out = self.visitor.out(self.step, latent, out)
            after = advance(out, timestep, latent, *args, **kwargs, return_dict=False)[0]
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

    def denoise(self, x: Any, text: Bound) -> Tensor:
        """The visitor's prediction for one call."""
        n = len(self.inputs)
        if not isinstance(x, Tensor) or len(x) not in (n, 2 * n):
            raise NotImplementedError(
                f"{type(self.inputs.pipe).__name__} gives its transformer latents that are not "
                "rows of its prompts: whole generations of it are not hooked; "
                "hooked_models.families.hook(pipe.transformer) hooks its calls."
            )
        together: tuple[Branch, ...] = (
            ("cond", "uncond") if self.inputs.dit.family.cond_first else ("uncond", "cond")
        )
        named = "uncond" if text.second else self.named or BRANCHES[self.calls]
        branches = together if len(x) == 2 * n else (named,)
        self.calls += 1
        call = Call(self.step, branches, n)
        timestep = next((text.arguments[name] for name in TIMES if name in text.arguments), None)
        return self.visitor.denoise(call, x, timestep, text)  # type: ignore[arg-type]


class Trial:
    """A visitor that finds out which calls a pipeline makes, without computing them.

    It predicts zeros.
    """

    def __init__(self, transformer: Any = None, channels: tuple[int, ...] | None = None) -> None:
        self.transformer, self.shape = transformer, channels
        """`transformer`: computes one prediction, for its shape."""
        self.calls: list[tuple[Call, Bound, Tensor]] = []

    def latent(self, step: int, latent: Tensor) -> Tensor:
        """Latents of a step, unchanged."""
        return latent

    def denoise(self, call: Call, x: Tensor, timestep: Any, text: Any) -> Tensor:
        """Record the call, and return zeros of the prediction's shape."""
        like = x
        self.calls.append((call, text, x))
        if self.transformer is not None and self.shape is None:
            if not has_weights_on(self.transformer):
                text, x = replace(text, arguments=moved(text.arguments, "meta")), x.to("meta")
            self.shape = text.call(self.transformer, x).shape[1:]
        return (
            torch.zeros_like(like) if self.shape is None else like.new_zeros(len(like), *self.shape)
        )

    def out(self, step: int, latent: Tensor, out: Tensor) -> Tensor:
        """Guided output of a step, unchanged."""
        return out

    def after(self, step: int, latent: Tensor) -> None:
        """End of a step; nothing to do."""
        pass


class _Answers(Trial):
    """A visitor of a finished run, with whose last latents the scheduler's are replaced."""

    def __init__(self, predictions: Mapping[Any, Tensor], shape: tuple[int, ...]) -> None:
        super().__init__(channels=shape)
        self.predictions = predictions

    def denoise(self, call: Call, x: Tensor, timestep: Any, text: Any) -> Tensor:
        known = self.predictions.get((call.step, call.branches))
        return super().denoise(call, x, timestep, text) if known is None else known


class PipelineLoop:
    """A diffusers pipeline's own loop."""

    def __call__(
        self, inputs: PipelineInputs, visitor: Visitor, until: int
    ) -> Float[Tensor, "batch ..."]:
        """The latents before step `until`, in the pipeline's own layout."""
        return Running(inputs, visitor, until).run(output_type="latent")

    @torch.no_grad()
    def prepare(self, inputs: PipelineInputs) -> PipelineInputs:
        """The inputs with text encoded, a prepared scheduler, and the calls known by step.

        The scheduler is as the pipeline prepares it.
        """
        trial = Trial()
        running = Running(inputs, trial, None).quiet()
        try:
            running.run(output_type="latent")
        except (
            RuntimeError
        ):  # the prediction has another shape than the latents: one of the transformer itself
            trial = Trial(inputs.pipe.transformer)
            running = Running(replace(inputs, encoded=tuple(running.encoded)), trial, None).quiet()
            running.run(output_type="latent")
        layouts: dict[Branch, Layout] = {}
        uncond: set[int] = set()
        texts: dict[str, tuple[int, ...]] = {}
        family = inputs.dit.family
        for call, text, x in trial.calls:
            uncond |= {call.step} if "uncond" in call.branches else set()
            if not set(call.branches) <= set(layouts):
                whole = inputs.dit.layout_of(**text.expanded().given(x))
                for branch in call.branches:
                    part = call.part(branch)
                    layouts[branch] = whole.take(torch.arange(part.start, part.stop))
                    size = text_size(text.arguments, family.text)
                    texts[f"{branch}.hook_text"] = (len(inputs), *size)
        first = [branch for call, *_ in trial.calls if call.step == 0 for branch in call.branches]
        predicted = (len(inputs), *(trial.shape or trial.calls[0][2].shape[1:]))
        shapes = running.shapes | dict.fromkeys(("hook_out_cond", "hook_out_uncond"), predicted)
        return replace(
            inputs,
            encoded=tuple(running.encoded),
            solver=running.solver,
            calls=tuple(call for call, *_ in trial.calls),
            branches=tuple(first),
            uncond=frozenset(uncond),
            layouts=layouts,
            shapes=shapes | texts | {IMAGE_HOOK: image_shape(inputs)},
        )

    def decode(
        self, inputs: PipelineInputs, record: Any, latent: Tensor
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images in [0, 1], by the pipeline's own decoding of the last latents."""
        running = Running(
            inputs, _Answers(record.predictions, inputs.shapes["hook_out_cond"][1:]), None
        ).quiet()
        scheduler, last = vars(running.pipe)["scheduler"], len(inputs.solver) - 1
        step = scheduler.step

        @wraps(step)
        def answered(out: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = record.outs[running.step].to(out) if running.step < len(record) else out
            found = step(out, timestep, sample, *args, **kwargs)
            return (
                ((latent,) if isinstance(found, tuple) else type(found)(prev_sample=latent))
                if running.step > last
                else found
            )

        scheduler.step = answered
        output = running.run(output_type="pt")
        return next(iter(output.values()))  # images, frames, …, in pipelines' own words


def image_shape(inputs: PipelineInputs) -> tuple[int, ...]:
    """Shape of the images, from the pipeline's arguments and its default size."""
    pipe = inputs.pipe
    known = inspect.signature(type(pipe).__call__).parameters
    default = getattr(pipe, "default_sample_size", 0) * getattr(pipe, "vae_scale_factor", 0)
    asked = (
        int(inputs.options.get(side) or known[side].default or default)
        for side in ("height", "width")
    )
    sides = inputs.dit.family.sides(pipe, *asked)
    frames = inputs.options.get("num_frames")
    return (len(inputs), *([] if frames is None else [int(frames)]), 3, *sides)
