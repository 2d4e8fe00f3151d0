"""Several runs to each draw that is scored: `Simulator(replicates=m)`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from simulators_for_tests import Counted, drift, fails_above_one, model_of
from torch import Tensor

from pyrobirds import GeneralizedELBO, Simulator, losses
from pyrobirds.simulators import repeated


class Seen:
    """A loss that remembers what it was given."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.x, self.y = x, y
        return (x.mean(1) - y).square().reshape(len(y), -1).mean(1)


def test_the_loss_sees_the_runs_of_each_draw_in_its_second_dimension() -> None:
    fn, loss = Counted(drift), Seen()
    theta = torch.tensor([-100.0, 0.0, 100.0], requires_grad=True)
    y = torch.arange(15.0).reshape(3, 5)
    value = Simulator(fn, loss, replicates=4)(theta).log_prob(y)
    assert (fn.calls, fn.batch) == (1, 12)
    assert loss.x.shape == (3, 4, 5)
    assert loss.y.equal(y)
    assert (loss.x - theta.reshape(3, 1, 1)).abs().max() < 6  # each draw has runs of its own parameters
    assert len(loss.x.flatten().unique()) == 60  # and each run noise of its own
    # x is theta plus noise: the gradient is that of the mean over the runs.
    expected = -(2 * (loss.x.mean(1) - y)).mean(1)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), theta)[0], expected)


def test_plates_particles_and_vectors_of_parameters() -> None:
    def fn(theta: Tensor) -> Tensor:
        assert theta.shape == (24, 3)
        return theta + 0.0

    loss = Seen()
    theta = torch.randn(2, 4, 3)
    site = Simulator(fn, loss, replicates=3, theta_event_dims=1)(theta)
    value = site.log_prob(torch.zeros(4, 3))
    assert value.shape == (2, 4)
    assert loss.x.shape == (8, 3, 3)
    assert loss.x.equal(theta.reshape(8, 1, 3).expand(8, 3, 3))
    assert site.event_shape == (3,)


def test_a_function_of_one_draw() -> None:
    loss = Seen()
    site = Simulator(lambda theta: theta + torch.randn(5), loss, batched=False, replicates=4)(torch.zeros(3))
    assert site.log_prob(torch.zeros(5)).shape == (3,)
    assert loss.x.shape == (3, 4, 5)
    assert len(loss.x.flatten().unique()) == 60


def test_several_outputs_share_their_runs() -> None:
    fn = Counted(lambda theta, n: {"a": drift(theta, n), "b": drift(theta, 2)})
    losses = {"a": Seen(), "b": Seen()}
    run = Simulator(fn, losses, replicates=4)(torch.zeros(3))
    for output, size in (("a", 5), ("b", 2)):
        run[output].log_prob(torch.zeros(size))
        assert losses[output].x.shape == (3, 4, size)
    assert fn.calls == 1


def test_drawing_is_one_run() -> None:
    fn = Counted(drift)
    site = Simulator(fn, Seen(), replicates=4)(torch.zeros(3))
    x = site.sample((2,))
    assert x.shape == (2, 3, 5)
    assert fn.batch == 6
    site.log_prob(torch.zeros(5))
    assert (fn.calls, fn.batch) == (2, 12)
    model = model_of(Simulator(drift, Seen(), replicates=4))
    assert Predictive(model, num_samples=7, parallel=True)()["x"].shape == (7, 5)


def test_a_draw_that_was_not_served_is_no_set_of_replicates() -> None:
    losses = {"a": Seen(), "b": Seen()}
    run = Simulator(lambda theta: {"a": drift(theta), "b": drift(theta)}, losses, replicates=4)(torch.zeros(3))
    run["a"].rsample()
    run["b"].log_prob(torch.zeros(5))
    assert losses["b"].x.shape == (3, 4, 5)


def test_frozen_replicates_are_the_same_at_every_score_and_differ_from_each_other() -> None:
    loss = Seen()
    site = Simulator(drift, loss, replicates=4, seed=1)(torch.zeros(3))
    first, x = site.log_prob(torch.zeros(5)), loss.x
    assert site.log_prob(torch.zeros(5)).equal(first)
    assert len(x.flatten().unique()) == 60


def test_one_run_that_fails_fails_its_draw() -> None:
    loss = Seen()

    def fn(theta: Tensor) -> Tensor:
        theta = theta.clone()
        theta[5] = 2.0  # the second run of the second of three draws with four runs each
        return fails_above_one(theta)

    site = Simulator(fn, loss, replicates=4)(torch.zeros(3))
    value = site.log_prob(torch.zeros(4))
    assert value.isnan().tolist() == [False, True, False]
    assert site.num_failed is not None
    assert site.num_failed.tolist() == [0, 1, 0]


