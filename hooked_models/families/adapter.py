"""Other diffusion transformers, hooked from outside.

`FamilyModel` runs diffusers' own forward and names the tensors inside. A `Family` declares where
blocks, attentions and MLPs are and which positions are text. Queries and keys are seen as the
attention kernel receives them, after norms and rotary codes; residual streams and outputs, as
modules receive and return them. No part of a model's arithmetic is written again. A model without
hooks runs as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from ..hooks.errors import UnknownHookError
from ..hooks.layout import Layout
from ..hooks.module import HookedModule, LanguageToolGuard
from ..hooks.table import IMAGE_POSITIONS, TEXT_POSITIONS, Axes
from ..pixart.cache import DiTCache
from ..pixart.config import HookedConfig
from .blocks import Blocks
from .circuits import NORM_BEFORE, WeightCircuits
from .kernel_tap import FamilyHeads, KernelTap
from .taps import SilentHookError, StreamTap, Tap
from .text import TextTap
from .views import TIMES, FamilyView
from .weights import Weights


def default_sizes(live: Any) -> tuple[int, int, int]:
    """n_heads, d_head and d_model where the config has diffusers' usual names."""
    heads, d_head = live.config.num_attention_heads, live.config.attention_head_dim
    return heads, d_head, heads * d_head


@dataclass(frozen=True)
class Family:
    """How one kind of transformer is laid out."""

    name: str
    transformer: str
    """Its class in diffusers."""
    blocks: tuple[Blocks, ...]
    """Lists of blocks in the order in which they run; layers are counted through."""
    layout: Callable[[Any, Mapping[str, Any]], Layout]
    """Positions of a call, from the live model and the arguments by name."""
    inputs: Callable[[Any], dict[str, Any]]
    """Small random inputs for any model of the family, on which it is checked."""
    small: Callable[[], Any]
    """A random model of the family, with two heads or so, for tests."""
    sizes: Callable[[Any], tuple[int, int, int]] = default_sizes
    """n_heads, d_head, d_model."""
    image: str = "hidden_states"
    """Argument that holds the latents."""
    axes: str = ""
    """Axes of one row of latents: "nc" (tokens), "chw", "cfhw", "fchw" or "fhwc"; empty: by their
    number.
    """
    text: str = "encoder_hidden_states"
    """Argument that holds the (first) text."""
    mixers: tuple[str, ...] = ()
    """Modules of a block, besides attention kernels, that mix positions."""
    spreads: frozenset[str] = frozenset()
    """Streams in which one token's input reaches the others before the first block ("image",
    "text").
    """
    differentiable: Callable[[Any], AbstractContextManager[Any]] = lambda live: nullcontext()
    """Context in which a live model's gradients are right, where diffusers cuts them."""
    no_pattern: Mapping[str, str] = field(default_factory=dict)
    """Attentions that have no pattern, and why."""
    before: Callable[[Mapping[str, Any]], int] = lambda given: 0
    """Number of positions before the image's in latents and predictions, from the arguments as
    diffusers takes them; `by_row` leaves them away.
    """
    second: str = ""
    """Name of the pipeline's transformer that computes the unconditional branch, where that is
    another one than the conditional's.
    """
    layerwise: Callable[[Any], tuple[Any, Sequence[Any]]] | None = None
    """Embedding and layers of a text encoder, where the pipeline runs them one by one."""
    guidance: float = 1.0
    """Guidance by default, where the pipeline's own argument has no number."""
    completed: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda options: dict(options)
    """Arguments of the pipeline's call, with those that follow from others."""
    cond_first: bool = False
    """True if a call with both guidance branches has the conditional rows first."""
    latents: Callable[[Any, Mapping[str, Any]], tuple[int, ...]] | None = None
    """Shape of a row of latents, from the pipeline and the arguments of its call, where it draws
    its noise without `prepare_latents`.
    """
    sides: Callable[[Any, int, int], tuple[int, int]] = lambda pipe, height, width: (height, width)
    """Height and width of the images that a pipeline draws, from those of its call."""
    by_row: Callable[[Any, Mapping[str, Any]], dict[str, Any]] = lambda live, given: dict(given)
    """Arguments of a call with rows as every first axis, and an argument for each place that text
    has in the stream, in order; from the live model and the arguments as diffusers takes them.
    """
    as_called: Callable[[Any, Mapping[str, Any]], dict[str, Any]] = lambda live, rows: dict(rows)
    """Inverse of `by_row`."""
    kept: Callable[[Any], Any] = lambda encoded: encoded
    """Result of the pipeline's `encode_prompt`, with rows as every first axis."""
    handed: Callable[[Any], Any] = lambda encoded: encoded
    """Inverse of `kept`, once rows were chosen; makes anew what is of all rows together."""
    modular: Callable[[Any], Any] | None = None
    """Makes of diffusers' modular pipeline one that is called as others, where it has no other."""
    drawn: Callable[[Any, Mapping[str, Any], str, int | None], dict[str, Tensor]] | None = None
    """Arguments [1 …] of the pipeline's call that it draws for a row before its loop, from the
    pipeline, the call's other arguments, the row's prompt and its seed; without a seed, any of
    their shape.
    """
    nonlinear: Callable[[Any], str] = lambda live: NORM_BEFORE
    """Why scores of attention to the text are not linear in the residual stream; empty where they
    are.
    """
    position: Callable[[Any], Tensor | None] = lambda live: None
    """Position code [pos d_model] that is added to the image's stream, if there is one."""
    caption: Callable[[Any, Tensor], Tensor] = lambda live, text: text
    """Text as keys and values of cross-attention are made of it."""
    notes: str = ""


