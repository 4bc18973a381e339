"""Other diffusion transformers, hooked at their attentions: `FamilyModel` runs diffusers' own forward and names what is inside.

A `Family` says where the blocks and their attentions are and which positions are text. The rest is the model's own: queries
and keys are seen as its attention kernel gets them, after norms and rotary codes, so neither has to be written again.
All of these attentions call `torch.nn.functional.scaled_dot_product_attention`, which is stood in for while one of them runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..hooks import HookedModule, NoLanguageModel, UnknownHookError
from ..hooks_table import IMAGE_POSITIONS, Axes
from ..pixart.attention import Heads
from ..pixart.cache import DiTCache
from ..pixart.config import HookedConfig


@dataclass(frozen=True)
class Family:
    """How one kind of transformer is laid out."""

    name: str
    transformer: str
    """Its class in diffusers."""
    blocks: tuple[str, ...]
    """Paths of its lists of blocks, in the order in which they run; layers are counted through."""
    attentions: Mapping[str, str]
    """Our name of an attention (attn: image ↔ image, or both streams; cross_attn: image ← text) → the block's own."""
    text: Literal["before", "after", "cross"]
    """Where text stands in `attn`: before or after the image positions, or not at all, because `cross_attn` reads it."""
    inputs: Callable[[Any], dict[str, Any]]
    """Small random inputs for any model of the family, on which it is checked."""
    small: Callable[[], Any]
    """A random model of the family, with two heads or so, for tests."""
    no_pattern: Mapping[str, str] = field(default_factory=dict)
    """Attentions that have no pattern, and why."""
    notes: str = ""


class FamilyHeads(Heads):
    """One attention, its positions ordered [image, text] whatever the model's own order is."""

    def __init__(self, text: Literal["before", "after", "cross"]) -> None:
        super().__init__()
        self.text = text
        self.n_text = 0

    def run(
        self,
        query: Float[Tensor, "batch head query_pos d_head"],
        key: Float[Tensor, "batch head key_pos d_head"],
        value: Float[Tensor, "batch head key_pos d_head"],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Float[Tensor, "batch head query_pos d_head"]:
        """In place of `scaled_dot_product_attention`, with its arguments."""
        if dropout_p or is_causal or enable_gqa:
            raise NotImplementedError("Attention with dropout, a causal mask or grouped keys is not hooked: call .eval().")
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        first = self.n_text if self.text == "before" else 0

        def image_first(tensor: Tensor, dim: int) -> Tensor:
            return tensor.roll(-first, dims=dim) if first and tensor.shape[dim] > 1 else tensor

        q, k, v = (image_first(tensor, 2).transpose(1, 2) for tensor in (query, key, value))
        z = self(q, k, v, None if attn_mask is None else image_first(image_first(attn_mask, -1), -2)).transpose(1, 2)
        return z.roll(first, dims=2) if first else z


class _Kernel(TorchFunctionMode):
    """Hands the attention of whichever module is running to its `FamilyHeads`."""

    def __init__(self) -> None:
        super().__init__()
        self.current: FamilyHeads | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.current is not None:
            return self.current.run(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class FamilyBlock(nn.Module):
    """The attentions of one block."""

    def __init__(self, attentions: Mapping[str, Literal["before", "after", "cross"]]) -> None:
        super().__init__()
        for name, text in attentions.items():
            self.add_module(name, FamilyHeads(text))


class FamilyModel(NoLanguageModel, HookedModule):
    """A live transformer of a known family, with `blocks.{l}.{attn,cross_attn}.hook_{q,k,v,attn_scores,pattern,z}`.

    In attention over both streams, positions are [image, text]; `n_text` is the text's length in the last call. Weights are the
    wrapped module's, which is not changed, takes the same arguments and can be replaced by this one in its pipeline.
    """

    cache_class = DiTCache
    blocks: Any
    wrapped: Any
    """The diffusers module."""
    setup: Any
    mod_dict: Any

    def __init__(self, transformer: nn.Module, family: Family) -> None:
        super().__init__()
        live: Any = transformer
        self.family = family
        lists: list[Any] = [live.get_submodule(path) for path in family.blocks]
        modules = [block for blocks in lists for block in blocks]
        self._attentions: list[tuple[nn.Module, FamilyHeads]] = []
        self.blocks = nn.ModuleList()
        for block in modules:
            there = {ours: found for ours, own in family.attentions.items() if (found := getattr(block, own, None)) is not None}
            hooked = FamilyBlock({ours: "cross" if ours == "cross_attn" else family.text for ours in there})
            self._attentions += [(found, getattr(hooked, ours)) for ours, found in there.items()]
            self.blocks.append(hooked)
        first: Any = self._attentions[0][0]
        n_heads, inner = first.heads, first.to_q.out_features
        self.cfg = HookedConfig(
            d_model=first.to_q.in_features,
            d_head=inner // n_heads,
            n_heads=n_heads,
            n_layers=len(modules),
            n_ctx=0,
            act_fn="gelu_new",
            device=str(live.device),
            dtype=live.dtype,
        )
        self.n_text = 0
        self.setup()
        self.wrapped = live  # after setup(), which gives every module a name
        self.train(transformer.training)

    def __getattr__(self, name: str) -> Any:
        """What a pipeline asks of its transformer (`config`, `dtype`, `cache_context`, …) is the wrapped module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "wrapped" not in self._modules:
                raise
            return getattr(self._modules["wrapped"], name)

    def canonical_name(self, name: str) -> str:
        """As in HookedModule; says why an attention without a pattern has no hooks."""
        for sublayer, reason in self.family.no_pattern.items():
            if f".{sublayer}.hook_" in name and name not in self.mod_dict:
                raise UnknownHookError(f"{self.family.name} has no {name!r}: {reason}")
        return super().canonical_name(name)

    def axes(self, name: str) -> Axes:
        """As in HookedModule; positions of joint attention are "joint_pos", image first."""
        joint = self.family.text != "cross" and ".image_attn." not in name
        return tuple(f"joint_{axis}" if joint and axis in IMAGE_POSITIONS else axis for axis in super().axes(name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's own forward, with hooks."""
        given = inspect.signature(self.wrapped.forward).bind(*args, **kwargs).arguments
        text = given.get("encoder_hidden_states")
        self.n_text = 0 if text is None or self.family.text == "cross" else text.shape[1]
        with self._watching():
            return self.wrapped(*args, **kwargs)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        kernel = _Kernel()

        def enter(heads: FamilyHeads) -> Callable[..., None]:
            def begin(module: nn.Module, inputs: Any) -> None:
                heads.n_text, kernel.current = self.n_text, heads

            return begin

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            kernel.current = None

        with ExitStack() as stack:
            for module, heads in self._attentions:
                for handle in (module.register_forward_pre_hook(enter(heads)), module.register_forward_hook(leave)):
                    stack.callback(handle.remove)
            stack.enter_context(kernel)
            yield


def random(*shape: int) -> Tensor:
    """Normal numbers, the same in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
