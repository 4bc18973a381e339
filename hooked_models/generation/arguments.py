"""Checks of arguments: one value in its right type, or a ValueError that names the argument and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import numpy as np
from torch import Tensor


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An integer, Python's, numpy's or a 0-dimensional tensor, as an int; booleans are refused.

    Args:
        name: of the argument, for the message.
        low, high: the smallest and the largest that is allowed.

    Raises:
        ValueError: it is no integer, or lies outside.

    Example:
        >>> integer("num_steps", np.int64(4), low=1)
        4
    """
    limits = f" from {low} to {high}" if high is not None else "" if low is None else f" of at least {low}"
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, Tensor) and (value.ndim or value.is_floating_point())):
        try:
            found = index(value)
        except TypeError:
            pass
        else:
            if (low is None or found >= low) and (high is None or found <= high):
                return found
    raise ValueError(f"{name}={value!r}: give an integer{limits}.")


def integers(name: str, value: Any, low: int | None = None, high: int | None = None) -> tuple[int, ...]:
    """One integer or several as a tuple; errors as in `integer`.

    Example:
        >>> integers("steps", np.arange(3)), integers("steps", 2)
        ((0, 1, 2), (2,))
    """
    if isinstance(value, str) or not isinstance(value, Iterable) or getattr(value, "shape", None) == ():
        return (integer(name, value, low, high),)
    return tuple(integer(name, one, low, high) for one in value)


def number(name: str, value: Any, low: float | None = None) -> float:
    """A finite real number as a float; booleans and text are refused.

    Raises:
        ValueError: it is no number, not finite, or below `low`.

    Example:
        >>> number("guidance", np.float32(4.5))
        4.5
    """
    if not isinstance(value, (bool, np.bool_, str, bytes, complex)):
        try:
            found = float(value)
        except (TypeError, ValueError, RuntimeError):
            found = math.nan
        if math.isfinite(found) and (low is None or found >= low):
            return found
    raise ValueError(f"{name}={value!r}: give a finite number" + ("." if low is None else f" of at least {low:g}."))


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
    raise ValueError(f"{name}={value!r}: choose {' or '.join(map(repr, options))}.")
