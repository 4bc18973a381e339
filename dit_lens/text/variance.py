"""Variance partition of word vectors over a factorial set of prompts.

The effect vector of each factor's level comes with it.

    prompts = variance.factorial_prompts()
    vectors, factors = variance.word_vectors(model, prompts, role="shape2", at="caption")
    chosen = factors[["color2", "shape2", "shape1", "relation"]]
    table = variance.partition(vectors, chosen, interactions=["color2:shape2"])
    effects = variance.effect_vectors(vectors, factors[["shape2", "relation"]])  # for steering

Source: Wang, Fan, Pan (arXiv 2601.06338), appendix B.6 (`variance_partition_with_effects.py`). Sums
of squares are those of Anderson 2001 (PERMANOVA, Austral Ecology 26) for Euclidean distances:
ordinary ANOVA sums, added over the vector's components.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from .word_vectors import (
    Space,
    encode,
    encode_prompts,
    factorial_prompts,
    factors_of,
    phrase_of,
    phrase_span,
    word_vectors,
)

__all__ = [
    "Space",
    "effect_vectors",
    "encode",
    "encode_prompts",
    "factorial_prompts",
    "factors_of",
    "partition",
    "phrase_of",
    "phrase_span",
    "word_vectors",
]

Vectors = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]
Factors = pd.DataFrame | Mapping[str, Sequence[Any] | pd.Series]
Interactions = Sequence[str] | Literal["all"]

ROUNDING = 1e-9
"""Relative size below which a direction of the design, or a share of the variance, is rounding."""
RESERVED = ("mean", "residual", "total", "d")

# The design


@dataclass(frozen=True)
class _Term:
    """Factor, or interaction of several."""

    name: str
    factors: tuple[str, ...]
    levels: tuple[tuple[Any, ...], ...]
    contrasts: Float[np.ndarray, "cell column"]
    """Sum-to-zero coding of every combination of levels; Kronecker product of the factors' own."""
    columns: Float[np.ndarray, "n column"]

    def margin_of(self, other: _Term) -> bool:
        """True if `other` is an interaction with this term (`a:b:c` has `a` and `a:b`)."""
        return set(self.factors) < set(other.factors)


def _terms(factors: Factors, interactions: Interactions, n: int) -> list[_Term]:
    coded = {str(name): _coding(str(name), values, n) for name, values in dict(factors).items()}
    if not coded:
        raise ValueError("There is no factor.")
    pairs = itertools.combinations(coded, 2)
    together = [":".join(pair) for pair in pairs] if interactions == "all" else list(interactions)
    for name in together:
        parts = name.split(":")
        if unknown := [part for part in parts if part not in coded]:
            raise ValueError(
                f"There is no factor {unknown[0]!r}: the factors are {', '.join(coded)}."
            )
        if len(parts) < 2 or len(set(parts)) < len(parts):
            raise ValueError(f"{name!r} is no interaction: write 'a:b' for two different factors.")
    return [_term(name, coded, n) for name in [*coded, *together]]


_Coding = tuple[tuple[Any, ...], np.ndarray, np.ndarray]
"""Levels of a factor, the level of each vector, and contrasts [level column]."""


def _coding(name: str, values: Collection[Any], n: int) -> _Coding:
    """Code a factor so that its columns sum to zero over the levels."""
    if len(values) != n:
        raise ValueError(f"Factor {name!r} has {len(values)} values for {n} vectors.")
    if name in RESERVED or ":" in name:
        raise ValueError(f"A factor cannot be called {name!r}: rename it.")
    found = pd.Categorical(list(values)).remove_unused_categories()
    if (found.codes < 0).any():
        raise ValueError(f"Factor {name!r} has missing values: leave those rows out.")
    levels = len(found.categories)
    if levels < 2:
        raise ValueError(
            f"Factor {name!r} has a single level, {found.categories[0]!r}: leave it out."
        )
    contrasts = np.vstack([np.eye(levels - 1), -np.ones(levels - 1)])
    return tuple(found.categories), np.asarray(found.codes), contrasts


def _term(name: str, coded: Mapping[str, _Coding], n: int) -> _Term:
    parts = tuple(name.split(":"))
    contrasts: np.ndarray = np.ones((1, 1))
    cells = np.zeros(n, dtype=int)
    for part in parts:
        levels, codes, own = coded[part]
        contrasts, cells = np.kron(contrasts, own), cells * len(levels) + codes
    of_parts = tuple(coded[part][0] for part in parts)
    return _Term(name, parts, of_parts, contrasts, contrasts[cells])


