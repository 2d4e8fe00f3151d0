"""Losses of exchangeable time points: MMD and the sliced Wasserstein distance."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import wasserstein_distance
from torch import Tensor

from pyrobirds import Simulator, losses
from pyrobirds.losses import MMD, SlicedWasserstein

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "MMD": MMD(),
    "MMD of fixed bandwidth": MMD(1.5),
    "Wasserstein": SlicedWasserstein(seed=0),
    "Wasserstein, p = 1": SlicedWasserstein(p=1, seed=0),
    "Wasserstein, p = 2.5": SlicedWasserstein(num_projections=7, p=2.5, seed=0),
    "Wasserstein with lags": SlicedWasserstein(lags=(1,), seed=0),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

pytestmark = pytest.mark.usefixtures("double_precision")


def z_score(sample: Tensor, exact: float) -> float:
    return float((sample.mean() - exact) / (sample.std() / math.sqrt(len(sample))))


def mean_kernel(squared_mean: float, variance: float, bandwidth: float) -> float:
    """E exp(-Z^2 / h^2) of Z ~ N(mean, variance)."""
    spread = 1 + 2 * variance / bandwidth**2
    return spread**-0.5 * math.exp(-squared_mean / bandwidth**2 / spread)


def mmd_of_blackbirds(x: np.ndarray, y: np.ndarray) -> float:
    """Its formula for one series, written anew: points in rows, the median over all pairs in both orders."""

    def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([[float(np.sum((s - t) ** 2)) for t in b] for s in a])

    n = len(y)
    sigma = np.sort(squares(y, y).ravel())[(n * n - 1) // 2]  # torch takes the lower of two medians
    k_xx, k_yy, k_xy = (np.exp(-squares(a, b) / sigma) for a, b in [(x, x), (y, y), (x, y)])
    return float((k_xx.sum() - n + k_yy.sum() - n) / (n * (n - 1)) - 2 * k_xy.mean())


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 9), st.integers(0, 3), st.integers(1, 3), st.integers(0, 99))
def test_mmd_is_that_of_blackbirds_over_the_observed_times(n_times: int, d: int, batch: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = (batch, n_times, d)[: 3 if d else 2]
    x, y = 3 + generator.normal(size=shape), 3 + 2 * generator.normal(size=shape)
    y[:, 1] = np.nan
    y[0, 0] = np.nan
    got = MMD()(torch.tensor(x), torch.tensor(y))
    for b in range(batch):
        xb, yb = x[b].reshape(n_times, -1), y[b].reshape(n_times, -1)
        seen = ~np.isnan(yb).any(1)
        if seen.sum() < 3:  # with two points half of the distances are those of points to themselves
            continue
        assert float(got[b]) == pytest.approx(mmd_of_blackbirds(xb[seen], yb[seen]), abs=1e-12)


def test_mmd_in_single_precision_is_near_that_in_double_far_from_the_origin() -> None:
    """The inputs are the same numbers, 1,000 bandwidths from 0; the difference is of the rounding of sums of 100."""
    x, y = ((1_000 + torch.randn(4, 100)).float() for _ in range(2))
    x.requires_grad_()
    for loss in (MMD(), MMD(0.7)):
        single, double = loss(x, y), loss(x.double(), y.double())
        torch.testing.assert_close(single.double(), double, atol=5e-6, rtol=0)
        (g_single,), (g_double,) = (torch.autograd.grad(value.sum(), x) for value in (single, double))
        torch.testing.assert_close(g_single, g_double, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("event", [(50,), (50, 2)])
def test_mmd_gradient_in_single_precision_is_that_in_double_far_from_the_data(event: tuple[int, ...]) -> None:
    """Here only the pairs of x count, 1,000 bandwidths from y; the inputs are the same numbers."""
    x, y = (1_000 + torch.randn(2, *event)).float(), torch.randn(2, *event).float()
    x.requires_grad_()
    (g_single,), (g_double,) = (
        torch.autograd.grad(value.sum(), x) for value in (MMD(1.0)(x, y), MMD(1.0)(x.double(), y.double()))
    )
    # A sum of 50 terms of at most 2 / (50 * 49), each off by a few times 6e-8 of 1; with cancellation it was 4e-7.
    torch.testing.assert_close(g_single, g_double, atol=2e-8, rtol=1e-5)


def test_mmd_compares_one_series_of_data_with_itself_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, shapes = torch.randn(3, 5), torch.randn(1, 5), []
    within = losses.mmd.distances

    def spy(a: Tensor, b: Tensor) -> Tensor:
        shapes.append(a.shape)
        return within(a, b)

    monkeypatch.setattr(losses.mmd, "distances", spy)
    torch.testing.assert_close(MMD()(x, y.expand(3, 5)), MMD()(x, y[[0, 0, 0]]))
    assert shapes == [(1, 5, 1), (3, 5, 1)]


@pytest.mark.parametrize("event", [(5,), (5, 2)])
def test_mmd_inside_a_loss_of_one_draw(event: tuple[int, ...]) -> None:
    """Without the warning of a loop over draws, and with the gradient of the batch."""

    def loss(theta: Tensor, y: Tensor) -> Tensor:
        return MMD()((theta * y)[None], y[None])[0]

    theta, y = torch.tensor([0.5, 2.0], requires_grad=True), torch.randn(*event)
    site = Simulator.from_loss(loss, batched=False, event_dim=len(event))
    value = site(theta).log_prob(y)
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    expected = -MMD()(theta.reshape(2, *[1] * len(event)) * y, y.expand(2, *event))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), theta)[0])


def test_mmd_does_not_depend_on_how_many_kernel_values_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    for x, y in [(torch.randn(2, 9), torch.randn(2, 9)), (torch.randn(2, 9, 2), torch.randn(2, 9, 2))]:
        x.requires_grad_()
        whole = MMD()(x, y)
        (gradient,) = torch.autograd.grad(whole.sum(), x)
        for most in (1, 80):  # one row at a time; two rows, and one is left
            monkeypatch.setattr(losses.mmd, "_MOST_KERNEL_VALUES", most)
            in_parts = MMD()(x, y)
            torch.testing.assert_close(in_parts, whole)
            torch.testing.assert_close(torch.autograd.grad(in_parts.sum(), x)[0], gradient)
        monkeypatch.undo()


def test_mmd_of_independent_points_is_unbiased() -> None:
    """Fails by chance at |z| > 4.4, in one of 90,000 versions of torch's random numbers."""
    mean, sd, bandwidth = 0.7, 1.6, 1.3
    x, y = mean + sd * torch.randn(20_000, 6), torch.randn(20_000, 6)
    exact = (
        mean_kernel(0, 2 * sd**2, bandwidth)
        + mean_kernel(0, 2, bandwidth)
        - 2 * mean_kernel(mean**2, 1 + sd**2, bandwidth)
    )
    assert abs(z_score(MMD(bandwidth)(x, y), exact)) < 4.4
    assert abs(z_score(MMD(bandwidth)((x - mean) / sd, y), 0.0)) < 4.4


