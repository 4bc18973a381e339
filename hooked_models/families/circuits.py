"""Circuits in a family's weights, where scores are linear in the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

if TYPE_CHECKING:
    from .adapter import Family

NORM_BEFORE = "a norm stands before its attention to the text"
OWN_NORMS = "queries and keys of its attention to the text pass norms of their own"


class WeightCircuits:
    """`W_pos`, `project_caption` and factored matrices of cross-attention, as `HookedDiT` has them.

    Each raises TypeError with the reason where scores are not linear in the stream.
    """

    family: Family
    wrapped: Any
    blocks: Any

    def check_linear(self) -> None:
        """Raise TypeError unless scores of cross-attention are linear in stream and text.

        They are products of weights, the stream and the projected text.

        Example:
            >>> from hooked_models import families
            >>> family = families.SUPPORTED["FluxTransformer2DModel"]
            >>> families.hook(family.small().eval()).check_linear()
            Traceback (most recent call last):
            TypeError: FLUX.1 has no circuits in its weights alone: a norm stands ...
        """
        if reason := self.family.nonlinear(self.wrapped):
            raise TypeError(
                f"{self.family.name} has no circuits in its weights alone: {reason}, so that "
                "scores are not linear in the stream; attribution and path patching go by "
                "activations."
            )

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """Position code that is added to the image's stream, of images of the model's own size."""
        self.check_linear()
        if (code := self.family.position(self.wrapped)) is None:
            raise TypeError(
                f"This {self.family.name} adds no code of positions to its stream, so that no map "
                "over positions follows from its weights."
            )
        return code

    def project_caption(
        self, text: Float[Tensor, "*batch d_text"]
    ) -> Float[Tensor, "*batch d_caption"]:
        """Project text features to the inputs of cross-attention, through no hook."""
        self.check_linear()
        return self.family.caption(self.wrapped, text)

    @property
    def cross_QK(self) -> FactoredMatrix:
        """``W_Q W_Kᵀ`` of cross-attention, [layer head d_model d_caption]; copies."""
        return self._factored("QK")

    @property
    def cross_OV(self) -> FactoredMatrix:
        """``W_V W_O`` of cross-attention, [layer head d_caption d_model]; copies."""
        return self._factored("OV")

    @property
    def folded_timestep(self) -> float | None:
        """Raise TypeError: a timestep is folded into PixArt's weights alone."""
        self.check_linear()
        raise TypeError(
            f"{self.family.name}'s attention within the image reads the stream through a norm that "
            "the timestep modulates, which can be folded into PixArt's weights alone."
        )

    def _factored(self, circuit: Literal["QK", "OV"]) -> FactoredMatrix:
        self.check_linear()
        attentions = [block.cross_attn for block in self.blocks]
        if circuit == "OV":
            sides = [(each.W_V, each.W_O) for each in attentions]
        else:
            sides = [(each.W_Q, each.W_K.mT) for each in attentions]
        left, right = zip(*sides, strict=True)
        return FactoredMatrix(torch.stack(left), torch.stack(right))