def submodule(block: Any, path: str) -> Any:
    """Module at a dotted path, None where there is none."""
    for part in path.split("."):
        block = getattr(block, part, None)
    return block


class FamilyBlock(nn.Module):
    """The hook points of one block, and the taps that lead to them."""

    def __init__(self, block: Any, layer: int, where: Blocks, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        n_heads, d_head, _ = sizes
        self.layer, self.where = layer, where
        for ours, attention in where.attentions.items():
            if (found := submodule(block, attention.path)) is not None:
                weights = Weights(block, found, n_heads, attention.weights)
                heads = FamilyHeads(attention.queries, attention.keys, d_head**-0.5, weights)
                self.add_module(ours, heads)
        self.taps = self.taps_on(block)

    def taps_on(self, block: Any) -> list[Tap]:
        """Taps that lead from a live block to these points."""
        where = self.where
        taps: list[Tap] = [
            KernelTap(found, getattr(self, ours), self.layer)
            for ours, attention in where.attentions.items()
            if (found := submodule(block, attention.path)) is not None
        ]
        entering = tuple(where.enters.values()), tuple(where.enters)
        taps.append(self._tap("resid_pre", block, *entering, axes=where.axes))
        textual = not where.text_if or submodule(block, where.text_if) is not None
        for leaf, write in where.writes.items():
            if (found := submodule(block, write.path)) is not None:
                streams = (
                    write.streams
                    if textual
                    else tuple(stream for stream in write.streams if stream != "text")
                )
                taps.append(self._tap(leaf, found, streams, call=write.call, axes=write.axes))
        leaving = {"axes": where.axes, "keeps_text": textual}
        return [*taps, self._tap("resid_post", block, where.leaves, **leaving)]

    def _tap(self, leaf: str, module: nn.Module, *args: Any, **kwargs: Any) -> StreamTap:
        name = f"hook_{leaf}"
        if name not in self._modules:
            self.add_module(name, HookPoint())
        return StreamTap(module, self._modules[name], self.layer, *args, **kwargs)


class FamilyModel(WeightCircuits, LanguageToolGuard, HookedModule):
    """A live transformer of a known family, with names for its tensors.

    Its attentions, residual streams and everything added to them. `layout` has the positions of the
    last call that had a hook. Weights are the wrapped module's, which is not changed, takes the
    same arguments and can be replaced by this one in its pipeline.

    Example:
        >>> from hooked_models import families
        >>> family = families.SUPPORTED["FluxTransformer2DModel"]
        >>> model = families.hook(family.small().eval())
        >>> _, cache = model.run_with_cache(
        ...     **family.inputs(model.wrapped), names_filter="blocks.0.attn.hook_pattern"
        ... )
        >>> cache["pattern", 0].shape, model.layout.grid, model.layout.n_text
        (torch.Size([2, 2, 11, 11]), (2, 3, 1), [5, 5])
    """

    cache_class = DiTCache
    blocks: Any
    wrapped: Any
    """The diffusers module."""
    setup: Any
    mod_dict: Any

    def __init__(
        self, transformer: nn.Module, family: Family, first: FamilyModel | None = None
    ) -> None:
        """`first`: of another transformer of the same shape, whose hook points it shares."""
        super().__init__()
        live: Any = transformer
        self.family = family
        self.layout: Layout | None = None
        n_heads, d_head, d_model = sizes = family.sizes(live)
        listed = [
            (block, where) for where in family.blocks for block in live.get_submodule(where.path)
        ]
        self.blocks = (
            first.blocks
            if first is not None
            else nn.ModuleList(
                FamilyBlock(block, layer, where, sizes)
                for layer, (block, where) in enumerate(listed)
            )
        )
        # [batch text_pos d_text]
        self.hook_text: HookPoint = HookPoint() if first is None else first.hook_text
        self._axes: dict[str, Axes] = {}
        self._taps: list[Tap] = [TextTap(transformer, self.hook_text, family)]
        for ours, (block, _) in zip(self.blocks, listed, strict=True):
            self._taps += ours.taps if first is None else ours.taps_on(block)
        self.cfg = HookedConfig(
            d_model=d_model,
            d_head=d_head,
            n_heads=n_heads,
            n_layers=len(listed),
            n_ctx=0,
            act_fn="gelu_new",
            device=str(live.device),
            dtype=live.dtype,
        )
        self.setup()
        self.wrapped = live  # after setup(), which gives every module a name
        self.second: Any = None
        """Model of the transformer that computes the unconditional branch, if that is another."""
        self.train(transformer.training)

    def __getattr__(self, name: str) -> Any:
        """Pass on the attributes that a pipeline reads of its transformer.

        Such are `config`, `dtype` and `cache_context`.

        Raises:
            AttributeError: the wrapped module has no such attribute; the message names the way to
                whole generations.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "wrapped" not in self._modules:
                raise
            wrapped = self._modules["wrapped"]
        if name.startswith("__") or hasattr(wrapped, name):
            return getattr(wrapped, name)
        raise AttributeError(self._alone(repr(name)))

    def _alone(self, what: str) -> str:
        return (
            f"{self.family.name} is hooked here as a denoiser alone, one call at a time, and has "
            f"no {what}: for prompts, steps, "
            "interventions and sweeps open its pipeline with HookedTextToImage.from_pipeline(pipe)."
        )

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError: a denoiser alone takes no prompts."""
        raise TypeError(self._alone("text encoder"))

    def canonical_name(self, name: str) -> str:
        """As in HookedModule; says why an attention without a pattern has no hooks."""
        for sublayer, reason in self.family.no_pattern.items():
            if f".{sublayer}.hook_" in name and name not in self.mod_dict:
                raise UnknownHookError(f"{self.family.name} has no {name!r}: {reason}")
        return super().canonical_name(name)

    def axes(self, name: str) -> Axes:
        """As in HookedModule; positions of both streams are "joint_pos", image first."""
        if name not in self._axes:
            self._axes[name] = self._axes_of(name)
        return self._axes[name]

    def _axes_of(self, name: str) -> Axes:
        usual_axes, point = super().axes(name), self.mod_dict[name]
        sides = next(sides for tap in self._taps if (sides := tap.sides(point)) is not None)

        def axis(usual: str) -> str:
            if usual not in IMAGE_POSITIONS + TEXT_POSITIONS:
                return usual
            streams = sides[usual.startswith("key")]
            bare = usual.replace("text_pos", "pos")
            if streams == {"text"}:
                return bare.replace("pos", "text_pos")
            return bare if streams == {"image"} else f"joint_{bare}"

        return tuple(map(axis, usual_axes))

    def bind(
        self,
        latents: Any,
        timestep: float | Shaped[Tensor, "*row"],
        text: Any,
        *,
        pos: Literal["image", "text", "joint"] = "image",
        **arguments: Any,
    ) -> tuple[FamilyView, Int[Tensor, "row pos"]]:
        """Bind the inputs of one denoiser call.

        ``(view, tokens)`` for TransformerLens' tools as ``model`` and ``tokens``.

        Args:
            latents: [row …] in the transformer's own layout, or a list of rows.
            timestep: one number for all rows, or one each.
            text: [row text_pos d_text] of the (first) text encoder, or a list of rows.
            pos: positions that a sweep "by position" goes over: the image's, the text's (hooks then
                see the text's part of joint streams alone), or all of both ("joint", the image's
                first).
            arguments: all others of the transformer's forward, by its own names (masks, position
                ids, pooled text, guidance).

        Raises:
            ValueError: streams of this family have no such positions.
            TypeError: an argument is missing or unknown.

        Example:
            >>> from hooked_models import families
            >>> family = families.SUPPORTED["SD3Transformer2DModel"]
            >>> model = families.hook(family.small().eval())
            >>> given = family.inputs(model.wrapped)
            >>> names = ("hidden_states", "timestep", "encoder_hidden_states")
            >>> parts = [given.pop(name) for name in names]
            >>> view, tokens = model.bind(*parts, pos="joint", **given)
            >>> tokens.shape, view(tokens).shape
            (torch.Size([2, 11]), torch.Size([2, 4, 4, 6]))
        """
        known = inspect.signature(self.wrapped.forward).parameters
        when = next(name for name in TIMES if name in known)
        times = torch.as_tensor(timestep, device=self.wrapped.device).expand(len(latents))
        given = {self.family.image: latents, when: times, self.family.text: text, **arguments}
        inspect.signature(self.wrapped.forward).bind(**given)
        view = FamilyView(self, given, pos)
        return view, view.to_tokens()

    def layout_of(self, *args: Any, **kwargs: Any) -> Layout:
        """Positions of a call with these arguments: grid of image tokens, text mask of each row."""
        return self.family.layout(self.wrapped, self._given(args, kwargs))

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        # of the class: an instance's own forward may be a wrapper of any signature
        forward = inspect.signature(type(self.wrapped).forward)
        given = dict(forward.bind(self.wrapped, *args, **kwargs).arguments)
        del given["self"]
        return given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module's own forward, with hooks.

        Raises:
            SilentHookError: a hook point that has a hook was not reached.
            LayoutError: a tensor has other positions than the family declares.
        """
        if torch.is_grad_enabled():
            with self.family.differentiable(self.wrapped):
                return self._watched(args, kwargs)
        return self._watched(args, kwargs)

    def _watched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        taps = [tap for tap in self._taps if tap.has_hooks()]
        if not taps:
            return self.wrapped(*args, **kwargs)
        given = self._given(args, kwargs)
        self.layout = layout = self.family.layout(self.wrapped, given)
        with ExitStack() as stack:
            for tap in taps:
                for handle in tap.attach(layout):
                    stack.callback(handle.remove)
            if any(module._compiled_call_impl is not None for module in self.wrapped.modules()):
                # compiled code would pass the hooks by
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            output = self.wrapped(*args, **kwargs)
        _check_all_fired(taps, given)
        return output


def _check_all_fired(taps: Sequence[Any], given: Mapping[str, Any]) -> None:
    """Raise SilentHookError if a hooked point was not reached in a call with these arguments."""
    skipped = set(given.get("skip_layers") or ())
    if silent := [name for tap in taps if tap.layer not in skipped for name in tap.silent()]:
        verb = "has a hook that" if len(silent) == 1 else "have hooks that"
        raise SilentHookError(
            f"{', '.join(silent[:3])} {verb} did not fire in this call: its module did not run (a "
            "cache or a compiled forward skips it), or its attention processor does not call "
            "torch's scaled_dot_product_attention; remove that cache, or call "
            "set_default_attn_processor() and set_attention_backend('native')."
        )
