"""A whole text-to-image generation as a hooked model: text encoder → denoiser at every step → scheduler → codec.

Source of the arithmetic: `PixArtSigmaPipeline.__call__` (diffusers 0.42), which images are equal to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import T5EncoderModel

from ..arguments import (
    chosen_steps,
    diffusers_names,
    initial_latents,
    integer,
    is_several,
    number,
    one_of,
    shown,
    token_ids,
    torch_device,
)
from ..fast import empty_prompts
from ..hooks.module import HookedModule, NameFilter, NoLanguageModel
from ..hooks.wrapping import stamp
from ..pipelines.pipeline_model import PipelineModel
from ..pipelines.resolution import nearest_resolution
from ..pixart.config import DiTConfig
from ..pixart.dit import HookedDiT
from ..pixart.text_state import TextState
from ..text_encoders.random_tokens import PAD_ID, HookedTokenEncoder, RandomTokenEncoder
from ..text_encoders.t5 import HookedT5Encoder
from ..text_encoders.words import EncodedText, encode_text
from .cache import KEEPS_BATCH, GenerationCache, estimate_recorded, refuse_if_does_not_fit, refuse_if_too_large
from .cache_store import record_to_folder
from .capture import Heads, Patterns, Recorder, heads_by_layer
from .hooks import Attached, HookedGeneration, SamplerHooks, attach, select
from .loops import Call, PixArtLoop
from .names import BRANCHES, FINAL, Branch, GenerationNames, Part, Site
from .passes import Denoise, Pass, Rows, from_step
from .pipeline import HookedPipeline
from .sampling import Seeds, seed_of_each, seeded_noise
from .trajectory import Inputs, Record, Run
from .views import StepView

Prompts = str | Sequence[str] | Int[Tensor, "batch text_pos"]
DEFAULT_STEPS = 14
_TOKENIZING = threading.Lock()
"""A tokenizer keeps its padding as state while it works."""
DEFAULT_GUIDANCE = 4.5
LONGEST_TEXT, LARGEST_SIDE = 2**16, 2**14
"""Tokens of a padded prompt, and pixels of an image's side."""


def hooked_encoder(encoder: nn.Module) -> nn.Module:
    """Around a T5 or a random-token encoder; any other (and one that is hooked already) is returned as it is."""
    if isinstance(encoder, RandomTokenEncoder):
        return HookedTokenEncoder(encoder)
    return HookedT5Encoder(encoder) if isinstance(encoder, T5EncoderModel) else encoder


