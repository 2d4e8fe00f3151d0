"""Each violation of a Simulator's contract has its own message, at the first moment it can be known."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from simulators_for_tests import drift, model_of, tutorial_walk
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyrobirds import GeneralizedELBO, Simulator, losses

T = 5
Y = torch.zeros(T)


def message(*parts: str) -> str:
    """A pattern that finds the parts in their order."""
    return r"(?s)" + ".*".join(re.escape(part) for part in parts)


def step(simulator: Simulator, y: Tensor = Y, **options: Any) -> None:
    model = model_of(simulator)
    SVI(model, AutoNormal(model), Adam({"lr": 0.01}), GeneralizedELBO(**options)).step(y)


def test_a_setting_that_the_function_does_not_take() -> None:
    with pytest.raises(TypeError, match=message("drift", "'n_steps'", "drift(theta", "n_timesteps")):
        Simulator(drift, losses.mse, n_steps=5)


@pytest.mark.parametrize(
    ("loss", "came"),
    [(None, "None"), ("mse", "'mse'"), ({}, "{}"), ({"x": 3}, "3")],
)
def test_a_loss_that_is_none(loss: Any, came: str) -> None:
    with pytest.raises(TypeError, match=message("loss must be a callable", came)):
        Simulator(drift, loss)


def test_a_simulator_that_is_no_function() -> None:
    with pytest.raises(TypeError, match=message("must be a function", "tensor")):
        Simulator(torch.zeros(3), losses.mse)


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"event_dim": -1}, ValueError, ("event_dim", "at least 0", "-1")),
        ({"event_dim": 1.0}, TypeError, ("event_dim", "whole number", "1.0")),
        ({"event_dim": {"x": 1}}, ValueError, ("event_dim", "'x'")),
        ({"seed": -1}, ValueError, ("seed", "-1")),
        ({"seed": "a"}, TypeError, ("seed", "'a'")),
        ({"seed": 2**32}, ValueError, ("seed", "below 2**32")),
        ({"theta_event_dims": {"thta": 1}}, ValueError, ("theta_event_dims", "'thta'", "drift", "'theta'")),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error, match=message(*parts)):
        Simulator(drift, losses.mse, **options)


def test_wrong_parameters_of_a_call() -> None:
    walk = Simulator(drift, losses.mse, n_timesteps=T)
    with pytest.raises(
        TypeError, match=message("drift", "missing a required argument", "['theta']", "['n_timesteps']")
    ):
        walk()
    with pytest.raises(TypeError, match=message("drift", "'beta'")):
        walk(torch.zeros(2), beta=1.0)
    with pytest.raises(TypeError, match=message("parameter 'theta' of drift", "tensor or a number", "'high'")):
        walk("high")
    with pytest.raises(TypeError, match=message("parameter 'theta' of drift", "None")):
        walk(None)


def test_parameters_that_do_not_broadcast() -> None:
    def two(a: Tensor, b: Tensor) -> Tensor:
        return (a + b).unsqueeze(-1).expand(-1, T)

    with pytest.raises(ValueError, match=message("two", "do not broadcast", "a (3,), b (4,)", "theta_event_dims")):
        Simulator(two, losses.mse)(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match=message("theta_event_dims of two has 1 entries", "2 parameters")):
        Simulator(two, losses.mse, theta_event_dims=[1])(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=message("parameter 'b' of two", "shape ()", "theta_event_dims", "1")):
        Simulator(two, losses.mse, theta_event_dims={"b": 1})(torch.zeros(3), torch.tensor(0.0))


def transposed(theta: Tensor) -> Tensor:
    return drift(theta, T).T


def one_draw(theta: Tensor) -> Tensor:
    return theta.sum() + torch.zeros(T)


def without_batch_growth(theta: Tensor) -> Tensor:
    return drift(theta, T)[:1]


@pytest.mark.parametrize(
    ("fn", "came"),
    [(transposed, "(5, 10)"), (one_draw, "(5,)"), (without_batch_growth, "(1, 5)")],
)
def test_the_batch_must_be_in_front(fn: Callable[..., Tensor], came: str) -> None:
    site = Simulator(fn, losses.mse)(torch.zeros(10))
    parts = (f"what {fn.__name__} returned has shape {came}", "(10, ...)", "batch of draws in front", "batched=False")
    with pytest.raises(ValueError, match=message(*parts)):
        site.log_prob(Y)
    with pytest.raises(ValueError, match=message(*parts)):
        site.sample()


def test_the_tutorials_walk_without_batched_false() -> None:
    with pytest.raises(
        ValueError, match=message("Error while computing log_prob at site 'x'", "tutorial_walk", "batched=False")
    ):
        step(Simulator(tutorial_walk, losses.mse, n_timesteps=T))


def test_wrong_event_dim() -> None:
    with pytest.raises(ValueError, match=message("drift", "(3, 5)", "event_dim=2", "set event_dim")):
        Simulator(drift, losses.mse, event_dim=2)(torch.zeros(3)).sample()
    with pytest.raises(ValueError, match=message("ONE draw")):
        Simulator(one_draw, losses.mse, batched=False, event_dim=2)(torch.zeros(3)).sample()


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=message("what as_numpy returned is a ndarray", "torch tensor")):
        Simulator(lambda_named("as_numpy", lambda theta: np.zeros((len(theta), T))), losses.mse)(
            torch.zeros(2)
        ).sample()


def lambda_named(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    fn.__name__ = name
    return fn


def test_event_shape_of_the_data() -> None:
    with pytest.raises(
        ValueError, match=message("site 'x'", "Simulator(drift)", "shape (6,)", "shape (5,)", "time steps")
    ):
        step(Simulator(drift, losses.mse), torch.zeros(6))
    with pytest.raises(ValueError, match=message("shape ()", "shape (5,)")):
        Simulator(drift, losses.mse)(torch.zeros(3)).log_prob(torch.tensor(0.0))
    with pytest.raises(TypeError, match=message("must be a torch tensor", "ndarray")):
        Simulator(drift, losses.mse)(torch.zeros(3)).log_prob(np.zeros(T))


@pytest.mark.parametrize("shape", [(3, T), (1, T), (2, 4, T)])
def test_no_broadcast_of_data_over_the_batch(shape: tuple[int, ...]) -> None:
    parts = (f"batch shape {shape[:-1]}", "(4,)", "pyro.plate")
    with pytest.raises(ValueError, match=message(*parts)):
        Simulator(drift, losses.mse)(torch.zeros(4)).log_prob(torch.zeros(shape))


def test_several_series_without_a_plate() -> None:
    with pytest.raises(ValueError, match=message('site "x"', "Expected [], actual [3]", "pyro.plate")):
        step(Simulator(drift, losses.mse), torch.zeros(3, T))


def mean_of_all(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(x, y)


def by_entry(x: Tensor, y: Tensor) -> Tensor:
    return (x - y) ** 2


@pytest.mark.parametrize(
    ("loss", "came"), [(mean_of_all, "shape ()"), (by_entry, "shape (3, 5)"), (lambda x, y: 1.0, "a float")]
)
def test_a_loss_whose_result_is_not_one_per_draw(loss: Callable[..., Any], came: str) -> None:
    with pytest.raises(ValueError, match=message("the loss", "drift", came, "(3,)", "mean(-1)")):
        Simulator(drift, loss)(torch.zeros(3)).log_prob(Y)


def test_mse_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match=message("mse", "(4, 5)", "(5,)")):
        losses.mse(torch.zeros(4, 5), torch.zeros(5))


def cut(theta: Tensor) -> Tensor:
    return drift(theta.detach(), T)


def hard_choice(theta: Tensor) -> Tensor:
    return (torch.rand(len(theta), T) < torch.sigmoid(theta).unsqueeze(-1)).float()


@pytest.mark.parametrize("fn", [cut, hard_choice])
def test_not_differentiable_in_theta(fn: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=message(fn.__name__, "not depend differentiably on 'theta'", "relaxation")):
        step(Simulator(fn, losses.mse))
    Predictive(model_of(Simulator(fn, losses.mse)), num_samples=3, parallel=True)()  # to draw needs no gradient


def test_not_differentiable_in_one_of_two_parameters() -> None:
    """A warning and no error: the parameter may have no effect at the draws of the first run."""

    def half(a: Tensor, b: Tensor) -> Tensor:
        return drift(a + b.detach(), T)

    a, b = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    with pytest.warns(UserWarning, match=message("half", "no gradient", "in 'b'", ".detach()")):
        Simulator(half, losses.mse)(a, b).log_prob(Y)


def test_an_error_comes_again_until_it_is_mended() -> None:
    """In a notebook a cell is run again: the second time must not go through."""
    for fn, loss in ((cut, losses.mse), (drift, numpy_loss), (average_theta, losses.mse)):
        site = Simulator(fn, loss)(torch.zeros(3, requires_grad=True))
        for _ in range(3):
            with pytest.raises(ValueError, match=r"differentiably|mixes up"):
                site.log_prob(Y)


def test_a_reentrant_checkpoint_in_a_simulator() -> None:
    """It takes backward() alone, so that the gradient cannot be looked at; the simulator is taken as it is."""

    def saved(theta: Tensor) -> Tensor:
        return checkpoint(drift, theta, T, use_reentrant=True)

    theta = torch.zeros(3, requires_grad=True)
    Simulator(saved, losses.mse)(theta).log_prob(torch.ones(T)).sum().backward()
    assert theta.grad is not None
    assert theta.grad.abs().min() > 0


def test_outputs_that_add_up_to_a_constant_are_differentiable() -> None:
    def shares(theta: Tensor) -> Tensor:
        p = torch.sigmoid(theta)
        return torch.stack([p, 1 - p], -1)

    theta = torch.zeros(3, requires_grad=True)
    assert Simulator(shares, losses.mse)(theta).log_prob(torch.zeros(2)).requires_grad  # and no warning


def test_a_gradient_that_is_zero_everywhere_is_warned_of() -> None:
    def rounded(theta: Tensor) -> Tensor:
        return drift(theta, T).round()

    theta = torch.zeros(3, requires_grad=True)
    with pytest.warns(UserWarning, match=message("rounded", "zero", "'theta'", "rounding")):
        Simulator(rounded, losses.mse)(theta).log_prob(Y)


def test_a_guide_set_up_without_the_data() -> None:
    model = model_of(Simulator(drift, losses.mse))
    with pytest.raises(ValueError, match=message("Simulator(drift)", "pass the data when the guide is first called")):
        AutoNormal(model)()


def two_outputs(theta: Tensor) -> dict[str, Tensor]:
    return {"a": drift(theta, T), "b": drift(theta, T)}


def test_outputs_and_losses_must_fit() -> None:
    theta = torch.zeros(2)
    with pytest.raises(ValueError, match=message("two_outputs returned a dict", "['a', 'b']", "loss={'a'")):
        Simulator(two_outputs, losses.mse)(theta).sample()
    with pytest.raises(ValueError, match=message("drift returned a Tensor", "['a']")):
        Simulator(drift, {"a": losses.mse})(theta)["a"].sample()
    with pytest.raises(ValueError, match=message("two_outputs returned a dict of ['a', 'b']", "['c']")):
        Simulator(two_outputs, {"c": losses.mse})(theta)["c"].sample()
    with pytest.raises(KeyError, match=message("two_outputs has no output 'c'", "['a', 'b']")):
        Simulator(two_outputs, {"a": losses.mse, "b": losses.mse})(theta)["c"]
    with pytest.raises(ValueError, match=message("event_dim", "['a']")):
        Simulator(two_outputs, {"a": losses.mse, "b": losses.mse}, event_dim={"a": 1})
    broken = Simulator(lambda theta: {"a": drift(theta, T), "b": drift(theta, T).T}, {"a": losses.mse, "b": losses.mse})
    with pytest.raises(ValueError, match=message("output 'b' of", "(5, 2)")):
        broken(theta)["a"].sample()


def test_support_is_asked_of_latents_only() -> None:
    site = Simulator(drift, losses.mse)(torch.zeros(2))
    with pytest.raises(ValueError, match="taken for a latent"):
        _ = site.support


def test_event_shape_is_known_after_the_first_run() -> None:
    walk = Simulator(drift, losses.mse)
    assert walk(torch.zeros(2)).event_shape == (-1,)
    walk(torch.zeros(2)).sample()
    assert walk(torch.zeros(3)).event_shape == (T,)
    assert walk(torch.zeros(3)).shape() == (3, T)


def test_repr() -> None:
    walk = Simulator(drift, losses.mse)
    assert repr(walk(torch.zeros(2))) == "Simulator(drift)(batch_shape=(2,))"
    with pyro.plate("series", 3, dim=-2):
        assert "drift" in repr(walk(torch.zeros(2)))


def numpy_loss(x: Tensor, y: Tensor) -> Tensor:
    return torch.as_tensor(((x.detach().numpy() - y.numpy()) ** 2).mean(-1))


def test_a_loss_that_cuts_the_graph() -> None:
    """Nothing would be learnt, and the prior would come back as the posterior."""
    with pytest.raises(
        ValueError, match=message("the loss 'numpy_loss'", "drift", "not depend differentiably on 'theta'", "NumPy")
    ):
        step(Simulator(drift, numpy_loss))


def over_draws(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean(0)


def time_in_front(theta: Tensor) -> Tensor:
    return drift(theta, T).T


def average_theta(theta: Tensor) -> Tensor:
    return drift(theta.mean().expand(len(theta)), T)


@pytest.mark.parametrize(
    ("fn", "loss"), [(drift, over_draws), (time_in_front, losses.mse), (average_theta, losses.mse)]
)
def test_mixing_up_draws_is_found_where_shapes_cannot_tell(
    fn: Callable[..., Tensor], loss: Callable[..., Tensor]
) -> None:
    theta = torch.zeros(T, requires_grad=True)  # as many draws as time steps
    with pytest.raises(ValueError, match=message("mixes up the draws", "'theta'", "FIRST dimension")):
        Simulator(fn, loss)(theta).log_prob(torch.ones(T))
    with pytest.raises(ValueError, match=message("mixes up the draws", "'theta'", "FIRST dimension")):
        step(Simulator(fn, loss), torch.ones(T), num_particles=T, max_plate_nesting=0)


@pytest.mark.parametrize(
    ("dims", "error", "parts"),
    [
        (-1, ValueError, ("theta_event_dims", "at least 0", "-1")),
        ("x", TypeError, ("theta_event_dims", "whole number", "'x'")),
        (1.0, TypeError, ("theta_event_dims", "whole number", "1.0")),
        ([0, -2], ValueError, ("theta_event_dims", "-2")),
        ({"theta": True}, TypeError, ("theta_event_dims", "True")),
    ],
)
def test_theta_event_dims_are_checked_at_once(dims: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error, match=message(*parts)):
        Simulator(drift, losses.mse, theta_event_dims=dims)


def test_batched_is_true_or_false() -> None:
    with pytest.raises(TypeError, match=message("batched must be True or False", "'no'")):
        Simulator(drift, losses.mse, batched="no")


def test_a_setting_whose_name_the_simulator_takes_itself() -> None:
    def noisy(theta: Tensor, seed: int) -> Tensor:
        return drift(theta, T)

    with pytest.raises(
        TypeError, match=message("missing a required argument: 'seed'", "['seed']", "functools.partial")
    ):
        Simulator(noisy, losses.mse, seed=3)(torch.zeros(2))


def test_a_hand_written_guide_without_the_data() -> None:
    model = model_of(Simulator(drift, losses.mse))

    def guide(y: Tensor | None = None) -> None:
        pyro.sample("theta", dist.Normal(pyro.param("at", torch.tensor(0.0)), 1.0))

    svi = SVI(model, guide, Adam({"lr": 0.01}), GeneralizedELBO())
    with pytest.raises(ValueError, match=message("Simulator(drift)", "own draw", "no data", "svi.step(y)")):
        svi.step()


def accidental_series() -> Callable[..., Any]:
    return model_of(Simulator(drift, losses.mse))


def accidental_vector(y: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), 1.0).to_event(1))
    pyro.sample("x", Simulator(drift, losses.mse)(theta), obs=y)  # theta_event_dims=1 forgotten


def accidental_constant(y: Tensor) -> None:
    def two(theta: Tensor, k: Tensor) -> Tensor:
        return drift(theta + k, T)

    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", Simulator(two, losses.mse)(theta, torch.arange(10.0)), obs=y)


@pytest.mark.parametrize("nesting", [{}, {"max_plate_nesting": 0}], ids=["guessed", "given"])
@pytest.mark.parametrize(
    ("model", "y"),
    [(accidental_series(), torch.zeros(10, T)), (accidental_vector, Y), (accidental_constant, Y)],
    ids=["series without a plate", "vector taken for scalars", "constant taken for scalars"],
)
def test_a_batch_as_long_as_the_particles_is_not_taken_for_them(
    model: Callable[..., Any], y: Tensor, nesting: dict[str, int]
) -> None:
    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.01}), GeneralizedELBO(num_particles=10, **nesting))
    with pytest.raises(ValueError, match=r'site "x", invalid log_prob shape|batch shape \(10,\).*pyro.plate'):
        svi.step(y)
