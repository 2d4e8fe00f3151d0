"""A run that fails has a log-probability of NaN and no gradient, and changes nothing of the others."""

from __future__ import annotations

import gc
import random
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.ops.provenance import get_provenance, track_provenance
from pyro.optim import Adam
from simulators_for_tests import fails_above_one, line, model_of, raises_above_one
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyrobirds import GeneralizedELBO, Simulator, losses

T = 4
Y = torch.linspace(-1.0, 1.0, T)
THETA = torch.tensor([0.5, 2.0, -1.0, 0.25, 3.0])
FAILS = THETA > 1
HOWS = ["batched", "vmap", "loop"]
LOOPS = "ignore:.*runs in a Python loop:UserWarning"
RAISES = "ignore:.*raised an exception:RuntimeWarning"


def simulator_of(fn: Callable[..., Any], how: str, loss: Any = losses.mse, **options: Any) -> Simulator:
    """A simulator of a function that takes a batch of draws as well as one draw."""

    def looped(theta: Tensor) -> Any:
        theta.item()  # which vmap cannot take
        return fn(theta)

    return Simulator(looped if how == "loop" else fn, loss, batched=how == "batched", **options)


def scores_and_gradient(simulator: Simulator, theta: Tensor, y: Tensor = Y) -> tuple[Tensor, Tensor]:
    theta = theta.clone().requires_grad_()
    score = simulator(theta).log_prob(y)
    (gradient,) = torch.autograd.grad(score.nansum(), theta)
    return score.detach(), gradient


def check_that_survivors_are_untouched(simulator: Simulator, reference: Simulator) -> None:
    score, gradient = scores_and_gradient(simulator, THETA)
    alone, gradient_alone = scores_and_gradient(reference, THETA[~FAILS])
    assert torch.equal(score.isnan(), FAILS)
    assert torch.equal(score[~FAILS], alone)
    assert torch.equal(gradient[~FAILS], gradient_alone)
    assert gradient_alone.abs().min() > 0
    assert torch.equal(gradient[FAILS], torch.zeros(2))


def log_of_what_is_left(x: Tensor, y: Tensor) -> Tensor:
    """A loss that is NaN where x ends above 4, that is theta above 1."""
    return losses.mse(x, y) + (4 - x[:, -1] + 1e-3).log()


# ---- what fails in the forward pass ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings(LOOPS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_output_that_is_not_finite(bad: float, how: str) -> None:
    """Its derivative is not finite either, so that a gradient of zero becomes NaN inside the function."""
    check_that_survivors_are_untouched(
        simulator_of(lambda theta: fails_above_one(theta, bad), how), simulator_of(line, how)
    )


