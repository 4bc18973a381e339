"""Attentions of live models, hooked where they call torch's kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from ..hooks.layout import Layout
from ..hooks.masks import as_bias, finite_bias, pattern_of
from ..hooks.module import has_hooks
from ..pixart.attention import AttentionCore, fused_attention
from .taps import here, same_shape
from .weights import Weights

HEAD_POINTS = ("hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z")


class FamilyHeads(AttentionCore):
    """One attention of a live model.

    Inputs and output of its kernel, positions ordered [image, text]. `queries` and `keys` name the
    streams of either side.
    """

    weights: Weights
    bias: Callable[[], Tensor | None]
    """Addend of the scores in the running call, positions as hooks see them."""

    def __init__(self, queries: str, keys: str, scale: float, weights: Weights) -> None:
        super().__init__()
        self.queries, self.keys, self.scale = queries, keys, scale
        self.calls = 0
        # hidden from nn.Module, which would register the live modules
        self.__dict__["weights"] = weights

    def has_hooks(self) -> bool:
        """Return True if a hook or an observer is attached."""
        return self.on_qk is not None or any(has_hooks(getattr(self, name)) for name in HEAD_POINTS)

    def run(
        self,
        layout: Layout,
        query: Float[Tensor, "batch head query_pos d_head"],
        key: Float[Tensor, "batch kv_head key_pos d_head"],
        value: Float[Tensor, "batch kv_head key_pos d_head"],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Float[Tensor, "batch head query_pos d_head"]:
        """Stand in for `scaled_dot_product_attention`, with its arguments.

        Bitwise the same where hooks change nothing.

        Raises:
            NotImplementedError: dropout is on.
            LayoutError: the kernel receives other positions than declared.
        """
        self._check(layout, query, key, dropout_p)
        if key.shape[1] != query.shape[1]:
            key, value = (
                x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value)
            )
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.__dict__["bias"] = lambda: self._bias(layout, attn_mask, is_causal, query, key)
        query = self._through(self.hook_q, query, layout, self.queries)
        key = self._through(self.hook_k, key, layout, self.keys)
        value = self._through(self.hook_v, value, layout, self.keys)
        explicit = has_hooks(self.hook_attn_scores) or has_hooks(self.hook_pattern)
        if explicit or self.on_qk is not None:
            q, k = (
                layout.image_first(x, (s,), dim=2)
                for x, s in ((query, self.queries), (key, self.keys))
            )
            bias = self._bias(layout, attn_mask, is_causal, query, key)
        with_sums = None
        if self.on_qk is not None:
            with_sums = self.on_qk(q.transpose(1, 2), k.transpose(1, 2), finite_bias(bias))
        if not explicit:

            def ordered(sums: Tensor | None) -> None:
                if with_sums is not None:
                    with_sums(
                        None if sums is None else layout.image_first(sums, (self.queries,), dim=2)
                    )

            z = fused_attention(
                query,
                key,
                value,
                attn_mask,
                is_causal,
                scale,
                with_sums=ordered if with_sums else None,
            )
            return self._through(self.hook_z, z, layout, self.queries)
        scores = q @ k.mT * self.scale
        scores = self.hook_attn_scores(scores if bias is None else scores + bias)
        z = self.hook_pattern(pattern_of(scores)) @ layout.image_first(value, (self.keys,), dim=2)
        z = self.hook_z(z.transpose(1, 2)).transpose(1, 2)
        return layout.as_model(z, (self.queries,), dim=2)

    def _check(self, layout: Layout, query: Tensor, key: Tensor, dropout_p: float) -> None:
        if dropout_p:
            raise NotImplementedError(
                "Attention with dropout is not hooked: call .eval() on the model."
            )
        self.calls += 1
        if self.calls > 1:
            raise NotImplementedError(
                f"{self.place} calls its kernel more than once in one call, which hooks cannot "
                "tell apart."
            )
        layout.check(f"{self.place}.hook_q", query.shape[2], (self.queries,))
        layout.check(f"{self.place}.hook_k", key.shape[2], (self.keys,))

    @property
    def place(self) -> str:
        """Name of the attention, such as "blocks.0.attn"."""
        return str(self.hook_q.name).removesuffix(".hook_q")

    # Weights of the projections; `…_text` where the text stream has its own. TypeError where no
    # Linear has them.

    @property
    def W_Q(self) -> Float[Tensor, "head d_in d_head"]:
        """Weights of the queries, one matrix a head; TypeError where no Linear makes them."""
        return self.weights.get("Q")

    @property
    def W_K(self) -> Float[Tensor, "head d_in d_head"]:
        """Weights of the keys, one matrix a head; TypeError where no Linear makes them."""
        return self.weights.get("K")

    @property
    def W_V(self) -> Float[Tensor, "head d_in d_head"]:
        """Weights of the values, one matrix a head; TypeError where no Linear makes them."""
        return self.weights.get("V")

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Weights of the output projection, by head; TypeError where no Linear follows."""
        return self.weights.get("O")

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Bias of the queries; None where there is none."""
        return self.weights.bias("Q")

    @property
    def W_Q_text(self) -> Float[Tensor, "head d_in d_head"]:
        """Weights of the text's queries, where it has its own projection."""
        return self.weights.get("Q", text=True)

    @property
    def W_K_text(self) -> Float[Tensor, "head d_in d_head"]:
        """Weights of the text's keys, where it has its own projection."""
        return self.weights.get("K", text=True)

    @property
    def W_V_text(self) -> Float[Tensor, "head d_in d_head"]:
        """Weights of the text's values, where it has its own projection."""
        return self.weights.get("V", text=True)

    @property
    def W_O_text(self) -> Float[Tensor, "head d_head d_model"]:
        """Weights of the text's output projection, where it has its own."""
        return self.weights.get("O", text=True)

    def _through(self, point: HookPoint, x: Tensor, layout: Layout, stream: str) -> Tensor:
        if not has_hooks(point):
            return x
        ours = layout.image_first(x, (stream,), dim=2).transpose(1, 2)
        return layout.as_model(same_shape(point, ours).transpose(1, 2), (stream,), dim=2)

    def _bias(
        self, layout: Layout, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor
    ) -> Tensor | None:
        """Mask as a bias [#batch #head query_pos key_pos], positions [image, text]."""
        mask = as_bias(mask, causal, query, key.shape[2])
        if mask is None:
            return None
        for dim, stream in ((2, self.queries), (3, self.keys)):
            mask = layout.image_first(mask, (stream,), dim=dim) if mask.shape[dim] > 1 else mask
        return mask


