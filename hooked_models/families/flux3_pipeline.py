"""FLUX.3's modular pipeline, called as other pipelines are.

Source: `Flux3ModularPipeline` and its blocks (diffusers 0.42). Its own blocks run one after the
other, in its order; text, noise and denoising have the names that other pipelines give them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.pipelines.flux2 import Flux2PipelineOutput
from torch import Tensor


class _Block:
    """A block that computes gradients where they are enabled; the block's own call has none."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of an object that is being copied
            raise AttributeError(name)
        return getattr(self._block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = type(self._block).__call__
        return getattr(call, "__wrapped__", call)(self._block, *args, **kwargs)


class Flux3Pipeline:
    """A `Flux3ModularPipeline` with a `__call__`, an `encode_prompt` and components of its own.

    Prompts are encoded as they are, without the prompt upsampler. The modular pipeline itself takes
    one prompt; several are encoded one by one, and drawn in one batch.

    Example:
        >>> Flux3Pipeline.names
        ('text_encoder', 'tokenizer', 'vae', 'transformer', 'scheduler', 'guider')
    """

    names = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler", "guider")
    """Components; a distilled model has no guider."""
    guider: Any

    def __init__(self, modular: Any) -> None:
        self.modular = modular
        self.blocks = dict(modular.blocks.get_workflow("text2image").sub_blocks)
        self.blocks.pop("prompt_upsampler", None)
        loop = self.blocks["denoise.denoise"]
        for name, block in loop.sub_blocks.items():
            loop.sub_blocks[name] = _Block(block)
        self.blocks = {name: _Block(block) for name, block in self.blocks.items()}
        for name in self.names:
            setattr(self, name, getattr(modular, name, None))

    @property
    def components(self) -> dict[str, Any]:
        """The components by name."""
        found = {name: getattr(self, name) for name in self.names}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def _execution_device(self) -> torch.device:
        return self.modular._execution_device

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a latent, on one side."""
        return self.modular.vae_scale_factor

    def set_progress_bar_config(self, **how: Any) -> None:
        """As of other pipelines; this object's blocks alone are set."""
        self.blocks["denoise.denoise"].set_progress_bar_config(**how)

    def to(self, *args: Any, **kwargs: Any) -> Flux3Pipeline:
        """Move all components, as `modular.to` does."""
        self.modular.to(*args, **kwargs)
        return self

    def _components_with(self, guidance_scale: float) -> Any:
        """The modular pipeline with these components and a fresh guider."""
        found = copy.copy(self.modular)
        vars(found).update(self.components)
        if self.guider is not None:
            vars(found)["guider"] = guider = copy.deepcopy(self.guider)
            guider.guidance_scale = guidance_scale
        return found

    def encode_prompt(
        self,
        prompt: Sequence[str],
        negative_prompt: str | None = None,
        max_sequence_length: int = 8192,
        guidance_scale: float = 3.5,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Text [row text_pos d] and its negative, None where nothing guides.

        Raises:
            ValueError: the prompts' windows are of several lengths, and their pads are attended to.
        """
        pipe, rows = self._components_with(guidance_scale), []
        for one in prompt:
            state = PipelineState()
            given = {"prompt": one, "negative_prompt": negative_prompt, **options}
            for name, value in (given | {"max_sequence_length": max_sequence_length}).items():
                state.set(name, value)
            with torch.no_grad():
                self.blocks["text_encoder"](pipe, state)
            rows.append([state.get(f"{kind}prompt_embeds") for kind in ("", "negative_")])
        text, negative = zip(*rows, strict=True)
        if len({one.shape[1] for one in text}) > 1:
            raise ValueError(
                "FLUX.3 attends to the padding of its text, which is as long as a prompt needs: "
                "give prompts of similar length in one batch, or a call for each."
            )
        return torch.cat(text), None if negative[0] is None else torch.cat(negative)

    def prepare_latents(self, latents: Tensor) -> Tensor:
        """The noise [row pos channel], from the block that draws it."""
        return latents

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.5,
        generator: Any = None,
        latents: Tensor | None = None,
        sigmas: list[float] | None = None,
        max_sequence_length: int = 8192,
        text_encoder_out_layers: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 28, 32),
        output_type: str = "pil",
    ) -> Flux2PipelineOutput:
        """Arguments as of the modular pipeline's call; several prompts at once.

        Returns:
            `images`; with output_type="latent", the latents [row pos channel] that the loop ends
            with.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        text, negative = self.encode_prompt(
            prompts,
            negative_prompt,
            max_sequence_length,
            guidance_scale,
            text_encoder_out_layers=text_encoder_out_layers,
        )
        pipe, state = self._components_with(guidance_scale), PipelineState()
        for name, value in (("prompt_embeds", text), ("negative_prompt_embeds", negative)):
            state.set(name, value, "denoiser_input_fields")
        given = {
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "sigmas": sigmas,
            "generator": generator,
            "latents": latents,
            "output_type": output_type,
            "num_images_per_prompt": 1,
        }
        for name, value in given.items():
            state.set(name, value)
        for name, block in self.blocks.items():
            if name == "text_encoder":
                continue
            block(pipe, state)
            if name == "denoise.prepare_latents":
                state.set("latents", self.prepare_latents(state.get("latents")))
            if name == "denoise.denoise" and output_type == "latent":
                return Flux2PipelineOutput(images=state.get("latents"))
        return Flux2PipelineOutput(images=state.get("images"))