def test_mmd_falls_back_where_the_median_is_zero() -> None:
    x = torch.randn(1, 4)
    mostly_equal = torch.tensor([[2.0, 2.0, 2.0, 5.0]])  # the mean of the 16 squared distances is 6 * 9 / 16
    torch.testing.assert_close(MMD()(x, mostly_equal), MMD(math.sqrt(54 / 16))(x, mostly_equal))
    constant = torch.full((1, 4), 2.0)
    torch.testing.assert_close(MMD()(x, constant), MMD(1.0)(x, constant))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize("event", [(5,), (5, 2)])
def test_mmd_node_in_forward_mode_and_under_vmap(event: tuple[int, ...]) -> None:
    x, y, tangents = torch.randn(2, *event), torch.randn(2, *event), torch.randn(3, 2, *event)
    x_leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(MMD()(x_leaf, y).sum(), x_leaf)
    expected = (gradient * tangents).flatten(2).sum(2)

    def push(tangent: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: MMD()(x, y), (x,), (tangent,))[1]

    torch.testing.assert_close(push(tangents[0]), expected[0])
    torch.testing.assert_close(torch.vmap(push, randomness="same")(tangents), expected)


@pytest.mark.parametrize("event", [(5,), (5, 2)])
def test_mmd_has_second_derivatives(event: tuple[int, ...]) -> None:
    x, y = torch.randn(2, *event, requires_grad=True), torch.randn(2, *event)
    y[0, 2] = torch.nan
    assert torch.autograd.gradgradcheck(lambda x: MMD()(x, y), (x,))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(0, 99))
def test_wasserstein_on_the_line_is_that_of_scipy_over_the_observed_times(n_times: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(3, n_times)), 1 + 2 * generator.normal(size=(3, n_times))
    y[generator.uniform(size=y.shape) < 0.2] = np.nan
    got = SlicedWasserstein(p=1)(torch.tensor(x), torch.tensor(y))
    for b in range(3):
        seen = ~np.isnan(y[b])
        expected = wasserstein_distance(x[b][seen], y[b][seen]) if seen.any() else 0.0
        assert float(got[b]) == pytest.approx(expected, abs=1e-12)


