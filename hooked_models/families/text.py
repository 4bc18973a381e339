"""The text as it enters a live denoiser."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from ..hooks.layout import Layout
from ..hooks.module import has_hooks
from ..hooks.texts import joined_text, parted_text
from .taps import here, same_shape


@dataclass
class TextTap:
    """`hook_text`: the arguments of a denoiser that hold its text, as one tensor."""

    module: nn.Module
    point: HookPoint
    family: Any
    """A `Family`, which names the arguments that hold text and latents."""
    layer: int = -1
    fired: bool = field(default=False, init=False)
    signature: inspect.Signature = field(init=False)

    def __post_init__(self) -> None:
        # of the class: on a live module something else may stand in for it
        self.signature = inspect.signature(type(self.module).forward)

    def has_hooks(self) -> bool:
        """As in `Tap`."""
        return has_hooks(self.point)

    def sides(self, point: HookPoint) -> tuple[set[str], set[str]] | None:
        """As in `Tap`."""
        return ({"text"}, {"text"}) if point is self.point else None

    def attach(self, layout: Layout) -> list[RemovableHandle]:
        """As in `Tap`."""
        self.fired = False
        return [self.module.register_forward_pre_hook(here(self._enter), with_kwargs=True)]

    def silent(self) -> list[str]:
        """As in `Tap`."""
        return [] if self.fired else [str(self.point.name)]

    def _enter(self, module: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        self.fired = True
        bound = self.signature.bind(module, *args, **kwargs).arguments
        given = dict(list(bound.items())[1:])
        more, family = given.pop("kwargs", {}), self.family
        rows = family.by_row(module, given)
        new = same_shape(self.point, joined_text(rows, family.text, len(rows[family.image])))
        rows |= parted_text(rows, family.text, new)
        return (), {**family.as_called(module, rows), **more}
