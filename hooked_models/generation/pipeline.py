"""Any diffusers text-to-image pipeline with a transformer as a hooked model, through the pipeline's own loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import families
from ..hooks.module import NameFilter, NoLanguageModel
from ..hooks.wrapping import stamp
from ..pipelines.pipeline_model import PipelineModel
from ..text_encoders.words import EncodedText
from .cache import GenerationCache
from .capture import Recorder
from .hooks import Attached, HookedGeneration, SamplerHooks, attach, select
from .loops import Call
from .names import FINAL, Branch, GenerationNames, Site
from .passes import Denoise, Pass, Rows, from_step
from .pipeline_loop import Bound, PipelineInputs, PipelineLoop
from .sampling import Seeds, seed_of_each
from .text_positions import encoded_at_positions
from .trajectory import Record, Run

DEFAULT_STEPS = 14


class HookedPipeline(NoLanguageModel, PipelineModel, HookedGeneration):
    """A diffusers pipeline whose denoiser is of a known family, hooked by step and branch as `HookedTextToImage`.

    Names are `steps.{s}.{cond|uncond}.{name in the denoiser}`, `steps.{s}.hook_{latent,out_cond,out_uncond,out,x0}` and
    `hook_image`. Latents have the pipeline's own layout. Made by `HookedTextToImage.from_pipeline`.
    """

    pipe: Any

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.__dict__["pipe"] = pipe
        self.dit = families.hook(pipe.transformer)
        self.text_encoder, self.codec = None, getattr(pipe, "vae", None)
        self.sampler_hooks = SamplerHooks()
        self.names = GenerationNames(self.dit, self.sampler_hooks, None, lambda: DEFAULT_STEPS)
        self.loop = PipelineLoop()
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    @classmethod
    def from_pipeline(cls, pipe: Any) -> HookedPipeline:
        """Around a live pipeline; its modules are used, not copied, and no longer require gradients.

        Raises:
            ValueError: its transformer is of no known family; the message names those that are.
            TypeError: it has no transformer, or no loop of denoiser calls that can be followed.
        """
        for needed in ("transformer", "scheduler", "prepare_latents", "encode_prompt"):
            if getattr(pipe, needed, None) is None:
                raise TypeError(
                    f"{type(pipe).__name__} has no {needed}: HookedTextToImage takes PixArt and others that draw by one."
                )
        return cls(pipe)

    @property
    def cfg(self) -> Any:
        """The denoiser's configuration."""
        return self.dit.cfg

    @property
    def scheduler(self) -> Any:
        """The pipeline's."""
        return self.pipe.scheduler

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return torch.device(self.pipe._execution_device)

    @property
    def hook_dict(self) -> GenerationNames:
        """Every hook name of a generation of the default length, in order."""
        return self.names

    mod_dict = hook_dict

    def check_wrapped(self) -> None:
        """Nothing: the pipeline's own modules run, with whatever was changed in them."""

    def forward(self, prompts: str | Sequence[str], seed: Seeds = 0, num_steps: int = DEFAULT_STEPS, **options: Any) -> Tensor:
        """Images [batch 3 height width] in [0, 1].

        Args:
            seed: of each prompt's generator, from which the pipeline draws its noise; an int is that of every prompt.
            options: further arguments of the pipeline's call, such as `guidance_scale` and `height`, or `guidance`, the main one
                of its guidance arguments.
        """
        return self.trajectory(prompts, seed, num_steps, **options).images

    def trajectory(
        self,
        prompts: str | Sequence[str],
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        *,
        until: int | None = None,
        **options: Any,
    ) -> Run:
        """A generation with its record, so that it can be forked. Arguments as in `forward`; `until` stops before that step."""
        return self.run(self.prepare(prompts, seed, num_steps, **options), until=until)

    def prepare(
        self, prompts: str | Sequence[str], seed: Seeds = 0, num_steps: int = DEFAULT_STEPS, **options: Any
    ) -> PipelineInputs:
        """Everything that a generation is computed from: text encoded, hooks checked, the calls of a step known."""
        inputs = self.loop.prepare(self._inputs(prompts, seed, num_steps, options))
        self.check_hooks(num_steps, inputs.guidance, solver=inputs.solver)
        return inputs

    def _inputs(self, prompts: str | Sequence[str], seed: Seeds, num_steps: int, options: dict[str, Any]) -> PipelineInputs:
        """The inputs of a run, before anything is encoded."""
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        known = inspect.signature(type(self.pipe).__call__).parameters
        if "guidance" in options:
            name = next((name for name in ("guidance_scale", "true_cfg_scale") if name in known), None)
            if name is None:
                raise ValueError(f"{type(self.pipe).__name__} takes no guidance.")
            options[name] = options.pop("guidance")
        if unknown := [name for name in options if name not in known]:
            raise ValueError(f"{type(self.pipe).__name__} has no argument {unknown[0]!r}.")
        latents = options.pop("latents", None)
        options["num_inference_steps"] = num_steps
        seeds = tuple(seed_of_each(seed, len(texts)))
        return PipelineInputs(self.pipe, texts, options, seeds, latents, weights=stamp(self.dit))

    def encoded_texts(self, prompts: str | Sequence[str], length: int | None = None, **options: Any) -> list[EncodedText]:
        """Each prompt with one entry for each text position of the denoiser: which of its characters stand there.

        Args:
            length: not used here; the pipeline decides it.
            options: of the run's call, such as `max_sequence_length`.

        Raises:
            ValueError: the pipeline changes a prompt's words before it encodes them.
        """
        inputs = self._inputs(prompts, 0, 1, options)
        return encoded_at_positions(inputs, self.dit.family.text)

    def run(
        self,
        inputs: Any,
        record: Record | None = None,
        leave: int = 0,
        until: int | None = None,
        *,
        rows: Callable[[int], Rows] | None = None,
        denoise: Denoise | None = None,
        after: Callable[[int, Record, Tensor], None] | None = None,
    ) -> Run:
        """As `HookedTextToImage.run`."""
        hooks = self.attached
        leaving = rows or (from_step(leave) if leave else lambda step: None)
        visitor = Pass(self, inputs, hooks, record, leaving, denoise, after)
        latent = self.loop(inputs, visitor, len(inputs.solver) if until is None else until)
        images = tuple(select(hooks, lambda site: site.inner == FINAL, lambda: [Site("sampler", FINAL)]))
        return Run(self, inputs, visitor.record, latent, images)

    def denoise(self, latents: Tensor, timestep: Any, text: Bound) -> Tensor:
        """One call of the denoiser, with the other arguments that the pipeline gave it."""
        text = text.expanded() if self.hooked_inside else text  # hooks are given a row for each prompt
        return self.dit(hidden_states=latents, **text.arguments, return_dict=False)[0]

    def step(self, inputs: Any, call: Call, latents: Tensor, timestep: Any, text: Bound) -> Tensor:
        """One denoiser call of a run of `inputs`, with the hooks that are attached to the model at its step."""
        return Pass(self, inputs, self.attached).call(call, None, latents, timestep, text)  # type: ignore[arg-type]

    def images_of(self, run: Run) -> Float[Tensor, "batch 3 height width"]:
        """The images of a finished run, through `hook_image`."""
        image = self.loop.decode(run.inputs, run.record, run.latent)  # type: ignore[arg-type]
        attached = self.firing(lambda site: site.inner == FINAL, lambda: [Site("sampler", FINAL)])
        known = {id(hook.function) for hook in run.hooks}
        hooks: list[Attached] = [*run.hooks, *(hook for hook in attached if id(hook.function) not in known)]
        with attach(hooks, self.names.module, contexts=self.contexts()):
            return self.sampler_hooks.hook_image(image)

    def run_with_cache(
        self,
        prompts: str | Sequence[str],
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        *,
        names_filter: NameFilter = None,
        steps: int | Sequence[int] | slice | None = None,
        branch: Branch | Literal["both"] = "cond",
        device: str | torch.device | None = None,
        **options: Any,
    ) -> tuple[Tensor, GenerationCache]:
        """`(images, cache)` of one generation. Arguments as in `forward`, the others as in `HookedTextToImage.run_with_cache`."""
        inputs = self.prepare(prompts, seed, num_steps, **options)
        solver: Any = inputs.solver
        sites = self.names.select(names_filter, steps, branch, len(solver), inputs.guided, solver.forms_x0)
        recorder = Recorder(self, sites, device=device)
        with self.hooks(recorder.hooks()):
            images = self.run(inputs).images
        return images, GenerationCache(recorder.take(), self, solver.noise_levels)
