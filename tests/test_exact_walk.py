"""The exact reference reproduces the project's table of reference figures and agrees with a direct simulation."""

import numpy as np
import pytest
from exact_walk import (
    TUTORIAL_WALK,
    best_gaussian,
    exact_posterior,
    expected_mse,
    expected_mse_slope,
    objective,
)
from scipy.special import expit


def test_the_tutorial_walk_is_a_walk():
    assert len(TUTORIAL_WALK) == 100
    assert TUTORIAL_WALK[0] == 0
    assert TUTORIAL_WALK[-1] == -55
    assert set(np.abs(np.diff(TUTORIAL_WALK))) == {1}


@pytest.mark.parametrize(
    ("w", "mean", "sd", "total", "loss", "reg"),
    [
        (1, -1.055220, 0.032437, 52.90451, 49.41878, 3.48573),
        (10, -1.051967, 0.101838, 77.30146, 53.87269, 23.42878),
        (100, -1.012146, 0.301403, 221.20093, 95.50606, 125.69487),
    ],
)
def test_best_gaussian_is_the_table(w, mean, sd, total, loss, reg):
    best = best_gaussian(TUTORIAL_WALK, w)
    # Half a unit of the table's last digit, doubled for the flat optimum's own rounding.
    assert best.mean == pytest.approx(mean, abs=1e-6)
    assert best.sd == pytest.approx(sd, abs=1e-6)
    assert best.terms.total == pytest.approx(total, abs=1e-5)
    assert best.terms.loss == pytest.approx(loss, abs=1e-4)
    assert best.terms.reg == pytest.approx(reg, abs=1e-4)


@pytest.mark.parametrize(
    ("w", "mean", "sd", "minimum"),
    [(1, -1.055221, 0.032455, 52.90433), (10, -1.052043, 0.102388, 77.28388), (100, -1.015977, 0.312903, 220.10943)],
)
def test_exact_posterior_is_the_table(w, mean, sd, minimum):
    posterior = exact_posterior(TUTORIAL_WALK, w)
    assert posterior.mean == pytest.approx(mean, abs=1e-6)
    assert posterior.sd == pytest.approx(sd, abs=1e-6)
    assert posterior.minimum == pytest.approx(minimum, abs=1e-5)


@pytest.mark.parametrize("w", [1, 10, 100])
def test_no_gaussian_beats_the_minimum_over_all_densities(w):
    assert exact_posterior(TUTORIAL_WALK, w).minimum < best_gaussian(TUTORIAL_WALK, w).terms.total


@pytest.mark.parametrize("theta", [-1.5, 0.0, 0.7])
def test_expected_mse_is_the_mean_over_simulated_walks(theta):
    rng = np.random.default_rng(0)
    steps = 2.0 * (rng.random((20_000, 99)) < expit(theta)) - 1.0
    paths = np.concatenate([np.zeros((20_000, 1)), steps.cumsum(1)], axis=1)
    mse = ((paths - np.asarray(TUTORIAL_WALK)) ** 2).mean(1)
    standard_error = mse.std() / np.sqrt(len(mse))
    assert abs(mse.mean() - expected_mse(theta, TUTORIAL_WALK)) < 4.5 * standard_error


def test_the_slope_is_the_derivative():
    theta = np.linspace(-3, 3, 13)
    h = 1e-5
    difference = (expected_mse(theta + h, TUTORIAL_WALK) - expected_mse(theta - h, TUTORIAL_WALK)) / (2 * h)
    np.testing.assert_allclose(expected_mse_slope(theta, TUTORIAL_WALK), difference, rtol=1e-6, atol=1e-5)


def test_the_sums_over_time_are_the_formula_step_by_step():
    theta = np.linspace(-4, 4, 17)
    p, y = expit(theta), np.asarray(TUTORIAL_WALK)
    by_step = [(t * (2 * p - 1) - y[t]) ** 2 + 4 * t * p * (1 - p) for t in range(100)]
    np.testing.assert_allclose(expected_mse(theta, TUTORIAL_WALK), np.mean(by_step, axis=0), rtol=1e-12)


def test_the_quadrature_has_converged():
    mean, sd = -1.0, 0.3
    grid = np.linspace(mean - 10 * sd, mean + 10 * sd, 20_001)
    density = np.exp(-0.5 * ((grid - mean) / sd) ** 2)
    loss = (density * expected_mse(grid, TUTORIAL_WALK)).sum() / density.sum()
    assert objective(mean, sd, TUTORIAL_WALK, 1.0).loss == pytest.approx(loss, rel=1e-10)
