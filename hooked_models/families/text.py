"""The text as it enters a denoiser, whatever arguments and rows it comes in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from ..hooks.layout import Layout
from ..hooks.module import has_hooks
from .taps import here, same_shape


def text_parts(arguments: Mapping[str, Any], text: str) -> Iterator[tuple[str, Any]]:
    """Arguments that hold text, by name: `text` itself and those whose names begin with it.

    Each is a tensor [batch text_pos …] or a list of rows [text_pos …].

    Example:
        >>> import torch
        >>> list(text_parts({"text": torch.ones(1, 2, 3), "scale": 2.0}, "text"))[0][0]
        'text'
    """
    for name, value in arguments.items():
        if name == text or name.startswith(f"{text}_"):
            rows = value if isinstance(value, (list, tuple)) else ()
            if (isinstance(value, Tensor) and value.ndim > 2) or (
                rows and all(isinstance(row, Tensor) and row.ndim > 1 for row in rows)
            ):
                yield name, value


def joined_text(
    arguments: Mapping[str, Any], text: str, rows: int
) -> Float[Tensor, "batch text_pos d_text"]:
    """All text of a call, one encoder's positions after the other's.

    Narrower texts end in zeros, as do shorter rows of a list.

    Example:
        >>> import torch
        >>> texts = {"text": torch.ones(2, 3, 4), "text_t5": [torch.ones(5, 6), torch.ones(2, 6)]}
        >>> joined_text(texts, "text", rows=2).shape
        torch.Size([2, 8, 6])
    """
    parts = [_batched(value, rows) for _, value in text_parts(arguments, text)]
    width = max(part.shape[-1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[-1])) for part in parts], dim=1)


def _batched(value: Any, rows: int) -> Float[Tensor, "batch text_pos d"]:
    if isinstance(value, Tensor):
        return value.flatten(2).expand(rows, -1, -1)  # one text may serve all rows
    return torch.nn.utils.rnn.pad_sequence([row.flatten(1) for row in value], batch_first=True)


@dataclass
class TextTap:
    """`hook_text`: the arguments of a denoiser that hold its text, as one tensor."""

    module: nn.Module
    point: HookPoint
    text: str
    """Name of the (first) argument."""
    image: str
    """Name of the argument that holds the latents."""
    layer: int = -1
    fired: bool = field(default=False, init=False)

    def watched(self) -> bool:
        return has_hooks(self.point)

    def sides(self, point: HookPoint) -> tuple[set[str], set[str]] | None:
        return ({"text"}, {"text"}) if point is self.point else None

    def attach(self, layout: Layout) -> list[RemovableHandle]:
        self.fired = False
        return [self.module.register_forward_pre_hook(here(self._enter), with_kwargs=True)]

    def silent(self) -> list[str]:
        return [] if self.fired else [str(self.point.name)]

    def _enter(self, module: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        self.fired = True
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        more = given.pop("kwargs", {})
        new = same_shape(self.point, joined_text(given, self.text, len(given[self.image])))
        start = 0
        for name, value in list(text_parts(given, self.text)):
            length = _batched(value, len(new)).shape[1]
            given[name] = _as_given(new[:, start : start + length], value)
            start += length
        return (), {**given, **more}


def _as_given(new: Float[Tensor, "batch text_pos d_text"], value: Any) -> Any:
    if isinstance(value, Tensor):
        found = new[..., : value.flatten(2).shape[-1]]
        return found.reshape(len(new), *value.shape[1:]).contiguous()
    rows = [row[: len(old), : old[0].numel()] for row, old in zip(new, value, strict=True)]
    return type(value)(row.reshape(old.shape) for row, old in zip(rows, value, strict=True))
