"""PixArt behind nnsight."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_models.generation.model import Prompts
from hooked_models.generation.pixart import HookedPixArt
from hooked_models.pipelines.folder import PIXART

from . import pixart_kernel, pixart_plan, plan
from .caches import RENAME
from .model import RemoteTextToImage


class RemotePixArt(RemoteTextToImage, HookedPixArt):
    """A PixArt pipeline behind nnsight, text encoder included; made by `RemoteTextToImage`.

    Example:
        >>> type(RemoteTextToImage("rte-nano")).__name__
        'RemotePixArt'
    """

    renames = RENAME
    kernel = staticmethod(pixart_kernel.run)

    @classmethod
    def opens(cls, pipeline_class: str) -> bool:
        """True for PixArt-α's and PixArt-Σ's."""
        return pipeline_class in PIXART

    def open_parts(self, pipe: Any) -> None:
        """As in RemoteTextToImage."""
        HookedPixArt.__init__(
            self, pipe.transformer, pipe.text_encoder, pipe.tokenizer, pipe.vae, pipe.scheduler
        )

    def draw(self, inputs: Any) -> Float[Tensor, "batch 3 height width"]:
        """As in HookedTextToImage, through nnsight."""
        return self.ask(inputs.tokens, inputs)["images"]

    def plan_of(self, draft: Any, request: plan.Request) -> dict[str, Any]:
        """As in RemoteTextToImage."""
        return pixart_plan.make(self, draft, request)

    def call_of(self, prompts: Prompts, draft: Any) -> dict[str, Any]:
        """As in RemoteTextToImage.

        Raises:
            ValueError: the tokens are those of no text.
        """
        height, width = self.image_size(draft.latents.shape[-2:])
        return {
            "prompt": self._texts(prompts, draft.tokens),
            "num_inference_steps": draft.num_steps,
            "guidance_scale": draft.guidance,
            "latents": draft.latents.to(self.dit.dtype),
            "generator": draft.generators(),
            "height": height,
            "width": width,
            "max_sequence_length": draft.tokens.shape[1],
            "output_type": "pt",
            "return_dict": False,
            "clean_caption": False,
            "use_resolution_binning": False,
        }

    def _texts(self, prompts: Prompts, tokens: Tensor) -> list[str]:
        """Prompts as the pipeline takes them."""
        if not isinstance(prompts, Tensor):
            return [prompts] if isinstance(prompts, str) else list(prompts)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        if not bool((self.to_tokens(texts, length=tokens.shape[1]) == tokens).all()):
            raise ValueError(
                "These tokens are not those of a text, and nnsight's pipeline takes text: give "
                "prompts."
            )
        return texts