def _basis(
    columns: Float[np.ndarray, "n column"], given: Float[np.ndarray, "n given"] | None = None
) -> Float[np.ndarray, "n rank"]:
    """Orthonormal basis of the centred columns, after removal of `given` (orthonormal, centred)."""
    columns = columns - columns.mean(axis=0)
    scale = np.linalg.norm(columns)
    if given is not None:
        columns = columns - given @ (given.T @ columns)
    left, size, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, size > ROUNDING * scale]


def _span_of(terms: Sequence[_Term], n: int) -> Float[np.ndarray, "n rank"]:
    return _basis(np.hstack([np.zeros((n, 0)), *(term.columns for term in terms)]))


def _as_array(vectors: Vectors) -> Float[np.ndarray, "n d"]:
    values = (
        vectors.detach().double().cpu().numpy()
        if isinstance(vectors, Tensor)
        else np.asarray(vectors, dtype=float)
    )
    if not np.isfinite(values).all():
        raise ValueError(
            "Some vectors are not finite; T5, for one, overflows in float16: encode in float32 or "
            "bfloat16."
        )
    return values


# Partition


def partition(
    vectors: Vectors,
    factors: Factors,
    interactions: Interactions = (),
    permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of the vectors' variance explained by each factor.

    Factors are categories, coded to sum to zero. All sums of squares are added over the d
    components, and R² are shares of the total around the mean.

    Args:
        vectors: [vector d].
        factors: name → a value for each vector. The order matters for the sequential column only.
        interactions: terms such as "shape1:relation" of two or more of the factors, or "all" for
            every pair.
        permutations: number of permutations of the test.
        seed: seed of the permutations.

    Returns:
        One row a term, then `residual` and `total` (only df, sequential). Columns:

        - ``df``: of the term, after the factors that it is made of.
        - ``r2_sequential`` (ANOVA type I): gain when the term joins those above it. Adds up, with
          the residual, to 1.
        - ``r2_marginal``: of the term alone (of an interaction: after its own factors).
        - ``r2_partial`` (type II): gain after all terms that do not contain it; without
          interactions, this is type III too.
        - ``df_partial``: remaining df after those terms.
        - ``partial_eta2``: SS / (SS + SS residual), with the partial SS; NaN if both are 0.
        - ``p``: of the partial share, by Freedman & Lane 1983: permutes the residuals of the model
          with all terms that do not contain this one; the statistic is pseudo-F (as partial η²,
          which has the same order). At least 1 / (permutations + 1).
        - ``aliased_with``: terms that explain the same differences ("" for none). A term with
          nothing of its own has NaN.

        In a balanced orthogonal design the three shares are equal.

    Raises:
        ValueError: factors and vectors do not go together, or the vectors do not vary.

    Example:
        >>> vectors = np.array([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0], [3.0, 1.0]])
        >>> table = partition(vectors, {"x": [0, 0, 1, 1], "y": [0, 1, 0, 1]}, permutations=9)
        >>> table["r2_partial"].dropna().round(3).to_dict()
        {'x': 0.9, 'y': 0.1}
    """
    values = _as_array(vectors)
    n, centred = len(values), values - values.mean(axis=0)
    terms = _terms(factors, interactions, n)
    if centred.shape[1] > n:  # a rotation into the span of the vectors keeps all sums of squares
        centred = np.linalg.qr(centred.T).R.T
    total = (centred**2).sum()
    if total <= (ROUNDING**2) * max((values**2).sum(), np.finfo(float).tiny):
        raise ValueError("All vectors are equal: there is no variance to partition.")
    own = {term.name: _own_basis(term, terms, n) for term in terms}
    full = _span_of(terms, n)
    rng = np.random.default_rng(seed)

    def share(basis: Float[np.ndarray, "n rank"]) -> float:
        return float(((basis.T @ centred) ** 2).sum() / total) if basis.shape[1] else np.nan

    rows, earlier = {}, list[_Term]()
    for term in terms:
        name = term.name
        without = _span_of([t for t in terms if t is not term and not term.margin_of(t)], n)
        last = _basis(term.columns, without)
        eta, p = _freedman_lane(
            centred - without @ (without.T @ centred), last, full, total, permutations, rng
        )
        df = own[name].shape[1]
        rows[name] = {
            "df": df,
            "r2_sequential": share(_basis(term.columns, _span_of(earlier, n))),
            "r2_marginal": share(own[name]),
            "r2_partial": share(last),
            "df_partial": last.shape[1],
            "partial_eta2": eta,
            "p": p,
            "aliased_with": _aliases(term, terms, own) if last.shape[1] < df else "",
        }
        earlier.append(term)
    left = n - 1 - full.shape[1]
    rows["residual"] = {"df": left, "r2_sequential": 1 - share(full), "aliased_with": ""}
    rows["total"] = {"df": n - 1, "r2_sequential": 1.0, "aliased_with": ""}
    table = (
        pd.DataFrame.from_dict(rows, orient="index")
        .rename_axis("term")
        .astype({"df_partial": "Int64"})
    )
    if aliased := [
        f"{name} with {row['aliased_with']}" for name, row in rows.items() if row["aliased_with"]
    ]:
        warnings.warn(
            f"Aliased: {'; '.join(aliased)}. What they share is in neither's partial share.",
            stacklevel=2,
        )
    return table


def _own_basis(term: _Term, terms: Sequence[_Term], n: int) -> Float[np.ndarray, "n rank"]:
    """Basis of a term, after the factors that it is made of."""
    return _basis(term.columns, _span_of([other for other in terms if other.margin_of(term)], n))


def _freedman_lane(
    residuals: Float[np.ndarray, "n d"],
    basis: Float[np.ndarray, "n rank"],
    full: Float[np.ndarray, "n full_rank"],
    total: float,
    permutations: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """(partial η², p) of the term spanned by `basis`, given the residuals of the reduced model."""
    left, rank = (residuals**2).sum(), basis.shape[1]
    if not rank:
        return np.nan, np.nan
    if left <= ROUNDING * total:
        return np.nan, 1.0  # no variance is left to explain
    ordered = np.hstack([basis, _basis(full, basis)]).T

    def eta2(rows: np.ndarray) -> float:
        squares = ((ordered @ residuals[rows]) ** 2).sum(axis=1)
        explained = squares[:rank].sum()
        unexplained = max(left - squares.sum(), 0.0)
        return (
            float(explained / (explained + unexplained))
            if explained + unexplained > ROUNDING * left
            else 0.0
        )

    observed = eta2(np.arange(len(residuals)))
    exceed = sum(
        eta2(rng.permutation(len(residuals))) >= observed - ROUNDING for _ in range(permutations)
    )
    return observed, (1 + exceed) / (1 + permutations)


def _aliases(term: _Term, terms: Sequence[_Term], own: Mapping[str, np.ndarray]) -> str:
    mine = own[term.name]
    others = [
        other.name
        for other in terms
        if other is not term and not term.margin_of(other) and not other.margin_of(term)
    ]
    shared = [name for name in others if _basis(own[name], mine).shape[1] < own[name].shape[1]]
    return ", ".join(shared) or "the others together"


def effect_vectors(
    vectors: Vectors, factors: Factors, interactions: Interactions = ()
) -> dict[str, xr.DataArray]:
    """Effect vector of each level of each factor, by least squares.

    They sum to zero over the levels.

    Returns:
        `"mean"`: the intercept, dims (d,), which is the mean of a balanced set; each factor: dims
        (factor, d); each interaction: dims (factor, factor, …, d). Axes carry the levels, so
        `effects["relation"].sel(relation="left")` is a vector, and the sum of all entries is, by
        broadcasting, the fitted vector of every combination of levels.

    Raises:
        ValueError: as in `partition`; or a term is aliased with others (or lacks some combination
            of levels), so that its vectors are not determined.

    Example:
        >>> vectors = np.array([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0], [3.0, 1.0]])
        >>> effects = effect_vectors(vectors, {"x": [0, 0, 1, 1], "y": [0, 1, 0, 1]})
        >>> effects["x"].sel(x=1).values.round(6).tolist()
        [1.5, 0.0]
    """
    values = _as_array(vectors)
    n = len(values)
    terms = _terms(factors, interactions, n)
    short = [t.name for t in terms if _beside_all(t, terms, n) < t.columns.shape[1]]
    if short:
        raise ValueError(
            f"The vectors cannot be told apart for {', '.join(short)}: leave one of the aliased "
            "factors out, or the interaction that lacks some combinations."
        )
    coefficients = np.linalg.lstsq(
        np.hstack([np.ones((n, 1)), *(t.columns for t in terms)]), values, rcond=None
    )[0]
    effects = {"mean": xr.DataArray(coefficients[0], dims="d", name="mean")}
    start = 1
    for term in terms:
        stop = start + term.columns.shape[1]
        cells = (term.contrasts @ coefficients[start:stop]).reshape(*map(len, term.levels), -1)
        coords = {
            factor: list(levels) for factor, levels in zip(term.factors, term.levels, strict=True)
        }
        effects[term.name] = xr.DataArray(
            cells, dims=(*term.factors, "d"), coords=coords, name=term.name
        )
        start = stop
    return effects


def _beside_all(term: _Term, terms: Sequence[_Term], n: int) -> int:
    return _basis(term.columns, _span_of([other for other in terms if other is not term], n)).shape[
        1
    ]
