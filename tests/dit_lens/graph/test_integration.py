"""The quadrature over runs, against integrals that are known."""

from __future__ import annotations

import pytest
from scipy.integrate import fixed_quad

from dit_lens.graph.integration import quadrature


@pytest.mark.parametrize("points", [1, 2, 5])
def test_polynomials_of_degree_two_n_minus_one_are_exact(points):
    found = quadrature(points)
    for degree in range(2 * points):
        integral = sum(weight * place**degree for place, weight in found)
        assert integral == pytest.approx(1 / (degree + 1))
        assert integral == pytest.approx(fixed_quad(lambda x: x**degree, 0, 1, n=points)[0])  # noqa: B023


def test_no_points():
    with pytest.raises(ValueError, match="at least 1"):
        quadrature(0)
