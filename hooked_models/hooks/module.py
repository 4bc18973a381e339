"""A HookedRootModule that refuses a hook which would never fire.

TransformerLens attaches a hook to a gated-off name without a word (``check_hooks_to_add`` runs in
``add_hook`` only), and caches nothing under a misspelt ``names_filter``. In an experiment both look
like "this head does nothing". Here every name is resolved before anything is attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from ..arguments import is_several, shown
from ..lazy_imports import renamed
from .errors import unknown_hook
from .points import ScopedHookPoint
from .scopes import scope, scopes
from .table import POSITIONS, Axes, HookPart, axis_of, hook_row

__getattr__ = renamed(
    __name__,
    {
        "NotFoldedError": "hooked_models.hooks.errors:NotFoldedError",
        "UnknownHookError": "hooked_models.hooks.errors:UnknownHookError",
        "NoLanguageModel": "hooked_models.hooks.module:LanguageToolGuard",
        "watched": "hooked_models.hooks.module:has_hooks",
    },
)

HookFunction = Callable[..., Tensor | None]
"""``fn(tensor, hook=HookPoint)``; returns None or the tensor to go on with."""

NameFilter = str | Callable[[str], bool] | Iterable[str] | None
"""One name, a predicate on names, several names, or None for every hook that fires."""


class LanguageToolGuard(nn.Module):
    """A model that says why TransformerLens' evaluations of language models do not apply."""

    def __call__(self, *args: Any, return_type: str | None = None, **kwargs: Any) -> Any:
        """`forward`. Raises TypeError for a language model's `return_type`."""
        if return_type is not None:
            raise TypeError(
                f"{type(self).__name__} has no {return_type}: it makes images, and "
                "TransformerLens' evals are for language models"
            )
        return super().__call__(*args, **kwargs)

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Raises TypeError: this model takes no text."""
        raise TypeError(
            f"{type(self).__name__} takes no text: tools that start from it (head_detector, evals) "
            "are for causal language models"
        )


def has_hooks(point: HookPoint) -> bool:
    """True if a hook is attached.

    TransformerLens', torch's, or a `forward` of the point's own, as nnsight gives it.

    Example:
        >>> from transformer_lens.hook_points import HookPoint
        >>> point = HookPoint()
        >>> _ = point.add_hook(lambda tensor, hook: None)
        >>> has_hooks(point), has_hooks(HookPoint())
        (True, False)
    """
    here = point.hook_state() if isinstance(point, ScopedHookPoint) else vars(point)
    attached = (
        here["fwd_hooks"] or here["bwd_hooks"] or here["_forward_hooks"] or here["_backward_hooks"]
    )
    return bool(attached) or "forward" in vars(point)


def as_names(names: Any) -> list[str]:
    """One hook name or several as a list.

    Raises:
        ValueError: there is none, or one is no string.
    """
    found = [names] if isinstance(names, str) else list(names) if is_several(names) else None
    if not found or not all(isinstance(name, str) for name in found):
        raise ValueError(
            f"{shown(names)} is no hook name: give one, several, or a predicate on names."
        )
    return found


def as_hooks(hooks: Any) -> list[tuple[str | Callable[[str], bool], HookFunction]]:
    """`fwd_hooks` as pairs (name or predicate, function).

    Raises:
        ValueError: it is something else; the message shows the form.
    """
    form = (
        "give a list of pairs [(name, function), …], such as Intervention(…).hooks(model, prompts)"
    )
    if isinstance(hooks, Mapping) or not is_several(hooks):
        raise ValueError(f"fwd_hooks={shown(hooks)}: {form}.")
    pairs = list(hooks)
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise ValueError(f"fwd_hooks holds {shown(pair)}: {form}.")
        where, function = pair
        if not (isinstance(where, str) or callable(where)) or not callable(function):
            raise ValueError(
                f"The hook ({shown(where)}, {shown(function)}) is no name or predicate with a "
                f"function: {form}."
            )
    return [(where, function) for where, function in pairs]


class HookedModule(HookedRootModule):
    """A HookedRootModule with strict names, aliases, gating flags and an ActivationCache."""

    hook_part: ClassVar[HookPart] = "dit"
    """The part of a generation that this module is, in the table `HOOKS`."""

    cache_class: ClassVar[type[ActivationCache]] = ActivationCache
    """Class of the cache that ``run_with_cache`` returns; built as ``cache_class(dict, model,
    has_batch_dim=…)``.
    """

    def add_aliases(self, aliases: Mapping[str, str]) -> None:
        """Let hooks be attached under further names (alias → name).

        ``hook.name`` stays the canonical one. Aliases live in ``mod_dict`` alone: in ``hook_dict``
        each would be cached a second time.
        """
        for alias, name in aliases.items():
            self.mod_dict[alias] = self.hook_dict[name]

    def canonical_name(self, name: str) -> str:
        """The name in ``hook_dict`` of a hook or alias that fires.

        Raises UnknownHookError (a KeyError) for a name that is no hook, ValueError for a hook that
        its flag holds back.
        """
        point = self.mod_dict.get(name)
        if not isinstance(point, HookPoint):
            raise unknown_hook(
                name, [known for known, mod in self.mod_dict.items() if isinstance(mod, HookPoint)]
            )
        if (flag := self._missing_flag(name)) is not None:
            raise ValueError(
                f"{name!r} does not fire while cfg.{flag} is False: call set_{flag}(True) first"
            )
        return str(point.name)

    def names(self, where: NameFilter) -> list[str]:
        """The canonical names that ``where`` selects, without duplicates.

        A predicate (or None) passes over hooks that are gated off, unless it selects nothing else:
        that is an error, as it is for a name. Raises the errors of ``canonical_name``.
        """
        if where is not None and not callable(where):
            return list(dict.fromkeys(map(self.canonical_name, as_names(where))))
        selected = [name for name in self.hook_dict if where is None or where(name)]
        firing = [name for name in selected if self._missing_flag(name) is None]
        if selected and not firing:
            self.canonical_name(selected[0])
        return firing

    def _hooked(self, where: str | Callable[[str], bool]) -> list[str]:
        """As `names`; ValueError for a predicate that selects none, whose hook would never fire."""
        names = self.names(where)
        if not names:
            raise ValueError(
                f"A predicate ({where!r}) selects no hook of {type(self).__name__}: its names are "
                "in hook_dict."
            )
        return names

    def _missing_flag(self, name: str) -> str | None:
        # an alias is gated as its canonical name
        flag = self.hook_flags.get(str(self.mod_dict[name].name))
        return flag if flag is not None and not getattr(self.cfg, flag) else None

    # TransformerLens' flags; of no effect in a module that has no such hooks

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Write attention outputs head by head, so that ``hook_result`` fires.

        Costs [batch pos head d_model]. This and the other flags raise ValueError when switched off
        under a hook that needs them.
        """
        self._set_flag("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Give every head its own copy of its inputs, so that ``hook_{q,k,v}_input`` fire.

        Costs three such tensors. Raises ValueError while ``use_attn_in`` is on: the two forks
        exclude each other.
        """
        self._set_flag("use_split_qkv_input", use_split_qkv_input, excludes="use_attn_in")

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Give every head one copy of the residual stream, so that its input hooks fire.

        They are ``hook_attn_in`` and ``hook_cross_attn_in``. Raises ValueError while
        ``use_split_qkv_input`` is on.
        """
        self._set_flag("use_attn_in", use_attn_in, excludes="use_split_qkv_input")

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Give the MLP its own copy of its input, before its norm; ``hook_mlp_in`` fires then."""
        self._set_flag("use_hook_mlp_in", use_hook_mlp_in)

    def _set_flag(self, flag: str, on: bool, excludes: str | None = None) -> None:
        if on and excludes is not None and getattr(self.cfg, excludes):
            raise ValueError(
                f"{flag} and {excludes} exclude each other: call set_{excludes}(False) first"
            )
        if not on and getattr(self.cfg, flag):
            for name, point in self.hook_dict.items():
                if self.hook_flags.get(name) == flag and (
                    point.has_hooks() or point.has_hooks("bwd")
                ):
                    raise ValueError(
                        f"{name!r} has a hook, which would silently stop firing: remove it before "
                        f"set_{flag}(False)"
                    )
        setattr(self.cfg, flag, on)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[tuple[str | Callable[[str], bool], HookFunction]] = (),
        bwd_hooks: Iterable[tuple[str | Callable[[str], bool], HookFunction]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedModule]:
        """TransformerLens' ``hooks``, with every name checked before the first hook is attached.

        The hooks act in the block and the thread that attach them. With ``reset_hooks_end=False``
        they stay attached, for all.
        """
        fwd: list[Any] = [
            (name, hook) for where, hook in as_hooks(fwd_hooks) for name in self._hooked(where)
        ]
        bwd: list[Any] = [
            (name, hook) for where, hook in as_hooks(bwd_hooks) for name in self._hooked(where)
        ]
        level = self.context_level + 1
        if not reset_hooks_end:
            for direction, pairs in (("fwd", fwd), ("bwd", bwd)):
                for name, hook in pairs:
                    self.hook_dict[name].add_hook(hook, direction, level=level)
            yield self
            return
        with scope(self) as inner:
            for direction, pairs in (("fwd", fwd), ("bwd", bwd)):
                for name, hook in pairs:
                    self.hook_dict[name].attach_in(inner, hook, direction, level)
            try:
                yield self
            finally:
                if clear_contexts:
                    self.clear_contexts()
                self.is_caching = False

    @property
    def context_level(self) -> int:
        """The number of ``hooks`` blocks that the caller is in, as in TransformerLens."""
        return sum(each.owner is self for each in scopes())

    @context_level.setter
    def context_level(self, level: int) -> None:
        """TransformerLens sets it to 0 when a module is made."""

    def setup(self) -> None:
        """TransformerLens' ``setup``.

        Hooks of the module's points belong to the block and thread that attach them.
        """
        super().setup()
        for point in self.hook_dict.values():
            if type(point) is HookPoint:
                point.__class__ = ScopedHookPoint

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """TransformerLens' ``add_hook``, with the name checked."""
        for canonical in self._hooked(name):
            super().add_hook(canonical, hook, dir, is_permanent, level, prepend)

    def add_caching_hooks(
        self, names_filter: NameFilter = None, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """TransformerLens' ``add_caching_hooks``, with the names checked."""
        return super().add_caching_hooks(self.names(names_filter), *args, **kwargs)

    def get_caching_hooks(
        self, names_filter: NameFilter = None, *args: Any, pos_slice: Any = None, **kwargs: Any
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """TransformerLens' ``get_caching_hooks``, with names checked.

        ``pos_slice`` is on each tensor's own position axis.
        """
        cache, fwd, bwd = super().get_caching_hooks(self.names(names_filter), *args, **kwargs)
        positions = Slice.unwrap(pos_slice)
        if positions.mode == "identity":
            return cache, fwd, bwd

        def sliced(save: HookFunction, tensor: Tensor, hook: HookPoint) -> None:
            axis = self.position_axis(str(hook.name))
            save(tensor if axis is None else positions.apply(tensor, dim=axis), hook=hook)

        return cache, *(
            [(name, partial(sliced, save)) for name, save in hooks] for hooks in (fwd, bwd)
        )

    @cached_property
    def hook_flags(self) -> Mapping[str, str]:
        """Hook name → the flag of ``cfg`` without which it does not fire, from `HOOKS`.

        A flag has a ``set_{flag}``.
        """
        rows = {name: hook_row(name, self.hook_part) for name in self.hook_dict}
        return {name: row.flag for name, row in rows.items() if row.flag is not None}

    def axes(self, name: str) -> Axes:
        """The axis names of a hook's tensor, from the table `HOOKS`; aliases are resolved.

        Raises:
            UnknownHookError: this module has no such hook.
            KeyError: the table has no row for it.

        Example:
            >>> model = HookedTextToImage.from_pretrained("rte-micro", weights=False)
            >>> model.dit.axes("blocks.0.cross_attn.hook_k")
            ('batch', 'text_pos', 'head', 'd_head')
        """
        point = self.mod_dict.get(name)
        if not isinstance(point, HookPoint):
            raise unknown_hook(name, list(self.hook_dict))
        return hook_row(str(point.name), self.hook_part).axes

    def position_axis(self, name: str, of: Literal["image", "text"] | None = None) -> int | None:
        """The axis that ``pos_slice`` slices in a hook's tensor, counted from the end.

        None for a tensor without positions. TransformerLens guesses it from the name's ending and
        would slice the batch of tensors that have no positions.

        Args:
            name: hook within the module.
            of: image positions or text positions; by default the module's own, image positions in a
                denoiser. Patterns have image queries, and text keys if they are cross-attention's.
        """
        axes = self.axes(name)
        axis = axis_of(
            axes, POSITIONS[of or ("text" if self.hook_part == "text_encoder" else "image")]
        )
        return None if axis is None else axis - len(axes)

    def run_with_cache(
        self,
        *args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """``(output, cache)`` of one forward.

        ``names_filter`` is any NameFilter, the rest as in TransformerLens.
        """
        output, tensors = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return output, tensors
        return output, self.cache_class(tensors, self, has_batch_dim=not remove_batch_dim)
