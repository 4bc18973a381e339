"""PixArt-α and PixArt-Σ: the generation whose every tensor has a name, text encoder included.

Source of the arithmetic: `PixArtSigmaPipeline.__call__` (diffusers 0.42), which images are equal
to.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import T5EncoderModel

from ..arguments import RENAMED, initial_latents, integer, is_several, number, shown, token_ids
from ..hooks.layout import Layout, ordered
from ..hooks.module import HookedModule
from ..hooks.wrapping import stamp
from ..pipelines.resolution import nearest_resolution
from ..pixart.config import DiTConfig
from ..pixart.dit import HookedDiT
from ..pixart.fast import empty_prompts
from ..pixart.text_state import TextState
from ..text_encoders.random_tokens import PAD_ID, HookedTokenEncoder, RandomTokenEncoder
from ..text_encoders.t5 import HookedT5Encoder
from ..text_encoders.words import EncodedText, encode_text
from .attached import AttachedHook, SamplerHooks, attach
from .cache_estimate import activation_shape
from .loops import PixArtLoop, branches_of
from .model import DEFAULT_GUIDANCE, DEFAULT_STEPS, HookedTextToImage, Prompts
from .names import Branch, GenerationNames, Part, Site
from .noise import Seeds, seed_of_each, seeded_noise
from .trajectory import Inputs, Run

_TOKENIZING = threading.Lock()
"""A tokenizer keeps its padding as state while it works."""
LONGEST_TEXT, LARGEST_SIDE = 2**16, 2**14
"""Tokens of a padded prompt, and pixels of an image's side."""


def hooked_encoder(encoder: nn.Module) -> nn.Module:
    """Around a T5 or a random-token encoder.

    Any other (and one that is hooked already) is returned as it is.
    """
    if isinstance(encoder, RandomTokenEncoder):
        return HookedTokenEncoder(encoder)
    return HookedT5Encoder(encoder) if isinstance(encoder, T5EncoderModel) else encoder


