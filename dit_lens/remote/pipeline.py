"""Every other pipeline behind nnsight."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import families
from hooked_models.generation.model import Prompts
from hooked_models.generation.pipeline import HookedPipeline
from hooked_models.pipelines.folder import PIXART

from . import pipeline_kernel, pipeline_plan, plan
from .model import RemoteTextToImage


class RemotePipeline(RemoteTextToImage, HookedPipeline):
    """A diffusers pipeline whose denoiser is of a known family, behind nnsight.

    Made by `RemoteTextToImage`.

    Example:
        >>> RemotePipeline.opens("FluxPipeline"), RemotePipeline.opens("PixArtSigmaPipeline")
        (True, False)
    """

    kernel = staticmethod(pipeline_kernel.run)
    order: pipeline_plan.Events | None = None
    """Order of the modules in a denoiser call, once a plan has needed it."""

    @classmethod
    def opens(cls, pipeline_class: str) -> bool:
        """True for all but PixArt's."""
        return pipeline_class not in PIXART

    def open_parts(self, pipe: Any) -> None:
        """As in RemoteTextToImage."""
        family = families.SUPPORTED.get(type(getattr(pipe, "transformer", None)).__name__)
        if family is not None and family.second:
            raise ValueError(
                f"{type(pipe).__name__} draws with two transformers, of which a trace follows one: "
                "open it here, with HookedTextToImage."
            )
        HookedPipeline.__init__(self, pipe)

    def draw(self, inputs: Any) -> Float[Tensor, "batch 3 height width"]:
        """As in HookedTextToImage, through nnsight."""
        return self.ask(inputs.prompts, inputs)["images"]

    def plan_of(self, draft: Any, request: plan.Request) -> dict[str, Any]:
        """As in RemoteTextToImage."""
        return pipeline_plan.make(self, draft, request)

    def call_of(self, prompts: Prompts, draft: Any) -> dict[str, Any]:
        """As in RemoteTextToImage: noise is drawn there, by generators that travel.

        Raises:
            ValueError: the pipeline also draws arguments, of all rows together.
        """
        if draft.drawn and len(draft) > 1:
            names = ", ".join(f"{name}=" for name in draft.drawn)
            raise ValueError(
                f"{type(self.pipe).__name__} draws from one generator for all rows of a batch: "
                f"give one prompt at a time, or {names}."
            )
        given = {} if draft.latents is None else {"latents": draft.latents}
        if not any(name.startswith("prompt_embeds") for name in draft.options):
            given["prompt"] = list(draft.prompts)
        return {
            **draft.options,
            **given,
            "generator": [torch.Generator().manual_seed(seed) for seed in draft.seeds],
            "output_type": "pt",
            "return_dict": False,
        }
