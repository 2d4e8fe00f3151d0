"""The compiled time loop is the eager one: path by path with the same noise, in law with its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx

from pyrobirds import GeneralizedELBO, Simulator
from pyrobirds.simulators import rollout, scanning

B, T = 6, 10


def growth(theta: Tensor, start: Tensor, noise: Tensor, **options: Any) -> dict[str, Tensor]:
    """A state of two series and a count, of which one series and the count are observed."""

    def step(state: dict[str, Any], t: Any, eps: Tensor) -> dict[str, Any]:
        old, new = state["x"]
        following = torch.tanh(theta * new + 0.3 * old + eps * (t + 1) / T)
        return {"x": (new, following), "n": state["n"] + (following > 0)}

    return rollout(
        step,
        {"x": (start, start), "n": torch.zeros(B, dtype=torch.int64)},
        T,
        inputs=noise,
        observe=lambda state: {"x": state["x"][1], "n": state["n"]},
        include_initial=True,
        **options,
    )


@pytest.mark.usefixtures("double_precision")
def test_values_and_gradients_are_those_of_the_eager_loop() -> None:
    """All options at once, in the second call with other values and a new closure, and without a recompilation."""
    for call in range(2):
        tensors = [torch.rand(B), torch.rand(B), torch.randn(T - 1, B)]
        found = []
        for compile in (False, True):
            leaves = [x.clone().requires_grad_() for x in tensors]
            with dynamo_config.patch(error_on_recompile=call > 0):
                history = growth(*leaves, gradient_horizon=4, compile=compile)
            loss = (history["x"] * torch.arange(T)).sum()
            gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
            again = torch.autograd.grad(loss, leaves)  # Simulator asks twice, too
            found.append((*history.values(), *gradients, *again))
            assert history["x"].shape == (B, T)
        assert not found[0][1].eq(0).all()
        for eager, compiled in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_state_whose_tensors_share_memory(with_gradients: bool) -> None:
    """The same tensor twice, and views of it, in the new state and in the gradients by the old, transposed one."""

    def step(state: tuple[Tensor, ...], t: Any, eps: Tensor) -> tuple[Tensor, ...]:
        x, same, stacked, rows = state
        x = torch.tanh(x + same * theta + stacked[0] + rows.view(B, 2)) + eps[0]
        return x, x, torch.stack([x]), x.reshape(1, 2 * B)

    theta, noise = torch.rand(B, 1), torch.randn(T, 1, B, 1)
    tensors = [theta, torch.rand(2, B).mT, *(torch.rand(shape) for shape in ((B, 2), (1, B, 2), (1, 2 * B)))]
    found = []
    with torch.set_grad_enabled(with_gradients):
        for compile in (False, True):
            leaves = [tensor.clone().requires_grad_(with_gradients) for tensor in tensors]
            theta, *state = leaves
            settings: dict[str, Any] = {"observe": lambda state: state[2], "time_dim": 0, "compile": compile}
            history = rollout(step, tuple(state), T, inputs=noise, **settings)
            gradients = torch.autograd.grad(history.square().sum(), leaves) if with_gradients else ()
            found.append((history, *gradients))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_one_step_with_gradients() -> None:
    """What it saves for the backward pass needs no reversal, and may be written into."""
    theta = torch.rand(B, requires_grad=True)
    x = rollout(lambda x, t: (torch.tanh(theta * x[0]), x[1] + 1), (torch.ones(B), torch.zeros(B)), 1, compile=True)
    (gradient,) = torch.autograd.grad(x[0].sum(), theta)
    torch.testing.assert_close(gradient, 1 - torch.tanh(theta.detach()) ** 2)


def walk(theta: Tensor, **options: Any) -> Tensor:
    """Sums of theta times standard normal numbers: the derivative of a path by theta is the path over theta."""

    def step(x: Tensor, t: Any) -> Tensor:
        return x + torch.distributions.Normal(0.0, theta).rsample()

    return rollout(step, torch.zeros_like(theta), 100, **options)


def test_noise_drawn_in_the_step_is_independent_and_that_of_the_backward_pass() -> None:
    """100 normal numbers in each of 100 paths, against their law: five standard errors each, 6e-7 to fail."""
    theta = torch.full((100,), 2.0, requires_grad=True)
    torch.manual_seed(1)
    x = walk(theta, compile=True)
    (gradient,) = torch.autograd.grad(x[:, -1].sum(), theta)
    torch.testing.assert_close(gradient, x[:, -1].detach() / 2, rtol=1e-4, atol=1e-4)
    noise = x.detach().diff(dim=1, prepend=torch.zeros(100, 1)) / 2
    n = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(noise.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    for products in (noise[:, 1:] * noise[:, :-1], noise[1:] * noise[:-1]):  # of neighbours in time, and among paths
        assert abs(products.mean()) < 5 / math.sqrt(products.numel())
    assert not torch.equal(x, walk(theta, compile=True))
    torch.manual_seed(1)
    assert torch.equal(x, walk(theta, compile=True))


def test_path_by_path_with_fallback_random() -> None:
    theta = torch.linspace(1, 2, 100).requires_grad_()
    found = []
    with inductor_config.patch(fallback_random=True):
        for compile in (False, True):
            torch.manual_seed(1)
            x = walk(theta, compile=compile)
            found.append((x, *torch.autograd.grad(x.square().mean(), theta)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_gradient_of_a_fit_with_a_compiled_simulator() -> None:
    """The loss, the square of the last value, is theta^2 Z^2 with log theta = loc + noise: its derivative is 2 loss."""
    simulate = Simulator(walk, lambda x, y: (x[:, -1] - y[:, -1]) ** 2, compile=True)

    def model(y: Tensor) -> Tensor:
        theta = pyro.sample("theta", dist.LogNormal(0.0, 1.0))
        return pyro.sample("x", simulate(theta), obs=y)

    guide = AutoNormal(model)
    loss = GeneralizedELBO(w=0, num_particles=100).loss_and_grads(model, guide, torch.zeros(100))
    gradient = pyro.param("AutoNormal.locs.theta").unconstrained().grad
    assert float(gradient) == pytest.approx(2 * loss, rel=1e-4)


def branches(x: Tensor, t: Any) -> Tensor:
    return x + 1 if x.sum() > 0 else x - 1


def indexes(x: Tensor, t: Any) -> Tensor:
    return x + torch.arange(5.0)[t]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (branches, "Data-dependent branching: .*dynamic control flow"),
        (indexes, "data-dependent expression"),
    ],
)
def test_what_cannot_be_compiled_is_an_error_with_the_reason(step: Callable[..., Any], reason: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"rollout\(compile=True\) cannot compile this simulator: .*{reason}"
    ) as error:
        rollout(step, torch.zeros(2), 3, compile=True)
    assert "Pass compile=False" in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None


def test_what_is_wrong_with_the_step_itself_is_said_as_in_the_eager_loop() -> None:
    with pytest.raises(ValueError, match=r"the state was \(2,\) .* and is \(2, 1\) .* after step 0"):
        rollout(lambda x, t: x.unsqueeze(-1), torch.zeros(2), 3, compile=True)
    with pytest.raises(ZeroDivisionError, match="by zero"):
        rollout(lambda x, t: x + 1 // 0, torch.zeros(2), 3, compile=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch.func.jvp itself
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda f, x: torch.func.jvp(f, (x,), (x,)), "neither forward-mode differentiation nor vmap"),
        (lambda f, x: torch.vmap(f)(x), "neither forward-mode differentiation nor vmap"),
        (lambda f, x: make_fx(f)(x), "traced by make_fx"),
    ],
)
def test_transformations_are_refused(call: Callable[..., Any], reason: str) -> None:
    def simulate(theta: Tensor) -> Tensor:
        return rollout(lambda x, t: x + theta, torch.zeros_like(theta), 3, time_dim=-1, compile=True)

    with pytest.raises(RuntimeError, match=reason):
        call(simulate, torch.ones(2))


def test_a_compiler_that_is_switched_off_or_missing_is_an_error() -> None:
    def simulate() -> Tensor:
        return rollout(lambda x, t: x * 3, torch.zeros(2), 3, compile=True)

    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RuntimeError, match=r"cannot compile this simulator: torch\.compile is switched off"),
    ):
        simulate()
    with (
        inductor_config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(RuntimeError, match=r"cannot compile this simulator: .*C\+\+ compiler"),
    ):
        simulate()


def test_too_many_compilations_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def simulate(factor: float) -> Tensor:
        return rollout(lambda x, t: x * factor, torch.ones(1), 3, compile=True)

    monkeypatch.setattr(scanning, "RECOMPILE_LIMIT", 1)
    assert simulate(2.0).tolist() == [[2.0, 4.0, 8.0]]
    with pytest.raises(RuntimeError, match=r"compiled 1 times, .* number in its closure \(make those 0-dim tensors\)"):
        simulate(3.0)
    assert simulate(2.0).tolist() == [[2.0, 4.0, 8.0]]


def test_functions_are_told_apart_by_their_code() -> None:
    def made(number: float) -> Callable[..., float]:
        return lambda x: number

    regions = {scanning._region(made(i).__code__, made(i).__code__, "cpu", False) for i in (1.0, 2.0)}
    assert len(regions) == 1
    assert scanning._region(walk.__code__, walk.__code__, "cpu", False) not in regions


def test_a_change_of_dtype_is_refused_as_it_is_in_the_plain_loop() -> None:
    counts = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"the state was \(2,\) of torch.int64 on cpu and is \(2,\) of torch.float32"):
        rollout(lambda n, t: n * 0.5, counts, 3, compile=True)


def test_a_history_without_a_place_for_time_is_refused_as_it_is_in_the_plain_loop() -> None:
    with pytest.raises(ValueError, match=r"time_dim=1 has no place in a history of values of shape \(\)"):
        rollout(lambda x, t: x + 1, torch.ones(()), 3, compile=True)
