"""Views that TransformerLens' tools take for a language model.

"tokens" in, hooks under canonical names. The tools pass token tensors around and read their shape,
nothing else. So a view keeps the real inputs in a table, and its tokens are int64 row numbers of
that table, repeated over the positions (image or text) that a sweep shall run over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice

from ..hooks.errors import NotFoldedError
from ..hooks.layout import Layout
from ..hooks.module import HookFunction, LanguageToolGuard, NameFilter
from ..hooks.table import JOINT_POSITIONS
from ..hooks.wrapping import stamp
from .cache import DiTCache
from .text_state import TextState

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from .dit import HookedDiT

FOLD_FIRST = "use model.fold_timestep(t), which moves them into the weights"
Positions = Literal["image", "text"]
Tokens = Int[Tensor, "batch pos"]
HookList = Iterable[tuple[str | Callable[[str], bool], HookFunction]]


def has_joint_stream(dit: Any) -> bool:
    """True if the residual stream holds image and text positions, [image, text]."""
    return "joint_pos" in dit.axes("blocks.0.hook_resid_pre")


def text_places(dit: Any, layout: Layout, pos: str) -> slice | None:
    """Text positions of joint streams, for a view of the text's.

    None where a view shows tensors whole.
    """
    if pos != "text" or not has_joint_stream(dit):
        return None
    end = min(layout.n_image + layout.text_mask.shape[1], layout.length("joint"))
    return slice(layout.n_image, end)  # some models cut the text to the longest of the batch


def number_of_positions(dit: Any, layout: Layout, pos: Literal["image", "text", "joint"]) -> int:
    """Positions that a sweep "by position" goes over.

    Raises:
        ValueError: no stream of the denoiser holds both the image's and the text's ("joint").

    Example:
        >>> from hooked_models import HookedTextToImage
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> number_of_positions(model.dit, model.layout(["red circle"]), "text")
        3
    """
    if pos == "joint" and not has_joint_stream(dit):
        raise ValueError(
            f"pos={pos!r}: positions in this model's streams are of the image or of the text."
        )
    if (places := text_places(dit, layout, pos)) is not None:
        return int(places.stop - places.start)
    number = {"image": layout.n_image, "text": layout.text_mask.shape[1]}
    return number[pos] if pos in number else layout.length("joint")


class View(LanguageToolGuard):
    """Base of both views; a subclass defines how rows of its table are run.

    Attributes that a view lacks are the denoiser's (`cfg`, `hook_dict`, `W_U`, flags, …).
    """

    dit: Any

    def __init__(
        self,
        dit: Any,
        rows: int,
        positions: int,
        pos: Positions,
        places: slice | None = None,
    ) -> None:
        """`places`: the part of joint positions that hooks see, by default all of them."""
        super().__init__()
        self.__dict__["dit"] = dit  # not a child: a view owns no weights
        self.pos: Positions = pos
        self.places = places
        self.table = torch.arange(rows)[:, None].repeat(1, positions)
        self.train(dit.training)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["dit"], name)

    @property
    def cfg(self) -> Any:
        """The denoiser's configuration.

        Said here, because a runtime-checked protocol does not ask `__getattr__`.
        """
        return self.dit.cfg

    @property
    def owner(self) -> nn.Module:
        """The model that the view runs."""
        return self.dit

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The owner's, so that a tool which freezes or resets its `model` reaches them.

        Where it cannot, they say so.
        """
        return self.owner.named_parameters(*args, **kwargs)

    @property
    def blocks(self) -> Any:
        """The denoiser's blocks; unless it is folded, their output weights refuse to be read."""
        folded = getattr(self.dit, "folded_timestep", None) is not None
        return self.dit.blocks if folded else [_Gated(block) for block in self.dit.blocks]

    def to_tokens(
        self, rows: int | str | Sequence[int] | Sequence[str] | Tensor | None = None
    ) -> Tokens:
        """The tokens that stand for some rows of the table (all of them unless said).

        Raises TypeError for text.
        """
        if isinstance(rows, str) or (
            isinstance(rows, (list, tuple)) and any(isinstance(row, str) for row in rows)
        ):
            return super().to_tokens(rows)
        return self.table if rows is None else self.table[torch.as_tensor(rows).reshape(-1)]

    def rows(self, tokens: Tokens) -> Int[Tensor, " batch"]:
        """The rows that tokens stand for. Raises ValueError for tokens that are not this view's."""
        if (
            tokens.ndim != 2
            or not bool((tokens == tokens[:, :1]).all())
            or not bool((tokens < len(self.table)).all())
        ):
            raise ValueError(
                "these are no tokens of this view: take rows of the ones it came with (row "
                f"numbers below {len(self.table)}, "
                "each repeated over the positions), or view.to_tokens(rows)"
            )
        return tokens[:, 0]

    def forward(self, tokens: Tokens) -> Tensor:
        """Run some rows of the table."""
        raise NotImplementedError

    def placed(self, hooks: HookList) -> list[tuple[str, HookFunction]]:
        """Hooks by name, each of which sees its tensor's part at `places`."""
        return [
            (name, self._placed(name, function))
            for where, function in hooks
            for name in self.dit.names(where)
        ]

    def _placed(self, name: str, function: HookFunction) -> HookFunction:
        axes = self.dit.axes(name)
        if self.places is None or not set(axes) & set(JOINT_POSITIONS):
            return function
        part = tuple(self.places if axis in JOINT_POSITIONS else slice(None) for axis in axes)

        def hook(tensor: Tensor, hook: HookPoint) -> Tensor | None:
            new = function(tensor[part], hook=hook)
            if new is None:
                return None
            whole = tensor.clone()
            whole[part] = new
            return whole

        return hook

    @contextmanager
    def hooks(
        self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), **kwargs: Any
    ) -> Iterator[View]:
        """Attach hooks by canonical name, as `HookedModule.hooks` does."""
        with self.dit.hooks(self.placed(fwd_hooks), self.placed(bwd_hooks), **kwargs):
            yield self

    def run_with_hooks(
        self,
        tokens: Tokens,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        *,
        return_type: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`forward` with hooks under canonical names.

        Further arguments as in `HookedRootModule.hooks`.

        Raises:
            TypeError: `return_type` is a language model's ("logits", "loss"): a view returns images
                or predictions.
        """
        with self.hooks(fwd_hooks, bwd_hooks, **kwargs):
            return self(tokens, return_type=return_type)

    def run_with_cache(
        self,
        tokens: Tokens,
        names_filter: NameFilter = None,
        device: str | torch.device | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        pos_slice: Any = None,
        return_type: str | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ActivationCache]:
        """`(output, cache)`; `pos_slice` slices the view's own kind of positions, image or text.

        `incl_bwd` also caches gradients (`…_grad`) of a scalar output. The rest as in
        `HookedRootModule.run_with_cache`.
        """
        store: dict[str, Tensor] = {}
        positions = Slice.unwrap(pos_slice)

        def keep(suffix: str, tensor: Tensor, hook: HookPoint) -> None:
            of = self.pos if self.places is None else "image"  # joint axes begin with the image
            axis = self.dit.position_axis(str(hook.name), of)
            part = tensor.detach() if axis is None else positions.apply(tensor.detach(), dim=axis)
            # a later hook may write in place
            store[str(hook.name) + suffix] = part.to(device or part.device, copy=True)

        names = self.dit.names(names_filter)
        backward = [(name, partial(keep, "_grad")) for name in names] if incl_bwd else []
        with self.hooks([(name, partial(keep, "")) for name in names], backward, **kwargs):
            out = self(tokens, return_type=return_type)
            if incl_bwd:
                out.backward()
        cache = DiTCache(store, self.dit)
        return out, cache.remove_batch_dim(len(tokens)) if remove_batch_dim else cache


class DenoiserView(View):
    """One denoiser call for each row of a table of inputs; made by `HookedDiT.bind`."""

    def __init__(
        self,
        dit: HookedDiT,
        latents: Float[Tensor, "row channel rows columns"],
        timestep: Shaped[Tensor, " row"],
        text: TextState,
        sizes: Mapping[str, Tensor | None],
        pos: Positions,
        returns: Literal["out", "patches"],
    ) -> None:
        p = dit.cfg.patch_size
        positions = (
            text.text.shape[1] if pos == "text" else latents.shape[-2] * latents.shape[-1] // p**2
        )
        super().__init__(dit, len(latents), positions, pos)
        self.latents, self.timestep, self.text, self.sizes, self.returns = (
            latents,
            timestep,
            text,
            sizes,
            returns,
        )
        self.weights = stamp(dit)

    @property
    def conditions(self) -> dict[str, Tensor | None]:
        """Inputs of gates: where two calls have the same, a head's z is the same contribution."""
        return {"timestep": self.timestep, **self.sizes}

    @property
    def text_mask(self) -> Bool[Tensor, "row text_pos"]:
        """True where a text position may be attended to."""
        text, bias = self.text.text, self.text.bias
        return (
            torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            if bias is None
            else bias[:, 0] == 0
        )

    def between(self, other: DenoiserView, alpha: float) -> DenoiserView:
        """The call whose text and latents lie at self + α · (other − self)."""
        with torch.no_grad():
            mixed = torch.lerp(self.text.text, other.text.text, alpha)
            text = self.dit.encode_text(mixed, self.text.bias)
            latents = torch.lerp(self.latents, other.latents, alpha)
        return DenoiserView(
            self.dit, latents, self.timestep, text, self.sizes, self.pos, self.returns
        )

    def forward(self, tokens: Tokens) -> Tensor:
        """[batch out_channels height width], or [batch pos d_vocab] with `returns="patches"`."""
        rows = self.rows(tokens).to(self.latents.device)
        sizes = {name: None if size is None else size[rows] for name, size in self.sizes.items()}
        text, latents = self.text.take(rows), self.latents[rows]
        if torch.is_grad_enabled():  # a graph of its own, so that every call can be differentiated
            latents, text = (
                with_gradient(latents),
                self.dit.encode_text(with_gradient(text.text), text.bias),
            )
        elif stamp(self.dit) != self.weights:
            text = self.dit.encode_text(text.text, text.bias)
        out = self.dit(
            latents,
            timestep=self.timestep[rows],
            added_cond_kwargs=sizes,
            text_state=text,
            return_dict=False,
        )[0]
        return out if self.returns == "out" else self.dit.patches(out)


def with_gradient(tensor: Tensor) -> Tensor:
    """A tensor that gradients reach."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


class _Gated:
    """A block or sublayer of an unfolded model, whose output weights lack the gate."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name in ("W_O", "b_O", "W_out", "b_out"):
            raise NotFoldedError(
                f"{name} ignores the timestep's gate, so it is not what is added to the residual: "
                f"{FOLD_FIRST}"
            )
        found = getattr(self._module, name)
        return _Gated(found) if name in ("attn", "mlp") else found
