"""Scoring rules of replicates: exact values, unbiasedness, gradients, missing data, propriety."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.ops.stats import crps_empirical, energy_score_empirical
from torch import Tensor

from pyrobirds.losses import CRPS, DebiasedMSE, EnergyScore, KernelScore

Score = Callable[[Tensor, Tensor], Tensor]

SCORES: dict[str, Score] = {
    "energy": EnergyScore(),
    "energy, beta 0.5": EnergyScore(0.5),
    "energy, beta 2": EnergyScore(2.0),
    "kernel": KernelScore(),
    "kernel of fixed bandwidth": KernelScore(bandwidth=1.5),
    "kernel of a callable": KernelScore(lambda s: (1 + s).rsqrt(), 1.5),
    "CRPS": CRPS(),
}
every_score = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)

pytestmark = pytest.mark.usefixtures("double_precision")


def normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def mean_distance(mean: float, sd: float) -> float:
    """E|Z| of Z ~ N(mean, sd^2)."""
    z = mean / sd
    return sd * (z * (2 * normal_cdf(z) - 1) + 2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi))


def mean_kernel(squared_mean: float, variance: float, n: int, bandwidth: float) -> float:
    """E exp(-|Z|^2 / h^2) of Z ~ N(mean, variance * identity) in n dimensions."""
    spread = 1 + 2 * variance / bandwidth**2
    return spread ** (-n / 2) * math.exp(-squared_mean / bandwidth**2 / spread)


def z_score(sample: Tensor, exact: float) -> float:
    return float((sample.mean() - exact) / (sample.std() / math.sqrt(len(sample))))


def numpy_score(
    x: np.ndarray, y: np.ndarray, between: Callable[[np.ndarray, np.ndarray], float], to_data: float
) -> float:
    """to_data * mean_i f(x_i, y) - mean_{i != j} f(x_i, x_j), one series, over its observed entries."""
    m, seen = len(x), ~np.isnan(y)
    pairs = [between(x[i][seen], x[j][seen]) for i in range(m) for j in range(m) if i != j]
    return to_data * np.mean([between(run[seen], y[seen]) for run in x]) - np.mean(pairs)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 3), max_size=2), st.integers(1, 3), st.integers(2, 4), st.floats(0.1, 2), st.integers(0, 99)
)
def test_scores_equal_loops_over_pairs(event: list[int], batch: int, m: int, beta: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(batch, m, *event)), generator.normal(size=(batch, *event))
    y[generator.uniform(size=y.shape) < 0.2] = np.nan
    xt, yt = torch.tensor(x), torch.tensor(y)
    energy, kernel, crps = EnergyScore(beta)(xt, yt), KernelScore(bandwidth=1.3)(xt, yt), CRPS()(xt, yt)
    assert energy.shape == kernel.shape == crps.shape == (batch,)
    for b in range(batch):
        expected = numpy_score(x[b], y[b], lambda a, c: float(np.sqrt(np.sum((a - c) ** 2))) ** beta, 2)
        assert float(energy[b]) == pytest.approx(expected, abs=1e-12)
        expected = -numpy_score(x[b], y[b], lambda a, c: float(np.exp(-np.sum((a - c) ** 2) / 1.3**2)), 2)
        assert float(kernel[b]) == pytest.approx(expected, abs=1e-12)
        expected = numpy_score(x[b], y[b], lambda a, c: float(np.abs(a - c).sum() / max(1, a.size)) / 2, 2)
        assert float(crps[b]) == pytest.approx(expected, abs=1e-12)


def test_energy_score_of_power_two_is_twice_the_debiased_squared_error() -> None:
    x, y = torch.randn(3, 5, 4), torch.randn(3, 4)
    torch.testing.assert_close(EnergyScore(2.0)(x, y), 2 * 4 * DebiasedMSE()(x, y))


def test_crps_is_half_of_the_energy_score_of_each_entry() -> None:
    x, y = torch.randn(3, 5, 4), torch.randn(3, 4)
    of_entries = torch.stack([EnergyScore()(x[..., t], y[..., t]) for t in range(4)])
    torch.testing.assert_close(CRPS()(x, y), of_entries.mean(0) / 2)


def test_scores_equal_those_of_pyro_where_these_are_made_fair() -> None:
    x, y = torch.randn(3, 7, 4), torch.randn(3, 4)
    # Pyro divides the sum over pairs by m^2.
    pairs = torch.cdist(x, x).sum((1, 2))
    energy = 2 * energy_score_empirical(x, y.unsqueeze(1))[:, 0] + pairs / 7**2 - pairs / (7 * 6)
    torch.testing.assert_close(EnergyScore()(x, y), energy)
    pairs = (x.unsqueeze(1) - x.unsqueeze(2)).abs().sum((1, 2)) / 2
    crps = crps_empirical(x.transpose(0, 1), y) + pairs / 7**2 - pairs / (7 * 6)
    torch.testing.assert_close(CRPS()(x, y), crps.mean(1))


RUNS = [[0.1, -0.7, 2.0], [1.3, 0.2, -0.4], [-0.6, 0.9, 0.5], [0.8, -1.1, 1.6]]
DATA = [0.3, 0.4, -0.2]


def test_scores_equal_those_of_scoringrules() -> None:
    """By version 0.10.0, estimator="fair"; its kernel has h^2 = 2, and its kernel score the constant k(y, y) / 2."""
    x, y = torch.tensor([RUNS]), torch.tensor([DATA])
    assert float(EnergyScore()(x, y)) == pytest.approx(2 * 0.6733676479109794, abs=1e-9)
    assert float(KernelScore(bandwidth=math.sqrt(2))(x, y)) == pytest.approx(2 * 0.28979280589665407 - 1, abs=1e-9)
    assert float(CRPS()(x, y)) == pytest.approx(0.3, abs=1e-9)


# Each of the three tests below fails by chance at |z| > 4.4, in one of 90,000 versions of torch's random numbers.


@pytest.mark.parametrize("m", [2, 5])
def test_expected_crps_and_energy_score_of_a_gaussian(m: int) -> None:
    mean, sd, y = 0.4, 1.3, -0.5
    x = mean + sd * torch.randn(20_000, m, 1)
    exact = mean_distance(mean - y, sd) - mean_distance(0.0, math.sqrt(2) * sd) / 2
    z = (y - mean) / sd  # the closed form of Gneiting and Raftery 2007, section 4.2
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    assert exact == pytest.approx(sd * (z * (2 * normal_cdf(z) - 1) + 2 * density - 1 / math.sqrt(math.pi)))
    data = torch.full((20_000, 1), y)
    assert abs(z_score(CRPS()(x, data), exact)) < 4.4
    assert abs(z_score(EnergyScore()(x, data), 2 * exact)) < 4.4


@pytest.mark.parametrize("m", [2, 5])
def test_expected_kernel_score_of_a_gaussian(m: int) -> None:
    sd, y, bandwidth = 1.3, torch.tensor([-0.5, 0.2, 0.9]), 2.0
    x = sd * torch.randn(20_000, m, 3)
    exact = mean_kernel(0.0, 2 * sd**2, 3, bandwidth) - 2 * mean_kernel(float(y @ y), sd**2, 3, bandwidth)
    assert abs(z_score(KernelScore(bandwidth=bandwidth)(x, y.expand(20_000, 3)), exact)) < 4.4


@pytest.mark.parametrize("score", [EnergyScore(), EnergyScore(1.5), KernelScore(bandwidth=2.0), CRPS()], ids=repr)
def test_expected_score_is_least_at_the_truth(score: Score) -> None:
    """Paired differences to other means and scales, z of at least 5: each is expected to be above 10."""
    noise, y = torch.randn(20_000, 3, 2), torch.randn(20_000, 2)
    truth = score(noise, y)
    for mean, sd in [(0.5, 1.0), (-0.5, 1.0), (0.0, 0.6), (0.0, 1.6)]:
        assert z_score(score(mean + sd * noise, y) - truth, 0.0) > 5


def test_what_is_not_fair_prefers_runs_that_are_too_much_alike() -> None:
    """Why the pairs are divided by m (m - 1): with two replicates Pyro's CRPS finds sd 0.7 better than the truth."""
    noise, y = torch.randn(2, 20_000), torch.randn(20_000)
    assert z_score(crps_empirical(0.7 * noise, y) - crps_empirical(noise, y), 0.0) < -5
    noise, y = noise.T.unsqueeze(-1), y.unsqueeze(-1)
    assert z_score(CRPS()(0.7 * noise, y) - CRPS()(noise, y), 0.0) > 5


