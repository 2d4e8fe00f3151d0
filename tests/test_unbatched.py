"""Functions of one draw, and losses that simulate inside themselves, as users bring them."""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from simulators_for_tests import drift, model_of, tutorial_walk
from torch import Tensor

from pyrobirds import GeneralizedELBO, Simulator, losses

T = 12


def tutorial_loss(theta: Tensor, y: Tensor) -> Tensor:
    x = tutorial_walk(theta, T)
    return torch.nn.functional.mse_loss(x, y)


def walk_mean(theta: Tensor) -> Tensor:
    return torch.arange(T) * (2 * torch.sigmoid(theta).unsqueeze(-1) - 1)


def walk_variance(theta: Tensor) -> Tensor:
    p = torch.sigmoid(theta).unsqueeze(-1)
    return 4 * torch.arange(T) * p * (1 - p)


@pytest.mark.parametrize("theta_event_dims", [0, 1], ids=["scalar theta", "theta of one entry"])
def test_the_tutorials_walk_runs_unchanged(theta_event_dims: int) -> None:
    """In law the walk of the closed form, by 5 standard errors of the mean at each time; and forward without a loop."""
    n = 2000
    theta = torch.full((n,), -1.0, requires_grad=True)
    walk = Simulator(tutorial_walk, losses.mse, batched=False, theta_event_dims=theta_event_dims, n_timesteps=T)
    argument = theta.unsqueeze(-1) if theta_event_dims else theta
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = walk(argument).rsample()
    error = (x.mean(0) - walk_mean(torch.tensor(-1.0))).abs()
    assert (error <= 5 * (walk_variance(torch.tensor(-1.0)) / n).sqrt()).all()
    x[:, -1].sum().backward()
    assert theta.grad is not None
    assert theta.grad.isfinite().all()
    assert (theta.grad >= 0).all()
    assert theta.grad.sum() > 0  # a higher theta goes up more often


def test_the_tutorials_walk_and_loss_calibrate() -> None:
    y = -torch.arange(float(T))  # a walk that always went down
    sites = {
        "walk": Simulator(tutorial_walk, losses.mse, batched=False, n_timesteps=T),
        "loss": Simulator.from_loss(tutorial_loss, batched=False),
    }
    for site in sites.values():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = model_of(site)
        guide = AutoNormal(model)
        svi = SVI(model, guide, Adam({"lr": 0.05}), GeneralizedELBO(w=1.0))
        for _ in range(100):
            svi.step(y)
        assert guide.median()["theta"] < -1.0


def test_a_loss_that_simulates_inside_equals_walk_and_loss() -> None:
    """E[loss | theta] has a closed form: mean over time of (mean - y)^2 + variance; 5 standard errors."""
    n, theta, y = 4000, torch.tensor(-0.5), torch.linspace(0, 3, T)
    exact = float(((walk_mean(theta) - y) ** 2 + walk_variance(theta)).mean())
    inside = -Simulator.from_loss(tutorial_loss, batched=False)(theta.expand(n)).log_prob(y)
    outside = -Simulator(tutorial_walk, losses.mse, batched=False, n_timesteps=T)(theta.expand(n)).log_prob(y)
    for values in (inside, outside):
        assert abs(values.mean().item() - exact) < 5 * values.std().item() / math.sqrt(n)


def test_from_loss_under_a_plate() -> None:
    def loss(theta: Tensor, y: Tensor) -> Tensor:
        assert y.shape == (T,)
        return ((theta - y) ** 2).mean()

    y = torch.arange(3.0).unsqueeze(-1).expand(3, T)
    site = Simulator.from_loss(loss, batched=False)(torch.zeros(3)).expand([4, 3])
    assert torch.equal(site.log_prob(y), -(torch.arange(3.0) ** 2).expand(4, 3))


def test_from_loss_batched_with_keywords_and_settings() -> None:
    def loss(theta: Tensor, scale: Tensor, power: int, y: Tensor) -> Tensor:
        return ((theta.unsqueeze(-1) - y) ** power * scale.unsqueeze(-1)).mean(-1)

    site = Simulator.from_loss(loss, power=4)
    expected = -torch.tensor([2.0, 2.0])
    assert torch.equal(site(torch.zeros(2), 2.0).log_prob(torch.ones(T)), expected)
    assert torch.equal(site(scale=2.0, theta=torch.zeros(2)).log_prob(torch.ones(T)), expected)


