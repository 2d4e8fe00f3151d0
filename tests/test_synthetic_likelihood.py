"""The synthetic likelihood and its robust relatives.

The statistical tests fail by chance less than once in 1,000 seeds each: 4 standard errors, few comparisons.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor

from pyrobirds import losses

ROBUST = {
    "beta": lambda power, **kwargs: losses.BetaSyntheticLikelihood(power, **kwargs),
    "gamma": lambda power, **kwargs: losses.GammaSyntheticLikelihood(power, **kwargs),
}


def mean_and_size(series: Tensor) -> Tensor:
    return torch.stack([series.nanmean(-1), series.square().nanmean(-1)], -1)


def runs(m: int, gaps: bool = False) -> tuple[Tensor, Tensor]:
    x, y = 1 + torch.randn(3, m, 2, 2) @ torch.randn(2, 2), torch.randn(3, 2, 2)
    if gaps:
        y[0, 1, 0] = y[1, 0] = y[2] = torch.nan
    return x, y


def scipy_values(x: Tensor, y: Tensor, noise: float, covariance: str) -> list[float]:
    values = []
    for replicates, data in zip(x.flatten(2).numpy(), y.flatten(1).numpy(), strict=True):
        seen = ~np.isnan(data)
        if not seen.any():
            values.append(0.0)
            continue
        sigma = np.atleast_2d(np.cov(replicates[:, seen].T)) + noise**2 * np.eye(seen.sum())
        if covariance == "diagonal":
            sigma = np.diag(np.diag(sigma))
        values.append(-stats.multivariate_normal.logpdf(data[seen], replicates.mean(0)[seen], sigma))
    return values


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_it_is_the_gaussian_density_of_scipy(double_precision: None, covariance: Any, noise: float, gaps: bool) -> None:
    x, y = runs(9, gaps)
    got = losses.SyntheticLikelihood(covariance=covariance, noise=noise, unbiased=False)(x, y)
    assert got.tolist() == pytest.approx(scipy_values(x, y, noise, covariance), rel=1e-10, abs=1e-12)


def test_it_takes_statistics(double_precision: None) -> None:
    x, y = torch.randn(3, 5, 8), torch.randn(3, 8)
    y[1, :4] = torch.nan
    alike = torch.where(y.isnan().unsqueeze(1), torch.nan, x)
    got = losses.SyntheticLikelihood(mean_and_size, unbiased=False)(x, y)
    expected = scipy_values(mean_and_size(alike), mean_and_size(y), 0.0, "full")
    assert got.tolist() == pytest.approx(expected, rel=1e-10)


def test_an_event_of_no_dimension_is_one_statistic(double_precision: None) -> None:
    x, y = torch.randn(3, 5), torch.randn(3)
    got = losses.SyntheticLikelihood(unbiased=False)(x, y)
    assert got.tolist() == pytest.approx(scipy_values(x.unsqueeze(2), y.unsqueeze(1), 0.0, "full"), rel=1e-10)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_unbiased_estimate_is_and_the_plug_in_has_its_known_bias(
    double_precision: None, covariance: Any, gaps: bool
) -> None:
    # Replicates of N(mu, Sigma); m - k of 7 keeps the variance of the inverse of the covariance finite.
    n, m, k = 20_000, 10, 3
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.5, 0.0], [-0.3, 0.2, 0.4]])
    if covariance == "diagonal":
        root = torch.diag(root.diagonal())
    y, mu, seen = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.5, 0.0, 0.0]), torch.ones(3, dtype=torch.bool)
    if gaps:
        y[1], seen[1], k = torch.nan, False, 2
    x = mu + torch.randn(n, m, 3) @ root.T
    sigma = (root @ root.T)[seen][:, seen].numpy()
    exact = -stats.multivariate_normal.logpdf(y[seen].numpy(), mu[seen].numpy(), sigma)
    data = y.expand(n, 3)

    unbiased = losses.SyntheticLikelihood(covariance=covariance)(x, data)
    assert abs(float(unbiased.mean()) - exact) < 4 * float(unbiased.std()) / n**0.5

    plug_in = losses.SyntheticLikelihood(covariance=covariance, unbiased=False)(x, data)
    own = k if covariance == "full" else 1
    error = (y - mu)[seen].numpy()
    squared = (m - 1) / (m - own - 2) * (error @ np.linalg.solve(sigma, error) + k / m)
    psi = sum(special.digamma((m - i) / 2) for i in range(1, own + 1)) * k / own
    log = np.linalg.slogdet(sigma)[1] + psi - k * math.log((m - 1) / 2)
    expected = 0.5 * (k * math.log(2 * math.pi) + log + squared)
    assert abs(float(plug_in.mean()) - expected) < 4 * float(plug_in.std()) / n**0.5
    assert expected - exact > 20 * float(plug_in.std()) / n**0.5  # so that the test tells one from the other


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_fitted_spread_is_that_of_the_data_and_by_the_plug_in_greater(
    double_precision: None, covariance: Any
) -> None:
    """The expected gradient vanishes at the law of the data, or at sqrt((m - 1) / (m - 3)) times its spread."""
    n, m = 40_000, 10
    for loss, spread in [
        (losses.SyntheticLikelihood(covariance=covariance), 1.0),
        (losses.SyntheticLikelihood(covariance=covariance, unbiased=False), math.sqrt((m - 1) / (m - 3))),
    ]:
        theta = torch.tensor([0.0, math.log(spread)]).repeat(n, 1).requires_grad_()
        x = theta[:, :1, None] + theta[:, 1:, None].exp() * torch.randn(n, m, 1)
        (gradients,) = torch.autograd.grad(loss(x, torch.randn(n, 1)).sum(), theta)
        errors = gradients.std(0) / n**0.5
        assert (gradients.mean(0).abs() < 4 * errors).all()
        assert (errors < 0.02).all()  # so that the bias of the plug-in, 1 - 9 / 7 at a spread of 1, would be seen


LOSSES = [
    losses.SyntheticLikelihood(),
    losses.SyntheticLikelihood(noise=0.5),
    losses.SyntheticLikelihood(unbiased=False),
    losses.SyntheticLikelihood(covariance="diagonal"),
    losses.SyntheticLikelihood(covariance="diagonal", unbiased=False),
    losses.SyntheticLikelihood(covariance="diagonal", noise=0.5),
    losses.BetaSyntheticLikelihood(1.3),
    losses.BetaSyntheticLikelihood(1.3, noise=0.5),
    losses.GammaSyntheticLikelihood(1.3),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradients_are_numerically_right_and_zero_where_data_are_missing(double_precision: None, loss: Any) -> None:
    x, y = runs(8, gaps=True)
    y = y / 3  # near the replicates, for an outlier has no gradient of the robust losses
    x = torch.where(y.isnan().unsqueeze(1), torch.inf, x).requires_grad_()  # no value where the data have none
    (gradient,) = torch.autograd.grad(loss(x, y).sum(), x)
    missing = y.isnan().unsqueeze(1).expand_as(x)
    assert gradient.isfinite().all()
    assert (gradient[missing] == 0).all()
    assert (gradient[~missing] != 0).all()
    x, _ = runs(8)
    assert torch.autograd.gradcheck(lambda x: loss(x, y), x.requires_grad_())
    assert loss(x, y)[2] == 0


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_counts_are_data_and_single_precision_stays(loss: Any) -> None:
    x, y = torch.randn(2, 8, 3), torch.tensor([[0, 1, 2], [1, 1, 0]])
    assert loss(x, y).dtype == torch.float32
    # The rounding of 1e-7 times the condition of a covariance matrix of 8 replicates, which is below 100.
    torch.testing.assert_close(loss(x, y), loss(x.double(), y.double()).float(), rtol=1e-5, atol=1e-5)


# what does not vary


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_what_does_not_vary_has_a_density_only_with_noise_or_if_it_is_missing(loss: Any) -> None:
    x = torch.randn(2, 8, 3)
    x[0, :, 0] = 0.1  # is rounded, so that the deviations from a computed mean need not be 0
    y = torch.randn(2, 3)
    assert loss(x, y).isnan().tolist() == [loss.noise == 0, False]
    y[0, 0] = torch.nan
    assert loss(x.requires_grad_(), y).isfinite().all()
    assert torch.autograd.grad(loss(x, y).sum(), x)[0].isfinite().all()


DENSITIES = {
    "full": losses.SyntheticLikelihood(noise=1e-3),
    "diagonal": losses.SyntheticLikelihood(covariance="diagonal", noise=1e-3),
    "beta": losses.BetaSyntheticLikelihood(1.0001, noise=1e-3),
    "gamma": losses.GammaSyntheticLikelihood(1.0001, noise=1e-3),
}


@pytest.mark.parametrize("level", [0.1, 1e4 / 3])
@pytest.mark.parametrize("name", DENSITIES)
def test_what_does_not_vary_has_the_density_of_the_noise(name: str, level: float) -> None:
    """In single precision, in which the greater level is rounded by a fifth of the noise."""
    x = torch.full((1, 7, 1), level).requires_grad_()
    value = DENSITIES[name](x, x[:, 0].detach())
    exact = math.log(1e-3) + 0.5 * math.log(2 * math.pi)
    # The robust losses are off by the square of the log-density times 0.0001 / 2, and by less.
    assert float(value.detach()) == pytest.approx(exact, rel=1e-6 if name in ("full", "diagonal") else 1e-3)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert (gradient == 0).all()


def test_statistics_that_determine_each_other_have_no_density() -> None:
    x, y = torch.randn(3, 8, 2), torch.randn(3, 3)
    x = torch.cat([x, x.sum(2, keepdim=True)], 2)
    assert losses.SyntheticLikelihood()(x, y).isnan().all()
    assert losses.SyntheticLikelihood(noise=0.1)(x, y).isfinite().all()
    y[:, 1] = torch.nan
    assert losses.SyntheticLikelihood()(x, y).isfinite().all()


# robust


def score(kind: str, power: float, y: float, mean: float, sd: float) -> float:
    """The papers' formulas with the integral by quadrature."""
    density = stats.norm(mean, sd).pdf
    integral = integrate.quad(lambda z: density(z) ** power, mean - 40 * sd, mean + 40 * sd, points=[mean])[0]
    if kind == "beta":
        return -(density(y) ** (power - 1)) / (power - 1) + integral / power + 1 / (power - 1) - 1
    ratio = density(y) ** (power - 1) / integral ** ((power - 1) / power)
    return -power / (power - 1) * ratio + power / (power - 1)