@every_score
def test_gradients_are_those_of_finite_differences(score: Score) -> None:
    x, y = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 2, 2)
    y[0, 1, 0] = torch.nan
    assert torch.autograd.gradcheck(lambda x: score(x, y), (x,))


@every_score
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_ties_and_without_data(score: Score, dtype: torch.dtype) -> None:
    y = torch.tensor([[0.0, 1.0], [0.0, torch.nan], [torch.nan, torch.nan], [0.0, 1.0]], dtype=dtype)
    x = torch.zeros(4, 3, 2, dtype=dtype)
    x[3] = y[3]
    x[1:3, 0, 1] = torch.nan  # what a simulator gives where nothing was observed is its own affair
    if score == KernelScore():  # a single entry has no median difference, see below
        x[1], y[1] = x[0], y[0]
    x.requires_grad_()
    loss = score(x, y)
    assert loss.dtype == dtype
    assert loss.isfinite().all()
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[2] == 0).all()
    assert (gradient[1][:, y[1].isnan()] == 0).all()
    torch.testing.assert_close(gradient[3].sum(0), torch.zeros(2, dtype=dtype), atol=1e-6, rtol=0)


@every_score
def test_missing_entries_are_as_if_they_were_not_there(score: Score) -> None:
    x, y = torch.randn(2, 3, 5), torch.randn(2, 5)
    y[:, [1, 3]] = torch.nan
    torch.testing.assert_close(score(x, y), score(x[..., [0, 2, 4]], y[:, [0, 2, 4]]))


