"""Variance partition against statsmodels' ANOVA, effect vectors against least squares and planted
truth.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from dit_lens import variance


def unbalanced(n: int = 70, d: int = 3, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    """Vectors with effects of a, b and a:b in an unbalanced design whose factors are correlated."""
    rng = np.random.default_rng(seed)
    a = rng.integers(3, size=n)
    b = np.where(rng.random(n) < 0.5, a, rng.integers(4, size=n))
    c = rng.integers(2, size=n)
    effect = rng.normal(size=(3, 4, d))
    vectors = effect[a, b] + 0.7 * rng.normal(size=(n, d)) + 5
    return vectors, pd.DataFrame({"a": [f"a{i}" for i in a], "b": b, "c": np.where(c, "x", "y")})


def anova(vectors: np.ndarray, factors: pd.DataFrame, formula: str, typ: int) -> pd.DataFrame:
    """statsmodels' sums of squares, added over the vectors' components; rows named as here."""
    tables = [
        anova_lm(ols(f"y ~ {formula}", factors.assign(y=column)).fit(), typ=typ)[["sum_sq", "df"]]
        for column in vectors.T
    ]
    table = sum(tables[1:], tables[0])
    table.index = [row.replace("C(", "").replace(", Sum)", "") for row in table.index]
    return table / [((vectors - vectors.mean(0)) ** 2).sum(), len(tables)]


CODED = "C(a, Sum) + C(b, Sum) + C(c, Sum)"


@pytest.mark.parametrize("d", [1, 3])
def test_shares_of_main_effects_are_those_of_statsmodels(d):
    vectors, factors = unbalanced(d=d)
    table = variance.partition(vectors, factors, permutations=9)
    first, second, third = (anova(vectors, factors, CODED, typ) for typ in (1, 2, 3))
    for factor in "abc":
        assert table.r2_sequential[factor] == pytest.approx(first.sum_sq[factor], rel=1e-9)
        assert table.r2_partial[factor] == pytest.approx(second.sum_sq[factor], rel=1e-9)
        assert table.r2_partial[factor] == pytest.approx(third.sum_sq[factor], rel=1e-9)
        alone = anova(vectors, factors, f"C({factor}, Sum)", 1)
        assert table.r2_marginal[factor] == pytest.approx(alone.sum_sq[factor], rel=1e-9)
        assert table.df[factor] == table.df_partial[factor] == first.df[factor]
        residual = second.sum_sq["Residual"]
        assert table.partial_eta2[factor] == pytest.approx(
            second.sum_sq[factor] / (second.sum_sq[factor] + residual), rel=1e-9
        )
    assert table.r2_sequential["residual"] == pytest.approx(first.sum_sq["Residual"], rel=1e-9)
    assert table.df["residual"] == first.df["Residual"]
    assert table.r2_sequential.drop("total").sum() == pytest.approx(1)
    # the design is not orthogonal
    assert not np.isclose(table.r2_sequential["a"], table.r2_partial["a"], rtol=0.05)


def test_more_components_than_vectors_make_no_difference_to_a_rotated_table():
    vectors, factors = unbalanced()
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 3)))[0]
    tables = [
        variance.partition(v, factors, permutations=99) for v in (vectors, vectors @ rotation.T + 1)
    ]
    pd.testing.assert_frame_equal(*tables)


def test_interactions_are_tested_beside_their_factors_and_factors_not_beside_them():
    vectors, factors = unbalanced(140, seed=1)
    # statsmodels' type II needs every combination
    assert len(factors[["a", "b"]].drop_duplicates()) == 12
    table = variance.partition(vectors, factors, ["a:b"], permutations=9)
    first, second = (
        anova(vectors, factors, f"{CODED} + C(a, Sum):C(b, Sum)", typ) for typ in (1, 2)
    )
    for term in ("a", "b", "c", "a:b"):
        assert table.r2_sequential[term] == pytest.approx(first.sum_sq[term], rel=1e-9)
        assert table.r2_partial[term] == pytest.approx(second.sum_sq[term], rel=1e-9)
    assert list(variance.partition(vectors, factors, "all", permutations=1).index[:6]) == [
        "a",
        "b",
        "c",
        "a:b",
        "a:c",
        "b:c",
    ]


def test_shares_of_a_balanced_design_are_one_and_the_same():
    rng = np.random.default_rng(0)
    grid = pd.MultiIndex.from_product(
        [range(3), list("xy"), range(4)], names=["a", "b", "c"]
    ).to_frame(index=False)
    parts = {name: rng.normal(size=(grid[name].nunique(), 6)) for name in grid}
    parts = {name: part - part.mean(0) for name, part in parts.items()}
    vectors = 2 + sum(parts[name][pd.factorize(grid[name])[0]] for name in grid)
    table = variance.partition(torch.from_numpy(vectors), grid, permutations=99)
    sizes = {name: (part**2).sum() * len(grid) / len(part) for name, part in parts.items()}
    for name in grid:
        expected = sizes[name] / sum(sizes.values())
        assert table.loc[
            name, ["r2_sequential", "r2_marginal", "r2_partial"]
        ].tolist() == pytest.approx([expected] * 3)
        assert table.partial_eta2[name] == pytest.approx(1)
        assert table.p[name] == 0.01
    assert table.r2_sequential["residual"] == pytest.approx(0, abs=1e-12)
    effects = variance.effect_vectors(vectors, grid)
    np.testing.assert_allclose(effects["mean"], vectors.mean(0), atol=1e-12)
    for name in grid:
        np.testing.assert_allclose(
            effects[name].sel({name: list(dict.fromkeys(grid[name]))}), parts[name], atol=1e-12
        )
    everything = sum(effects.values()).sel(a=1, b="y", c=2)
    np.testing.assert_allclose(
        everything, vectors[grid.query("a == 1 and b == 'y' and c == 2").index[0]], atol=1e-12
    )


def test_permutation_p_agrees_with_the_f_test_on_normal_data():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        _, factors = unbalanced(60, seed=seed)
        y = (
            0.25 * rng.integers(1, 3) * (factors["c"] == "x")
            + 0.8 * factors["b"]
            + rng.normal(size=60)
        )
        found = variance.partition(y.to_numpy()[:, None], factors, permutations=1999, seed=1).p
        expected = anova_lm(ols(f"y ~ {CODED}", factors.assign(y=y)).fit(), typ=2)[
            "PR(>F)"
        ].to_numpy()[:3]
        # about 3 standard errors at p = 1/2
        np.testing.assert_allclose(found[:3].astype(float), expected, atol=0.04)
    again = variance.partition(y.to_numpy()[:, None], factors, permutations=1999, seed=1).p
    pd.testing.assert_series_equal(found, again)


def test_aliased_factors_are_reported_and_not_split():
    vectors, factors = unbalanced()
    factors = factors.assign(opposite=factors["c"].map({"x": "y", "y": "x"}))
    with pytest.warns(UserWarning, match="c with opposite; opposite with c"):
        table = variance.partition(vectors, factors, permutations=9)
    for name in ("c", "opposite"):
        assert table.loc[name, ["r2_partial", "partial_eta2", "p"]].isna().all()
        assert table.df_partial[name] == 0
    assert np.isnan(table.r2_sequential["opposite"])  # c came first
    assert table.r2_marginal["c"] == pytest.approx(table.r2_marginal["opposite"])
    without = variance.partition(vectors, factors.drop(columns="opposite"), permutations=9)
    assert table.r2_partial["a"] == pytest.approx(without.r2_partial["a"])
    assert table.r2_sequential["residual"] == pytest.approx(without.r2_sequential["residual"])
    assert list(table.aliased_with[:4]) == ["", "", "opposite", "c"]
    with pytest.raises(ValueError, match="cannot be told apart for c, opposite"):
        variance.effect_vectors(vectors, factors)


def test_what_only_several_others_explain_together_is_aliased_too():
    grid = pd.MultiIndex.from_product([range(3), range(2)], names=["a", "b"]).to_frame(index=False)
    grid["cell"] = 2 * grid["a"] + grid["b"]
    grid = pd.concat([grid, grid])
    vectors = np.random.default_rng(0).normal(size=(12, 4))
    with pytest.warns(UserWarning, match="a with cell; b with cell; cell with a, b"):
        table = variance.partition(vectors, grid, permutations=9)
    # the interaction is all that is its own
    assert (table.df["cell"], table.df_partial["cell"]) == (5, 2)
    interaction = variance.partition(vectors, grid[["a", "b"]], ["a:b"], permutations=9)
    assert table.r2_partial["cell"] == pytest.approx(interaction.r2_partial["a:b"])


def test_effect_vectors_of_an_unbalanced_design_are_the_least_squares_fit():
    vectors, factors = unbalanced()
    effects = variance.effect_vectors(vectors, factors, ["a:c"])
    fits = [
        ols("y ~ C(a, Sum) * C(c, Sum) + C(b, Sum)", factors.assign(y=y)).fit() for y in vectors.T
    ]
    fitted = np.stack([fit.fittedvalues for fit in fits], axis=1)
    total = sum(effects.values())
    rows = [total.sel(a=row.a, b=row.b, c=row.c).values for row in factors.itertuples()]
    np.testing.assert_allclose(rows, fitted, atol=1e-9)
    for name, effect in effects.items():
        if name != "mean":
            assert effect.dims == (*name.split(":"), "d")
            for factor in name.split(":"):
                np.testing.assert_allclose(effect.sum(factor), 0, atol=1e-9)


@pytest.mark.parametrize(
    ("factors", "interactions", "message"),
    [
        ({"a": [0, 1, 0]}, (), "3 values for 4 vectors"),
        ({"a": [0, 0, 0, 0]}, (), "single level"),
        ({"a": [0, 1, None, 1]}, (), "missing values"),
        ({"a": [0, 1, 0, 1]}, ["a:b"], "no factor 'b'"),
        ({"a": [0, 1, 0, 1]}, ["a"], "no interaction"),
        ({"a:b": [0, 1, 0, 1]}, (), "rename it"),
        ({}, (), "no factor"),
    ],
)
def test_bad_designs_are_refused(factors, interactions, message):
    with pytest.raises(ValueError, match=message):
        variance.partition(np.eye(4), factors, interactions)


def test_vectors_without_variance_or_with_nan_are_refused():
    with pytest.raises(ValueError, match="no variance"):
        variance.partition(np.ones((4, 2)) / 3, {"a": [0, 1, 0, 1]})
    with pytest.raises(ValueError, match="not finite"):
        variance.partition(np.full((4, 2), np.nan), {"a": [0, 1, 0, 1]})
