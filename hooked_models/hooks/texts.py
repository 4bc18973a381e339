"""The text as it enters a denoiser, as one tensor, whatever arguments and rows it comes in.

As in `streams`, this arithmetic also runs on a server without hooked_models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, no_type_check

import torch
from torch import Tensor


@no_type_check
def text_parts(arguments: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Arguments that hold text, by name: `text` itself and those whose names begin with it.

    Each is a tensor [batch text_pos …] or a list of rows [text_pos …].

    Example:
        >>> import torch
        >>> list(text_parts({"text": torch.ones(1, 2, 3), "scale": 2.0}, "text"))
        ['text']
    """
    found = {}
    for name, value in arguments.items():
        if name == text or name.startswith(f"{text}_"):
            rows = value if isinstance(value, (list, tuple)) else ()
            if (isinstance(value, Tensor) and value.ndim > 2) or (
                len(rows) and all(isinstance(row, Tensor) and row.ndim > 1 for row in rows)
            ):
                found[name] = value
    return found


@no_type_check
def batched(value: Any, rows: int) -> Tensor:
    """One argument as [batch text_pos d]; shorter rows of a list end in zeros.

    Example:
        >>> batched([torch.ones(5, 6), torch.ones(2, 6)], rows=2).shape
        torch.Size([2, 5, 6])
    """
    if isinstance(value, Tensor):
        return value.flatten(2).expand(rows, -1, -1)  # one text may serve all rows
    return torch.nn.utils.rnn.pad_sequence([row.flatten(1) for row in value], batch_first=True)


@no_type_check
def text_size(arguments: Mapping[str, Any], text: str) -> tuple[int, int]:
    """Positions and width of all text of a call, as `joined_text` joins it.

    Example:
        >>> texts = {"text": torch.ones(2, 3, 4), "text_t5": [torch.ones(5, 6), torch.ones(2, 6)]}
        >>> text_size(texts, "text")
        (8, 6)
    """
    length = width = 0
    for value in text_parts(arguments, text).values():
        rows = value[:1] if isinstance(value, Tensor) else value
        length += max(row.shape[0] for row in rows)
        width = max(width, rows[0].shape[1:].numel())
    return length, width


@no_type_check
def joined_text(arguments: Mapping[str, Any], text: str, rows: int) -> Tensor:
    """All text of a call [batch text_pos d_text], one encoder's positions after the other's.

    Narrower texts end in zeros, as do shorter rows of a list.

    Example:
        >>> import torch
        >>> texts = {"text": torch.ones(2, 3, 4), "text_t5": [torch.ones(5, 6), torch.ones(2, 6)]}
        >>> joined_text(texts, "text", rows=2).shape
        torch.Size([2, 8, 6])
    """
    parts = [batched(value, rows) for value in text_parts(arguments, text).values()]
    width = max(part.shape[-1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[-1])) for part in parts], dim=1)


@no_type_check
def parted_text(arguments: Mapping[str, Any], text: str, new: Tensor) -> dict[str, Any]:
    """The inverse of `joined_text`: arguments that hold text, by name, with new values.

    Example:
        >>> import torch
        >>> texts = {"text": torch.ones(2, 3, 4), "text_t5": [torch.ones(5, 6), torch.ones(2, 6)]}
        >>> found = parted_text(texts, "text", torch.zeros(2, 8, 6))
        >>> found["text"].shape, [row.shape[0] for row in found["text_t5"]]
        (torch.Size([2, 3, 4]), [5, 2])
    """
    found, start = {}, 0
    for name, value in text_parts(arguments, text).items():
        length = batched(value, len(new)).shape[1]
        here = new[:, start : start + length]
        start += length
        if isinstance(value, Tensor):
            width = value.flatten(2).shape[-1]
            found[name] = here[..., :width].reshape(len(new), *value.shape[1:]).contiguous()
        else:
            rows = [
                row[: len(old), : old[0].numel()].reshape(old.shape)
                for row, old in zip(here, value, strict=True)
            ]
            found[name] = type(value)(rows)
    return found
