"""A whole text-to-image generation as a hooked model.

Text encoder → denoiser at every step → scheduler → decoder. `HookedTextToImage` has all that models
share. The two kinds of models implement the rest: `pixart.HookedPixArt` and, for any other
pipeline, `pipeline.HookedPipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..arguments import chosen_steps, diffusers_names, integer, one_of, torch_device
from ..hooks.layout import Layout
from ..hooks.module import LanguageToolGuard, NameFilter
from ..hooks.table import Axes
from ..pipelines.folder import PIXART
from ..pipelines.pipeline_model import PipelineModel
from ..text_encoders.words import EncodedText
from .attached import AttachedHook, attach, select
from .cache import KEEPS_BATCH, GenerationCache
from .cache_estimate import check_disk, check_memory, estimate_sites
from .cache_store import record_to_folder
from .capture import Heads, Patterns, Recorder, heads_by_layer
from .hooks import HookedGeneration
from .loops import Call
from .names import BRANCHES, IMAGE_HOOK, Branch, GenerationNames, Site
from .noise import Seeds
from .passes import Denoise, Pass, Rows, from_step
from .trajectory import Record, Run
from .views import StepView

Prompts = str | Sequence[str] | Int[Tensor, "batch text_pos"]
DEFAULT_STEPS = 14
DEFAULT_GUIDANCE = 4.5
"""Guidance of PixArt; other pipelines have their own."""


class HookedTextToImage(LanguageToolGuard, PipelineModel, HookedGeneration):
    """A text-to-image pipeline with a name for every tensor at every step and branch.

    Names are `steps.{s}.{cond|uncond}.{name in the denoiser}`,
    `steps.{s}.hook_{latent,out_cond,out_uncond,out,x0}` and `hook_image`; of PixArt also
    `text_encoder.…` and `null_text_encoder.…`. `hook_dict` lists them for the default step count.
    The batch axis of every tensor is the prompts. Weights are those of the modules passed in.

    Example:
        >>> images, cache = model.run_with_cache("red circle above blue square", num_steps=2)
        >>> cache[
        ...     "pattern", 2, "cross_attn", 0
        ... ].shape  # layer 2, step 0: [batch head query_pos key_pos]
        torch.Size([1, 3, 64, 6])
    """

    loop: Any
    # PixArt alone has these
    noise: Any
    encode: Any
    decode: Any
    image_size: Any
    size_conditions: Any
    prompt_texts: Any
    to_str_tokens: Any
    default_guidance: float
    """Guidance of a run by default."""
    text_keys_are_constant = False
    """True if no step changes the text's keys and values in cross-attention."""
    behind_nnsight = False
    """True if runs go through nnsight, where modules and positions of a call are out of reach."""
    enters_at_layers = False
    """True if a denoiser call can begin in the middle, from a residual stream."""

    def __new__(cls, *parts: Any, **named: Any) -> HookedTextToImage:
        """A PixArt model of its parts, as `HookedPixArt`.

        `from_pretrained` and `from_pipeline` open any pipeline.
        """
        if cls is HookedTextToImage:
            from .. import HookedPixArt  # looked up in the table of public names

            return super().__new__(HookedPixArt)
        return super().__new__(cls)

    def __init__(self, *parts: Any) -> None:
        super().__init__()

    @classmethod
    def from_pipeline(cls, pipe: Any) -> Any:
        """Around a live pipeline; its modules are used, not copied, and put into evaluation mode.

        Their weights no longer require gradients, so that a run builds no graph:
        `model.requires_grad_(True)` to train them.

        Returns:
            A `HookedPixArt` of PixArt-α's and PixArt-Σ's pipelines; of any other, a
            `HookedPipeline`, which runs its own loop.

        Raises:
            ValueError: a part is spread over several devices, or the transformer is of no known
                family.
            TypeError: the pipeline has no loop of denoiser calls that can be followed.
        """
        from .. import HookedPipeline, HookedPixArt  # looked up in the table of public names

        return (HookedPixArt if type(pipe).__name__ in PIXART else HookedPipeline).from_pipeline(
            pipe
        )

    def check_wrapped(self) -> None:
        """Raise ValueError if a wrapped module was changed so that this model would ignore it."""

    @property
    def cfg(self) -> Any:
        """The denoiser's configuration."""
        return self.dit.cfg

    @property
    def hook_dict(self) -> GenerationNames:
        """Every hook name of a generation of the default length, in order.

        Values carry the name, step and branch.
        """
        return self.names

    @property
    def mod_dict(self) -> GenerationNames:
        """As `hook_dict`; aliases resolve too."""
        return self.names

    # Left to the kinds of models

    def draft(
        self,
        prompts: Any,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The inputs of a run whose text may not be encoded yet: enough to know its computations.

        Arguments as in `forward`.
        """
        raise NotImplementedError

    def encoded(self, inputs: Any) -> Any:
        """Inputs with their text encoded, through the hooks on the text encoder."""
        raise NotImplementedError

    def reseeded(self, inputs: Any, seeds: Sequence[int]) -> Any:
        """Inputs with the noise of other seeds, one each row."""
        raise NotImplementedError

    def between(self, inputs: Any, others: Any, alpha: float) -> Any:
        """Inputs whose text lies at `inputs` + alpha · (`others` − `inputs`)."""
        raise NotImplementedError

    def same_length(self, inputs: Any, others: Any) -> tuple[Any, Any]:
        """Both inputs with texts of one length.

        Raises:
            ValueError: that cannot be.
        """
        raise NotImplementedError

    def opened(self, text: Any) -> Any:
        """The text of a denoiser call, as a beginning of a graph that gradients reach."""
        raise NotImplementedError

    def layout(self, prompts: Any, branch: Branch = "cond") -> Layout:
        """Image grid, and the positions that hold text, in rows of one guidance branch.

        They are those of runs of some prompts or inputs.

        Raises:
            ValueError: such runs have no unconditional branch.
        """
        raise NotImplementedError

    def texts_read(self, prompts: Sequence[str], branch: Branch = "cond") -> list[str]:
        """The text that a guidance branch reads in each prompt's run."""
        raise NotImplementedError

    def encoded_texts(
        self, prompts: str | Sequence[str], length: int | None = None, **options: Any
    ) -> list[EncodedText]:
        """Each prompt with one entry for each text position, by whose characters words are found.

        Args:
            prompts: one prompt or several.
            length: of PixArt's text, by default that of the longest prompt.
            options: of a pipeline's call, such as `max_sequence_length`.
        """
        raise NotImplementedError

    def axes(self, site: Site) -> Axes:
        """Names of the axes of a tensor."""
        return self.names.module(site.part).axes(site.inner)

    def shape(self, inputs: Any, site: Site) -> tuple[int, ...]:
        """The shape of a tensor in a run, from arithmetic alone."""
        raise NotImplementedError

    def denoise(self, latents: Tensor, timestep: Any, text: Any) -> Tensor:
        """One call of the denoiser."""
        raise NotImplementedError

    def pixels(self, run: Run) -> Float[Tensor, "batch 3 height width"]:
        """The images of a finished run, through no hook."""
        raise NotImplementedError

    # Running

    @diffusers_names
    def forward(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Float[Tensor, "batch ..."] | None = None,
        **options: Any,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images in [0, 1]. Gradients follow torch's grad mode.

        Args:
            prompts: one prompt, several, or (PixArt) token ids.
            seed: an int gives every prompt the same noise (a paired design), a sequence one seed
                each; see `seeded_noise`.
            num_steps: denoising steps; solvers that evaluate more often have more.
            guidance: classifier-free guidance; at 1 or below no unconditional branch is run. By
                default `default_guidance`. In a model that is distilled with guidance, the number
                that it is given.
            latents: initial noise, instead of `seed`.
            options: further arguments of a pipeline's own call, such as `height` and
                `negative_prompt`; PixArt has none.
        """
        return self.trajectory(prompts, seed, num_steps, guidance, latents, **options).images

    @diffusers_names
    def trajectory(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Float[Tensor, "batch ..."] | None = None,
        until: int | None = None,
        **options: Any,
    ) -> Run:
        """A generation with its record, so that it can be forked. Arguments as in `forward`.

        `until` stops before that step: the run then has no images, but can be forked up to there.
        """
        inputs = self.prepare(prompts, seed, num_steps, guidance, latents, **options)
        until = None if until is None else integer("until", until, 0, len(inputs.solver))
        return self.run(inputs, until=until)

    def prepare(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Everything that a generation is computed from: text encoded, noise drawn, hooks checked.

        Arguments as in `forward`.
        """
        inputs = self.draft(prompts, seed, num_steps, guidance, latents, **options)
        self.check_hooks(inputs.extent)
        return self.encoded(inputs)

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
        """The generation of `inputs`, with the hooks that are attached to the model.

        Args:
            inputs: of `draft` or a run: conditions, noise and scheduler.
            record: of an earlier run of these inputs, of which the steps before `leave` are taken.
            leave: first step that is computed.
            until: the step to stop before.
            rows: step → the rows that are computed there, in place of all from `leave` on; others
                are taken from `record`.
            denoise: replaces the denoiser call; see `passes.Pass`.
            after: called after each step; see `passes.Pass`.
        """
        hooks = self.attached
        clean = not (hooks or denoise or self.has_hooks_inside) and (record is None or record.clean)
        leaving = rows or (from_step(leave) if leave else lambda step: None)
        visitor = Pass(self, inputs, hooks, record, leaving, denoise, after)
        latent = self.loop(inputs, visitor, len(inputs.solver) if until is None else until)
        images = tuple(
            select(
                hooks, lambda site: site.inner == IMAGE_HOOK, lambda: [Site("sampler", IMAGE_HOOK)]
            )
        )
        return Run(self, inputs, replace(visitor.record, clean=clean), latent, images)

    def step(
        self,
        inputs: Any,
        call: Call,
        latents: Float[Tensor, "branch_batch ..."],
        timestep: Shaped[Tensor, " branch_batch"],
        text: Any,
    ) -> Float[Tensor, "branch_batch ..."]:
        """One denoiser call of a run of `inputs`, with hooks.

        The hooks are those that are attached to the model inside the denoiser at its step.

        Args:
            inputs: inputs of the run.
            call: its step, branches and rows.
            latents: as the scheduler scales them for the denoiser, of all rows of the call, branch
                after branch.
            timestep: of each row, as the denoiser takes it.
            text: encoded text of all rows, as the loop prepared it.
        """
        return Pass(self, inputs, self.attached).call(call, None, latents, timestep, text)

    def draw(self, inputs: Any) -> Float[Tensor, "batch 3 height width"]:
        """Images of a draft, with the hooks that are attached to the model."""
        self.check_hooks(inputs.extent)
        return self.run(self.encoded(inputs)).images

    def images_of(self, run: Run) -> Float[Tensor, "batch 3 height width"]:
        """The images of a finished run, through its own hooks and then those attached by now."""
        return self.seen(self.pixels(run), run.hooks)

    def seen(
        self, images: Float[Tensor, "batch 3 height width"], hooks: Sequence[AttachedHook] = ()
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images through `hook_image`, with `hooks` and then those attached by now."""
        attached = self.active_hooks(
            lambda site: site.inner == IMAGE_HOOK, lambda: [Site("sampler", IMAGE_HOOK)]
        )
        known = {id(hook.function) for hook in hooks}
        several = [*hooks, *(hook for hook in attached if id(hook.function) not in known)]
        with attach(several, self.names.module, contexts=self.contexts()):
            return self.sampler_hooks.hook_image(images)

    # Views and caches

    @diffusers_names
    def at(
        self,
        step: int,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Float[Tensor, "batch ..."] | None = None,
        *,
        branch: Branch = "cond",
        pos: Literal["image", "text", "joint"] = "image",
        returns: Literal["images", "x0", "out"] = "images",
        **options: Any,
    ) -> tuple[StepView, Int[Tensor, "batch pos"]]:
        """`(view, tokens)` for TransformerLens' tools, of generations hooked at one step.

        They are the `model` and `tokens` that the tools take. Steps before this one are computed
        once, here, for all prompts, and are a constant to gradients.

        Args:
            step: denoising step, from 0; negative ones count from the end.
            prompts: as in `forward`.
            seed: as in `forward`.
            num_steps: as in `forward`.
            guidance: as in `forward`.
            latents: as in `forward`.
            branch: the guidance branch in which hooks act.
            pos: the positions that a sweep "by position" goes over: of the image, of the text, or,
                in models whose streams hold both, all of them ("joint", the image's first). Hooks
                of a view of the text see such streams' text positions alone.
            returns: argument of metrics: the final images, or this step's x0 or guided output.
            options: as in `forward`.

        Raises:
            ValueError: the run has no such step or branch, or its scheduler forms no x0.
        """
        one_of("branch", branch, BRANCHES)
        one_of("pos", pos, ("image", "text", "joint"))
        one_of("returns", returns, ("images", "x0", "out"))
        with torch.no_grad():
            inputs = self.prepare(prompts, seed, num_steps, guidance, latents, **options)
            (step,) = chosen_steps(integer("step", step), len(inputs.solver), "step")
            if branch == "uncond" and step not in inputs.extent.uncond:
                raise ValueError(
                    f"There is no unconditional branch at step {step} of this run, with guidance "
                    f"{inputs.guidance:g}."
                )
            if returns == "x0" and not inputs.solver.forms_x0:
                raise ValueError(
                    f"{inputs.solver.name} forms no clean-image prediction that is known here: "
                    "take returns='out' or 'images'."
                )
            run = self.run(inputs, until=step)
        view = StepView(run, step, branch, pos, returns)
        return view, view.to_tokens()

    @diffusers_names
    def run_with_cache(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Float[Tensor, "batch ..."] | None = None,
        *,
        names_filter: NameFilter = None,
        steps: int | Sequence[int] | slice | None = None,
        branch: Branch | Literal["both"] = "cond",
        heads: Heads | None = None,
        patterns: Patterns = "whole",
        out: str | Path | None = None,
        device: str | torch.device | None = None,
        max_bytes: int | None = None,
        remove_batch_dim: bool = False,
        **options: Any,
    ) -> tuple[Float[Tensor, "batch 3 height width"], GenerationCache]:
        """`(images, cache)` of one generation.

        The first arguments are `forward`'s; the others select what is cached.

        Args:
            prompts: as in `forward`.
            seed: as in `forward`.
            num_steps: as in `forward`.
            guidance: as in `forward`.
            latents: as in `forward`.
            names_filter: a full name, a name in the denoiser (then at every chosen step and
                branch), a list of either, or a predicate on full names; None for everything.
            steps: denoising steps to keep, negative ones from the end; by default all.
            branch: guidance branches to keep.
            heads: of per-head tensors only these, "L2H8", (2, 8), a head of every layer, or
                several; layers without any are left out. Their patterns are computed for them
                alone.
            patterns: kept parts of patterns: all, or, computed in chunks, each query's `entropy`
                or `largest` entry [batch head query], or the attention that each key has `received`
                from all queries [batch head key].
            out: a folder, to which each step is written as it ends; the cache then reads from
                there. A call that was stopped goes on where it was when it is repeated, and one
                that had ended is not run again.
            device: where the cache is kept; where it arises unless said.
            max_bytes: refuse, before running, to cache more than this; a quarter of the free memory
                unless said.
            remove_batch_dim: not for a whole generation; there, so that who asks for it is told
                what to do.
            options: as in `forward`.

        Raises:
            CacheTooLargeError: with the estimate, and how to narrow it.
            UnknownHookError: a name does not exist; the nearest one is suggested.
            ValueError: nothing is selected, or a step lies outside of the run.
        """
        if remove_batch_dim:
            raise TypeError(KEEPS_BATCH)
        max_bytes = None if max_bytes is None else integer("max_bytes", max_bytes, 0)
        device = None if device is None else torch_device(device)
        arguments = (prompts, seed, num_steps, guidance, latents)
        draft = self.draft(*arguments, **options)
        solver, extent = draft.solver, draft.extent
        known = self.names.select(
            names_filter, steps, branch, len(solver), extent.guided, solver.forms_x0
        )
        sites = [site for site in known if extent.fires(site)]
        recorder = Recorder(
            self,
            sites,
            heads_by_layer(heads, self.cfg.n_layers, self.cfg.n_heads),
            patterns,
            device,
        )
        size = estimate_sites(recorder, lambda site: self.shape(draft, site))
        if out is not None:
            check_disk(size, out)
            with torch.no_grad():
                images = record_to_folder(recorder, out, arguments, options)
            return images, GenerationCache.load(out, self)
        check_memory(size, max_bytes, device or self.device)
        with self.hooks(recorder.hooks()):
            recorder.inputs = inputs = self.prepare(*arguments, **options)
            images = self.run(inputs).images
        return images, GenerationCache(
            recorder.take(), self, inputs.solver.noise_levels, recorder.heads
        )
