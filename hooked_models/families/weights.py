"""Projections of a live attention in TransformerLens' layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..pixart.attention import bias_of, weight_of

OWN = {"Q": "to_q", "K": "to_k", "V": "to_v", "O": "to_out"}
OF_TEXT = {"Q": "add_q_proj", "K": "add_k_proj", "V": "add_v_proj", "O": "to_add_out"}


class Weights:
    """`W_Q W_K W_V W_O` of one attention, views of the live Linears where they can be.

    `…_text` are the text stream's own. Keys and values that heads share are repeated.
    """

    def __init__(
        self, block: Any, attention: Any, n_heads: int, own: Mapping[str, Callable[[Any], Tensor]]
    ) -> None:
        self.block, self.attention, self.n_heads, self.own = block, attention, n_heads, own

    def get(self, which: str, text: bool = False) -> Float[Tensor, "head d_in d_out"]:
        """`which` is "Q", "K", "V" (head d_in d_head) or "O" (head d_head d_model).

        Raises:
            TypeError: there is no Linear of this name.
        """
        name = which + ("_text" if text else "")
        if name in self.own:
            weight = self.own[name](self.block)
        else:
            path = (OF_TEXT if text else OWN)[which]
            linear: Any = getattr(self.attention, path, None)
            if isinstance(linear, (list, tuple)) or type(linear).__name__ in (
                "ModuleList",
                "Sequential",
            ):
                linear = linear[0]
            if linear is None:
                raise TypeError(
                    f"{type(self.attention).__name__} has no {path}, so there is no W_{name} to "
                    "view."
                )
            weight = weight_of(linear)
        if which == "O":
            return rearrange(
                weight, "d_model (head d_head) -> head d_head d_model", head=self.n_heads
            )
        per_head = self.n_heads if which == "Q" else self._heads_of(weight)
        split = rearrange(weight, "(head d_head) d_in -> head d_in d_head", head=per_head)
        return (
            split
            if per_head == self.n_heads
            else split.repeat_interleave(self.n_heads // per_head, dim=0)
        )

    def bias(self, which: str) -> Float[Tensor, "..."]:
        """Bias of the attention's own Linear, [head d_head], of the output's [d_model].

        It is zero where the Linear has none.
        """
        linear: Any = getattr(self.attention, OWN[which])
        linear = linear[0] if which == "O" else linear
        bias = bias_of(linear)
        return bias if which == "O" else rearrange(bias, "(head d) -> head d", head=self.n_heads)

    def _heads_of(self, weight: Tensor) -> int:
        d_head = self.get("Q").shape[-1]
        return weight.shape[0] // d_head
