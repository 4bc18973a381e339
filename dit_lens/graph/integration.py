"""Gradients averaged over runs between two, as integrated gradients need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from ..runs.chains import Chain
from ..runs.gradients import Metric, gradients
from ..runs.pairs import Pair


def runs_between(pair: Pair, ig_steps: int) -> list[tuple[Chain, float]]:
    """The runs whose gradients are averaged, with their weights.

    Args:
        pair: original and source.
        ig_steps: 1 for the original alone, m > 1 for m runs between the two.

    Raises:
        ValueError: `ig_steps` is less than 1.

    Example:
        >>> from dit_lens.graph.attribution import pair
        >>> [round(weight, 2) for _, weight in runs_between(pair(below, above), 2)]
        [0.5, 0.5]
    """
    if ig_steps == 1:
        return [(pair.original, 1.0)]
    return [(pair.interpolated(alpha), weight) for alpha, weight in quadrature(ig_steps)]


def quadrature(points: int) -> list[tuple[float, float]]:
    """Gauss–Legendre on [0, 1], as in captum.

    Far closer to the integral than EAP-IG's Riemann sum of as many points.

    Returns:
        (place, weight) of each point; weights sum to 1.

    Raises:
        ValueError: there is less than one point.

    Example:
        >>> [(round(place, 3), round(weight, 3)) for place, weight in quadrature(2)]
        [(0.211, 0.5), (0.789, 0.5)]
    """
    if points < 1:
        raise ValueError(f"ig_steps must be at least 1 (plain attribution), not {points}.")
    places, weights = np.polynomial.legendre.leggauss(points)  # on [-1, 1]
    return [((1 + float(x)) / 2, float(w) / 2) for x, w in zip(places, weights, strict=True)]


def gradients_along(
    pair: Pair,
    path: list[tuple[Chain, float]],
    names: tuple[Mapping[int, list[str]], Mapping[int, list[str]]],
    metric: Metric,
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
    """(step, gradients along the path at the first of `names`, source − original at the second).

    Tensors of a path that is the original run alone are those of the backward pass.

    Args:
        pair: original and source.
        path: runs and weights, as `runs_between` gives them.
        names: step → full names of hooks, to differentiate by and to compare.
        metric: differentiable; the tensor that the pair returns [batch …] → [batch].

    Example:
        >>> from dit_lens.graph.attribution import pair
        >>> two = pair(below, above, steps=0)
        >>> hooks = two.in_contexts(["blocks.1.hook_attn_out"])
        >>> [(step, gradient, change)] = gradients_along(
        ...     two, runs_between(two, 1), (hooks, hooks), red
        ... )
        >>> step, list(gradient) == list(change) == hooks[0]
        (0, True)
    """
    at, changing = names
    alone = path[0][0] is pair.original
    for step, found in gradients(path, at, metric, changing if alone else None):
        original = found.values if alone else None
        yield step, found.gradients, pair.differences(step, changing[step], original)