class _Kernel(TorchFunctionMode):
    """Hands torch's attention kernel to one `FamilyHeads`."""

    def __init__(self, heads: FamilyHeads, layout: Layout) -> None:
        super().__init__()
        self.heads, self.layout = heads, layout

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.heads.run(self.layout, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass
class KernelTap:
    """An attention, hooked where it calls torch's kernel.

    It runs with diffusers' native backend for the time of the call.
    """

    module: nn.Module
    heads: FamilyHeads
    layer: int

    def has_hooks(self) -> bool:
        """As in `Tap`."""
        return self.heads.has_hooks()

    def sides(self, point: HookPoint) -> tuple[set[str], set[str]] | None:
        """As in `Tap`."""
        queries, keys = {self.heads.queries}, {self.heads.keys}
        if point in (self.heads.hook_k, self.heads.hook_v):
            return keys, keys
        return (
            (queries, keys)
            if point in [getattr(self.heads, name) for name in HEAD_POINTS]
            else None
        )

    def attach(self, layout: Layout) -> list[RemovableHandle]:
        """As in `Tap`; the kernel is hooked between the module's start and end."""
        self.heads.calls = 0
        scopes: list[ExitStack] = []

        def enter(module: nn.Module, inputs: Any) -> None:
            with ExitStack() as scope:
                scope.enter_context(native_backend([module]))
                scope.enter_context(_Kernel(self.heads, layout))
                scopes.append(scope.pop_all())

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if scopes:
                scopes.pop().close()
            vars(self.heads).pop("bias", None)  # holds queries and keys

        return [
            self.module.register_forward_pre_hook(here(enter)),
            self.module.register_forward_hook(here(leave), always_call=True),
        ]

    def silent(self) -> list[str]:
        """As in `Tap`."""
        return [] if self.heads.calls else [f"{self.heads.place}.hook_*"]


@contextmanager
def native_backend(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the attentions among `modules` call torch's own kernel.

    Whatever backend is set is set again at the end.
    """
    every: list[Any] = [getattr(module, "processor", None) for module in modules]
    processors = {id(one): one for one in every if hasattr(one, "_attention_backend")}.values()
    kept = [(processor, processor._attention_backend) for processor in processors]
    try:
        for processor, _ in kept:
            processor._attention_backend = AttentionBackendName.NATIVE
        yield
    finally:
        for processor, backend in kept:
            processor._attention_backend = backend
