"""`Simulator(differentiation="forward")`: gradients equal those of reverse mode, and memory stays flat in time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.ops.provenance import get_provenance, track_provenance
from pyro.optim import Adam
from simulators_for_tests import drift, fails_above_one, line, model_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrobirds import GeneralizedELBO, Simulator, losses
from pyrobirds.simulators.forward_mode import NotForwardDifferentiable
from pyrobirds.simulators.rollout import rollout


def oscillator(theta: Tensor, k: Tensor, n_timesteps: int = 30) -> Tensor:
    """A noisy oscillator: theta (B, 2) starts it, k (B,) pulls it back."""

    def step(state: tuple[Tensor, Tensor], t: int) -> tuple[Tensor, Tensor]:
        x, v = state
        v = 0.98 * v - k.exp() * x.sin() * 0.1 + 0.05 * torch.randn_like(x)
        return x + 0.1 * v, v

    return rollout(step, (theta[:, 0], theta[:, 1]), n_timesteps, observe=lambda state: state[0])


def two_outputs(theta: Tensor, k: Tensor) -> dict[str, Tensor]:
    x = oscillator(theta, k)
    return {"x": x, "turns": (x.diff().sign().diff() != 0).sum(1, keepdim=True), "power": x.square().mean(1, True)}


def fills_in_place(theta: Tensor, k: Tensor) -> Tensor:
    x = torch.zeros(len(k), 4).normal_()
    x[:, 0] = theta[:, 0] * k
    x[:, 1:] *= theta[:, 1:]
    return x


def one_draw(theta: Tensor, k: Tensor) -> Tensor:
    return (k * theta.sum() + torch.randn(6)).tanh()


def looped(theta: Tensor, k: Tensor) -> Tensor:
    noise = torch.distributions.Normal(theta[0], k.exp()).rsample((3,))  # which vmap does not take
    return torch.cat([noise, theta])


def gradients(simulator: Simulator, y: Any, *, seed: int = 3) -> list[Tensor]:
    """Of the log-probability of the data, after a first call that finds out about the function."""
    found = []
    for _ in range(2):
        pyro.set_rng_seed(seed)
        theta = torch.linspace(-1, 1, 8).reshape(4, 2).requires_grad_()
        k = torch.linspace(-0.5, 0.5, 4).requires_grad_()
        site = simulator(theta, k)
        if isinstance(y, dict):
            value = sum(site[name].log_prob(each).sum() for name, each in y.items())
        else:
            value = site.log_prob(y).sum()
        found = [value.detach(), *torch.autograd.grad(value, [theta, k])]
    return found


@pytest.mark.parametrize(
    ("fn", "y", "options"),
    [
        (oscillator, torch.zeros(30), {}),
        (oscillator, torch.zeros(30), {"seed": 1}),
        (two_outputs, {"x": torch.zeros(30), "power": torch.ones(1)}, {}),
        (fills_in_place, torch.ones(4), {}),
        (one_draw, torch.ones(6), {"batched": False}),
    ],
)
def test_equal_to_reverse_mode(fn: Callable[..., Any], y: Any, options: dict[str, Any]) -> None:
    loss = dict.fromkeys(y, losses.mse) if isinstance(y, dict) else losses.mse
    dims = {"theta": 1}
    forward = Simulator(fn, loss, theta_event_dims=dims, differentiation="forward", **options)
    reverse = Simulator(fn, loss, theta_event_dims=dims, **options)
    for a, b in zip(gradients(forward, y), gradients(reverse, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_equal_to_reverse_mode_in_a_loop_over_draws() -> None:
    y = torch.ones(5)
    found = []
    for mode in ("forward", "reverse"):
        simulator = Simulator(looped, losses.mse, batched=False, theta_event_dims={"theta": 1}, differentiation=mode)
        with pytest.warns(UserWarning, match="looped runs in a Python loop over draws"):
            found.append(gradients(simulator, y))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_equal_to_reverse_mode_with_replicates_and_a_loss_that_simulates_inside() -> None:
    def debiased(x: Tensor, y: Tensor) -> Tensor:
        return ((x.mean(1) - y).square() - x.var(1) / x.shape[1]).mean(1)

    def inside(theta: Tensor, k: Tensor, y: Tensor) -> Tensor:
        return (oscillator(theta, k) - y).square().mean(1)

    for make in (
        lambda **options: Simulator(oscillator, debiased, replicates=5, theta_event_dims={"theta": 1}, **options),
        lambda **options: Simulator.from_loss(inside, theta_event_dims={"theta": 1}, **options),
    ):
        forward, reverse = make(differentiation="forward"), make()
        for a, b in zip(gradients(forward, torch.ones(30)), gradients(reverse, torch.ones(30)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def model(simulate: Simulator) -> Callable[..., Any]:
    def made(y: Tensor | None = None) -> Any:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        k = pyro.sample("k", dist.Normal(0.0, 0.5))
        with pyro.plate("series", 3):
            return pyro.sample("x", simulate(theta, k), obs=y)

    return made


@pytest.mark.parametrize("objective", [GeneralizedELBO, Trace_ELBO])
def test_a_fit_takes_the_same_steps_as_in_reverse_mode(objective: Callable[..., Any]) -> None:
    trails = []
    for mode in ("forward", "reverse"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        made = model(Simulator(oscillator, losses.mse, theta_event_dims={"theta": 1}, differentiation=mode))
        elbo = objective(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(made, AutoNormal(made), Adam({"lr": 0.05}), elbo)
        trails.append([svi.step(torch.zeros(3, 30)) for _ in range(10)])
    assert trails[0] == pytest.approx(trails[1], rel=1e-4)


# How often the function runs.


class Calls:
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = fn
        self.calls = 0

    def __call__(self, theta: Tensor, k: Tensor) -> Tensor:
        self.calls += 1
        return self.fn(theta, k)


def test_all_parameters_go_through_one_run() -> None:
    fn = Calls(oscillator)
    simulator = Simulator(fn, losses.mse, theta_event_dims={"theta": 1}, differentiation="forward")
    gradients(simulator, torch.zeros(30))
    assert fn.calls == 3  # one more at the first call, to look at the function


class NoVmap(torch.autograd.Function):
    """The square: a user's node with a rule for forward mode, but none for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        if torch._C._functorch.is_batchedtensor(tangent):
            raise NotImplementedError("no rule for vmap")
        return 2 * ctx.saved_tensors[0] * tangent