def test_an_exception_in_one_run_of_a_function_of_one_draw_fails_its_draw() -> None:
    calls = []

    def fn(theta: Tensor) -> Tensor:
        calls.append(theta)
        if float(theta) > 1 and len(calls) % 2:
            raise ArithmeticError("too large")
        return theta + torch.zeros(4)

    site = Simulator(fn, Seen(), batched=False, replicates=4)
    with pytest.warns(UserWarning, match="fn runs in a Python loop over draws"):
        site(torch.zeros(3)).log_prob(torch.zeros(4))
    with pytest.warns(RuntimeWarning, match=r"fn raised an exception in 1 of 3 draws, such as theta=2"):
        value = site(torch.tensor([0.0, 2.0, 0.5])).log_prob(torch.zeros(4))
    assert value.isnan().tolist() == [False, True, False]


def test_missing_data_and_failed_runs_where_they_are_missing() -> None:
    def fn(theta: Tensor) -> Tensor:
        return theta.unsqueeze(-1) + torch.tensor([0.0, torch.inf, 0.0])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(y.isnan().unsqueeze(1), 0, x - y.nan_to_num().unsqueeze(1)).square().sum((1, 2))

    site = Simulator(fn, loss, replicates=2)(torch.ones(3))
    assert site.log_prob(torch.tensor([0.0, torch.nan, 1.0])).tolist() == [-2.0, -2.0, -2.0]
    assert site.log_prob(torch.tensor([0.0, 1.0, 1.0])).isnan().all()


def test_repeats_of_replicates_average_the_loss_of_as_many_sets() -> None:
    fn, loss = Counted(drift), Seen()
    model = model_of(Simulator(fn, loss, replicates=4))
    trace = pyro.poutine.trace(repeated(model, 3)).get_trace(torch.zeros(5))
    trace.compute_log_prob()
    assert fn.batch == 12
    assert loss.x.shape == (3, 4, 5)


def test_a_fit_with_replicates_reaches_the_posterior_of_the_mean() -> None:
    # The squared error of the mean of m runs, less the variance that it adds, has expectation (theta - y)^2, so that
    # the posterior at w = 1 is Gaussian: precision 1 + 2, mean 2 y / 3.
    def debiased(x: Tensor, y: Tensor) -> Tensor:
        return ((x.mean(1) - y).square() - x.var(1) / x.shape[1]).mean(1)

    model = model_of(Simulator(drift, debiased, replicates=10, n_timesteps=20))
    guide = AutoNormal(model, init_scale=0.5)
    y = torch.full((20,), 1.5)
    svi = SVI(model, guide, Adam({"lr": 0.02}), GeneralizedELBO(num_particles=50))
    trail = []
    for step in range(600):
        svi.step(y)
        if step >= 300:
            trail.append([guide.locs.theta.item(), guide.scales.theta.item()])
    mean, sd = torch.tensor(trail).mean(0).tolist()
    # Over the seeds 0 to 9 the errors have a standard deviation of about 0.003.
    assert mean == pytest.approx(1.0, abs=0.015)
    assert sd == pytest.approx(3**-0.5, abs=0.015)


def test_wrong_numbers_of_replicates_are_refused() -> None:
    with pytest.raises(ValueError, match="replicates must be at least 1, got 0"):
        Simulator(drift, Seen(), replicates=0)
    with pytest.raises(TypeError, match=r"replicates must be a whole number of at least 1, got 2\.5"):
        Simulator(drift, Seen(), replicates=2.5)  # type: ignore[arg-type]


def test_a_loss_that_keeps_the_replicates_is_refused() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (x - y.unsqueeze(1)).square().mean(-1)

    with pytest.raises(ValueError, match=r"the loss 'loss' of a site of Simulator\(drift\) returned shape \(3, 4\)"):
        Simulator(drift, loss, replicates=4)(torch.zeros(3)).log_prob(torch.zeros(5))


def test_the_site_says_how_many_replicates_it_has() -> None:
    assert "replicates=4" in Simulator(drift, Seen(), replicates=4)(torch.zeros(3)).made_of
    assert "replicates" not in Simulator(drift, Seen())(torch.zeros(3)).made_of


def test_a_parameter_of_that_name_is_fixed_by_partial() -> None:
    def fn(theta: Tensor, replicates: Tensor) -> Tensor:
        return drift(theta + replicates)

    with pytest.raises(TypeError, match=r"Fix \['replicates'\], which Simulator takes itself, by functools.partial"):
        Simulator(fn, Seen(), replicates=2)(torch.zeros(3))


def test_a_scalar_of_each_run() -> None:
    loss = Seen()
    site = Simulator(lambda theta: theta + torch.randn(len(theta)), loss, event_dim=0, replicates=4)(torch.zeros(3))
    assert site.log_prob(torch.tensor(1.0)).shape == (3,)
    assert loss.x.shape == (3, 4)


def test_the_site_says_the_settings_of_its_loss() -> None:
    def made_of(loss: Any) -> str:
        return Simulator(drift, loss, replicates=4)(torch.zeros(3)).made_of

    assert made_of(losses.EnergyScore(beta=1.5)).startswith("Simulator(drift, EnergyScore(beta=1.5)")
    assert made_of(partial(losses.mse, weights=torch.ones(5))).startswith("Simulator(drift, mse")
    assert made_of(Seen()).startswith("Simulator(drift, Seen")