@every_score
def test_scores_do_not_mix_the_draws_of_a_batch_and_take_counts(score: Score) -> None:
    x, y = torch.randn(3, 4, 5), torch.randint(9, (3, 5))
    torch.testing.assert_close(score(x, y), torch.cat([score(x[b : b + 1], y[b : b + 1]) for b in range(3)]))
    torch.testing.assert_close(score(x, y[:1].expand(3, 5)), score(x, y[[0, 0, 0]]))
    counts = torch.randint(9, (3, 4, 5))
    torch.testing.assert_close(score(counts, y), score(counts.double(), y.double()))


@every_score
def test_scores_refuse_one_run_and_other_shapes(score: Score) -> None:
    for x, y in [((4, 5), (4, 5)), ((4, 1, 5), (4, 5)), ((4, 3, 5), (4, 6)), ((4, 3, 5), (5,))]:
        with pytest.raises(ValueError, match=r"expected x \(B, m, \*event\) with m of at least 2 and y \(B, \*event\)"):
            score(torch.zeros(x), torch.zeros(y))


def test_crps_weighs_the_entries() -> None:
    x, y, weights = torch.randn(2, 3, 4), torch.randn(2, 4), torch.tensor([0.0, 1.0, 2.0, 1.0])
    y[0, 1] = torch.nan
    each = torch.stack([CRPS()(x[..., t], y[..., t]) for t in range(4)], 1)
    weight = weights * ~y.isnan()
    torch.testing.assert_close(CRPS(weights)(x, y), (weight * each).sum(1) / weight.sum(1))
    with pytest.raises(ValueError, match=r"CRPS: weights has shape \(4,\), but the event has shape \(3,\)"):
        CRPS(weights)(x[..., :3], y[:, :3])
    with pytest.raises(ValueError, match="CRPS: weights must be finite numbers of at least 0"):
        CRPS(-weights)