def test_from_loss_cannot_be_drawn() -> None:
    model = model_of(Simulator.from_loss(tutorial_loss, batched=False))
    with pytest.raises(ValueError, match=r"from_loss\(tutorial_loss\).*not drawn.*Simulator\(fn, loss\)"):
        Predictive(model, num_samples=2)()


def test_from_loss_violations() -> None:
    with pytest.raises(ValueError, match=r"tutorial_loss.*expected shape \(3,\).*batched=False"):
        Simulator.from_loss(lambda_loss)(torch.zeros(3)).log_prob(torch.zeros(3, T))
    with pytest.raises(ValueError, match=r"from_loss|event_dim"):
        Simulator.from_loss(tutorial_loss, batched=False)(torch.zeros(3)).log_prob(torch.tensor(0.0))
    with pytest.raises(
        TypeError, match="must take parameters and the data: in a parameter called y, or in the last one"
    ):
        Simulator.from_loss(lambda: torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"not depend differentiably on 'theta'"):
        Simulator.from_loss(lambda theta, y: (theta.detach() - y).mean(), batched=False)(
            torch.zeros(3, requires_grad=True)
        ).log_prob(torch.zeros(T))


def lambda_loss(theta: Tensor, y: Tensor) -> Tensor:
    return ((theta.unsqueeze(-1) - y) ** 2).mean()


lambda_loss.__name__ = "tutorial_loss"


def with_rsample(theta: Tensor, n_timesteps: int = T) -> Tensor:
    return torch.distributions.Normal(theta, 1.0).rsample((n_timesteps,))


def test_what_vmap_cannot_take_runs_in_a_loop_said_once() -> None:
    walk = Simulator(with_rsample, losses.mse, batched=False)
    theta = torch.linspace(-1, 1, 500, requires_grad=True)
    with pytest.warns(UserWarning, match=r"with_rsample runs in a Python loop.*vmap.*RuntimeError") as caught:
        x = walk(theta).rsample()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(theta).rsample()  # said once
    assert x.shape == (500, T)
    residual = (x - theta.unsqueeze(-1)).detach()
    assert abs(float(residual.mean())) < 5 / math.sqrt(500 * T)
    assert torch.autograd.grad(x.sum(), theta)[0].allclose(torch.tensor(float(T)))


def with_numpy_noise(theta: Tensor) -> Tensor:
    return theta + torch.as_tensor(np.random.standard_normal(T), dtype=theta.dtype)  # noqa: NPY002


def with_python_noise(theta: Tensor) -> Tensor:
    return theta + torch.tensor([random.gauss(0, 1) for _ in range(T)])


@pytest.mark.parametrize("fn", [with_numpy_noise, with_python_noise])
def test_noise_from_outside_torch_is_not_shared_between_draws(fn: object) -> None:
    with pytest.warns(UserWarning, match="loop.*generator"):
        x = Simulator(fn, losses.mse, batched=False)(torch.zeros(4)).sample()
    assert len({tuple(row) for row in x.tolist()}) == 4


def test_an_error_of_the_function_itself_is_raised_as_it_is() -> None:
    def broken(theta: Tensor) -> Tensor:
        raise ZeroDivisionError("agents divided by none")

    with pytest.raises(ZeroDivisionError, match="agents divided by none"):
        Simulator(broken, losses.mse, batched=False)(torch.zeros(2)).sample()


def test_tensors_among_the_settings_are_not_split_over_draws() -> None:
    def shifted(theta: Tensor, offsets: Tensor) -> Tensor:
        return theta + offsets

    x = Simulator(shifted, losses.mse, batched=False, offsets=torch.arange(4.0))(torch.zeros(4)).sample()
    assert torch.equal(x, torch.arange(4.0).expand(4, 4))


