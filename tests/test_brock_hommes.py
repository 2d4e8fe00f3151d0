"""Brock and Hommes' asset prices against plain references of their own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyrobirds import GeneralizedELBO, Simulator, losses, models
from pyrobirds.simulators import brock_hommes
from pyrobirds.simulators.brock_hommes import _BLOCK, _FEW_DRAWS

CUSTOMARY = {
    **{"g1": 0.0, "g2": 0.9, "g3": 0.9, "g4": 1.01, "b1": 0.0, "b2": 0.2, "b3": -0.2, "b4": 0.0},
    **{"beta": 120.0, "sigma": 0.04, "r": 0.01},
}


def around_customary(*batch: int) -> dict[str, Tensor]:
    """All parameters, different ones for each draw, that need a gradient."""
    theta = {name: value + 0.1 * torch.randn(batch) for name, value in CUSTOMARY.items()}
    for name in ("beta", "sigma", "r"):
        theta[name] = CUSTOMARY[name] * torch.exp(0.2 * torch.randn(batch))
    return {name: value.requires_grad_() for name, value in theta.items()}


def noise_of(seed: int, n_timesteps: int, n: int) -> Tensor:
    """The noise of a run that starts from this seed."""
    torch.manual_seed(seed)
    return torch.randn(n_timesteps - 1, n, 1).squeeze(-1)


def by_numpy(theta: dict[str, Any], noise: Any) -> Any:
    """One path, from the equations as they stand in the literature."""
    g = np.array([float(theta[f"g{h}"]) for h in range(1, 5)])
    b = np.array([float(theta[f"b{h}"]) for h in range(1, 5)])
    beta, sigma, R = float(theta["beta"]), float(theta["sigma"]), 1 + float(theta["r"])
    x = [0.0, 0.0, 0.0]
    for epsilon in noise:
        profit = (x[-1] - R * x[-2]) * (g * x[-3] + b - R * x[-2])
        weight = np.exp(beta * (profit - profit.max()))
        share = weight / weight.sum()
        x.append(((share * (g * x[-1] + b)).sum() + sigma * epsilon) / R)
    return np.array(x[2:])


def by_autograd(theta: dict[str, Tensor], noise: Tensor, horizon: int | None = None) -> Tensor:
    """Paths ``(B, T)`` by plain torch operations, the state detached before steps 0, h, 2h, ..."""
    g = torch.stack([theta[f"g{h}"] for h in range(1, 5)], -1)
    b = torch.stack([theta[f"b{h}"] for h in range(1, 5)], -1)
    beta, sigma, R = (theta[name].unsqueeze(-1) + (name == "r") for name in ("beta", "sigma", "r"))
    zero = torch.zeros_like(R)
    state, xs = (zero, zero, zero), [zero]
    for t, epsilon in enumerate(noise):
        if horizon is not None and t % horizon == 0:
            state = tuple(x.detach() for x in state)
        x, x1, x2 = state
        share = torch.softmax(beta * (x - R * x1) * (g * x2 + b - R * x1), -1)
        new = ((share * (g * x + b)).sum(-1, keepdim=True) + sigma * epsilon.unsqueeze(-1)) / R
        new = new.clamp(-1e3, 1e3)
        state = (new, x, x1)
        xs.append(new)
    return torch.cat(xs, -1)


def gradients(x: Tensor, theta: dict[str, Tensor], weights: Tensor) -> Tensor:
    return torch.stack(torch.autograd.grad((x * weights).sum(), [*theta.values()]))


@pytest.mark.usefixtures("double_precision")
def test_path_by_path_the_equations() -> None:
    theta = around_customary(8)
    torch.manual_seed(5)
    x = brock_hommes(**theta, n_timesteps=100, bound=1e6)
    noise = noise_of(5, 100, 8)
    reference = np.stack(
        [by_numpy({name: value[i].item() for name, value in theta.items()}, noise[:, i].numpy()) for i in range(8)]
    )
    assert np.abs(reference).max(1).min() > 0.1  # that they went somewhere
    assert (np.abs(x.detach().numpy() - reference) < 1e-10 * np.maximum(np.abs(reference), 1)).all()


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(("n", "n_timesteps"), [(5, 40), (2, 2 * _BLOCK + 2), (_FEW_DRAWS + 1, _BLOCK + 3), (3, 2)])
def test_gradient_is_that_of_automatic_differentiation(n: int, n_timesteps: int) -> None:
    theta = around_customary(n)
    torch.manual_seed(5)
    x = brock_hommes(**theta, n_timesteps=n_timesteps, gradient_horizon=30)
    noise, weights = noise_of(5, n_timesteps, n), torch.randn(n, n_timesteps)
    expected = gradients(by_autograd(theta, noise, 30), theta, weights)
    assert torch.allclose(gradients(x, theta, weights), expected, rtol=1e-8, atol=1e-8 * expected.abs().max())


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("horizon", [None, 1, 2, 3, 4, 7, 100])
def test_gradient_horizon_cuts_where_the_state_is_detached(horizon: int | None) -> None:
    theta = around_customary(5)
    torch.manual_seed(5)
    x = brock_hommes(**theta, n_timesteps=25, gradient_horizon=horizon)
    noise, weights = noise_of(5, 25, 5), torch.randn(5, 25)
    expected = gradients(by_autograd(theta, noise, horizon), theta, weights)
    assert torch.allclose(gradients(x, theta, weights), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch.func.jvp itself
@pytest.mark.usefixtures("double_precision")
def test_forward_mode_is_the_transpose_of_reverse_mode() -> None:
    theta = around_customary(5)
    values = tuple(value.detach() for value in theta.values())
    noise = noise_of(5, 20, 5)

    def run(*values: Tensor) -> Tensor:
        torch.manual_seed(5)
        return brock_hommes(**dict(zip(theta, values, strict=True)), n_timesteps=20)

    def plain(*values: Tensor) -> Tensor:
        return by_autograd(dict(zip(theta, values, strict=True)), noise)

    tangents = torch.randn(4, len(values), 5)
    expected = torch.stack([torch.func.jvp(plain, values, tuple(tangent))[1] for tangent in tangents])
    one_by_one = torch.stack([torch.func.jvp(run, values, tuple(tangent))[1] for tangent in tangents])
    together = torch.vmap(lambda tangent: torch.func.jvp(run, values, tuple(tangent))[1], randomness="same")(tangents)
    assert torch.allclose(one_by_one, expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(together, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("double_precision")
def test_compiled_paths_and_gradients_are_the_eager_ones() -> None:
    theta = around_customary(4)
    weights = torch.randn(4, 30)
    results = []
    for compile in (False, True):
        torch.manual_seed(5)
        x = brock_hommes(**theta, n_timesteps=30, compile=compile)
        results.append((x, gradients(x, theta, weights)))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-10, atol=1e-10)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("double_precision")
def test_without_expectations_prices_are_the_noise() -> None:
    nothing = dict.fromkeys(("g2", "b2", "g3", "b3", "g4"), 0.0)
    torch.manual_seed(5)
    x = brock_hommes(sigma=torch.full((3,), 0.5), r=0.25, **nothing, n_timesteps=10)
    assert torch.allclose(x[:, 1:], 0.4 * noise_of(5, 10, 3).T, rtol=1e-14)
    assert (x[:, 0] == 0).all()


@pytest.mark.usefixtures("double_precision")
def test_without_choice_prices_are_an_autoregression() -> None:
    """Beta = 0: equal shares, so Gaussian with a = mean g / R. 20 z-scores below 5: fails once in 10^5 seeds."""
    n = 20_000
    a, drift, sd = (0.3 + 0.5 + 0.4 + 0.8) / 4 / 1.1, (0.1 + 0.2 - 0.5 + 0.4) / 4 / 1.1, 0.3 / 1.1
    x = brock_hommes(
        **{"g1": 0.3, "g2": 0.5, "g3": 0.4, "g4": 0.8, "b1": 0.1, "b2": 0.2, "b3": -0.5, "b4": 0.4},
        beta=torch.zeros(n),
        sigma=0.3,
        r=0.1,
        n_timesteps=11,
    )
    t = torch.arange(1, 11)
    mean = drift * (1 - a**t) / (1 - a)
    variance = sd**2 * (1 - a ** (2 * t)) / (1 - a**2)
    assert ((x[:, 1:].mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    assert ((x[:, 1:].var(0) / variance - 1).abs() < 5 * math.sqrt(2 / n)).all()


def test_prices_are_cut_off_and_the_gradient_there_is_zero() -> None:
    g = torch.tensor([0.5, 3.0], requires_grad=True)
    b = torch.tensor([0.1, 0.1], requires_grad=True)
    types = {f"g{h}": g for h in range(1, 5)} | {f"b{h}": b for h in range(1, 5)}
    x = brock_hommes(**types, n_timesteps=30, bound=50.0)
    assert (x[1].abs() <= 50).all()
    assert (x[1, 20:].abs() == 50).all()
    last, all_of_it = (torch.autograd.grad(value, g, retain_graph=True)[0] for value in (x[:, -1].sum(), x.sum()))
    assert last[1] == 0 != last[0]
    assert (all_of_it != 0).all()
    torch.manual_seed(5)
    free = brock_hommes(**types, n_timesteps=30, bound=1e6)
    torch.manual_seed(5)
    assert torch.equal(free[0], brock_hommes(**types, n_timesteps=30, bound=50.0)[0])


def test_far_tails_of_the_priors_stay_finite() -> None:
    """10^5 draws of the model's priors with five times their scale, all parameters free, 30 time steps."""
    n = 100_000
    trace = poutine.trace(poutine.block(models.brock_hommes, hide=["x"])).get_trace(free=tuple(CUSTOMARY))
    theta = {}
    for name in CUSTOMARY:
        prior = trace.nodes[name]["fn"]
        base = prior.base_dist if isinstance(prior, dist.LogNormal) else prior
        value = base.loc + 5 * base.scale * torch.randn(n)
        theta[name] = (value.exp() if isinstance(prior, dist.LogNormal) else value).requires_grad_()
    x = brock_hommes(**theta, n_timesteps=30)
    assert x.isfinite().all()
    assert (x.abs() == 1e3).any()  # so far that the bound is met
    assert gradients(x, theta, x.detach()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", -1.0),
        ("r", -2.0),
        ("beta", -1.0),
        ("sigma", -0.01),
        ("g2", math.inf),
        ("b4", math.nan),
        ("beta", math.inf),
    ],
)
def test_a_parameter_out_of_range_is_a_failed_run(name: str, value: float) -> None:
    """NaN in its own draw, without a gradient; the others are as they were."""
    theta = around_customary(3)
    torch.manual_seed(5)
    whole = brock_hommes(**theta, n_timesteps=20)
    expected = gradients(whole, theta, torch.ones(3, 20))
    wrong = {key: one.detach().clone() for key, one in theta.items()}
    wrong[name][1] = value
    wrong = {key: one.requires_grad_() for key, one in wrong.items()}
    torch.manual_seed(5)
    x = brock_hommes(**wrong, n_timesteps=20)
    assert x[1].isnan().all()
    assert torch.equal(x[[0, 2]], whole[[0, 2]])
    found = gradients(x, wrong, torch.ones(3, 20))
    assert torch.allclose(found[:, [0, 2]], expected[:, [0, 2]])
    assert (found[:, 1] == 0).all()
    score = Simulator(brock_hommes, losses.mse, n_timesteps=20)(**wrong).log_prob(torch.zeros(20))
    assert score.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_any_batch_in_the_dtype_of_the_parameters(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    b2 = torch.full(batch, 0.2, dtype=dtype)
    x = brock_hommes(b2=b2, g2=torch.tensor(0.9, dtype=dtype), n_timesteps=7)
    assert (x.shape, x.dtype) == ((*batch, 7), dtype)
    assert len(x.reshape(-1, 7)[:, 1].unique()) == math.prod(batch)  # each with noise of its own


def test_numbers_alone_make_one_path() -> None:
    assert brock_hommes(n_timesteps=5).shape == (5,)
    assert brock_hommes(n_timesteps=1).tolist() == [0.0]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"n_timesteps": 0}, ValueError, "n_timesteps must be at least 1, got 0"),
        ({"bound": 0.0}, ValueError, "bound must be a finite number above 0, got 0.0"),
        ({"bound": 1e30}, ValueError, r"bound must be at most 1e\+06, got 1e\+30: .* Take a larger unit of price"),
        (
            {"g2": torch.zeros(2).half()},
            TypeError,
            "g2 must be of float32 or float64, got torch.float16: use g2",
        ),
        ({"gradient_horizon": 0}, ValueError, "gradient_horizon must be at least 1, got 0"),
        ({"compile": 1}, TypeError, "compile must be True or False, got 1"),
        ({"g2": "trend"}, TypeError, "g2 must be a number, got 'trend'"),
        ({"beta": math.inf}, ValueError, "beta must be a finite number, got inf"),
        (
            {"b2": torch.tensor([1, 2])},
            TypeError,
            "b2 must be of float32 or float64, got torch.int64",
        ),
        (
            {"b2": torch.zeros(2), "g3": torch.zeros(3)},
            ValueError,
            r"the parameters of brock_hommes must broadcast to one batch, got g3 \(3,\), b2 \(2,\)",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        brock_hommes(**{"n_timesteps": 5, **arguments})


@pytest.mark.parametrize("batched", [True, False])
def test_in_a_simulator_any_subset_is_free(batched: bool) -> None:
    simulate = Simulator(brock_hommes, losses.mse, n_timesteps=10, batched=batched)
    theta = around_customary(4)
    for names in (("g2", "b2"), tuple(CUSTOMARY)):
        free = {name: theta[name] for name in names}
        site = simulate(**free)
        assert site.sample().shape == (4, 10)
        found = torch.autograd.grad(site.log_prob(torch.zeros(10)).sum(), [*free.values()])
        assert all(bool((gradient != 0).all()) for gradient in found)


def test_the_model_has_the_sites_that_are_free() -> None:
    trace = poutine.trace(models.brock_hommes).get_trace(free=("b2", "sigma"), n_timesteps=12)
    assert trace.stochastic_nodes == ["b2", "sigma", "x"]
    assert trace.nodes["x"]["value"].shape == (12,)
    assert trace.nodes["x"]["infer"]["event_dims"] == ["time"]
    assert [*poutine.trace(models.brock_hommes).get_trace().stochastic_nodes] == ["g2", "b2", "g3", "b3", "x"]


@pytest.mark.parametrize("free", [(), ("b2", "gamma"), "b2"])
def test_the_model_refuses_unknown_parameters(free: Any) -> None:
    with pytest.raises(ValueError, match=r"free must name at least one parameter out of \['g1', .*'r'\], got"):
        models.brock_hommes(free=free)


def test_the_model_can_be_fitted() -> None:
    y = brock_hommes(n_timesteps=40)
    guide = AutoNormal(models.brock_hommes, init_scale=0.1)
    svi = SVI(models.brock_hommes, guide, pyro.optim.Adam({"lr": 0.02}), GeneralizedELBO(w=0.01))
    found = [svi.step(y, n_timesteps=40) for _ in range(60)]
    assert sum(found[-15:]) < sum(found[:15])
    predicted = Predictive(models.brock_hommes, guide=guide, num_samples=5, parallel=True)(n_timesteps=40)
    assert predicted["x"].shape == (5, 40)