def test_the_median_bandwidth_is_that_of_the_pairs_of_observed_entries() -> None:
    x, y = torch.randn(2, 3, 6), torch.randn(2, 6)
    y[1, 2] = torch.nan
    expected = []
    for b in range(2):
        seen = y[b][~y[b].isnan()]
        squares = [float((c - a) ** 2) for i, a in enumerate(seen) for c in seen[i + 1 :]]
        square = len(seen) * sorted(squares)[(len(squares) - 1) // 2]  # the lower median, as torch's
        expected.append(KernelScore(bandwidth=math.sqrt(square))(x[b : b + 1], y[b : b + 1]))
    torch.testing.assert_close(KernelScore()(x, y), torch.cat(expected))


def test_the_median_bandwidth_of_long_events_is_near_that_of_all_pairs() -> None:
    """It compares 250 order statistics of 1,000: off by 0.3%, and by twice the spacing of the 250 at most."""
    y = torch.randn(1, 1_000)
    x = torch.randn(1, 3, 1_000)
    square = 1_000 * float(torch.nn.functional.pdist(y.T).square().median())
    at = [float(KernelScore(bandwidth=math.sqrt(scale * square))(x, y)) for scale in (0.98, 1.0, 1.02)]
    assert min(at) < float(KernelScore()(x, y)) < max(at)


def test_the_median_bandwidth_of_long_events_with_gaps_is_that_of_what_is_observed() -> None:
    """Also where the observed entries are few, or as many as are compared, or more."""
    y = torch.full((5, 2_000), torch.nan)
    y[0, ::400] = torch.tensor([0.0, 1e3, -1e3, 2e3, 500.0])
    y[1, 100:356] = torch.randn(256)
    y[2, ::2] = torch.randn(1_000)
    y[3] = torch.randn(2_000)
    y[4, ::300] = torch.randn(7)
    squares = KernelScore()._square_of_bandwidth(y)
    assert isinstance(squares, Tensor)
    assert float(squares[0]) == 5e6
    for b, tolerance in [(1, 0.0), (2, 0.02), (3, 0.02), (4, 0.0)]:  # the spacing of 256 order statistics, as above
        seen = y[b][~y[b].isnan()]
        differences = torch.nn.functional.pdist(seen.unsqueeze(1)).square()
        assert float(squares[b]) == pytest.approx(len(seen) * float(differences.median()), rel=tolerance, abs=1e-9)


def test_a_single_observed_entry_has_no_median_bandwidth_and_fails() -> None:
    x, y = torch.randn(3, 4, 5), torch.full((3, 5), torch.nan)
    y[0], y[1, 2] = torch.randn(5), 1e3
    score = KernelScore()(x, y)
    assert score.isnan().tolist() == [False, True, False]
    assert score[2] == -1
    assert KernelScore(bandwidth=1.0)(x, y).isfinite().all()


def test_the_median_bandwidth_is_not_differentiated_and_computed_once_for_one_series() -> None:
    x, y = torch.randn(2, 3, 5), torch.randn(1, 5, requires_grad=True)
    square = KernelScore()._square_of_bandwidth(y.expand(2, 5))
    assert isinstance(square, Tensor)
    assert square.shape == (1, 1, 1)
    copied = KernelScore()._square_of_bandwidth(y[[0, 0]])
    assert isinstance(copied, Tensor)
    assert copied.shape == (2, 1, 1)
    gradients = [
        torch.autograd.grad(score(x, y.expand(2, 5)).sum(), y)[0]
        for score in (KernelScore(), KernelScore(bandwidth=math.sqrt(float(square))))
    ]
    torch.testing.assert_close(*gradients)


def test_the_kernel_score_is_curved_where_runs_and_data_are_equal() -> None:
    """Of exp(-(a - b)^2 / h^2) the second derivatives by a and b are -2 / h^2 and 2 / h^2 at a = b."""
    x, y = torch.zeros(1, 2, 1), torch.zeros(1, 1)
    hessian = torch.autograd.functional.hessian(lambda x: KernelScore(bandwidth=2.0)(x, y).sum(), x)
    torch.testing.assert_close(hessian.reshape(2, 2), torch.tensor([[0.0, 0.5], [0.5, 0.0]]))


@every_score
def test_scores_in_single_precision_are_near_those_in_double_far_from_the_origin(score: Score) -> None:
    """The inputs are the same numbers, 10,000 spreads from 0; the differences are of sums of 20 rounded ones."""
    x, y = (10_000 + torch.randn(2, 5, 20)).float(), (10_000 + torch.randn(2, 20)).float()
    x.requires_grad_()
    single, double = score(x, y), score(x.double(), y.double())
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=1e-6)
    (g_single,), (g_double,) = (torch.autograd.grad(value.sum(), x) for value in (single, double))
    torch.testing.assert_close(g_single, g_double, atol=1e-5, rtol=1e-4)