def test_unbatched_function_with_a_dict_of_outputs() -> None:
    def both(theta: Tensor) -> dict[str, Tensor]:
        x = drift(theta, T)
        return {"a": x, "b": x.sum()}

    def both_in_a_loop(theta: Tensor) -> dict[str, Tensor]:
        x = with_rsample(theta)
        return {"a": x, "b": x.sum()}

    loss = {"a": losses.mse, "b": losses.mse}
    for fn in (both, both_in_a_loop):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = Simulator(fn, loss, batched=False, event_dim={"a": 1, "b": 0})(torch.zeros(6))
            a, b = run["a"].sample(), run["b"].sample()
        assert a.shape == (6, T)
        assert torch.allclose(a.sum(-1), b)


def test_bare_factor_is_silently_wrong_where_from_loss_is_right() -> None:
    """Why from_loss exists: a factor of an unbatched loss sees all particles at once and mixes them up."""
    y = torch.zeros(T)

    def one_loss(theta: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(theta.expand_as(y) if theta.dim() == 0 else theta.mean() + y * 0, y)

    theta = torch.tensor([-1.0, 1.0])
    assert torch.equal(Simulator.from_loss(one_loss, batched=False)(theta).log_prob(y), torch.tensor([-1.0, -1.0]))
    assert one_loss(theta, y) == 0  # the two particles cancelled


@pytest.mark.parametrize("make", [lambda: np.random.default_rng(0).normal, lambda: random.Random(0).gauss])
def test_noise_from_a_generator_of_the_functions_own_is_not_shared_either(make: Callable[[], Callable]) -> None:
    normal = make()

    def fn(theta: Tensor) -> Tensor:
        return theta + torch.tensor([normal(0.0, 1.0) for _ in range(T)])

    with pytest.warns(UserWarning, match="loop.*generator outside of torch"):
        x = Simulator(fn, losses.mse, batched=False)(torch.zeros(4)).sample()
    assert len({tuple(row) for row in x.tolist()}) == 4


def test_functions_without_noise_go_through_vmap() -> None:
    walk = Simulator(lambda theta: theta + torch.arange(float(T)), losses.mse, batched=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(walk(torch.zeros(3)).sample(), torch.arange(float(T)).expand(3, T))


def test_from_loss_finds_the_data() -> None:
    """The parameter called y, or else the last one without a default; however the function takes it."""

    def with_default(theta: Tensor, y: Tensor, tau: float = 0.5) -> Tensor:
        return ((theta - y) ** 2).mean() * tau

    def optional(theta: Tensor, y: Tensor | None = None, tau: float = 0.5) -> Tensor:
        return ((theta - y) ** 2).mean() * tau

    def other_name(theta: Tensor, data: Tensor, tau: float = 0.5) -> Tensor:
        return ((theta - data) ** 2).mean() * tau

    def positional(theta: Tensor, y: Tensor, /) -> Tensor:
        return ((theta - y) ** 2).mean() * 0.5

    partial = functools.partial(lambda theta, y, n: ((theta - y) ** 2).mean() / n, n=2)
    for loss in (with_default, optional, other_name, positional, partial):
        site = Simulator.from_loss(loss, batched=False)(torch.zeros(3))
        assert site.log_prob(torch.ones(T)).tolist() == [-0.5] * 3
    assert Simulator.from_loss(with_default, batched=False, tau=1.0)(torch.zeros(1)).log_prob(torch.ones(T)) == -1


def test_choices_that_come_out_alike_are_not_taken_for_shared_noise() -> None:
    def rare(theta: Tensor) -> Tensor:
        return (torch.rand(3) < torch.sigmoid(theta)).float() + 0 * theta

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            Simulator(rare, losses.mse, batched=False)(torch.full((4,), 3.0)).sample()


def test_a_generator_of_the_functions_own_is_found_next_to_noise_of_torch() -> None:
    generator = np.random.default_rng(0)

    def both(theta: Tensor) -> Tensor:
        return theta + torch.randn(T) + float(generator.normal())

    with pytest.warns(UserWarning, match="loop.*generator outside of torch"):
        Simulator(both, losses.mse, batched=False)(torch.zeros(4)).sample()


def test_outputs_that_are_no_numbers_do_not_disturb() -> None:
    def signed(theta: Tensor) -> dict[str, Tensor]:
        x = drift(theta, T)
        return {"x": x, "up": x > 0}

    simulator = Simulator(signed, {"x": losses.mse}, batched=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert simulator(torch.ones(3))["x"].sample().shape == (3, T)