class HookedTextToImage(NoLanguageModel, PipelineModel, HookedGeneration):
    """A PixArt pipeline whose every tensor has a name at every denoising step and guidance branch.

    Names are `text_encoder.…`, `null_text_encoder.…`, `steps.{s}.{cond|uncond}.{name in the denoiser}`,
    `steps.{s}.hook_{latent,out_cond,out_uncond,out,x0}` and `hook_image`; `hook_dict` lists them for the default step count.
    The batch axis of every tensor is the prompts. Weights are those of the modules passed in.

    Text is as long as the batch's longest prompt (pads carry exactly no attention), unless tokens of another length are given.
    """

    allow_unknown_words = False
    """Let the text encoder read words outside of its vocabulary, as <unk>; by default they are an error."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module, tokenizer: Any, codec: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.dit = transformer if isinstance(transformer, HookedDiT) else HookedDiT(transformer)
        empty_prompts.skip(self.dit)
        self.text_encoder = hooked_encoder(text_encoder)
        self.check_wrapped()
        self.codec = codec
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.sampler_hooks = SamplerHooks()
        with_hooks = self.text_encoder if isinstance(self.text_encoder, HookedModule) else None
        self.names = GenerationNames(self.dit, self.sampler_hooks, with_hooks, lambda: self.count_steps(DEFAULT_STEPS))
        self.loop = PixArtLoop(self.dit.cfg.in_channels)
        # No setup(): it would rename the hook points of the models inside.

    @classmethod
    def from_pipeline(cls, pipe: Any) -> Any:
        """Around a live pipeline; its modules are used, not copied, and put into evaluation mode.

        Their weights no longer require gradients, so that a run builds no graph: `model.requires_grad_(True)` to train them.

        Returns:
            A `HookedTextToImage` of PixArt-α's and PixArt-Σ's pipelines; of any other, a `generation.pipeline.HookedPipeline`,
            which runs its own loop.

        Raises:
            ValueError: a part is spread over several devices, or the transformer is of no known family.
            TypeError: the pipeline has no loop of denoiser calls that can be followed.
        """
        if not isinstance(pipe, (PixArtAlphaPipeline, PixArtSigmaPipeline)):
            return HookedPipeline.from_pipeline(pipe)
        for name, part in (("transformer", pipe.transformer), ("text_encoder", pipe.text_encoder)):
            if len(devices := {str(p.device) for p in part.parameters()}) > 1:
                raise ValueError(
                    f"The {name} is spread over {', '.join(sorted(devices))}; hooked, it must be on one device: load it without "
                    "offloading or device map, then use enable_cpu_offload()."
                )
        model = cls(pipe.transformer, pipe.text_encoder, pipe.tokenizer, pipe.vae, pipe.scheduler).eval()
        model.pipeline_class = type(pipe)
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
            part.requires_grad_(False)
        return model

    def check_wrapped(self) -> None:
        """Raise ValueError if a wrapped module was changed in a way that this model would ignore."""
        self.dit.wrapping.check()
        if isinstance(self.text_encoder, HookedT5Encoder):
            self.text_encoder.wrapping.check()

    # What the model is

    @property
    def cfg(self) -> DiTConfig:
        """The denoiser's configuration."""
        return self.dit.cfg

    @property
    def hook_dict(self) -> GenerationNames:
        """Every hook name of a generation of the default length, in order; values carry the name, step and branch."""
        return self.names

    @property
    def mod_dict(self) -> GenerationNames:
        """As `hook_dict`; aliases resolve too."""
        return self.names

    # Text

    def prompt_texts(self, prompts: str | Sequence[str]) -> list[str]:
        """The texts that are tokenised: prompts in lower case, as diffusers does it.

        With `clean_caption` they are cleaned as diffusers does (addresses, HTML, quotation marks, brackets, …).

        Raises:
            ValueError: there is no prompt, or one is no string.
            ImportError: `clean_caption` lacks its libraries, where diffusers would go on without cleaning.

        Example:
            >>> HookedTextToImage.from_pretrained("rte-micro", weights=False).prompt_texts(" Red circle")
            ['red circle']
        """
        if isinstance(prompts, Mapping) or not (isinstance(prompts, str) or is_several(prompts)):
            raise ValueError(f"prompts={shown(prompts)}: give a string or several, or token ids as one tensor.")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("prompts is empty: give at least one prompt.")
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(f"prompts holds {shown(wrong[0])}, which is no string: give strings, or token ids as one tensor.")
        texts = [prompt.lower().strip() for prompt in prompts]
        if self.clean_caption:
            if not (is_bs4_available() and is_ftfy_available()):
                raise ImportError("clean_caption=True needs two more packages: pip install beautifulsoup4 ftfy")
            texts = self.as_diffusers()._text_preprocessing(texts, clean_caption=True)
        return texts

    def to_tokens(self, prompts: str | Sequence[str], length: int | None = None) -> Int[Tensor, "batch text_pos"]:
        """Tokenize `prompt_texts(prompts)`: ids with EOS, padded to the longest prompt or to `length`.

        Raises:
            ValueError: a prompt is too long, or has a word outside of the encoder's vocabulary (which the message names;
                `model.allow_unknown_words = True` lets a T5 read it as <unk>).

        Example:
            >>> model = HookedTextToImage.from_pretrained("rte-micro", weights=False)
            >>> model.to_tokens(["red circle", "circle"]).shape
            torch.Size([2, 3])
        """
        texts = self.prompt_texts(prompts)
        length = None if length is None else integer("length", length, 1, LONGEST_TEXT)
        with _TOKENIZING:
            padding = "longest" if length is None else "max_length"
            tokens = self.tokenizer(texts, padding=padding, max_length=length, return_tensors="pt")
        ids = tokens.input_ids
        limit = length or self.max_sequence_length
        if ids.shape[1] > limit:
            raise ValueError(f"A prompt has {ids.shape[1]} tokens, but {limit} is the longest that this model reads: shorten it.")
        if self.tokenizer.unk_token_id in ids.unique().tolist():
            self._check_known(texts)
        return ids if self.device.type == "meta" else ids.to(self.device)  # without weights, tokens keep their values

    def _check_known(self, texts: Sequence[str]) -> None:
        """Raise ValueError that names the words outside of the vocabulary, unless they are allowed."""
        unknown = {text: words for text in texts if (words := encode_text(self.tokenizer, text).unknown_words)}
        words = list(dict.fromkeys(word for found in unknown.values() for word in found))
        if not words:  # CLIP's <unk> is its EOS
            return
        if isinstance(self.text_encoder, HookedTokenEncoder):
            raise ValueError(self.text_encoder.wrapped.no_vector_for(words))
        if not self.allow_unknown_words:
            raise ValueError(
                f"The text encoder does not know {', '.join(map(repr, words))} in {next(iter(unknown))!r} and would read <unk>: "
                "use other words, or set model.allow_unknown_words = True."
            )

    def encoded_texts(self, prompts: str | Sequence[str], length: int | None = None) -> list[EncodedText]:
        """Each prompt as it is tokenised, with character offsets, padded to the longest or to `length`.

        Example:
            >>> model = HookedTextToImage.from_pretrained("rte-micro", weights=False)
            >>> model.encoded_texts("red circle")[0].spans
            [(0, 3), (4, 10), (0, 0)]
        """
        length = self.to_tokens(prompts).shape[1] if length is None else length
        return [encode_text(self.tokenizer, text, length) for text in self.prompt_texts(prompts)]

    def to_str_tokens(self, prompt: str | Int[Tensor, " text_pos"]) -> list[str]:
        """The tokens of one prompt as strings."""
        ids = self.to_tokens(prompt)[0] if isinstance(prompt, str) else prompt
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(ids.tolist())]

    def _token_ids(self, tokens: Tensor) -> Tensor:
        return token_ids(tokens, getattr(getattr(self.text_encoder, "cfg", None), "d_vocab", len(self.tokenizer)))

    def _initial(self, latents: Any, batch: int) -> Tensor:
        return initial_latents(latents, batch, self.cfg.in_channels, self.cfg.patch_size)

    def encode(self, tokens: Int[Tensor, "batch text_pos"], guidance: float = DEFAULT_GUIDANCE) -> TextState:
        """Text features, captions, keys and values, computed once for all steps; with guidance for rows [uncond; cond].

        Example:
            >>> model = HookedTextToImage.from_pretrained("rte-nano")
            >>> model.encode(model.to_tokens("red circle above blue square"), guidance=1.0).text.shape[0]
            1
        """
        self._use("text_encoder")
        tokens = tokens.to(self.text_encoder.device)
        mask = (tokens != PAD_ID).long()
        with attach(self._firing_in("text_encoder"), self.names.module, contexts=self.contexts()):
            cond = self.text_encoder(tokens, attention_mask=mask)[0].to(self.device, self.dit.dtype)
        if guidance <= 1:
            self._use("dit")
            return self.dit.encode_text(cond, mask.to(self.device))
        null_tokens = self.tokenizer([""], return_tensors="pt").input_ids.to(tokens.device)
        null_tokens = nn.functional.pad(null_tokens, (0, tokens.shape[1] - null_tokens.shape[1]), value=PAD_ID)
        null_tokens = null_tokens.expand(len(tokens), -1)  # a row a prompt, so that hooks can tell them apart
        null_mask = (null_tokens != PAD_ID).long()
        with attach(self._firing_in("null_text_encoder"), self.names.module, contexts=self.contexts()):
            uncond = self.text_encoder(null_tokens, attention_mask=null_mask)[0].to(self.device, self.dit.dtype)
        self._use("dit")
        return self.dit.encode_text(torch.cat([uncond, cond]), torch.cat([null_mask, mask]).to(self.device))

    def _firing_in(self, part: Part) -> Iterator[Attached]:
        return self.firing(lambda site: site.part == part, lambda: self.names.sites(steps=[]))

    # Running

    @diffusers_names
    def forward(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        latents: Float[Tensor, "batch channel rows columns"] | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images in [0, 1]. Gradients follow torch's grad mode.

        Args:
            prompts: one prompt, several, or token ids.
            seed: an int gives every prompt the same noise (a paired design), a sequence one seed each; see `seeded_noise`.
            guidance: classifier-free guidance; at 1 or below no unconditional branch is run.
            latents: initial noise, instead of `seed`.
        """
        return self.trajectory(prompts, seed, num_steps, guidance, latents).images

    @diffusers_names
    def trajectory(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        latents: Float[Tensor, "batch channel rows columns"] | None = None,
        until: int | None = None,
    ) -> Run:
        """A generation with its record, so that it can be forked. Arguments as in `forward`.

        `until` stops before that step: the run then has no images, but can be forked up to there.
        """
        inputs = self.prepare(prompts, seed, num_steps, guidance, latents)
        until = None if until is None else integer("until", until, 0, len(inputs.solver))
        return self.run(inputs, until=until)

    def prepare(self, prompts: Prompts, seed: Seeds, num_steps: int, guidance: float, latents: Tensor | None = None) -> Inputs:
        """Everything that a generation is computed from: text encoded, noise drawn, hooks checked. Arguments as in `forward`."""
        guidance = number("guidance", guidance)
        tokens = (self._token_ids(prompts) if isinstance(prompts, Tensor) else self.to_tokens(prompts)).to(self.device)
        self.check_wrapped()
        solver = self.solver(num_steps)
        self.check_hooks(solver.num_steps, guidance)
        seeds = tuple(seed_of_each(seed, len(tokens)))
        drawn = latents is None
        noise = self.noise(seeds, len(tokens)) if latents is None else self._initial(latents, len(tokens))
        noise = noise.to(self.device, self.dit.dtype)
        return Inputs(tokens, self.encode(tokens, guidance), noise, seeds, drawn, guidance, solver, stamp(self.dit))

    def run(
        self,
        inputs: Inputs,
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
            record: of an earlier run of these inputs, of which the steps before `leave` are taken.
            until: the step to stop before.
            rows: step → the rows that are computed there, in place of all from `leave` on; others are taken from `record`.
            denoise, after: see `passes.Pass`.
        """
        hooks = self.attached
        leaving = rows or (from_step(leave) if leave else lambda step: None)
        visitor = Pass(self, inputs, hooks, record, leaving, denoise, after)
        latent = self.loop(inputs, visitor, len(inputs.solver) if until is None else until)
        images = tuple(select(hooks, lambda site: site.inner == FINAL, lambda: [Site("sampler", FINAL)]))
        return Run(self, inputs, visitor.record, latent, images)

    def noise(
        self,
        seed: Seeds = 0,
        batch: int = 1,
        *,
        height: int | None = None,
        width: int | None = None,
        binning: bool = True,
    ) -> Float[Tensor, "batch channel rows columns"]:
        """Initial latents, for images of the trained size or of another one, in pixels.

            model(prompts, latents=model.noise(height=512, width=768))

        `binning` takes the trained size with the nearest aspect ratio, as diffusers' pipelines do; `resolution.resize_and_crop`
        gives the images the size that was requested.
        """
        batch, grid = integer("batch", batch, 1, 10**6), (self.cfg.sample_size,) * 2
        if height is not None or width is not None:
            if height is None or width is None:
                raise ValueError("Give height and width in pixels, or neither for the trained size.")
            smallest = self.image_size((self.cfg.patch_size,) * 2)[0]
            height, width = (integer(name, side, smallest, LARGEST_SIDE) for name, side in (("height", height), ("width", width)))
            if binning:
                height, width = nearest_resolution(height, width, self.cfg.sample_size)
            if height % smallest or width % smallest:
                raise ValueError(f"height={height}, width={width}: give multiples of {smallest} pixels, the size of a patch.")
            pixels = self.image_size((1, 1))[0]
            grid = (height // pixels, width // pixels)
        return seeded_noise(seed_of_each(seed, batch), (self.cfg.in_channels, *grid))

    def denoise(
        self, latents: Float[Tensor, "batch channel rows columns"], timestep: Shaped[Tensor, " batch"], text: TextState
    ) -> Float[Tensor, "batch out_channel rows columns"]:
        """One call of the denoiser, with the size conditions of PixArt-α at 1024 px where the model has them."""
        self._use("dit")
        sizes = self.size_conditions(latents)
        return self.dit(latents, timestep=timestep, added_cond_kwargs=sizes, text_state=text, return_dict=False)[0]

    def step(
        self,
        inputs: Inputs,
        call: Call,
        latents: Float[Tensor, "branch_batch channel rows columns"],
        timestep: Shaped[Tensor, " branch_batch"],
        text: TextState,
    ) -> Float[Tensor, "branch_batch out_channel rows columns"]:
        """One denoiser call of a run of `inputs`, with the hooks that are attached to the model inside the denoiser at its step.

        Args:
            latents: as the scheduler scales them for the denoiser, of all rows of the call, branch after branch.
        """
        return Pass(self, inputs, self.attached).call(call, None, latents, timestep, text)

    def size_conditions(self, latents: Tensor) -> dict[str, Tensor | None]:
        """The image sizes [batch 2] and aspect ratios [batch 1] that a denoiser is conditioned on; None if it is on none."""
        if not self.cfg.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = self.image_size(latents.shape[-2:])
        resolution = latents.new_tensor([[height, width]]).expand(len(latents), -1)
        return {"resolution": resolution, "aspect_ratio": latents.new_tensor([[height / width]]).expand(len(latents), -1)}

    def image_size(self, grid: Sequence[int]) -> tuple[int, int]:
        """Height and width in pixels of the image of latents with these rows and columns."""
        scale = 2 ** (len(self.codec.config.block_out_channels) - 1)
        return grid[0] * scale, grid[1] * scale

    def decode(
        self, latent: Float[Tensor, "batch channel rows columns"], hooks: Sequence[Attached] = ()
    ) -> Float[Tensor, "batch 3 height width"]:
        """Latents → images in [0, 1], through `hook_image`: with `hooks`, then with those attached to the model by now."""
        self._use("codec")
        latent = latent.to(self.codec.device, self.codec.dtype)
        image = self.codec.decode(latent / self.codec.config.scaling_factor, return_dict=False)[0]
        attached = self.firing(lambda site: site.inner == FINAL, lambda: [Site("sampler", FINAL)])
        known = {id(hook.function) for hook in hooks}
        several = [*hooks, *(hook for hook in attached if id(hook.function) not in known)]
        with attach(several, self.names.module, contexts=self.contexts()):
            return self.sampler_hooks.hook_image((image / 2 + 0.5).clamp(0, 1))

    def images_of(self, run: Run) -> Float[Tensor, "batch 3 height width"]:
        """The images of a finished run: with its own hooks on them, then with those attached to the model by now."""
        return self.decode(run.latent, run.hooks)

    # Views and caches

    @diffusers_names
    def at(
        self,
        step: int,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        latents: Float[Tensor, "batch channel rows columns"] | None = None,
        *,
        branch: Branch = "cond",
        pos: Literal["image", "text"] = "image",
        returns: Literal["images", "x0", "out"] = "images",
    ) -> tuple[StepView, Int[Tensor, "batch pos"]]:
        """`(view, tokens)`: what TransformerLens' tools take as `model` and `tokens`, for generations hooked at one step.

        What comes before the step is computed once, here, for all prompts, and is a constant to gradients.

        Args:
            branch: the guidance branch in which hooks act.
            pos: which positions a sweep "by position" goes over.
            returns: what metrics get: the final images, or this step's x0 or guided network output.

        Raises:
            ValueError: the run has no such step or branch, or its scheduler forms no x0.
        """
        solver, guidance = self.solver(num_steps), number("guidance", guidance)
        (step,) = chosen_steps(integer("step", step), len(solver), "step")
        one_of("branch", branch, BRANCHES)
        one_of("pos", pos, ("image", "text"))
        one_of("returns", returns, ("images", "x0", "out"))
        if branch == "uncond" and guidance <= 1:
            raise ValueError(f"At guidance {guidance:g} there is no unconditional branch.")
        if returns == "x0" and not solver.forms_x0:
            raise ValueError(f"{solver.name} forms no clean-image prediction that is known here: take returns='out' or 'images'.")
        with torch.no_grad():
            run = self.trajectory(prompts, seed, num_steps, guidance, latents, until=step)
        view = StepView(run, step, branch, pos, returns)
        return view, view.to_tokens()

    @diffusers_names
    def run_with_cache(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        latents: Float[Tensor, "batch channel rows columns"] | None = None,
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
    ) -> tuple[Float[Tensor, "batch 3 height width"], GenerationCache]:
        """`(images, cache)` of one generation. What is generated is said as in `forward`, what is kept by the rest.

        Args:
            names_filter: a full name, a name in the denoiser (then at every chosen step and branch), a list of either, or a
                predicate on full names; None for everything.
            steps, branch: which denoising steps and guidance branches to keep.
            heads: of per-head tensors only these, "L2H8", (2, 8), a head of every layer, or several; layers without any are
                left out. Their patterns are computed for them alone.
            patterns: what to keep of patterns: all, or, computed in chunks, each query's `entropy` or `largest` entry
                [batch head query], or the attention that each key has `received` from all queries [batch head key].
            out: a folder, to which each step is written as it ends; the cache then reads from there. A call that was stopped
                goes on where it was when it is repeated, and one that had ended is not run again.
            device: where the cache is kept; where it arises unless said.
            max_bytes: refuse, before running, to cache more than this; a quarter of the free memory unless said.
            remove_batch_dim: not for a whole generation; there, so that who asks for it is told what to do.

        Raises:
            CacheTooLargeError: with the estimate, and how to narrow it.
            UnknownHookError: a name does not exist; the nearest one is suggested.
            ValueError: nothing is selected, or a step lies outside of the run.
        """
        if remove_batch_dim:
            raise TypeError(KEEPS_BATCH)
        tokens = self._token_ids(prompts) if isinstance(prompts, Tensor) else self.to_tokens(prompts)
        solver, guidance = self.solver(num_steps), number("guidance", guidance)
        latents = None if latents is None else self._initial(latents, len(tokens))
        max_bytes = None if max_bytes is None else integer("max_bytes", max_bytes, 0)
        device = None if device is None else torch_device(device)
        sites = self.names.select(names_filter, steps, branch, len(solver), guidance > 1, solver.forms_x0)
        recorder = Recorder(self, sites, heads_by_layer(heads, self.cfg.n_layers, self.cfg.n_heads), patterns, device)
        size = estimate_recorded(recorder, len(tokens), tokens.shape[1], None if latents is None else latents.shape[-2:])
        if out is not None:
            refuse_if_does_not_fit(size, out)
            with torch.no_grad():
                images = record_to_folder(recorder, out, (tokens, seed, num_steps, guidance, latents))
            return images, GenerationCache.load(out, self)
        refuse_if_too_large(size, max_bytes, device or self.device)
        with self.hooks(recorder.hooks()):
            recorder.inputs = inputs = self.prepare(tokens, seed, num_steps, guidance, latents)
            images = self.run(inputs).images
        return images, GenerationCache(recorder.take(), self, inputs.solver.noise_levels, recorder.heads)