def test_wasserstein_equals_that_of_pot() -> None:
    """By ot.wasserstein_1d of POT 0.9.7."""
    x, y = torch.tensor([[0.1, 1.3, -0.6, 0.8]]), torch.tensor([[0.3, 1.0, -0.4, 0.2]])
    for p, expected in [(1, 0.275), (2, 0.0975), (3, 0.04025)]:
        assert float(SlicedWasserstein(p=p)(x, y)) == pytest.approx(expected, abs=1e-12)


def test_wasserstein_between_quantiles_of_gaussians() -> None:
    """W_2^2 = (difference of means)^2 + (difference of sds)^2, with the variance of the quantiles for 1."""
    quantiles = torch.special.ndtri((torch.arange(1_000) + 0.5) / 1_000)
    x, y = 0.5 + 2 * quantiles.flip(0), -1 + 0.7 * quantiles
    expected = 1.5**2 + 1.3**2 * float(quantiles.square().mean())
    assert expected == pytest.approx(1.5**2 + 1.3**2, rel=2e-3)
    assert float(SlicedWasserstein()(x[None], y[None])) == pytest.approx(expected)


@pytest.mark.parametrize(("n_times", "best"), [(5, 0.639), (10, 0.791), (50, 0.948), (100, 0.973)])
def test_wasserstein_prefers_quiet_parameters_on_short_series(n_times: int, best: float) -> None:
    """E W_2^2 = s^2 + 1 - 2 s b with the mean b of the squares of expected order statistics: least at s = b.

    The derivative at s = 1 has the expectation 2 - 2 b. Fails by chance at |z| > 4.4, in one of 90,000 versions of
    torch's random numbers. That of MMD, which is unbiased for these points, is 0.
    """
    z, p = np.linspace(-9, 9, 4001), (np.arange(n_times) + 1)[:, None]
    log_density = stats.norm.logpdf(z) + (p - 1) * stats.norm.logcdf(z) + (n_times - p) * stats.norm.logsf(z)
    weights = np.exp(log_density - log_density.max(1, keepdims=True))
    means = (weights * z).sum(1) / weights.sum(1)
    assert (means**2).mean() == pytest.approx(best, abs=6e-4)
    noise, y = torch.randn(4_000, n_times), torch.randn(4_000, n_times)
    scale = torch.ones(4_000, 1, requires_grad=True)
    for loss, expected in [(SlicedWasserstein(), 2 - 2 * float((means**2).mean())), (MMD(1.0), 0.0)]:
        (slopes,) = torch.autograd.grad(loss(scale * noise, y).sum(), scale)
        assert abs(z_score(slopes.squeeze(1), expected)) < 4.4


def test_wasserstein_with_a_seed_has_the_same_directions_in_each_draw_of_vmap() -> None:
    x, y = torch.randn(3, 6, 2), torch.randn(3, 6, 2)
    loss = SlicedWasserstein(num_projections=3, seed=4)
    for randomness in ("same", "different", "error"):
        batched = torch.vmap(lambda x, y: loss(x[None], y[None])[0], randomness=randomness)(x, y)
        torch.testing.assert_close(batched, loss(x, y))


@pytest.mark.parametrize("d", [2, 5])
def test_wasserstein_of_shifted_points_is_unbiased_over_directions(d: int) -> None:
    """W_2^2 along u is (u . shift)^2, |shift|^2 / d in the mean. |z| > 4.4 in one of 90,000 versions of torch."""
    y, shift = torch.randn(1, 4, d), torch.arange(1.0, d + 1)
    loss = SlicedWasserstein(num_projections=1)
    draws = torch.cat([loss(y + shift, y) for _ in range(2_000)])
    assert abs(z_score(draws, float(shift @ shift) / d)) < 4.4
    # E (u . s)^4 = 3 |s|^4 / (d (d + 2)), so that many directions at once have this standard error.
    many = SlicedWasserstein(num_projections=20_000)(y + shift, y)
    spread = float(shift @ shift) * math.sqrt(3 / (d * (d + 2)) - 1 / d**2)
    assert abs(float(many) - float(shift @ shift) / d) < 4.4 * spread / math.sqrt(20_000)


def test_wasserstein_with_a_seed_is_a_fixed_function() -> None:
    x, y = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    fixed, free = SlicedWasserstein(num_projections=5, seed=1), SlicedWasserstein(num_projections=5)
    assert torch.equal(fixed(x, y), fixed(x, y))
    assert not torch.equal(fixed(x, y), SlicedWasserstein(num_projections=5, seed=2)(x, y))
    assert not torch.equal(free(x, y), free(x, y))
    state = torch.get_rng_state()
    fixed(x, y)
    free(x[..., 0], y[..., 0])  # on the line nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)


