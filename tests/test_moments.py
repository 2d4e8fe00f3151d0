"""Moments of series, and the method of simulated moments.

The statistical tests fail by chance less than once in 1,000 seeds each: 4 standard errors or more, few comparisons.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from pyrobirds import losses


def acf(z: Any, lag: int) -> float:
    """By loops over the pairs that are there, divided by the sum of squares of all that are."""
    d = z - np.nanmean(z)
    pairs = [d[t] * d[t + lag] for t in range(len(z) - lag)]
    return np.nansum(pairs) / np.nansum(d**2)


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 30), st.booleans(), st.integers(0, 2**31))
def test_series_moments_are_those_of_numpy_and_scipy(length: int, gaps: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    series = 2 + 3 * torch.randn(2, length, generator=generator, dtype=torch.float64)
    if gaps:
        series[:, 2:4] = torch.nan
    got = losses.SeriesMoments(lags=(1, 3))(series)
    for z, moments in zip(series.numpy(), got, strict=True):
        seen = z[~np.isnan(z)]
        expected = [
            *(seen.mean(), seen.std(), stats.skew(seen), stats.kurtosis(seen)),
            *(acf(values, lag) for values in (z, abs(z)) for lag in (1, 3)),
        ]
        assert moments.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_series_moments_have_names_in_their_order() -> None:
    moments = losses.SeriesMoments()
    assert moments.names == (
        *("mean", "sd", "skewness", "excess_kurtosis", "acf_1", "acf_5", "acf_10"),
        *("acf_abs_1", "acf_abs_5", "acf_abs_10"),
    )
    assert moments(torch.randn(3, 20)).shape == (3, 10)
    assert losses.SeriesMoments(lags=())(torch.randn(3, 20)).shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_series_moments_of_constant_and_empty_series_have_finite_gradients(dtype: torch.dtype) -> None:
    # 0.1 and 1/3 are rounded, so that their deviations from a computed mean need not be 0.
    series = torch.tensor([0.0, 0.1, 1 / 3, -1e8, torch.nan], dtype=dtype).unsqueeze(1).repeat(1, 37).requires_grad_()
    moments = losses.SeriesMoments()(series)
    expected = torch.zeros(5, 10, dtype=dtype)
    expected[:4, 0] = series[:4, 0].detach()
    torch.testing.assert_close(moments, expected)
    (gradient,) = torch.autograd.grad(moments.sum(), series)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[:4], torch.full((4, 37), 1 / 37, dtype=dtype))  # that of the mean


def test_gradients_of_series_moments_are_numerically_right(double_precision: None) -> None:
    series = torch.randn(2, 9)
    series[1, 4] = torch.nan
    seen = ~series.isnan()
    moments = losses.SeriesMoments(lags=(1, 2))

    def of_what_is_there(values: Tensor) -> Tensor:
        return moments(series.masked_scatter(seen, values))

    assert torch.autograd.gradcheck(of_what_is_there, series[seen].requires_grad_())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.SeriesMoments([1]),
            TypeError,
            r"lags must be a tuple of whole numbers of at least 1, got \[1\]",
        ),  # type: ignore[arg-type]
        (lambda: losses.SeriesMoments((0,)), ValueError, "each of lags must be at least 1, got 0"),
        (
            lambda: losses.SeriesMoments()(torch.zeros(2, 10)),
            ValueError,
            "series of 10 values have no lag 10: pass sho",
        ),
        (
            lambda: losses.Moments()(torch.zeros(2, 20, 2), torch.zeros(2, 20, 2)),
            ValueError,
            r"takes series of shape \(B, T\), got \(2, 20, 2\): for several series at once give the loss your own",
        ),
        (
            lambda: losses.Moments()(torch.zeros(2, 3), torch.zeros(2)),
            ValueError,
            r"got \(6,\): data of one number have no moments over time, give the loss your own statistics, \(B,\) -> "
            r"\(B, k\); to one series add a batch dimension",
        ),
    ],
)
def test_other_series_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# the loss


def mean_and_size(series: Tensor) -> Tensor:
    return torch.stack([series.nanmean(-1), series.square().nanmean(-1)], -1)


FULL = torch.tensor([[2.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
WEIGHTS = {"identity": None, "diagonal": torch.tensor([3.0, 0.5], dtype=torch.float64), "full": FULL}


def matrix(weight: Tensor | None) -> Any:
    if weight is None:
        return np.eye(2)
    return np.diag(weight.numpy()) if weight.dim() == 1 else weight.numpy()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_loss_is_its_formula(double_precision: None, name: str, m: int) -> None:
    x, y, w = torch.randn(3, m, 6), torch.randn(3, 6), matrix(WEIGHTS[name])
    y[1, 2] = torch.nan
    loss = losses.Moments(mean_and_size, WEIGHTS[name])
    got = loss(x, y)
    if m == 1:
        torch.testing.assert_close(loss(x[:, 0], y), got)
    for b in range(3):
        seen = ~y[b].isnan().numpy()
        simulated, data = x[b].numpy()[:, seen], y[b].numpy()[seen]
        statistics = np.stack([simulated.mean(1), (simulated**2).mean(1)], 1)
        error = statistics.mean(0) - [data.mean(), (data**2).mean()]
        noise = 0.0 if m == 1 else np.trace(w @ np.cov(statistics.T)) / m
        assert float(got[b]) == pytest.approx(error @ w @ error - noise, rel=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_loss_of_replicates_is_unbiased_and_that_of_one_run_is_not(double_precision: None, name: str) -> None:
    # n series of T Gaussian values: the mean and covariance of their mean and mean square are known.
    # 5 standard errors, because the losses, of degree 4 in a Gaussian, are skewed.
    n, length, mean, sd = 20_000, 4, 0.7, 1.2
    w = matrix(WEIGHTS[name])
    y = torch.tensor([0.3, -1.0, 0.5, 2.0]).expand(n, length)
    expected = np.array([mean, mean**2 + sd**2]) - [float(y[0].mean()), float(y[0].square().mean())]
    cov = np.array([[sd**2, 2 * mean * sd**2], [2 * mean * sd**2, 2 * sd**4 + 4 * mean**2 * sd**2]]) / length
    exact = expected @ w @ expected
    loss = losses.Moments(mean_and_size, WEIGHTS[name])
    for m in (2, 4):
        x = mean + sd * torch.randn(n, m, length)
        values = loss(x, y)
        assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / n**0.5
    values = loss(x[:, 0], y)
    assert abs(float(values.mean()) - exact - np.trace(w @ cov)) < 5 * float(values.std()) / n**0.5


@pytest.mark.parametrize("m", [1, 3])
def test_gradients_of_the_loss_are_numerically_right_with_gaps(double_precision: None, m: int) -> None:
    x, y = torch.randn(2, m, 12, requires_grad=True), torch.randn(2, 12)
    y[0, 3] = y[1] = torch.nan
    loss = losses.Moments(losses.SeriesMoments(lags=(1, 2)))
    assert torch.autograd.gradcheck(lambda x: loss(x, y), x)
    value = loss(x, y)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value[1] == 0
    assert (gradient.isfinite()).all()
    assert (gradient[0, :, 3] == 0).all()
    assert (gradient[1] == 0).all()


def test_the_data_themselves_have_no_loss_whatever_their_gaps() -> None:
    y = torch.randn(2, 30)
    y[:, 4:8] = torch.nan
    x = torch.where(y.isnan(), 100.0, y)
    assert losses.Moments()(x, y).tolist() == [0.0, 0.0]


def test_constant_series_have_a_finite_gradient() -> None:
    x = torch.full((2, 3, 20), 0.1, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.Moments()(x, torch.randn(2, 20)).sum(), x)
    assert gradient.isfinite().all()


def test_a_statistic_that_is_nan_is_a_failure_and_not_left_out() -> None:
    y = torch.randn(2, 6)
    y[0, 1] = torch.nan
    loss = losses.Moments(lambda series: series.mean(1, keepdim=True))(torch.randn(2, 3, 6), y)
    assert loss.isnan().tolist() == [True, False]


def test_data_of_one_number_take_statistics_of_their_own() -> None:
    x, y = torch.tensor([[1.0, 3.0]]), torch.tensor([1.0])
    loss = losses.Moments(lambda number: torch.stack([number, number.square()], -1))
    assert loss(x, y).tolist() == [(1 - 1) * (3 - 1) + (1 - 1) * (9 - 1)]
    assert loss(x[:, 1], y).tolist() == [2**2 + 8**2]


def test_counts_are_data() -> None:
    x, y = torch.randn(2, 3, 20), torch.randint(0, 9, (2, 20))
    assert torch.equal(losses.Moments()(x, y), losses.Moments()(x, y.float()))
    assert losses.Moments(mean_and_size, weight=FULL)(x, y).dtype == torch.float32


# the weight


def test_weight_from_is_the_inverse_of_the_covariance(double_precision: None) -> None:
    x = torch.randn(50, 8) * torch.linspace(1, 2, 50).unsqueeze(1)
    x[:, 3] = torch.nan
    weight = losses.Moments(mean_and_size).weight_from(x)
    expected = np.linalg.inv(np.cov(mean_and_size(x).numpy().T))
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-10)
    losses.Moments(mean_and_size, weight)  # accepted, so symmetric and positive


def test_weight_from_makes_moments_of_any_units_comparable(double_precision: None) -> None:
    # (s - E s)^T Cov^-1 (s - E s) has the expectation k, here with the covariance of n runs.
    n = 4_000
    x = torch.randn(2 * n, 40) * 1e-3
    moments = losses.Moments(losses.SeriesMoments(lags=(1,)))
    weighted = losses.Moments(moments.statistics, moments.weight_from(x[:n]))
    values = weighted(x[: n // 2].unsqueeze(1), x[n // 2 : n])
    # Twice, for the noise of both; the covariance has n - 1 degrees of freedom, which adds 4 standard errors of
    # sqrt(2 k / n) at most.
    assert abs(float(values.mean()) - 2 * 6) < 4 * float(values.std()) / (n // 2) ** 0.5


@pytest.mark.parametrize(
    ("x", "statistics", "message"),
    [
        (torch.randn(2, 8), mean_and_size, "x has 2 runs, but 2 statistics need at least 3 for an invertible"),
        (torch.ones(9, 8), mean_and_size, r"the statistics \[0, 1\] do not vary between the 9 runs of x, or are not"),
        (
            torch.arange(16.0) % 5 + torch.arange(-15.0, 15.0).unsqueeze(1),
            losses.SeriesMoments((1,)),
            r"the statistics \['sd', 'skewness', 'excess_kurtosis', 'acf_1'\] do not vary",
        ),
        (
            torch.randn(30, 8),
            lambda series: mean_and_size(series)[:, [0, 1, 0]],
            "the 3 statistics are linearly dependent over the 30 runs of x: leave out what follows",
        ),
    ],
)
def test_runs_that_give_no_weight_are_refused(x: Tensor, statistics: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.Moments(statistics).weight_from(x)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0], TypeError, r"weight must be a tensor \(k,\) or \(k, k\), or None, got a list"),
        (torch.ones(()), ValueError, r"weight must be of shape \(k,\) or \(k, k\), got \(\)"),
        (torch.ones(2, 3), ValueError, r"weight must be of shape \(k,\) or \(k, k\), got \(2, 3\)"),
        (torch.ones(2, dtype=torch.int), ValueError, "weight must be of a floating-point dtype, got torch.int32"),
        (torch.tensor([1.0, torch.nan]), ValueError, "weight has entries that are not finite"),
        (torch.tensor([1.0, -2.0]), ValueError, "a diagonal weight must be of at least 0, its least entry is -2"),
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]), ValueError, r"weight must be symmetric: only \(W \+ W.T\) / 2 counts"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), ValueError, "must have no negative eigenvalue.*; its least is -1"),
    ],
)
def test_other_weights_are_refused(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        losses.Moments(mean_and_size, weight)


def test_a_singular_weight_is_one() -> None:
    losses.Moments(mean_and_size, torch.ones(2, 2))
    losses.Moments(mean_and_size, torch.zeros(2, 2))


def test_the_weight_must_be_as_long_as_the_statistics() -> None:
    loss = losses.Moments(mean_and_size, torch.ones(3))
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), but there are 2 statistics: expected \(2,\) or"):
        loss(torch.zeros(1, 4), torch.zeros(1, 4))


# what statistics return, and shapes


@pytest.mark.parametrize("make", [losses.Moments, losses.SyntheticLikelihood])
@pytest.mark.parametrize(
    ("statistics", "error", "message"),
    [
        (
            lambda series: series.mean(),
            ValueError,
            r"statistics returned shape \(\) for series of shape \(6, 5\), expe",
        ),
        (lambda series: series.mean(1), ValueError, r"returned shape \(6,\).*expected \(6, k\), k statistics of each"),
        (
            lambda series: series.mean(0, keepdim=True),
            ValueError,
            r"reduce over the event only, and stack by torch.sta",
        ),
        (lambda series: 1.0, TypeError, r"statistics returned a float, expected a tensor of shape \(B, k\)"),
        ("mean", TypeError, r"statistics must be a callable \(B, \*event\) -> \(B, k\), got 'mean'"),
    ],
)
def test_other_statistics_are_refused(make: Any, statistics: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{make.__name__}: .*{message}"):
        make(statistics)(torch.randn(2, 3, 5), torch.randn(2, 5))


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 6), (2, 0, 5), (2, 3, 5, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"Moments: x has shape .* and y has shape \(2, 5\); expected x \(B, m, \*event"
    ):
        losses.Moments(mean_and_size)(torch.zeros(shape), torch.zeros(2, 5))