@pytest.mark.parametrize("power", [1.05, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("kind", ROBUST)
def test_robust_losses_are_the_papers_with_the_integral_by_quadrature(
    double_precision: None, kind: str, power: float
) -> None:
    x, y = runs(4, gaps=True)
    got = ROBUST[kind](power, noise=0.2)(x, y)
    for b in range(3):
        replicates, data = x[b].flatten(1).numpy(), y[b].flatten().numpy()
        means, sds = replicates.mean(0), np.sqrt(replicates.var(0, ddof=1) + 0.04)
        values = [score(kind, power, *each) for each in zip(data, means, sds, strict=True) if not math.isnan(each[0])]
        assert float(got[b]) == pytest.approx(sum(values), rel=1e-7)


@pytest.mark.parametrize("kind", ROBUST)
def test_the_limit_of_robust_losses_is_the_log_score(double_precision: None, kind: str) -> None:
    x, y = runs(6, gaps=True)
    log = losses.SyntheticLikelihood(covariance="diagonal", noise=1.0)(x, y)  # with a noise estimates are plugged in
    far, near = (float((ROBUST[kind](1 + step, noise=1.0)(x, y) - log).abs().amax()) for step in (1e-4, 1e-6))
    assert far > 0
    assert near == pytest.approx(far * 1e-2, rel=0.02)  # the difference is linear in the step


@pytest.mark.parametrize("kind", ROBUST)
def test_robust_losses_are_proper(double_precision: None, kind: str) -> None:
    # The expected score over y of N(0, 1), by quadrature, is least at that law. The two replicates mean +- sd / sqrt 2
    # have exactly that mean and standard deviation.
    y, weights = np.polynomial.hermite_e.hermegauss(80)
    data = torch.from_numpy(y).unsqueeze(1)

    def expected(mean: float, sd: float) -> float:
        pair = mean + sd / math.sqrt(2) * torch.tensor([[-1.0], [1.0]])
        values = ROBUST[kind](1.5)(pair.expand(80, 2, 1), data)
        return float(values @ torch.from_numpy(weights)) / math.sqrt(2 * math.pi)

    at_truth = expected(0.0, 1.0)
    for mean, sd in [(0.1, 1.0), (-0.1, 1.0), (0.0, 1.1), (0.0, 0.9), (1.0, 2.0), (0.0, 0.5), (0.0, 3.0)]:
        assert expected(mean, sd) > at_truth


@pytest.mark.parametrize("kind", ROBUST)
def test_an_outlier_moves_the_log_score_and_not_the_robust_losses(double_precision: None, kind: str) -> None:
    x, y = torch.randn(1, 50, 4), torch.zeros(1, 4)

    def gradient(loss: Any, outlier: float) -> Tensor:
        data = y.clone()
        data[0, 2] = outlier
        shift = torch.zeros((), requires_grad=True)
        return torch.autograd.grad(loss(x + shift, data).sum(), shift)[0]

    log, robust = losses.SyntheticLikelihood(covariance="diagonal", unbiased=False), ROBUST[kind](1.5)
    without = y.clone()
    without[0, 2] = torch.nan
    shift = torch.zeros((), requires_grad=True)
    (expected,) = torch.autograd.grad(robust(x + shift, without).sum(), shift)
    torch.testing.assert_close(gradient(robust, 1e3), expected)
    slope = float(1 / x[0, :, 2].var())
    assert float(gradient(log, 2e3) - gradient(log, 1e3)) == pytest.approx(-1e3 * slope)


def test_other_units_multiply_the_gamma_loss_by_a_constant(double_precision: None) -> None:
    x, y = torch.randn(3, 5, 1), torch.randn(3, 1)
    loss, limit = losses.GammaSyntheticLikelihood(1.5), 1.5 / 0.5
    ratios = (loss(100 * x, 100 * y) - limit) / (loss(x, y) - limit)
    torch.testing.assert_close(ratios, torch.full((3,), 100 ** (-0.5 / 1.5)))


# refusals


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.SyntheticLikelihood(covariance="banded"),
            ValueError,
            "must be 'full' or 'diagonal', got 'band",
        ),  # type: ignore[arg-type]
        (
            lambda: losses.SyntheticLikelihood(noise=-1.0),
            ValueError,
            "noise must be a finite number of at least 0, got",
        ),
        (lambda: losses.SyntheticLikelihood(unbiased=1), TypeError, "unbiased must be True or False, got 1"),  # type: ignore[arg-type]
        (
            lambda: losses.SyntheticLikelihood(unbiased=True, noise=0.1),
            ValueError,
            "unbiased=True takes the log of the replicates' own density, to which a noise cannot be added, got noise",
        ),
        (
            lambda: losses.BetaSyntheticLikelihood(1.0),
            ValueError,
            "beta must be above 1, got 1.0: its limit at 1 is Synt",
        ),
        (lambda: losses.GammaSyntheticLikelihood(0.5), ValueError, "gamma must be above 1, got 0.5"),
        (lambda: losses.GammaSyntheticLikelihood(2.0, noise=math.inf), ValueError, "noise must be a finite number"),
        (lambda: losses.BetaSyntheticLikelihood(2.0, "mean"), TypeError, "BetaSyntheticLikelihood: statistics must be"),  # type: ignore[arg-type]
    ],
)
def test_other_arguments_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        ({}, 7),
        ({"unbiased": True}, 7),
        ({"unbiased": False}, 5),
        ({"covariance": "diagonal"}, 4),
        ({"covariance": "diagonal", "unbiased": False}, 2),
        ({"noise": 1.0}, 2),
    ],
)
def test_it_says_how_many_replicates_it_needs(double_precision: None, arguments: Any, least: int) -> None:
    loss = losses.SyntheticLikelihood(**arguments)
    assert loss(torch.randn(2, least, 4), torch.randn(2, 4)).isfinite().all()
    message = (
        f"{least - 1} replicates of 4 statistics, but .* needs at least {least}: pass replicates={least} to the Simu"
    )
    if least == 2:
        message = r"expected x \(B, m, \*event\) with m of at least 2"
    with pytest.raises(ValueError, match=message):
        loss(torch.randn(2, least - 1, 4), torch.randn(2, 4))


def test_it_says_what_else_helps_with_few_replicates() -> None:
    with pytest.raises(ValueError, match=r"or take fewer statistics, or covariance='diagonal'"):
        losses.SyntheticLikelihood()(torch.randn(2, 10, 100), torch.randn(2, 100))


@pytest.mark.parametrize("loss", [losses.SyntheticLikelihood(), losses.GammaSyntheticLikelihood(1.5)], ids=str)
def test_other_shapes_are_refused(loss: Any) -> None:
    for shape in [(2, 3), (2, 1, 3), (2, 5, 1), (4, 5, 3)]:
        with pytest.raises(ValueError, match=rf"{type(loss).__name__}: x has shape .* and y has shape \(2, 3\); expec"):
            loss(torch.zeros(shape), torch.zeros(2, 3))
