"""Checks of arguments: the value in its right type, or a ValueError that names it and the fix."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

RENAMED = {
    "prompt": "prompts",
    "num_inference_steps": "num_steps",
    "guidance_scale": "guidance",
    "generator": "seed",
    "seeds": "seed",
}
"""Name of an argument of diffusers' pipelines → ours."""


def shown(value: Any, length: int = 80) -> str:
    """A value for a message, in one line of at most `length` characters.

    Arrays are shown by their shape, others by their repr.

    Example:
        >>> shown(torch.zeros(3, 4)), shown("x" * 200, 10)
        ('a tensor of shape [3, 4] (torch.float32)', "'xxxxxxxxx…")
    """
    if isinstance(value, Tensor) and value.ndim:
        return f"a tensor of shape {list(value.shape)} ({value.dtype})"
    if isinstance(value, np.ndarray) and value.size > 6:
        return f"an array of shape {list(value.shape)} ({value.dtype})"
    text = " ".join(repr(value).split())
    return text if len(text) <= length else text[:length] + "…"


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An integer, Python's, numpy's or a 0-dimensional tensor, as an int; booleans are refused.

    Args:
        name: of the argument, for the message.
        value: the argument as it was given.
        low: smallest value that is allowed; by default none.
        high: largest value that is allowed; by default none.

    Raises:
        ValueError: it is no integer, or lies outside.

    Example:
        >>> integer("num_steps", np.int64(4), low=1)
        4
    """
    limits = (
        f" from {low} to {high}"
        if high is not None
        else ""
        if low is None
        else f" of at least {low}"
    )
    several = isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0
    if (
        not isinstance(value, (bool, np.bool_))
        and not several
        and getattr(value, "dtype", None) is not torch.bool
    ):
        try:
            found = index(value)
        except (TypeError, ValueError, RuntimeError):
            pass
        else:
            if (low is None or found >= low) and (high is None or found <= high):
                return found
    raise ValueError(f"{name}={shown(value)}: give an integer{limits}.")


def is_several(value: Any) -> bool:
    """True for anything that can be iterated over, except text and 0-dimensional arrays.

    Example:
        >>> is_several([1]), is_several("ab"), is_several(np.array(1))
        (True, False, False)
    """
    return (
        isinstance(value, Iterable)
        and not isinstance(value, (str, bytes))
        and getattr(value, "shape", None) != ()
    )


def integers(
    name: str, value: Any, low: int | None = None, high: int | None = None
) -> tuple[int, ...]:
    """One integer or several as a tuple; errors as in `integer`.

    Example:
        >>> integers("steps", np.arange(3)), integers("steps", 2)
        ((0, 1, 2), (2,))
    """
    if not is_several(value):
        return (integer(name, value, low, high),)
    return tuple(integer(name, one, low, high) for one in value)


def number(
    name: str, value: Any, low: float | int | None = None, high: float | int | None = None
) -> float:
    """A finite real number as a float; booleans and text are refused.

    Raises:
        ValueError: it is no number, not finite, or outside of `low` to `high`.

    Example:
        >>> number("guidance", np.float32(4.5))
        4.5
    """
    one = not isinstance(value, (Tensor, np.ndarray)) or (
        value.ndim == 0 and value.dtype not in (torch.bool, np.dtype(bool))
    )
    if one and not isinstance(value, (bool, np.bool_, str, bytes, complex)):
        try:
            found = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            found = math.nan
        if (
            math.isfinite(found)
            and (low is None or found >= low)
            and (high is None or found <= high)
        ):
            return found
    limits = (
        ""
        if low is None
        else f" of at least {low:g}"
        if high is None
        else f" from {low:g} to {high:g}"
    )
    raise ValueError(f"{name}={shown(value)}: give a finite number{limits}.")


def one_of(name: str, value: Any, options: Sequence[Any]) -> Any:
    """`value`, which must be one of `options`.

    Raises:
        ValueError: it is another; the message lists them.

    Example:
        >>> one_of("branch", "cond", ("cond", "uncond"))
        'cond'
    """
    for option in options:
        if type(value) is type(option) and value == option:
            return option
    raise ValueError(f"{name}={shown(value)}: choose {' or '.join(map(repr, options))}.")


def chosen_steps(steps: Any, n: int, name: str = "steps") -> list[int]:
    """Some of `n` denoising steps, ascending and each once.

    Steps are one number, several or a slice, negative ones from the end; None is all of them.

    Raises:
        ValueError: one of them is no integer, or lies outside of the run; or there is none.

    Example:
        >>> chosen_steps(slice(2), 4), chosen_steps([-1, 0], 4), chosen_steps(None, 2)
        ([0, 1], [0, 3], [0, 1])
    """
    if isinstance(steps, slice):
        try:
            found = list(range(n)[steps])
        except TypeError:
            raise ValueError(
                f"{name}={shown(steps)}: give a slice of integers, such as slice(5)."
            ) from None
    else:
        found = (
            list(range(n))
            if steps is None
            else [one + n if one < 0 else one for one in integers(name, steps)]
        )
    if not found or not set(found) <= set(range(n)):
        raise ValueError(f"{name}={shown(steps)}: this run has steps 0 to {n - 1}.")
    return sorted(set(found))


def mapping(name: str, value: Any, of: str) -> Mapping[str, Any]:
    """A mapping whose keys are strings. `of` names its content, for the message.

    Raises:
        ValueError: it is none.

    Example:
        >>> mapping("metrics", {"mean": sum}, "functions")["mean"] is sum
        True
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}={shown(value)}: give a dict, name → {of}.")
    return value


