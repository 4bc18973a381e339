"""PixArt-α and PixArt-Σ: the generation whose every tensor has a name, text encoder included.

Source of the arithmetic: `PixArtSigmaPipeline.__call__` (diffusers 0.42), which images are equal
to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import T5EncoderModel

from ..arguments import initial_latents, integer, number
from ..hooks.layout import Layout, ordered
from ..hooks.module import HookedModule
from ..hooks.wrapping import stamp
from ..lazy_imports import renamed
from ..pipelines.resolution import nearest_resolution
from ..pixart.config import DiTConfig
from ..pixart.dit import HookedDiT
from ..pixart.fast import empty_prompts
from ..pixart.text_state import TextState
from ..text_encoders.random_tokens import PAD_ID, HookedTokenEncoder, RandomTokenEncoder
from ..text_encoders.t5 import HookedT5Encoder
from .attached import AttachedHook, SamplerHooks
from .cache_estimate import activation_shape
from .loops import PixArtLoop, branches_of
from .model import DEFAULT_GUIDANCE, DEFAULT_STEPS, Prompts
from .names import Branch, GenerationNames, Site
from .noise import Seeds, seed_of_each, seeded_noise
from .pixart_text import PixArtText, check_options
from .trajectory import Inputs, Run

__getattr__ = renamed(
    __name__, {"LONGEST_TEXT": "hooked_models.generation.pixart_text:LONGEST_TEXT"}
)

LARGEST_SIDE = 2**14
"""Pixels of an image's side."""


def hooked_encoder(encoder: nn.Module) -> nn.Module:
    """Around a T5 or a random-token encoder.

    Any other (and one that is hooked already) is returned as it is.
    """
    if isinstance(encoder, RandomTokenEncoder):
        return HookedTokenEncoder(encoder)
    return HookedT5Encoder(encoder) if isinstance(encoder, T5EncoderModel) else encoder


class HookedPixArt(PixArtText):
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

    # Inputs of a run

    def _initial(self, latents: Any, batch: int) -> Tensor:
        return initial_latents(latents, batch, self.cfg.in_channels, self.cfg.patch_size)

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
