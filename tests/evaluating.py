"""One evaluation of an ELBO on a freshly made model and guide, so that two ELBOs can be compared under one seed."""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from model_guide_pairs import GuideFactory, Problem
from pyro import poutine
from pyro.infer import ELBO, SVI
from torch import Tensor

METHODS = ("loss", "loss_and_grads", "differentiable_loss", "step", "evaluate_loss")


class Evaluation(NamedTuple):
    """What an ELBO returned, the gradient by parameter name (None: none was computed), and the warnings it gave."""

    value: float
    gradients: dict[str, Tensor | None]
    warnings: list[tuple[type[Warning], str]]


def evaluate(
    elbo: ELBO, method: str, problem: Problem, make_guide: GuideFactory, *, seed: int = 1, set_up: bool = True
) -> Evaluation:
    """Make the guide, move its parameters away from their start, seed, and evaluate.

    With `set_up=False` the first call of the guide is the ELBO's own, and the parameters stay where they start.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    y = problem.data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guide = make_guide(problem.model)
        if set_up:
            guide(y)
            poutine.trace(problem.model).get_trace(y)  # a model may have parameters, too
            with torch.no_grad():
                for _, parameter in sorted(pyro.get_param_store().named_parameters()):
                    parameter.add_(0.2 * torch.randn_like(parameter))
        pyro.set_rng_seed(seed)
        value, gradients = _METHODS[method](elbo, problem.model, guide, y)
    return Evaluation(value, gradients, [(warning.category, str(warning.message)) for warning in caught])


def gradients() -> dict[str, Tensor | None]:
    """The gradients of the parameter store's unconstrained parameters, by name."""
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in pyro.get_param_store().named_parameters()
    }


def _loss(elbo: ELBO, model: Callable, guide: Callable, y: Tensor) -> tuple[float, dict[str, Tensor | None]]:
    return elbo.loss(model, guide, y), gradients()


def _loss_and_grads(elbo: ELBO, model: Callable, guide: Callable, y: Tensor) -> tuple[float, dict[str, Tensor | None]]:
    return elbo.loss_and_grads(model, guide, y), gradients()


def _differentiable_loss(
    elbo: ELBO, model: Callable, guide: Callable, y: Tensor
) -> tuple[float, dict[str, Tensor | None]]:
    loss = elbo.differentiable_loss(model, guide, y)
    loss.backward()
    return loss.item(), gradients()


def _step(elbo: ELBO, model: Callable, guide: Callable, y: Tensor) -> tuple[float, dict[str, Tensor | None]]:
    # With plain gradient descent at rate 1, what a step takes from a parameter is the gradient.
    before: dict[str, Tensor] = {}
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1.0}), elbo)
    for name, parameter in pyro.get_param_store().named_parameters():
        before[name] = parameter.detach().clone()
    value = svi.step(y)
    after = dict(pyro.get_param_store().named_parameters())
    return value, {name: before[name] - after[name].detach() for name in sorted(before)}


def _evaluate_loss(elbo: ELBO, model: Callable, guide: Callable, y: Tensor) -> tuple[float, dict[str, Tensor | None]]:
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1.0}), elbo)
    return svi.evaluate_loss(y), gradients()


_METHODS = {
    "loss": _loss,
    "loss_and_grads": _loss_and_grads,
    "differentiable_loss": _differentiable_loss,
    "step": _step,
    "evaluate_loss": _evaluate_loss,
}


def assert_same(ours: Evaluation, theirs: Evaluation, *, relative: float = 1e-6) -> None:
    """The same value, and the same gradient of each parameter, relative to that gradient's largest element."""
    assert math.isfinite(theirs.value)
    assert type(ours.value) is type(theirs.value)
    assert abs(ours.value - theirs.value) <= relative * abs(theirs.value), (ours.value, theirs.value)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, expected in theirs.gradients.items():
        got = ours.gradients[name]
        if expected is None:
            assert got is None, name
            continue
        assert got is not None, name
        assert expected.isfinite().all(), name
        # Elements that cancel to rounding error are held to the largest element of their parameter.
        tolerance = relative * expected.abs().amax().item() + 1e-12 if expected.numel() else 0.0
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    assert ours.warnings == theirs.warnings