def torch_device(value: Any) -> torch.device:
    """A device or its name as a device.

    Raises:
        ValueError: there is no such kind of device.

    Example:
        >>> torch_device("cuda:1").index
        1
    """
    try:
        if isinstance(value, (str, torch.device)):
            return torch.device(value)
    except RuntimeError:
        pass
    raise ValueError(f"device={shown(value)}: give a device of torch, such as 'cpu' or 'cuda:0'.")


def initial_latents(value: Any, batch: int, channels: int, patch_size: int) -> Tensor:
    """Initial latents [batch channels rows columns], whose rows and columns are whole patches.

    Raises:
        ValueError: they have another shape, are no real numbers, or not finite.

    Example:
        >>> initial_latents(torch.zeros(2, 4, 8, 6), batch=2, channels=4, patch_size=2).shape
        torch.Size([2, 4, 8, 6])
    """
    fix = (
        f"give a tensor [{batch} {channels} rows columns] of real numbers, rows and columns "
        f"multiples of {patch_size}"
    )
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"latents={shown(value)}: {fix}.")
    sides = value.shape[2:]
    if (
        value.ndim != 4
        or value.shape[:2] != (batch, channels)
        or any(side < 1 or side % patch_size for side in sides)
    ):
        raise ValueError(f"latents={shown(value)}: {fix}.")
    if not bool(value.isfinite().all()):
        raise ValueError("latents hold numbers that are not finite: give finite ones.")
    return value


def token_ids(value: Tensor, vocabulary: int) -> Tensor:
    """Token ids [batch text_pos] in the place of prompts.

    Raises:
        ValueError: they are no integers, have another shape, or lie outside of the vocabulary.

    Example:
        >>> token_ids(torch.tensor([[3, 1]]), vocabulary=5).shape
        torch.Size([1, 2])
    """
    whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
    if value.ndim != 2 or not value.numel() or not whole:
        raise ValueError(
            f"prompts={shown(value)}: give strings, or integer token ids [batch text_pos]."
        )
    if not 0 <= int(value.min()) <= int(value.max()) < vocabulary:
        raise ValueError(
            f"prompts hold token ids from {value.min()} to {value.max()}; the vocabulary has 0 to "
            f"{vocabulary - 1}."
        )
    return value


def row_indices(value: Any, n: int) -> Tensor:
    """Indices of rows of a batch of `n`, as an int64 tensor [row].

    Raises:
        ValueError: there is none, or one is no integer from 0 to n - 1.

    Example:
        >>> row_indices([1, 0, 1], 2)
        tensor([1, 0, 1])
    """
    rows = integers("rows", value, 0, n - 1)
    if not rows:
        raise ValueError(f"rows={shown(value)}: give at least one row, from 0 to {n - 1}.")
    return torch.tensor(rows)


def diffusers_names(function: Function) -> Function:
    """Name our argument where a function is called with that of diffusers' pipelines.

    Such as `num_inference_steps`. A method's object may take some names itself: its `own_names`.

    Example:
        >>> diffusers_names(lambda num_steps=1: num_steps)(num_steps=3)
        3
    """

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        own = getattr(args[0], "own_names", ()) if args else ()
        for name, ours in RENAMED.items():
            if name in kwargs and name not in own:
                raise TypeError(f"{name}= is called {ours}= here.")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]