def test_the_median_bandwidth_falls_back_where_it_is_zero() -> None:
    x = torch.randn(1, 3, 4)
    mostly_equal = torch.tensor([[2.0, 2.0, 2.0, 5.0]])  # three of six pairs differ, and the lower median is 0
    expected = KernelScore(bandwidth=math.sqrt(4 * 4.5))(x, mostly_equal)
    torch.testing.assert_close(KernelScore()(x, mostly_equal), expected)
    constant = torch.full((1, 4), 2.0)
    torch.testing.assert_close(KernelScore()(x, constant), KernelScore(bandwidth=2.0)(x, constant))


def test_the_bandwidth_of_pilot_runs_is_their_median_distance() -> None:
    score = KernelScore.with_median_bandwidth(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
    assert score == KernelScore(bandwidth=math.sqrt(18))  # of 1, sqrt(18) and 5
    with pytest.raises(ValueError, match=r"expected at least two pilot runs, \(n, \*event\)"):
        KernelScore.with_median_bandwidth(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"the median distance between the 3 pilot runs x is 0\.0"):
        KernelScore.with_median_bandwidth(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="the median distance between the 3 pilot runs x is nan"):
        KernelScore.with_median_bandwidth(torch.full((3, 5), torch.nan))


def test_pilot_runs_may_be_counts_and_leave_out_what_is_not_observed() -> None:
    pilot = torch.tensor([[0, 0, 9], [3, 4, -9], [0, 0, 5]])
    assert KernelScore.with_median_bandwidth(pilot[:2, :2]) == KernelScore(bandwidth=5.0)
    y = torch.tensor([1.0, 2.0, torch.nan])
    runs = pilot.double()
    runs[:, 2] = torch.nan
    for x in (pilot, runs):
        assert KernelScore.with_median_bandwidth(x, y=y) == KernelScore(bandwidth=5.0)
    with pytest.raises(ValueError, match=r"y has shape \(1, 3\), but each of the 3 pilot runs x has shape \(3,\)"):
        KernelScore.with_median_bandwidth(pilot, y=y[None])


def test_the_median_bandwidth_needs_pairs_of_entries() -> None:
    with pytest.raises(ValueError, match="compares the entries of an event with one another, but y has one:"):
        KernelScore()(torch.zeros(4, 3), torch.zeros(4))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"beta must be at most 2, got 2\.5: the score is not proper above"):
        EnergyScore(2.5)
    with pytest.raises(ValueError, match="beta must be a finite number above 0, got 0"):
        EnergyScore(0)
    with pytest.raises(ValueError, match=r"kernel must be .gaussian. or a callable of squared distances, got 'cubic'"):
        KernelScore("cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bandwidth must be .median. or a number above 0, got 'mean'"):
        KernelScore(bandwidth="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bandwidth must be a finite number above 0, got -1\.0"):
        KernelScore(bandwidth=-1.0)


def test_scores_are_values() -> None:
    assert repr(EnergyScore(1.5)) == "EnergyScore(beta=1.5)"
    assert repr(KernelScore(bandwidth=2.0)) == "KernelScore(bandwidth=2.0)"
    assert repr(CRPS()) == "CRPS()"
    for score in SCORES.values():
        assert len({score, score}) == 1
    assert EnergyScore() == EnergyScore(1.0) != EnergyScore(2.0)
    assert KernelScore(bandwidth=2.0) == KernelScore(bandwidth=2.0) != KernelScore()
    assert hash(CRPS(torch.ones(3))) == hash(CRPS(torch.ones(3)))
    assert CRPS(torch.ones(3)) == CRPS(torch.ones(3)) != CRPS()