def test_lags_make_points_of_delays_and_see_the_order() -> None:
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    delayed = SlicedWasserstein(lags=(1, 3), seed=3)
    embedded = [torch.stack([cloud[:, 3:], cloud[:, 2:-1], cloud[:, :-3]], -1) for cloud in (x, y)]
    torch.testing.assert_close(delayed(x, y), SlicedWasserstein(seed=3)(*embedded))
    y[0, 4] = torch.nan  # spoils the points at 4, 5 and 7
    kept = [cloud[:1, [0, 3]] for cloud in embedded]
    torch.testing.assert_close(delayed(x, y)[:1], SlicedWasserstein(seed=3)(*kept))
    shuffled = y[1:, torch.randperm(8)]
    torch.testing.assert_close(SlicedWasserstein()(shuffled, y[1:]), torch.zeros(1))
    assert float(delayed(shuffled, y[1:])) > 0.01
    torch.testing.assert_close(MMD()(shuffled, y[1:]), MMD()(y[1:], y[1:]))


@every_loss
@pytest.mark.parametrize("event", [(6,), (6, 2)])
def test_gradients_are_those_of_finite_differences(loss: Callable[..., Tensor], event: tuple[int, ...]) -> None:
    x, y = torch.randn(2, *event, requires_grad=True), torch.randn(2, *event)
    y[0, 4] = torch.nan
    assert torch.autograd.gradcheck(lambda x: 2 * loss(x, y), (x,))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [0, 2])
def test_gradients_are_finite_at_ties_and_without_data(loss: Callable[..., Tensor], dtype: torch.dtype, d: int) -> None:
    nan = torch.nan
    y = torch.tensor([[0, 0, 0], [0, 1, 2], [0, 1, nan], [0, nan, nan], [nan, nan, nan]], dtype=dtype)
    x = torch.zeros(5, 3, dtype=dtype)
    x[1] = y[1]
    x[2:, 2] = nan
    if d:
        x, y = x.unsqueeze(2).repeat(1, 1, d), y.unsqueeze(2).repeat(1, 1, d)
    x.requires_grad_()
    value = loss(x, y)
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert value[4] == 0
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[y.isnan()] == 0).all()


@every_loss
def test_losses_do_not_mix_the_draws_of_a_batch_and_take_counts(loss: Callable[..., Tensor]) -> None:
    x, y = torch.randn(3, 6), torch.randint(9, (3, 6))
    torch.testing.assert_close(loss(x, y), torch.cat([loss(x[b : b + 1], y[b : b + 1]) for b in range(3)]))
    torch.testing.assert_close(loss(x, y[:1].expand(3, 6)), loss(x, y[[0, 0, 0]]))
    counts = torch.randint(9, (3, 6))
    torch.testing.assert_close(loss(counts, y), loss(counts.double(), y.double()))


@every_loss
def test_losses_refuse_other_shapes(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="compares one run a draw, so leave replicates out of the Simulator"):
        loss(torch.zeros(4, 3, 6), torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"both must be \(B, \*event\)"):
        loss(torch.zeros(4, 6), torch.zeros(4, 5))
    for shape in [(4,), (4, 6, 2, 2)]:
        with pytest.raises(ValueError, match=r"expected \(B, T\), a number at each time, or \(B, T, d\), a point with"):
            loss(torch.zeros(shape), torch.zeros(shape))


def test_mmd_refuses_one_time() -> None:
    with pytest.raises(ValueError, match="MMD: y has 1 time points; expected at least two"):
        MMD()(torch.zeros(4, 1), torch.zeros(4, 1))


def test_lags_must_fit_into_the_series() -> None:
    with pytest.raises(ValueError, match=r"SlicedWasserstein: lags=\(1, 5\) reaches over all 5 times of the series"):
        SlicedWasserstein(lags=(1, 5))(torch.zeros(2, 5), torch.zeros(2, 5))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"bandwidth must be .median. or a number above 0, got 'mean'"):
        MMD("mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"p must be at least 1, got 0\.5"):
        SlicedWasserstein(p=0.5)
    with pytest.raises(ValueError, match="num_projections must be at least 1, got 0"):
        SlicedWasserstein(num_projections=0)
    with pytest.raises(TypeError, match=r"lags must be a tuple of whole numbers, such as \(1, 2\), got \[1\]"):
        SlicedWasserstein(lags=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each of lags must be at least 1, got 0"):
        SlicedWasserstein(lags=(0,))
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        SlicedWasserstein(seed=-1)


def test_losses_are_values() -> None:
    assert repr(MMD(2.0)) == "MMD(bandwidth=2.0)"
    assert repr(SlicedWasserstein()) == "SlicedWasserstein(num_projections=50, p=2.0, lags=(), seed=None)"
    assert MMD() == MMD("median") != MMD(2.0)
    assert len({SlicedWasserstein(), SlicedWasserstein(), SlicedWasserstein(lags=(1,))}) == 2