@pytest.mark.filterwarnings(LOOPS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("times", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite(how: str, times: float) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return log_of_what_is_left(x, y) * torch.where(x[:, -1] > 4, times, 1)

    check_that_survivors_are_untouched(simulator_of(line, how, loss), simulator_of(line, how, log_of_what_is_left))


@pytest.mark.filterwarnings(LOOPS)
@pytest.mark.filterwarnings(RAISES)
@pytest.mark.parametrize("how", ["vmap", "loop"])
def test_an_exception_fails_its_draw(how: str) -> None:
    """By a Cholesky factorisation, which raises in vmap if one draw of the batch has none."""
    check_that_survivors_are_untouched(simulator_of(raises_above_one, how), simulator_of(raises_above_one, how))


@pytest.mark.filterwarnings(LOOPS)
@pytest.mark.parametrize("how", HOWS)
def test_a_loss_that_simulates_inside_itself(how: str) -> None:
    def loss(theta: Tensor, y: Tensor) -> Tensor:
        if how == "loop":
            theta.item()
        return (fails_above_one(theta) - y).square().mean(-1)

    simulator = Simulator.from_loss(loss, batched=how == "batched")
    score, gradient = scores_and_gradient(simulator, THETA)
    reference, gradient_of_reference = scores_and_gradient(simulator_of(line, how), THETA)
    assert torch.equal(score.isnan(), FAILS)
    torch.testing.assert_close(score[~FAILS], reference[~FAILS])
    torch.testing.assert_close(gradient, torch.where(FAILS, 0, gradient_of_reference))


@pytest.mark.filterwarnings(RAISES)
def test_an_exception_in_a_loss_that_simulates_inside_itself() -> None:
    def loss(theta: Tensor, y: Tensor) -> Tensor:
        return (raises_above_one(theta) - y).square().mean()

    score, gradient = scores_and_gradient(Simulator.from_loss(loss, batched=False), THETA)
    reference, gradient_of_reference = scores_and_gradient(simulator_of(line, "batched"), THETA)
    assert torch.equal(score.isnan(), FAILS)
    torch.testing.assert_close(score[~FAILS], reference[~FAILS])
    torch.testing.assert_close(gradient, torch.where(FAILS, 0, gradient_of_reference))


def test_an_infinite_loss_fails_too() -> None:
    site = Simulator(line, lambda x, y: x[:, 0] * torch.inf)(torch.tensor([1.0, -1.0]))
    assert site.log_prob(Y).isnan().all()


def test_what_is_missing_in_the_data_need_not_be_finite() -> None:
    def growth_rates(theta: Tensor) -> Tensor:  # the first is unknown
        return torch.cat([torch.full((len(theta), 1), torch.nan), fails_above_one(theta)[:, 1:]], 1)

    y = torch.cat([torch.tensor([torch.nan]), Y[1:]])
    simulator = Simulator(growth_rates, losses.mse)
    score, gradient = scores_and_gradient(simulator, THETA, y)
    reference, gradient_of_reference = scores_and_gradient(Simulator(line, losses.mse), THETA, y)
    assert torch.equal(score.isnan(), FAILS)
    torch.testing.assert_close(score[~FAILS], reference[~FAILS])
    torch.testing.assert_close(gradient, torch.where(FAILS, 0, gradient_of_reference))
    assert simulator(THETA).log_prob(Y).isnan().all()  # what is observed must be


def test_a_loss_need_not_know_what_to_do_with_nan() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise AssertionError("the loss saw NaN")
        return losses.mse(x, y)

    assert torch.equal(Simulator(fails_above_one, loss)(THETA).log_prob(Y).isnan(), FAILS)


def test_a_draw_that_is_not_finite_is_returned() -> None:
    x = Simulator(fails_above_one, losses.mse)(THETA).sample()
    assert torch.equal(x.isnan().all(-1), FAILS)
    assert torch.equal(x[~FAILS], line(THETA)[~FAILS])


@pytest.mark.parametrize("shared", [True, False], ids=["shared theta", "own theta"])
def test_in_plates_only_the_element_fails(shared: bool) -> None:
    """Three particles, two series. A shared theta keeps the gradient of the series that survive."""
    theta = torch.tensor([[0.5], [2.0], [-1.0]]) if shared else torch.tensor([[0.5, 2.0], [-1.0, 0.25], [3.0, 4.0]])
    theta.requires_grad_()
    offset = torch.tensor([0.0, 0.6])
    y = Y.expand(2, T)

    def shifted(theta: Tensor, offset: Tensor) -> Tensor:
        return fails_above_one(theta + offset)

    simulator = Simulator(shifted, losses.mse)

    def model() -> None:
        with pyro.plate("particles", 3, dim=-2), pyro.plate("series", 2, dim=-1):
            pyro.sample("x", simulator(theta, offset), obs=y)

    with pyro.validation_enabled(False):
        trace = poutine.trace(model).get_trace()
        trace.compute_log_prob()
    site = trace.nodes["x"]
    fails = (theta + offset > 1).detach()
    assert torch.equal(site["log_prob"].isnan(), fails)
    assert site["fn"].gradient_failed is None
    (gradient,) = torch.autograd.grad(site["log_prob"].nansum(), theta)
    exact = Simulator(lambda theta, offset: line(theta + offset), losses.mse)(theta, offset).log_prob(y)
    (expected,) = torch.autograd.grad(exact[~fails].sum(), theta)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(site["fn"].gradient_failed, torch.zeros(3, 2, dtype=torch.bool))


# ---- gradients that fail --------------------------------------------------------------------------------------------


class NaNAtTwo(torch.autograd.Function):
    """The identity, with a derivative of NaN at 2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor) -> Tensor:
        return theta.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.where(ctx.saved_tensors[0] == 2, torch.nan, gradient)


@pytest.mark.filterwarnings(LOOPS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("fn", "theta"),
    [
        (lambda theta: line(NaNAtTwo.apply(theta)), torch.tensor([1.0, 2.0, 3.0])),
        (lambda theta: line((theta - 2).square().sqrt()), torch.tensor([1.0, 2.0, 3.0])),  # 0 * inf is NaN
        (lambda theta: line(theta.sub(2).abs().sqrt()) + 1, torch.tensor([1.0, 2.0, 3.0])),
    ],
    ids=["NaN", "root of a square", "root"],
)
def test_a_gradient_that_is_not_finite(fn: Callable[..., Tensor], theta: Tensor, how: str) -> None:
    simulator = simulator_of(fn, how)
    bad = torch.tensor([False, True, False])
    theta.requires_grad_()
    site = simulator(theta)
    score = site.log_prob(Y)
    assert score.isfinite().all()
    assert site.gradient_failed is None
    (gradient,) = torch.autograd.grad(score.sum(), theta)
    assert torch.equal(site.gradient_failed, bad)
    alone, expected = scores_and_gradient(simulator, theta.detach()[~bad])
    assert torch.equal(score[~bad], alone)
    assert torch.equal(gradient[~bad], expected)
    assert expected.abs().min() > 0
    assert gradient[1] == 0


def test_a_gradient_that_fails_after_the_run_is_not_counted_twice() -> None:
    theta = THETA.clone().requires_grad_()
    site = Simulator(lambda theta: fails_above_one(theta) + (theta - 0.5).abs().sqrt().unsqueeze(-1), losses.mse)(theta)
    site.log_prob(Y).nansum().backward()
    assert torch.equal(site.gradient_failed, THETA == 0.5)
    assert theta.grad.isfinite().all()


def test_a_draw_has_a_gradient_in_all_of_its_parameters_or_in_none() -> None:
    """Also in a vector, of which one entry spoils the draw, and where gradients are asked for one by one."""

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return line(NaNAtTwo.apply(a)) + NaNAtTwo.apply(b).sum(-1, keepdim=True)

    a = torch.tensor([2.0, 0.5, 1.0], requires_grad=True)
    b = torch.tensor([[0.0, 1.0], [1.0, 2.0], [1.0, 1.0]], requires_grad=True)
    site = Simulator(fn, losses.mse, theta_event_dims=(0, 1))(a, b)
    score = site.log_prob(Y)
    together = torch.autograd.grad(score.sum(), [a, b], retain_graph=True)
    for gradient in together:
        assert gradient[:2].eq(0).all()
        assert gradient[2].ne(0).all()
    assert site.gradient_failed.tolist() == [True, True, False]
    again = Simulator(fn, losses.mse, theta_event_dims=(0, 1))(a, b)
    score = again.log_prob(Y)
    torch.autograd.grad(score.sum(), a, retain_graph=True)
    torch.autograd.grad(score.sum(), b)
    assert again.gradient_failed.tolist() == [True, True, False]


def test_outputs_that_share_a_run() -> None:
    """Each output fails by itself; where the gradient of the run is lost by that, the other one counts it."""

    def fn(theta: Tensor) -> dict[str, Tensor]:
        return {"a": fails_above_one(theta), "b": line(theta)}

    theta = THETA.clone().requires_grad_()
    run = Simulator(fn, {"a": losses.mse, "b": losses.mse})(theta)
    a, b = run["a"], run["b"]
    score_a, score_b = a.log_prob(Y), b.log_prob(Y)
    assert torch.equal(score_a.isnan(), FAILS)
    assert score_b.isfinite().all()
    (gradient,) = torch.autograd.grad(score_a.nansum() + score_b.sum(), theta)
    (of_line,) = torch.autograd.grad(Simulator(line, losses.mse)(theta).log_prob(Y).sum(), theta)
    torch.testing.assert_close(gradient, torch.where(FAILS, 0, 2 * of_line))
    assert not a.gradient_failed.any()
    assert torch.equal(b.gradient_failed, FAILS)


def test_a_foreign_elbo_sees_nan_and_keeps_its_parameters() -> None:
    model = model_of(Simulator(fails_above_one, losses.mse))
    guide = AutoNormal(model, init_scale=1.0)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO(num_particles=50, vectorize_particles=True))
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="Encountered NaN: loss"):
        assert np.isnan(svi.step(Y))
    before = guide.locs.theta.clone()
    assert before.isfinite()
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="Encountered NaN: loss"):
        svi.step(Y)
    assert guide.locs.theta.isfinite()
    assert guide.locs.theta != before


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in hessian
def test_derivatives_of_torch_func() -> None:
    simulator = Simulator(fails_above_one, losses.mse)
    simulator(THETA.clone().requires_grad_()).log_prob(Y)  # the checks of the first run look at values

    def total(theta: Tensor) -> Tensor:
        return simulator(theta).log_prob(Y).nansum()

    _, expected = scores_and_gradient(simulator, THETA)
    assert torch.equal(torch.func.grad(total)(THETA), expected)
    many = torch.vmap(torch.func.grad(total))(torch.stack([THETA, THETA.flip(0)]))
    assert torch.equal(many, torch.stack([expected, expected.flip(0)]))
    times = torch.arange(1.0, T + 1)
    curvature = -2 * times.square().mean().expand(3).diag()
    torch.testing.assert_close(torch.func.hessian(total)(THETA[~FAILS]), curvature)
    torch.testing.assert_close(torch.autograd.functional.hessian(total, THETA[~FAILS]), curvature)


def test_the_marks_of_pyros_provenance_and_the_graph_pass() -> None:
    """GeneralizedELBO finds out by them what depends on what."""
    theta = torch.zeros(3, requires_grad=True)
    x = Simulator(line, losses.mse)(track_provenance(theta * 1.0, frozenset({"theta"}))).rsample()
    assert get_provenance(x) == {"theta"}
    assert torch.autograd.grad(x.sum(), theta)[0].abs().min() > 0


def test_a_function_may_write_to_its_parameters() -> None:
    def writes(theta: Tensor) -> Tensor:
        theta.mul_(2.0)
        return line(theta)

    theta = torch.ones(3, requires_grad=True)
    assert torch.equal(Simulator(writes, losses.mse)(theta).rsample(), line(torch.full((3,), 2.0)))
    assert torch.equal(theta, torch.ones(3))


# ---- exceptions -----------------------------------------------------------------------------------------------------


class Switch:
    """A batch of draws, or one draw, of a line; it raises whenever ``error`` is set."""

    __name__ = "switch"

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __call__(self, theta: Tensor) -> Any:
        if self.error is not None:
            raise self.error
        return line(theta)


@pytest.mark.parametrize("how", HOWS)
def test_a_simulator_that_never_worked_raises_as_it_is(how: str) -> None:
    switch = Switch()
    switch.error = ZeroDivisionError("agents divided by none")
    simulator = simulator_of(switch, how)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="agents divided by none") as caught:
            simulator(THETA).log_prob(Y)
        assert caught.traceback[-1].name == "__call__"


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    """Of x and y of one dtype."""
    return (x.unsqueeze(1) @ y.unsqueeze(2)).flatten()


@pytest.mark.filterwarnings(LOOPS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_simulator_that_worked_before_fails(how: str, dtype: torch.dtype) -> None:
    switch = Switch()
    simulator = simulator_of(switch, how, inner_product)
    theta, y = THETA.to(dtype), Y.to(dtype)
    simulator(theta).log_prob(y)
    switch.error = ZeroDivisionError("agents divided by none")
    with pytest.warns(RuntimeWarning, match=r"raised an exception in 5 of 5 draws"):
        score = simulator(theta.requires_grad_()).log_prob(y)
    assert score.isnan().all()
    assert score.dtype == dtype
    assert not score.requires_grad
    score = simulator(theta).log_prob(y)  # said once
    assert score.isnan().all()
    with pytest.raises(ZeroDivisionError, match="agents divided by none"):
        simulator(theta).sample()
    switch.error = None
    assert torch.equal(simulator(theta).log_prob(y), -inner_product(line(theta), y.expand(5, T)))


def test_a_batch_that_raises_fails_as_a_whole_in_every_output() -> None:
    switch = Switch()

    def fn(theta: Tensor) -> dict[str, Tensor]:
        return {"a": switch(theta), "b": switch(theta).sum(-1)}

    loss = {"a": losses.mse, "b": losses.mse}
    simulator = Simulator(fn, loss, event_dim={"a": 1, "b": 0})
    simulator(THETA)["b"].log_prob(torch.tensor(0.0))
    switch.error = ValueError("no agents")
    run = simulator(THETA)
    with pytest.warns(RuntimeWarning, match="A batch that raises counts as failed in all of its draws"):
        assert run["a"].log_prob(Y).isnan().all()
    assert run["b"].log_prob(torch.tensor(0.0)).isnan().all()


def test_a_batch_that_raises_in_a_loss_that_simulates_inside_itself() -> None:
    switch = Switch()
    simulator = Simulator.from_loss(lambda theta, y: losses.mse(switch(theta), y))
    theta, y = THETA.double(), Y.double()
    assert simulator(theta).log_prob(y).isfinite().all()
    switch.error = ValueError("no agents")
    with pytest.warns(RuntimeWarning, match="5 of 5 draws"):
        score = simulator(theta).log_prob(y)
    assert score.dtype == torch.float64
    assert score.shape == THETA.shape
    assert score.isnan().all()


@pytest.mark.filterwarnings(RAISES)
def test_a_draw_that_raises_fails_where_all_data_are_missing() -> None:
    """There x is not looked at, and the loss is 0."""
    site = Simulator(raises_above_one, losses.mse, batched=False)(THETA)
    assert torch.equal(site.log_prob(torch.full((T,), torch.nan)).isnan(), FAILS)


def two_parameters(rate: Tensor, size: Tensor) -> Tensor:
    if rate > 1:
        raise ZeroDivisionError(f"no agents at {rate}")
    return line(rate) + size.sum()


def test_the_warning() -> None:
    simulator = Simulator(two_parameters, losses.mse, batched=False, theta_event_dims=(0, 1))
    raising_line = two_parameters.__code__.co_firstlineno + 2
    size = torch.arange(10.0).reshape(2, 5).expand(4, 2, 5).reshape(8, 5)
    rate = torch.tensor([0.0, 2.0, 1.5, 3.0, 4.0, 0.123456, 0.0, 0.0])
    with pytest.warns(RuntimeWarning) as caught:
        score = simulator(rate, size).log_prob(Y)
    assert score.isnan().tolist() == [False, True, True, True, True, False, False, False]
    (warning,) = caught
    assert str(warning.message) == (
        "two_parameters raised an exception in 4 of 8 draws, such as rate=2 and size=[5, 6, 7, 8, ...]; rate=1.5 and "
        "size=[0, 1, 2, 3, ...]; rate=3 and size=[5, 6, 7, 8, ...]: ZeroDivisionError: no agents at 2.0 "
        f"({__file__}:{raising_line}). They count as failed: the log-probability is NaN, the gradient zero. Later "
        "exceptions are not announced"
    )
    simulator(rate[1:], size[1:]).log_prob(Y)  # nor are they


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_to_stop_the_program_is_no_failure(how: str, error: type[BaseException]) -> None:
    switch = Switch()
    simulator = simulator_of(switch, how)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*runs in a Python loop")
        simulator(THETA).log_prob(Y)
    switch.error = error()
    with pytest.raises(error):
        simulator(THETA).log_prob(Y)


def test_a_draw_that_raises_is_nan() -> None:
    """In the dtype of the others, unless these hold whole numbers."""

    def fn(theta: Tensor, dtype: torch.dtype) -> Tensor:
        return (4 * raises_above_one(theta)).to(dtype)

    for dtype in (torch.bfloat16, torch.float64, torch.int32):
        simulator = Simulator(fn, losses.mse, batched=False, dtype=dtype)
        with pytest.warns(RuntimeWarning, match="2 of 5 draws"):
            x = simulator(THETA).sample()
        assert torch.equal(x.isnan().all(-1), FAILS)
        assert torch.equal(x.isnan().any(-1), FAILS)
        assert x.dtype == (torch.float32 if dtype == torch.int32 else dtype)
        assert torch.equal(x[~FAILS], 4 * line(THETA[~FAILS]).to(x.dtype))
        with pytest.raises(torch.linalg.LinAlgError):
            simulator(THETA[FAILS]).sample()


@pytest.mark.filterwarnings(LOOPS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (lambda theta: theta, ValueError, r"has shape \(5,\), expected \(5, ...\)"),
        (lambda theta: None, (TypeError, RuntimeError), "NoneType"),
        (lambda theta: {"a": line(theta)}, ValueError, "returned a dict"),
    ],
    ids=["shape", "type", "dict"],
)
def test_a_violation_of_the_contract_is_no_failure(
    returned: Callable[..., Any], error: type[Exception], match: str, how: str
) -> None:
    broken = False
    simulator = simulator_of(lambda theta: returned(theta) if broken else line(theta), how)
    simulator(THETA).log_prob(Y)
    broken = True
    with pytest.raises(error, match=match):
        simulator(THETA).log_prob(Y)


def test_an_exception_in_the_loss_is_no_failure() -> None:
    simulator = Simulator(line, lambda x, y: losses.mse(x, y) if len(x) < 5 else losses.mse(x, y[:, 1:]))
    simulator(THETA[:4]).log_prob(Y)
    with pytest.raises(ValueError, match="mse: x has shape"):
        simulator(THETA).log_prob(Y)


@pytest.mark.filterwarnings(RAISES)
@pytest.mark.parametrize("batched", [True, False])
def test_an_exception_keeps_nothing_alive(batched: bool) -> None:
    """Not even until the garbage collector runs: what a run simulated may be large."""

    class History:
        pass

    alive = weakref.WeakSet()

    def fn(theta: Tensor) -> Tensor:
        history = History()
        alive.add(history)
        if (theta > 1).any():
            raise ZeroDivisionError
        return line(theta)

    simulator = Simulator(fn, losses.mse, batched=batched)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*runs in a Python loop")
        simulator(THETA[~FAILS]).log_prob(Y)
    gc.collect()
    gc.disable()
    try:
        simulator(THETA).log_prob(Y)
        assert not len(alive)
    finally:
        gc.enable()


# ---- vmap, the loop and random numbers ------------------------------------------------------------------------------


def test_vmap_is_tried_again_after_a_draw_raised() -> None:
    calls = 0

    def counted(theta: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return raises_above_one(theta)

    def calls_of(theta: Tensor) -> int:
        nonlocal calls
        calls = 0
        simulator(theta).log_prob(Y)
        return calls

    simulator = Simulator(counted, losses.mse, batched=False)
    with pytest.warns(RuntimeWarning, match="raised an exception"):
        assert calls_of(THETA) == 1 + 5
    assert calls_of(THETA[~FAILS]) == 1 + 2  # and once two draws, whether it draws outside of torch
    assert calls_of(THETA) == 1 + 5
    assert calls_of(THETA[~FAILS]) == 1


def test_the_loop_is_settled_by_a_batch_that_it_can_take() -> None:
    def branches(theta: Tensor) -> Tensor:
        return line(-theta) if theta < 0 else raises_above_one(theta)

    simulator = Simulator(branches, losses.mse, batched=False)
    with pytest.warns(RuntimeWarning, match="raised an exception") as caught:
        simulator(THETA).log_prob(Y)
    assert len(caught) == 1  # nothing of a loop yet
    with pytest.warns(UserWarning, match="runs in a Python loop over draws, because torch.vmap cannot take it"):
        simulator(THETA[~FAILS]).log_prob(Y)
    assert torch.equal(simulator(THETA).log_prob(Y).isnan(), FAILS)  # and no warning


def test_noise_from_outside_torch_is_found_though_a_draw_raised() -> None:
    """The fifth call of the function is one of the loop; not before all draws succeed there is anything settled."""
    calls = 0

    def noisy(theta: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise ZeroDivisionError
        return line(theta) + float(np.random.standard_normal())  # noqa: NPY002

    simulator = Simulator(noisy, losses.mse, batched=False)
    with pytest.warns(RuntimeWarning, match="1 of 5 draws"):
        simulator(THETA).sample()
    with pytest.warns(UserWarning, match="generator outside of torch"):
        x = simulator(torch.zeros(4)).sample()
    assert len({*x[:, 0].tolist()}) == 4


def noise_then_a_branch(theta: Tensor) -> Tensor:
    noise = torch.randn(T)
    return theta + noise if theta > 0 else theta - noise


def noise_of_numpy(theta: Tensor) -> Tensor:
    return theta + torch.randn(T) + torch.as_tensor(np.random.standard_normal(T), dtype=theta.dtype)  # noqa: NPY002


def noise_of_python(theta: Tensor) -> Tensor:
    return theta + torch.randn(T) + random.gauss(0, 1)


def noise_then_an_exception(theta: Tensor) -> Tensor:
    return raises_above_one(theta) + torch.randn(T) + random.gauss(0, 1)


@pytest.mark.filterwarnings(LOOPS)
@pytest.mark.filterwarnings(RAISES)
@pytest.mark.parametrize("fn", [noise_then_a_branch, noise_of_numpy, noise_of_python, noise_then_an_exception])
def test_an_attempt_of_vmap_leaves_the_generators_alone(fn: Callable[..., Tensor]) -> None:
    """So that a fit draws the same numbers whether it was interrupted, and tries vmap again, or not."""
    simulator = Simulator(fn, losses.mse, batched=False)
    results, states = [], []
    for _ in range(3):
        pyro.set_rng_seed(5)
        results.append(simulator(THETA).sample())
        state = pyro.util.get_rng_state()
        states.append((state["torch"].tolist(), state["random"], state["numpy"][1].tolist(), state["numpy"][2]))
    for again, state in zip(results[1:], states[1:], strict=True):
        assert torch.equal(again.nan_to_num(), results[0].nan_to_num())
        assert state == states[0]
    assert len({*results[0][~FAILS].sub(THETA[~FAILS].unsqueeze(-1)).flatten().tolist()}) == 3 * T


def test_frozen_noise_with_draws_that_fail() -> None:
    def noisy(theta: Tensor) -> Tensor:
        return fails_above_one(theta) + torch.randn(len(theta), T)

    site = Simulator(noisy, losses.mse, seed=1)(THETA)
    first = site.log_prob(Y)
    assert torch.equal(first.isnan(), FAILS)
    assert torch.equal(first[~FAILS], site.log_prob(Y)[~FAILS])


# ---- the checks of the first runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [THETA > 0, THETA < 0])
def test_the_first_checks_look_at_survivors(fails: Tensor) -> None:
    """A draw in front, or behind, that failed is neither taken for one without gradient nor for a mixture."""

    def fn(theta: Tensor) -> Tensor:
        return torch.where(fails.unsqueeze(-1), torch.nan, line(theta))

    _, gradient = scores_and_gradient(Simulator(fn, losses.mse), THETA)
    assert torch.equal(gradient == 0, fails)


@pytest.mark.parametrize(
    ("fn", "loss", "match"),
    [
        (lambda theta: fails_above_one(theta.detach()), losses.mse, "not depend differentiably on 'theta'"),
        (lambda theta: fails_above_one(theta), lambda x, y: losses.mse(x.detach(), y), "not depend differentiably"),
        (lambda theta: fails_above_one(theta) + theta[1:3].sum(), losses.mse, "mixes up the draws"),
    ],
    ids=["no gradient", "no gradient in the loss", "mixture"],
)
def test_what_no_draw_of_the_first_run_shows_is_found_later(
    fn: Callable[..., Tensor], loss: Callable[..., Tensor], match: str
) -> None:
    simulator = Simulator(fn, loss)
    all_fail = torch.full((4,), 2.0, requires_grad=True)
    assert simulator(all_fail).log_prob(Y).isnan().all()
    with pytest.raises(ValueError, match=match):
        simulator(torch.tensor([2.0, 0.5, 0.25, 3.0], requires_grad=True)).log_prob(Y)


def test_the_check_for_an_effect_waits_for_a_draw_that_shows_it() -> None:
    """Draws that failed do not, nor do draws whose gradient is not finite."""
    rounded = Simulator(lambda theta: fails_above_one(theta.sub(0.5).abs().sqrt()).round(), losses.mse)
    for theta in ([4.0, 4.0], [0.5, 0.5], [4.0, 0.5]):
        rounded(torch.tensor(theta, requires_grad=True)).log_prob(Y)
    with pytest.warns(UserWarning, match="has no gradient, or one of zero, in 'theta'"):
        rounded(torch.tensor([4.0, 0.75, 0.5], requires_grad=True)).log_prob(Y)


def test_a_site_says_that_it_can_fail() -> None:
    model = model_of(Simulator(line, losses.mse))
    with pyro.plate("series", 2):
        trace = poutine.trace(model).get_trace(Y)
    assert trace.nodes["x"]["fn"].can_fail is True
    assert not hasattr(dist.Normal(0.0, 1.0), "can_fail")


@pytest.mark.parametrize("how", ["batched", "vmap"])
def test_nothing_is_looked_at_after_the_first_checks(how: str) -> None:
    """No operation that hands a value, or a number of entries, over to Python; nor in the backward pass."""
    simulator = simulator_of(fails_above_one, how)
    scores_and_gradient(simulator, THETA)

    def step(theta: Tensor) -> tuple[Tensor, ...]:
        site = simulator(theta)
        score = site.log_prob(Y)
        (gradient,) = torch.autograd.grad(score.nansum(), theta)
        return score, gradient, site.gradient_failed

    traced = make_fx(step)(THETA.clone().requires_grad_())
    operations = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert not [name for name in operations if re.search("_local_scalar_dense|nonzero|is_nonzero", name)]
    theta = THETA.flip(0).requires_grad_()
    for ours, theirs in zip(traced(theta), step(theta), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_the_message_tells_a_loss_that_is_not_finite_from_a_run_that_is_not() -> None:
    def one_over_zero(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean(1) / 0

    model = model_of(Simulator(line, one_over_zero))
    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.01}), GeneralizedELBO(on_failure="raise"))
    with pytest.raises(RuntimeError, match="with 'the loss one_over_zero not finite where x is'"):
        svi.step(torch.zeros(4))
    site = Simulator(fails_above_one, losses.mse)(torch.tensor([2.0]))
    site.log_prob(torch.zeros(4))
    assert site.cause == ""
