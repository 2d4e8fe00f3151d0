"""Losses entry by entry: of one run, of the mean of replicates, and their sums.

The statistical tests fail by chance less than once in 1,000 seeds each: 4 standard errors, few comparisons.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrobirds import losses
from pyrobirds.losses.value_object import name_of

ERRORS = {
    "mse": (losses.mse, lambda x, y: (x - y) ** 2),
    "mae": (losses.mae, lambda x, y: np.sqrt((x - y) ** 2)),
    "log_mse": (losses.log_mse, lambda x, y: (np.arcsinh(odd(x)) - np.arcsinh(odd(y))) ** 2),
    "log_mse, offset 0.3": (
        partial(losses.log_mse, offset=0.3),
        lambda x, y: (np.arcsinh(odd(x / 0.3)) - np.arcsinh(odd(y / 0.3))) ** 2,
    ),
}


def odd(z: Any) -> Any:
    """sinh of sign(z) log(1 + |z|), written by powers."""
    size = 1 + abs(z)
    return np.sign(z) * (size - 1 / size) / 2


def data(event: list[int], batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(batch, *event, generator=generator, dtype=torch.float64) for _ in range(2))
    y[torch.rand(y.shape, generator=generator) < 0.3] = torch.nan
    weights = torch.rand(event, generator=generator, dtype=torch.float64)
    return x, y, torch.where(weights < 0.2, 0, weights)


def weighted_mean(errors: Any, y: Tensor, weights: Tensor | None) -> float:
    """The mean over what is observed; 0 if that has no weight."""
    seen = ~y.isnan().numpy()
    by = np.ones(y.shape)[seen] if weights is None else weights.numpy()[seen]
    return float(np.average(errors[seen], weights=by)) if by.any() else 0.0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ERRORS)
def test_the_mean_is_over_the_observed_entries_of_the_event(name: str, weighted: bool) -> None:
    loss, reference = ERRORS[name]

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 5), st.integers(0, 2**31))
    def check(event: list[int], batch: int, seed: int) -> None:
        x, y, weights = data(event, batch, seed)
        got = loss(x, y, weights=weights if weighted else None)
        for b in range(batch):
            expected = weighted_mean(reference(x[b].numpy(), y[b].numpy()), y[b], weights if weighted else None)
            assert got[b] == pytest.approx(expected, rel=1e-9, abs=1e-12)

    check()


def test_log_mse_of_counts_is_the_squared_log_ratio() -> None:
    x, y = torch.tensor([[0.0, 99.0, 9999.0]]), torch.tensor([[9, 0, 999]])
    log = np.log(10.0)
    torch.testing.assert_close(losses.log_mse(x, y), torch.tensor([(1 + 4 + 1) * log**2 / 3], dtype=torch.float32))


def test_log_mse_has_its_derivative_at_zero_and_a_finite_one_below() -> None:
    # d/dx of (g(x) - g(y))^2 with g(y) = log 4 for y = 3: -2 log(4) g'(x), g'(x) = 1 / (1 + |x|); for x = -1 the g is
    # -log 2.
    x = torch.tensor([[0.0], [-1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.log_mse(x, torch.full((2, 1), 3.0)).sum(), x)
    log2 = float(np.log(2.0))
    torch.testing.assert_close(gradient, torch.tensor([[-4 * log2], [2 * (-3 * log2) / 2]]))


def replicated(loss: Any, x: Tensor, m: int) -> Tensor:
    """x for the losses of replicates, itself for those of one run."""
    return x if loss in ONE_RUN else torch.stack([x + 0.3 * torch.randn_like(x) for _ in range(m)], 1)


ONE_RUN = [losses.mse, losses.mae, losses.log_mse, losses.Sum([losses.mse, losses.mae], [1.0, 0.5])]
OF_REPLICATES = [losses.DebiasedMSE(), losses.Sum([losses.DebiasedMSE(), losses.DebiasedMSE()])]


@pytest.mark.parametrize("loss", ONE_RUN + OF_REPLICATES, ids=name_of)
def test_gradients_are_numerically_right_and_zero_where_data_are_missing(loss: Any) -> None:
    x, y, _ = data([4, 2], 3, seed=1)
    y[2] = torch.nan
    x = replicated(loss, x, 3)
    x[2] = torch.nan  # a simulator may have no value where the data have none
    x = x.requires_grad_()
    value = loss(x, y)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value[2] == 0
    assert gradient.isfinite().all()
    missing = y.isnan() if x.shape == y.shape else y.isnan().unsqueeze(1).expand_as(x)
    assert (gradient[missing] == 0).all()
    assert (gradient[~missing] != 0).all()
    assert torch.autograd.gradcheck(lambda z: loss(z, y[:2]), x[:2].detach().requires_grad_())


@pytest.mark.parametrize("loss", ONE_RUN + OF_REPLICATES, ids=name_of)
def test_counts_are_data_and_single_precision_stays(loss: Any) -> None:
    x = replicated(loss, torch.randn(2, 3), 2)
    y = torch.tensor([[0, 1, 5], [2, 3, 7]])
    assert loss(x, y).dtype == torch.float32
    assert torch.equal(loss(x, y), loss(x, y.float()))


def test_mae_has_no_gradient_at_an_exact_hit() -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.mae(x, torch.tensor([[0.0, 1.0]])).sum(), x)
    assert gradient.tolist() == [[0.0, -0.5]]


# weights


def test_weights_are_normalised_by_what_is_observed() -> None:
    x, y = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, torch.nan]])
    loss = partial(losses.mse, weights=torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(loss(x, y), torch.tensor([(1 + 8 + 27) / 6, (1 + 8) / 3]))


def test_a_series_observed_only_where_no_weight_is_says_nothing() -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    loss = losses.mse(x, torch.tensor([[1.0, torch.nan]]), weights=torch.tensor([0.0, 1.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.tolist() == [0.0]
    assert gradient.tolist() == [[0.0, 0.0]]


WEIGHTED: dict[str, Any] = {
    "mse": lambda weights: losses.mse(torch.zeros(2, 3), torch.zeros(2, 3), weights=weights),
    "mae": lambda weights: losses.mae(torch.zeros(2, 3), torch.zeros(2, 3), weights=weights),
    "log_mse": lambda weights: losses.log_mse(torch.zeros(2, 3), torch.zeros(2, 3), weights=weights),
    "DebiasedMSE": lambda weights: losses.DebiasedMSE(weights)(torch.zeros(2, 2, 3), torch.zeros(2, 3)),
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0, 1.0, 1.0], TypeError, r"weights must be a tensor of the shape of the event, got a list"),
        (torch.ones(1), ValueError, r"weights has shape \(1,\), but the event has shape \(3,\): give each entry"),
        (torch.ones(2, 3), ValueError, r"weights has shape \(2, 3\), but the event has shape \(3,\)"),
        (torch.tensor([1.0, -1.0, 1.0]), ValueError, r"weights must be finite numbers of at least 0, got tensor\(\[ 1"),
        (torch.tensor([1.0, torch.nan, 1.0]), ValueError, r"weights must be finite numbers of at least 0"),
        (torch.tensor([1.0, torch.inf, 1.0]), ValueError, r"weights must be finite numbers of at least 0"),
    ],
)
def test_other_weights_are_refused(name: str, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{name}: {message}"):
        WEIGHTED[name](weights)


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_that_were_changed_in_place_are_looked_at_again(name: str) -> None:
    weights = torch.ones(3)
    WEIGHTED[name](weights)
    weights[1] = -1
    with pytest.raises(ValueError, match=f"^{name}: weights must be finite numbers of at least 0"):
        WEIGHTED[name](weights)


def test_weights_may_come_from_inference_mode() -> None:
    with torch.inference_mode():
        weights = torch.tensor([1.0, 3.0])
    assert losses.mse(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), weights=weights).tolist() == [13 / 4]


# refusals of shapes


@pytest.mark.parametrize("loss", [losses.mse, losses.mae, losses.log_mse])
def test_losses_of_one_run_refuse_other_shapes(loss: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"{loss.__name__}: x has shape \(2, 3\) and y has shape \(3,\); both must be"
    ):
        loss(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=rf"{loss.__name__}: .* compares one run a draw, so leave replicates out"):
        loss(torch.zeros(2, 5, 3), torch.zeros(2, 3))


def test_debiased_mse_needs_two_replicates() -> None:
    for x in (torch.zeros(2, 3), torch.zeros(2, 1, 3), torch.zeros(2, 4, 1)):
        with pytest.raises(ValueError, match=r"DebiasedMSE: .* expected x \(B, m, \*event\) with m of at least 2"):
            losses.DebiasedMSE()(x, torch.zeros(2, 3))


def test_the_offset_must_be_positive() -> None:
    with pytest.raises(ValueError, match="offset must be a finite number above 0, got 0"):
        losses.log_mse(torch.zeros(1, 1), torch.zeros(1, 1), offset=0)


# DebiasedMSE


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 4), max_size=2), st.integers(2, 5), st.booleans(), st.integers(0, 2**31))
def test_debiased_mse_is_its_formula(event: list[int], m: int, weighted: bool, seed: int) -> None:
    x, y, weights = data(event, 2, seed)
    chosen = weights if weighted else None
    runs = torch.stack([x, *(torch.randn_like(x) for _ in range(m - 1))], 1)
    got = losses.DebiasedMSE(chosen)(runs, y)
    for b in range(2):
        each = runs[b].numpy()
        errors = (each.mean(0) - y[b].numpy()) ** 2 - each.var(0, ddof=1) / m
        assert got[b] == pytest.approx(weighted_mean(errors, y[b], chosen), rel=1e-9, abs=1e-12)


def test_debiased_mse_is_unbiased_and_the_mse_of_one_run_adds_the_variance(double_precision: None) -> None:
    n, mean, sd = 20_000, torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.5, 2.0, 1.0])
    y = torch.tensor([0.5, 1.0, 2.0]).expand(n, 3)
    exact = float((mean - y[0]).square().mean())
    for m in (2, 5):
        # Skewed noise: unbiased in any law with a variance.
        runs = mean + sd * (torch.empty(n, m, 3).exponential_() - 1)
        debiased = losses.DebiasedMSE()(runs, y)
        assert abs(float(debiased.mean()) - exact) < 4 * float(debiased.std()) / n**0.5
    one_run = losses.mse(runs[:, 0], y)
    assert abs(float(one_run.mean()) - exact - float(sd.square().mean())) < 4 * float(one_run.std()) / n**0.5


def test_the_gradient_of_debiased_mse_is_unbiased(double_precision: None) -> None:
    # x = theta (1 + noise): d/dtheta (E x - y)^2 = 2 (theta - y), whereas one run adds 2 theta.
    n, theta, y = 20_000, torch.tensor(2.0).expand(20_000).clone().requires_grad_(), 1.5
    x = theta[:, None, None] * (1 + torch.randn(n, 3, 1))
    (gradient,) = torch.autograd.grad(losses.DebiasedMSE()(x, torch.full((n, 1), y)).sum(), theta)
    assert abs(float(gradient.mean()) - 2 * (2.0 - y)) < 4 * float(gradient.std()) / n**0.5


# Sum


def test_a_sum_adds_weighted_losses() -> None:
    x, y, _ = data([5], 3, seed=2)
    own = lambda x, y: (x - y).nan_to_num().amax(1)  # noqa: E731
    both = losses.Sum([losses.mse, partial(losses.mae, weights=torch.ones(5)), own], weights=[2, 0.5, 1.0])
    torch.testing.assert_close(both(x, y), 2 * losses.mse(x, y) + 0.5 * losses.mae(x, y) + own(x, y))
    weights = "<tensor of shape (5,), checksum 5a1dba5d>"
    assert repr(both) == f"Sum(2.0 * mse + 0.5 * mae(weights={weights}) + 1.0 * <lambda>)"
    torch.testing.assert_close(losses.Sum((losses.mse, losses.mae))(x, y), losses.mse(x, y) + losses.mae(x, y))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((losses.mse,), TypeError, r"losses must be a list of callables \(x, y\) -> \(B,\), got <function mse"),
        (([losses.mse, 3],), TypeError, r"each loss must be a callable \(x, y\) -> \(B,\), got 3"),
        (([],), ValueError, "losses is empty, expected at least one"),
        (([losses.mse], [1.0, 2.0]), ValueError, "2 weights for 1 losses, expected one for each"),
        (([losses.mse], [-1.0]), ValueError, "each weight of Sum must be a finite number of at least 0, got -1.0"),
    ],
)
def test_other_sums_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        losses.Sum(*arguments)


def test_a_sum_checks_what_its_losses_return() -> None:
    x = torch.zeros(2, 3)
    per_entry = lambda x, y: (x - y).square()  # noqa: E731
    with pytest.raises(
        ValueError, match=r"Sum: the loss <lambda> returned shape \(2, 3\) for 2 draws, expected \(2,\)"
    ):
        losses.Sum([losses.mse, per_entry])(x, x)
    with pytest.raises(ValueError, match=r"Sum: the loss <lambda> returned a float for 2 draws"):
        losses.Sum([lambda x, y: 0.0])(x, x)


# as arguments of cached functions and in messages


def statistic(series: Tensor) -> Tensor:
    return series.mean(1, keepdim=True)


class Mean:
    """A statistic without a repr of its own, whose default one is an address."""

    def __call__(self, series: Tensor) -> Tensor:
        return statistic(series)


EQUAL_PAIRS = [
    (losses.DebiasedMSE, losses.DebiasedMSE(torch.ones(3))),
    (lambda: losses.DebiasedMSE(torch.ones(3)), losses.DebiasedMSE(torch.tensor([1.0, 1.0, 2.0]))),
    (losses.Moments, losses.Moments(weight=torch.ones(10))),
    (lambda: losses.Moments(statistic, weight=torch.ones(1)), losses.Moments(statistic, weight=torch.zeros(1))),
    (losses.SyntheticLikelihood, losses.SyntheticLikelihood(covariance="diagonal")),
    (lambda: losses.BetaSyntheticLikelihood(1.5), losses.BetaSyntheticLikelihood(1.4)),
    (lambda: losses.GammaSyntheticLikelihood(1.5), losses.BetaSyntheticLikelihood(1.5)),
    (lambda: losses.Sum([losses.mse], [1]), losses.Sum([losses.mse], [2])),
]


@pytest.mark.parametrize(("make", "other"), EQUAL_PAIRS, ids=[repr(other) for _, other in EQUAL_PAIRS])
def test_losses_with_equal_arguments_are_equal(make: Any, other: Any) -> None:
    first, second = make(), make()
    assert first == second
    assert repr(first) == repr(second)
    assert hash(first) == hash(second)
    assert first != other
    assert first != 1
    with pytest.raises(AttributeError):  # frozen
        first.anything = 1


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (losses.DebiasedMSE(), "DebiasedMSE()"),
        (losses.DebiasedMSE(torch.ones(3)), "DebiasedMSE(weights=<tensor of shape (3,), checksum dc7c4e94>)"),
        (losses.DebiasedMSE(torch.ones(2)), "DebiasedMSE(weights=<tensor of shape (2,), checksum d5065190>)"),
        (losses.Moments(statistic), "Moments(statistics=statistic)"),
        (losses.Moments(losses.SeriesMoments((1,))), "Moments(statistics=SeriesMoments(lags=(1,)))"),
        (losses.Moments(Mean()), "Moments(statistics=Mean)"),
        (losses.KernelScore(Mean(), 2), "KernelScore(kernel=Mean, bandwidth=2.0)"),
        (losses.SyntheticLikelihood(noise=0.5), "SyntheticLikelihood(noise=0.5, unbiased=False)"),
        (losses.BetaSyntheticLikelihood(1.5), "BetaSyntheticLikelihood(beta=1.5)"),
    ],
)
def test_losses_read_well(loss: Any, text: str) -> None:
    assert repr(loss) == text


ALIKE = [
    (losses.EnergyScore(1), losses.EnergyScore(1.0)),  # the default, and another
    (losses.EnergyScore(2), losses.EnergyScore(2.0)),
    (losses.MMD(torch.tensor(2.0)), losses.MMD(2)),  # type: ignore[arg-type]
    (losses.KernelScore(bandwidth=np.float64(2.0)), losses.KernelScore(bandwidth=2)),
    (losses.SlicedWasserstein(p=2, lags=(np.int64(1),)), losses.SlicedWasserstein(p=2.0, lags=(1,))),  # type: ignore[arg-type]
    (losses.SlicedWasserstein(num_projections=np.int64(9), seed=np.int64(1)), losses.SlicedWasserstein(9, seed=1)),  # type: ignore[arg-type]
    (losses.SeriesMoments((np.int64(1),)), losses.SeriesMoments((1,))),  # type: ignore[arg-type]
    (losses.SyntheticLikelihood(noise=0), losses.SyntheticLikelihood(unbiased=True)),
    (losses.SyntheticLikelihood(noise=1), losses.SyntheticLikelihood(noise=1.0, unbiased=False)),
    (losses.BetaSyntheticLikelihood(2, noise=0), losses.BetaSyntheticLikelihood(2.0)),
    (losses.GammaSyntheticLikelihood(2, noise=0), losses.GammaSyntheticLikelihood(2.0)),
    (losses.CRPS(torch.tensor([0.0, 1.0])), losses.CRPS(torch.tensor([-0.0, 1.0]))),
]


@pytest.mark.parametrize(("one", "other"), ALIKE, ids=[repr(one) for one, _ in ALIKE])
def test_equal_losses_read_alike(one: Any, other: Any) -> None:
    assert one == other
    assert repr(one) == repr(other)
    assert hash(one) == hash(other)


def test_losses_of_other_weights_read_otherwise() -> None:
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)]
    assert len({repr(losses.CRPS(each)) for each in weights}) == 3
    assert losses.CRPS(weights[0]) != losses.CRPS(weights[2])


# every loss


def two_moments(series: Tensor) -> Tensor:
    return torch.stack([series.mean(-1), series.square().mean(-1)], -1)


SHORT = losses.SeriesMoments(lags=(1,))
OF_ONE_RUN: dict[str, Any] = {
    "mse": losses.mse,
    "mae": losses.mae,
    "log_mse": losses.log_mse,
    "Sum": losses.Sum([losses.mse, partial(losses.mae, weights=torch.ones(6))]),
    "Moments of one run": losses.Moments(SHORT),
    "MMD": losses.MMD(),
    "MMD of fixed bandwidth": losses.MMD(1.5),
    "SlicedWasserstein": losses.SlicedWasserstein(seed=0),
    "SlicedWasserstein, p = 1": losses.SlicedWasserstein(p=1, seed=0),
    "SlicedWasserstein with lags": losses.SlicedWasserstein(num_projections=3, lags=(1,), seed=0),
}
OF_SEVERAL: dict[str, Any] = {
    "DebiasedMSE": losses.DebiasedMSE(torch.ones(6)),
    "Moments": losses.Moments(SHORT),
    "CRPS": losses.CRPS(),
    "EnergyScore": losses.EnergyScore(),
    "EnergyScore, beta = 0.7": losses.EnergyScore(0.7),
    "EnergyScore, beta = 2": losses.EnergyScore(2),
    "KernelScore": losses.KernelScore(),
    "KernelScore of fixed bandwidth": losses.KernelScore(bandwidth=1.5),
    "SyntheticLikelihood": losses.SyntheticLikelihood(two_moments),
    "SyntheticLikelihood with noise": losses.SyntheticLikelihood(two_moments, noise=0.5),
    "SyntheticLikelihood, diagonal": losses.SyntheticLikelihood(covariance="diagonal"),
    "BetaSyntheticLikelihood": losses.BetaSyntheticLikelihood(1.5),
    "GammaSyntheticLikelihood": losses.GammaSyntheticLikelihood(1.5),
}
EVERY = OF_ONE_RUN | OF_SEVERAL
PIECEWISE_LINEAR = {"mae", "CRPS", "SlicedWasserstein, p = 1"}
every_loss = pytest.mark.parametrize("name", EVERY)
# Torch's own, in jvp.
scripts = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def example(name: str, batch: int = 2) -> tuple[Tensor, Tensor]:
    """x and y of six times, with five replicates if the loss takes them."""
    replicates = (5,) if name in OF_SEVERAL else ()
    return torch.randn(batch, *replicates, 6), torch.randn(batch, 6)


def test_this_list_is_of_every_loss() -> None:
    names = {name.split(",")[0].split()[0] for name in EVERY}
    assert names == set(losses.__all__) - {"SeriesMoments"}


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_simulated_counts_are_compared_as_numbers(name: str, dtype: torch.dtype, double_precision: None) -> None:
    loss, (x, y) = EVERY[name], example(name)
    x, y = ((3 * values).abs().to(dtype) for values in (x, y))  # of unsigned ones 0 - 3 is 253
    expected = loss(x.double(), y.double())
    assert expected.isfinite().all()
    for pair in [(x, y), (x.double(), y), (x, y.double())]:
        torch.testing.assert_close(loss(*pair), expected, rtol=0, atol=0)


@every_loss
def test_a_batch_without_draws_has_no_losses(name: str) -> None:
    x, y = example(name, batch=0)
    x.requires_grad_()
    for data in (y, torch.zeros(6).expand(0, 6)):
        value = EVERY[name](x, data)
        assert value.shape == (0,)
        assert torch.autograd.grad(value.sum(), x)[0].shape == x.shape


@scripts
@every_loss
def test_losses_can_be_differentiated_forwards(name: str, double_precision: None) -> None:
    loss, (x, y) = EVERY[name], example(name)
    y[0, 4] = torch.nan if name != "SyntheticLikelihood" and "noise" not in name else 0.0
    tangents, leaf = torch.randn(3, *x.shape), x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, y).sum(), leaf)
    expected = (gradient * tangents).flatten(2).sum(2)

    def push(tangent: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: loss(x, y), (x,), (tangent,))[1]

    torch.testing.assert_close(push(tangents[0]), expected[0])
    torch.testing.assert_close(torch.vmap(push, randomness="same")(tangents), expected)


@every_loss
def test_losses_of_one_draw_can_be_batched_by_vmap(name: str, double_precision: None) -> None:
    """As `Simulator.from_loss(batched=False)` does; either may also be the same for all draws."""
    loss, (x, y) = EVERY[name], example(name, batch=3)
    leaf = x.clone().requires_grad_()
    for runs, data, dims in [(leaf, y, (0, 0)), (leaf, y[0], (0, None)), (leaf[0], y, (None, 0))]:
        batched = torch.vmap(lambda x, y: loss(x[None], y[None])[0], dims)(runs, data)
        expected = loss(runs.expand_as(x), data.expand_as(y))
        torch.testing.assert_close(batched, expected)
        gradients = [torch.autograd.grad(value.sum(), leaf)[0] for value in (batched, expected)]
        torch.testing.assert_close(*gradients)


@scripts
@every_loss
def test_losses_have_second_derivatives(name: str, double_precision: None) -> None:
    loss, (x, y) = EVERY[name], example(name, batch=1)
    hessian = torch.func.hessian(lambda x: loss(x, y)[0])(x)  # forwards over backwards
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, y).sum(), leaf, create_graph=True)
    assert (hessian == 0).all() == (name in PIECEWISE_LINEAR)
    direction = torch.randn_like(x)
    (product,) = torch.autograd.grad((gradient * direction).sum(), leaf)
    torch.testing.assert_close((hessian * direction).flatten(x.dim()).sum(-1), product)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, y), (leaf,))


@every_loss
def test_copies_are_equal_and_read_alike(name: str) -> None:
    loss = EVERY[name]
    if name == "Sum":
        loss = losses.Sum([losses.mse, losses.MMD()])  # functools.partial are equal only if they are the same
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert again == loss
        assert hash(again) == hash(loss)
        assert repr(again) == repr(loss)