def without_vmap(theta: Tensor, k: Tensor) -> Tensor:
    return NoVmap.apply(theta).sum(1, keepdim=True) + k.unsqueeze(1) * torch.randn(len(k), 4)


def test_where_vmap_cannot_each_parameter_has_a_run_of_its_own_on_the_same_random_numbers() -> None:
    fn = Calls(without_vmap)
    simulator = Simulator(fn, losses.mse, theta_event_dims={"theta": 1}, differentiation="forward")
    with pytest.warns(RuntimeWarning, match=r"Calls runs once for each of its parameters in forward mode, because"):
        found = gradients(simulator, torch.zeros(4))
    assert fn.calls == 1 + 1 + 3 + 3  # a look, the attempt, and two theta and a k, twice
    reverse = Simulator(without_vmap, losses.mse, theta_event_dims={"theta": 1})
    for a, b in zip(found, gradients(reverse, torch.zeros(4)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_tangents_where_no_gradient_is_asked_for() -> None:
    fn = Calls(oscillator)
    simulator = Simulator(fn, losses.mse, theta_event_dims={"theta": 1}, differentiation="forward")
    simulator(torch.zeros(4, 2), torch.zeros(4)).log_prob(torch.zeros(30))
    with torch.no_grad():
        simulator(torch.zeros(4, 2, requires_grad=True), torch.zeros(4)).log_prob(torch.zeros(30))
    assert fn.calls == 2


# Memory.


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside ever held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._storages:
                    self._storages.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, key, size)
        return result

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


def agents(theta: Tensor, k: Tensor, n_timesteps: int) -> Tensor:
    """A thousand agents, of whom the mean is seen at the end."""

    def step(x: Tensor, t: int) -> Tensor:
        return (x * k.unsqueeze(-1) + 0.1 * torch.randn_like(x)).tanh()

    x = theta.sum(1, keepdim=True).expand(-1, 1000) + 0.0
    return rollout(step, x, n_timesteps, observe=lambda x: x.mean(1))


def peak(differentiation: str, n_timesteps: int) -> int:
    simulator = Simulator(
        agents,
        losses.mse,
        theta_event_dims={"theta": 1},
        differentiation=differentiation,  # type: ignore[arg-type]
        n_timesteps=n_timesteps,
    )
    with PeakMemory() as memory:
        theta = torch.ones(2, 2, requires_grad=True)
        value = simulator(theta, torch.ones(2, requires_grad=True)).log_prob(torch.zeros(n_timesteps))
        value.sum().backward()
    return memory.peak


def test_memory_is_flat_in_time() -> None:
    state = 2 * 1000 * 4  # bytes
    short, long = peak("forward", 10), peak("forward", 1000)
    outputs = 1000 * 2 * 4 * (1 + 3)  # x and its three derivatives, of two draws
    assert long - short < 6 * outputs  # they are stacked, compared with the data, ...
    assert long < 30 * state + 6 * outputs
    assert peak("reverse", 1000) > 1000 * state  # what forward mode is for


# What it refuses.


def test_tensors_with_a_gradient_that_are_not_parameters_are_refused() -> None:
    layer = torch.nn.Linear(1, 4)
    simulator = Simulator(lambda theta: layer(theta.unsqueeze(-1)), losses.mse, differentiation="forward")
    with pytest.raises(ValueError, match="depends on tensors with a gradient that are not among its parameters"):
        simulator(torch.zeros(3, requires_grad=True)).log_prob(torch.zeros(4))


def test_a_function_that_breaks_the_graph_is_refused() -> None:
    simulator = Simulator(lambda theta: line(theta.detach()), losses.mse, differentiation="forward")
    with pytest.raises(ValueError, match="does not depend differentiably on 'theta'"):
        simulator(torch.ones(3, requires_grad=True)).log_prob(torch.zeros(4))


def test_a_derivative_of_zero_is_not_taken_for_a_broken_graph() -> None:
    simulator = Simulator(lambda theta: line(theta.clamp(min=0)), losses.mse, differentiation="forward")
    with pytest.warns(UserWarning, match="has no gradient, or one of zero, in 'theta' at its first run"):
        value = simulator(-torch.ones(3, requires_grad=True)).log_prob(torch.ones(4))
    assert value.tolist() == [-1.0] * 3


class NoJvp(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


def test_an_operation_without_a_forward_rule_is_named_at_once_and_never_taken_for_a_failed_run() -> None:
    def fn(theta: Tensor) -> Tensor:
        return NoJvp.apply(line(theta)) if bool((theta.detach() > 1).any()) else line(theta)

    simulator = Simulator(fn, losses.mse, differentiation="forward")
    simulator(torch.zeros(3, requires_grad=True)).log_prob(torch.ones(4))
    with pytest.raises(NotForwardDifferentiable, match=r"fn cannot be differentiated in forward mode \(.*jvp"):
        simulator(torch.full((3,), 2.0, requires_grad=True)).log_prob(torch.ones(4))


def test_random_numbers_of_its_own_need_a_single_run() -> None:
    own = torch.Generator().manual_seed(0)

    def fn(theta: Tensor) -> Tensor:
        return NoVmap.apply(theta.unsqueeze(-1)) + torch.randn(len(theta), 4, generator=own)

    simulator = Simulator(lambda theta, k: fn(theta) * k.unsqueeze(-1), losses.mse, differentiation="forward")
    with pytest.raises(NotForwardDifferentiable, match="two runs of <lambda> from the same state of torch's, NumPy's"):
        simulator(torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)).log_prob(torch.zeros(4))


def test_there_are_no_second_derivatives() -> None:
    theta = torch.ones(3, requires_grad=True)
    value = Simulator(line, losses.mse, differentiation="forward")(theta).log_prob(torch.zeros(4))
    (gradient,) = torch.autograd.grad(value.sum(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="differentiation must be 'reverse' or 'forward', got 'backward'"):
        Simulator(line, losses.mse, differentiation="backward")  # type: ignore[arg-type]


# Failed runs.


def test_failed_runs_keep_their_gradients_from_the_others() -> None:
    theta = torch.tensor([0.5, 2.0, -1.0], requires_grad=True)
    value = Simulator(fails_above_one, losses.mse, differentiation="forward")(theta).log_prob(torch.zeros(4))
    assert value.isnan().tolist() == [False, True, False]
    value.nansum().backward()
    # loss = theta^2 mean(1, 4, 9, 16) = 7.5 theta^2
    assert theta.grad is not None
    assert theta.grad.tolist() == [-7.5, 0.0, 15.0]


def test_a_batch_that_raises_counts_as_failed() -> None:
    def fn(theta: Tensor) -> Tensor:
        if bool((theta.detach() > 1).any()):
            raise ArithmeticError("too large")
        return line(theta)

    simulator = Simulator(fn, losses.mse, differentiation="forward")
    simulator(torch.zeros(2, requires_grad=True)).log_prob(torch.ones(4))
    with pytest.warns(RuntimeWarning, match="fn raised an exception in 2 of 2 draws"):
        value = simulator(torch.tensor([0.0, 2.0], requires_grad=True)).log_prob(torch.ones(4))
    assert value.isnan().all()


def test_a_function_that_never_worked_raises_its_own_exception() -> None:
    def fn(theta: Tensor) -> Tensor:
        raise ArithmeticError("never")

    with pytest.raises(ArithmeticError, match="never"):
        Simulator(fn, losses.mse, differentiation="forward")(torch.zeros(2, requires_grad=True)).log_prob(torch.ones(4))


def test_draws_are_differentiable_too() -> None:
    theta = torch.ones(3, requires_grad=True)
    x = Simulator(drift, losses.mse, differentiation="forward")(theta).rsample()
    assert torch.autograd.grad(x.sum(), theta)[0].tolist() == [5.0] * 3


# Equal to reverse mode where simulators do unusual things.


def of_theta(fn: Callable[..., Any], y: Tensor, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The log-probability and its gradient by mode, at the second of two calls."""
    found = {}
    for mode in ("forward", "reverse"):
        simulator = Simulator(fn, losses.mse, differentiation=mode, **options)  # type: ignore[arg-type]
        for _ in range(2):
            pyro.set_rng_seed(0)
            theta = torch.tensor([0.3, 0.4, 0.8], requires_grad=True)
            value = simulator(theta).log_prob(y)
            found[mode] = value.detach(), torch.autograd.grad(value.sum(), theta)[0]
    return found


def half_frozen(theta: Tensor) -> Tensor:
    with torch.no_grad():
        scale = theta.exp()
    return line(theta * scale)


def sampled(theta: Tensor) -> Tensor:
    noise = torch.distributions.Exponential(theta.unsqueeze(-1).expand(len(theta), 4)).sample()
    return noise + theta.unsqueeze(-1)


def straight_through(theta: Tensor) -> Tensor:
    soft = (theta.unsqueeze(-1) + torch.randn(len(theta), 4)).sigmoid()
    with torch.no_grad():
        correction = (soft > 0.5).float() - soft
    return soft + correction


def writes_to_its_parameter(theta: Tensor) -> Tensor:
    return line(theta.exp_())


def diverges_where_nothing_was_observed(theta: Tensor) -> Tensor:
    x, xs = 0.2 + 0 * theta, []
    for _ in range(400):
        x = (3.9 + 0.01 * theta) * x * (1 - x)
        xs.append(x)
    return torch.stack(xs, 1)


@pytest.mark.parametrize(
    "fn", [half_frozen, sampled, straight_through, writes_to_its_parameter, diverges_where_nothing_was_observed]
)
def test_the_gradient_is_that_of_reverse_mode(fn: Callable[..., Any]) -> None:
    y = torch.zeros(4)
    if fn is diverges_where_nothing_was_observed:
        y = torch.cat([torch.zeros(20), torch.full((380,), torch.nan)])
    found = of_theta(fn, y)
    for a, b in zip(found["forward"], found["reverse"], strict=True):
        assert bool((b != 0).all())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_other_outputs_than_tensors_pass_through() -> None:
    def fn(theta: Tensor) -> dict[str, Any]:
        return {"converged": True, "x": line(theta)}

    simulator = Simulator(fn, {"x": losses.mse}, differentiation="forward")
    theta = torch.ones(3, requires_grad=True)
    value = simulator(theta)["x"].log_prob(torch.zeros(4))
    assert torch.autograd.grad(value.sum(), theta)[0].tolist() == [-15.0] * 3


def test_an_empty_batch() -> None:
    simulator = Simulator(line, losses.mse, differentiation="forward")
    theta = torch.zeros(0, requires_grad=True)
    value = simulator(theta).log_prob(torch.zeros(4))
    assert value.shape == (0,)
    assert torch.autograd.grad(value.sum(), theta)[0].shape == (0,)


def test_provenance_survives() -> None:
    # Pyro tracks by it which latents a log-probability depends on.
    theta = track_provenance(torch.ones(3, requires_grad=True), frozenset({"theta"}))
    value = Simulator(line, losses.mse, differentiation="forward")(theta).log_prob(torch.zeros(4))
    assert get_provenance(value) == {"theta"}


def test_tracegraph_elbo_with_a_discrete_latent() -> None:
    simulate = Simulator(drift, losses.mse, differentiation="forward")

    def made(y: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", simulate(theta + z), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))
        pyro.sample("theta", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    assert SVI(made, guide, Adam({"lr": 0.01}), TraceGraph_ELBO()).step(torch.zeros(5)) != 0
    assert pyro.param("loc").item() != 0


@pytest.mark.parametrize("batched", [True, False])
def test_nuts(batched: bool) -> None:
    # The loss is exactly (theta - 1)^2 / 2 / w with w = 1/2: N(0.5, 0.5) against the prior N(0, 1) at w = 1.
    def half_square(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean(1) / 2

    fn = (lambda theta: theta.unsqueeze(-1).expand(-1, 4) + 0.0) if batched else (lambda theta: theta.expand(4) + 0.0)
    simulate = Simulator(fn, half_square, batched=batched, differentiation="forward")
    mcmc = MCMC(NUTS(model_of(simulate)), num_samples=400, warmup_steps=100, disable_progbar=True)
    mcmc.run(torch.ones(4))
    theta = mcmc.get_samples()["theta"]
    # About 150 effective draws of sd 0.71: five standard errors.
    assert theta.mean().item() == pytest.approx(0.5, abs=0.29)
    assert theta.std().item() == pytest.approx(0.5**0.5, abs=0.2)


# What else it refuses.


def second_direction_differs(own: torch.Generator) -> Callable[..., Tensor]:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        noise = torch.randn(len(a), 4, generator=own)
        return NoVmap.apply((a + b).unsqueeze(-1) * noise)

    return fn


def test_a_generator_of_its_own_is_found_when_it_matters_first() -> None:
    simulator = Simulator(
        second_direction_differs(torch.Generator().manual_seed(0)), losses.mse, differentiation="forward"
    )
    a, b = torch.ones(3, requires_grad=True), torch.ones(3)
    with pytest.warns(RuntimeWarning, match="runs once for each of its parameters"):
        simulator(a, b).log_prob(torch.zeros(4))
    with pytest.raises(NotForwardDifferentiable, match="two runs of fn"):
        simulator(a, b.requires_grad_()).log_prob(torch.zeros(4))


@pytest.mark.parametrize(
    "fn",
    [
        lambda theta: line(theta.roll(1)),
        lambda theta: line(theta - theta.mean()) + theta.unsqueeze(-1) ** 2,
    ],
    ids=["rolled", "centred"],
)
def test_a_function_that_mixes_draws_is_refused(fn: Callable[..., Tensor]) -> None:
    theta = torch.ones(3, requires_grad=True)
    simulator = Simulator(fn, losses.mse, differentiation="forward")
    with pytest.raises(ValueError, match="<lambda> mixes up the draws of a batch"):
        simulator(theta).log_prob(torch.zeros(4))
    inside = Simulator.from_loss(lambda theta, y: losses.mse(fn(theta), y), differentiation="forward")
    with pytest.raises(ValueError, match="<lambda> mixes up the draws of a batch"):
        inside(theta).log_prob(torch.zeros(4))


def test_a_module_that_gets_gradients_later_is_refused_then() -> None:
    layer = torch.nn.Linear(1, 4).requires_grad_(False)
    simulator = Simulator(lambda theta: layer(theta.unsqueeze(-1)), losses.mse, differentiation="forward")
    theta = torch.zeros(3, requires_grad=True)
    simulator(theta).log_prob(torch.zeros(4))
    layer.requires_grad_(True)
    with pytest.raises(ValueError, match="depends on tensors with a gradient that are not among its parameters"):
        simulator(theta).log_prob(torch.zeros(4))


def test_a_broken_graph_is_found_after_a_draw() -> None:
    simulator = Simulator(lambda theta: line(theta.detach()), losses.mse, differentiation="forward")
    theta = torch.ones(3, requires_grad=True)
    simulator(theta).rsample()
    with pytest.raises(ValueError, match="does not depend differentiably on 'theta'"):
        simulator(theta).log_prob(torch.zeros(4))


def test_complex_outputs_are_refused() -> None:
    simulator = Simulator(lambda theta: line(theta) * 1j, losses.mse, differentiation="forward")
    with pytest.raises(NotForwardDifferentiable, match="what it returns is complex; return real and imaginary parts"):
        simulator(torch.ones(3, requires_grad=True)).log_prob(torch.zeros(4))