def check_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError for arguments of a run that PixArt has not."""
    for name in options:
        raise TypeError(
            f"{name}= "
            + (
                f"is called {RENAMED[name]}= here."
                if name in RENAMED
                else "does not exist for PixArt."
            )
        )


class HookedPixArt(HookedTextToImage):
    """A PixArt pipeline, hooked down to the text encoder.

    `HookedTextToImage(…)` of its parts makes one. Text is as long as the batch's longest prompt
    (pads carry exactly no attention), unless tokens of another length are given.

    Example:
        >>> type(HookedTextToImage.from_pretrained("rte-nano")).__name__
        'HookedPixArt'
    """

    default_guidance = DEFAULT_GUIDANCE
    text_keys_are_constant = True
    enters_at_layers = True
    allow_unknown_words = False
    """Let the text encoder read words outside of its vocabulary, as <unk>; by default they are an
    error.
    """

    def __init__(
        self,
        transformer: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        codec: nn.Module,
        scheduler: Any,
    ) -> None:
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
        self.names = GenerationNames(
            self.dit, self.sampler_hooks, with_hooks, lambda: self.count_steps(DEFAULT_STEPS)
        )
        self.loop = PixArtLoop(self.dit.cfg.in_channels)

    @classmethod
    def from_pipeline(cls, pipe: Any) -> Any:
        """As in HookedTextToImage, of a PixArt pipeline."""
        for name, part in (("transformer", pipe.transformer), ("text_encoder", pipe.text_encoder)):
            if len(devices := {str(p.device) for p in part.parameters()}) > 1:
                raise ValueError(
                    f"The {name} is spread over {', '.join(sorted(devices))}; hooked, it must be "
                    "on one device: load it without "
                    "offloading or device map, then use enable_cpu_offload()."
                )
        model = cls(
            pipe.transformer, pipe.text_encoder, pipe.tokenizer, pipe.vae, pipe.scheduler
        ).eval()
        model.pipeline_class = type(pipe)
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
            part.requires_grad_(False)
        return model

    def check_wrapped(self) -> None:
        """Raise ValueError if a wrapped module was changed so that this model would ignore it."""
        self.dit.wrapping.check()
        if isinstance(self.text_encoder, HookedT5Encoder):
            self.text_encoder.wrapping.check()

    @property
    def cfg(self) -> DiTConfig:
        """The denoiser's configuration."""
        return self.dit.cfg

    # Text

    def prompt_texts(self, prompts: str | Sequence[str]) -> list[str]:
        """The texts that are tokenised: prompts in lower case, as diffusers does it.

        With `clean_caption` they are cleaned as diffusers does (addresses, HTML, quotation marks,
        brackets, …).

        Raises:
            ValueError: there is no prompt, or one is no string.
            ImportError: `clean_caption` lacks its libraries, where diffusers would go on without
                cleaning.

        Example:
            >>> HookedTextToImage.from_pretrained("rte-micro", weights=False).prompt_texts(
            ...     " Red circle"
            ... )
            ['red circle']
        """
        if isinstance(prompts, Mapping) or not (isinstance(prompts, str) or is_several(prompts)):
            raise ValueError(
                f"prompts={shown(prompts)}: give a string or several, or token ids as one tensor."
            )
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("prompts is empty: give at least one prompt.")
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(
                f"prompts holds {shown(wrong[0])}, which is no string: give strings, or token ids "
                "as one tensor."
            )
        texts = [prompt.lower().strip() for prompt in prompts]
        if self.clean_caption:
            if not (is_bs4_available() and is_ftfy_available()):
                raise ImportError(
                    "clean_caption=True needs two more packages: pip install beautifulsoup4 ftfy"
                )
            texts = self.as_diffusers()._text_preprocessing(texts, clean_caption=True)
        return texts

    def to_tokens(
        self, prompts: str | Sequence[str], length: int | None = None
    ) -> Int[Tensor, "batch text_pos"]:
        """Tokenize `prompt_texts(prompts)`.

        Ids with EOS, padded to the longest prompt or to `length`.

        Raises:
            ValueError: a prompt is too long, or has a word outside of the encoder's vocabulary
                (which the message names; `model.allow_unknown_words = True` lets a T5 read it as
                <unk>).

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
            raise ValueError(
                f"A prompt has {ids.shape[1]} tokens, but {limit} is the longest that this model "
                "reads: shorten it."
            )
        if self.tokenizer.unk_token_id in ids.unique().tolist():
            self._check_known(texts)
        # without weights, tokens keep their values
        return ids if self.device.type == "meta" else ids.to(self.device)

    def _check_known(self, texts: Sequence[str]) -> None:
        """Raise ValueError with the words outside of the vocabulary, unless they are allowed."""
        unknown = {
            text: words
            for text in texts
            if (words := encode_text(self.tokenizer, text).unknown_words)
        }
        words = list(dict.fromkeys(word for found in unknown.values() for word in found))
        if not words:  # CLIP's <unk> is its EOS
            return
        if isinstance(self.text_encoder, HookedTokenEncoder):
            raise ValueError(self.text_encoder.wrapped.no_vector_for(words))
        if not self.allow_unknown_words:
            raise ValueError(
                f"The text encoder does not know {', '.join(map(repr, words))} in "
                f"{next(iter(unknown))!r} and would read <unk>: "
                "use other words, or set model.allow_unknown_words = True."
            )

    def to_str_tokens(self, prompt: str | Int[Tensor, " text_pos"]) -> list[str]:
        """The tokens of one prompt as strings."""
        ids = self.to_tokens(prompt)[0] if isinstance(prompt, str) else prompt
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(ids.tolist())]

    def _token_ids(self, tokens: Tensor) -> Tensor:
        return token_ids(
            tokens, getattr(getattr(self.text_encoder, "cfg", None), "d_vocab", len(self.tokenizer))
        )

    def _initial(self, latents: Any, batch: int) -> Tensor:
        return initial_latents(latents, batch, self.cfg.in_channels, self.cfg.patch_size)

    def encode(
        self, tokens: Int[Tensor, "batch text_pos"], guidance: float = DEFAULT_GUIDANCE
    ) -> TextState:
        """Text features, captions, keys and values, computed once for all steps.

        With guidance for rows [uncond; cond].

        Example:
            >>> model.encode(
            ...     model.to_tokens("red circle above blue square"), guidance=1.0
            ... ).text.shape[0]
            1
        """
        self._use("text_encoder")
        tokens = tokens.to(self.text_encoder.device)
        mask = (tokens != PAD_ID).long()
        cond = self._features("text_encoder", tokens, mask)
        if guidance <= 1:
            self._use("dit")
            return self.dit.encode_text(cond, mask.to(self.device))
        null_tokens = self.tokenizer([""], return_tensors="pt").input_ids.to(tokens.device)
        null_tokens = nn.functional.pad(
            null_tokens, (0, tokens.shape[1] - null_tokens.shape[1]), value=PAD_ID
        )
        # a row a prompt, so that hooks can tell them apart
        null_tokens = null_tokens.expand(len(tokens), -1)
        null_mask = (null_tokens != PAD_ID).long()
        uncond = self._features("null_text_encoder", null_tokens, null_mask)
        self._use("dit")
        return self.dit.encode_text(
            torch.cat([uncond, cond]), torch.cat([null_mask, mask]).to(self.device)
        )

    def _features(self, part: Part, tokens: Tensor, mask: Tensor) -> Tensor:
        """Text features as the denoiser takes them, through the hooks of a part."""
        hooks = self.active_hooks(
            lambda site: site.part == part, lambda: self.names.sites(steps=[])
        )
        with attach(hooks, self.names.module, contexts=self.contexts()):
            features = self.text_encoder(tokens, attention_mask=mask)[0]
        return features.to(self.device, self.dit.dtype)

    # Inputs of a run

    def draft(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Tensor | None = None,
        **options: Any,
    ) -> Inputs:
        """As in HookedTextToImage; a text of zero width stands for one not encoded yet."""
        check_options(options)
        guidance = number("guidance", self.default_guidance if guidance is None else guidance)
        tokens = (
            self._token_ids(prompts) if isinstance(prompts, Tensor) else self.to_tokens(prompts)
        ).to(self.device)
        self.check_wrapped()
        solver = self.solver(num_steps)
        seeds = tuple(seed_of_each(seed, len(tokens)))
        drawn = latents is None
        noise = (
            self.noise(seeds, len(tokens))
            if latents is None
            else self._initial(latents, len(tokens))
        )
        noise = noise.to(self.device, self.dit.dtype)
        empty = noise.new_empty(len(branches_of(guidance)) * len(tokens), 0, 0)
        return Inputs(
            tokens,
            TextState(empty, empty, None, ()),
            noise,
            seeds,
            drawn,
            guidance,
            solver,
            stamp(self.dit),
        )

    def encoded(self, inputs: Inputs) -> Inputs:
        """As in HookedTextToImage."""
        return replace(inputs, text=self.encode(inputs.tokens, inputs.guidance))

    def reseeded(self, inputs: Inputs, seeds: Sequence[int]) -> Inputs:
        """As in HookedTextToImage."""
        return replace(
            inputs,
            latents=self.noise(seeds, len(inputs)).to(inputs.latents),
            seeds=tuple(seeds),
            drawn=True,
        )

    def between(self, inputs: Inputs, others: Inputs, alpha: float) -> Inputs:
        """As in HookedTextToImage: the text features, and the noise where it differs."""
        features = torch.lerp(inputs.text.text, others.text.text, alpha)
        latents = torch.lerp(inputs.latents, others.latents, alpha)
        return replace(
            inputs, text=self.dit.encode_text(features, inputs.text.bias), latents=latents
        )

    @torch.no_grad()
    def same_length(self, inputs: Inputs, others: Inputs) -> tuple[Inputs, Inputs]:
        """As in HookedTextToImage: the shorter text is padded, and nothing attends to pads."""
        length = max(inputs.text.text.shape[1], others.text.text.shape[1])

        def padded(one: Inputs) -> Inputs:
            text, more = one.text, length - one.text.text.shape[1]
            if more == 0:
                return one
            assert text.bias is not None  # a generation always has a mask
            tokens = nn.functional.pad(one.tokens, (0, more), value=PAD_ID)
            bias = nn.functional.pad(text.bias, (0, more), value=-10000.0)
            text = self.dit.encode_text(nn.functional.pad(text.text, (0, 0, 0, more)), bias)
            return replace(one, tokens=tokens, text=text)

        return padded(inputs), padded(others)

    def opened(self, text: TextState) -> TextState:
        """As in HookedTextToImage."""
        features = text.text if text.text.requires_grad else text.text.detach().requires_grad_()
        return self.dit.encode_text(features, text.bias)

    # Positions

    def layout(self, prompts: Any, branch: Branch = "cond") -> Layout:
        """As in HookedTextToImage."""
        tokens = prompts.tokens if isinstance(prompts, Inputs) else prompts
        tokens = tokens if isinstance(tokens, Tensor) else self.to_tokens(tokens)
        side = (
            (self.cfg.sample_size, self.cfg.sample_size)
            if not isinstance(prompts, Inputs)
            else prompts.latents.shape[-2:]
        )
        mask = (tokens != PAD_ID).cpu()
        if branch == "uncond":
            mask = (torch.arange(mask.shape[1]) == 0).expand(len(mask), -1)
        p = self.cfg.patch_size
        return ordered((side[0] // p, side[1] // p, 1), mask, first="image")

    def texts_read(self, prompts: Sequence[str], branch: Branch = "cond") -> list[str]:
        """As in HookedTextToImage."""
        return [""] * len(prompts) if branch == "uncond" else list(prompts)

    def encoded_texts(
        self, prompts: str | Sequence[str], length: int | None = None, **options: Any
    ) -> list[EncodedText]:
        """Each prompt as it is tokenised, with character offsets.

        Padded to the longest or to `length`.

        Example:
            >>> model = HookedTextToImage.from_pretrained("rte-micro", weights=False)
            >>> model.encoded_texts("red circle")[0].spans
            [(0, 3), (4, 10), (0, 0)]
        """
        check_options(options)
        length = self.to_tokens(prompts).shape[1] if length is None else length
        return [encode_text(self.tokenizer, text, length) for text in self.prompt_texts(prompts)]

    def shape(self, inputs: Inputs, site: Site) -> tuple[int, ...]:
        """As in HookedTextToImage."""
        grid: Any = tuple(inputs.latents.shape[-2:])
        cfg = self.text_encoder.cfg if site.part.endswith("text_encoder") else self.cfg
        return activation_shape(
            cfg, site, len(inputs), grid, inputs.tokens.shape[1], self.image_size(grid)
        )

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

        `binning` takes the trained size with the nearest aspect ratio, as diffusers' pipelines do;
        `resolution.resize_and_crop` gives the images the size that was requested.
        """
        batch, grid = integer("batch", batch, 1, 10**6), (self.cfg.sample_size,) * 2
        if height is not None or width is not None:
            if height is None or width is None:
                raise ValueError(
                    "Give height and width in pixels, or neither for the trained size."
                )
            smallest = self.image_size((self.cfg.patch_size,) * 2)[0]
            height, width = (
                integer(name, side, smallest, LARGEST_SIDE)
                for name, side in (("height", height), ("width", width))
            )
            if binning:
                height, width = nearest_resolution(height, width, self.cfg.sample_size)
            if height % smallest or width % smallest:
                raise ValueError(
                    f"height={height}, width={width}: give multiples of {smallest} pixels, the "
                    "size of a patch."
                )
            pixels = self.image_size((1, 1))[0]
            grid = (height // pixels, width // pixels)
        return seeded_noise(seed_of_each(seed, batch), (self.cfg.in_channels, *grid))

    def denoise(
        self,
        latents: Float[Tensor, "batch channel rows columns"],
        timestep: Shaped[Tensor, " batch"],
        text: TextState,
    ) -> Float[Tensor, "batch out_channel rows columns"]:
        """One call of the denoiser, with size conditions where the model has them.

        Those of PixArt-α at 1024 px.
        """
        self._use("dit")
        sizes = self.size_conditions(latents)
        return self.dit(
            latents, timestep=timestep, added_cond_kwargs=sizes, text_state=text, return_dict=False
        )[0]

    def size_conditions(self, latents: Tensor) -> dict[str, Tensor | None]:
        """The image sizes [batch 2] and aspect ratios [batch 1] that a denoiser is conditioned on.

        None if it is on none.
        """
        if not self.cfg.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = self.image_size(latents.shape[-2:])
        resolution = latents.new_tensor([[height, width]]).expand(len(latents), -1)
        return {
            "resolution": resolution,
            "aspect_ratio": latents.new_tensor([[height / width]]).expand(len(latents), -1),
        }

    def image_size(self, grid: Sequence[int]) -> tuple[int, int]:
        """Height and width in pixels of the image of latents with these rows and columns."""
        scale = 2 ** (len(self.codec.config.block_out_channels) - 1)
        return grid[0] * scale, grid[1] * scale

    def pixels(self, run: Run) -> Float[Tensor, "batch 3 height width"]:
        """As in HookedTextToImage."""
        return self.decoded(run.latent)

    def decoded(
        self, latent: Float[Tensor, "batch channel rows columns"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Images in [0, 1] of latents, through no hook."""
        self._use("codec")
        latent = latent.to(self.codec.device, self.codec.dtype)
        image = self.codec.decode(latent / self.codec.config.scaling_factor, return_dict=False)[0]
        return (image / 2 + 0.5).clamp(0, 1)

    def decode(
        self,
        latent: Float[Tensor, "batch channel rows columns"],
        hooks: Sequence[AttachedHook] = (),
    ) -> Float[Tensor, "batch 3 height width"]:
        """Latents → images in [0, 1], through `hook_image`.

        With `hooks`, then with those attached to the model by now.
        """
        return self.seen(self.decoded(latent), hooks)
