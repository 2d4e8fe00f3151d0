"""GeneralizedELBO as an object: its weight, its terms, its arguments, and its use by SVI, torch modules and tracers."""

import copy
import math
import pickle
import random
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_walk import TUTORIAL_WALK
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from sampling_checks import parameters, randomise
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyrobirds import GeneralizedELBO, models
from pyrobirds.divergences import KL

Y = torch.tensor([0.4, -1.1, 1.9])


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.3, 1.2))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 0.8))
        pyro.sample("y", dist.Normal(theta, 0.7), obs=y)


def ready(make_guide: Callable = AutoNormal) -> Callable:
    guide = make_guide(model)
    guide(Y)
    randomise()
    return guide


def evaluate(elbo: GeneralizedELBO, guide: Callable, *, seed: int = 1) -> tuple[float, dict[str, Tensor]]:
    for parameter in parameters().values():
        parameter.grad = None
    pyro.set_rng_seed(seed)
    value = elbo.loss_and_grads(model, guide, Y)
    return value, {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in parameters().items()
    }


DIVERGENCES = [KL(), KL(analytic=False), KL(num_particles=7)]
all_divergences = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)


# ---- the weight -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_particles", "vectorized"), [(3, True), (2, False)])
@all_divergences
def test_w_multiplies_the_divergence_only(divergence, num_particles, vectorized):
    guide = ready()
    keywords = {"divergence": divergence, "num_particles": num_particles, "vectorize_particles": vectorized}
    at = {}
    for w in (0.0, 1.0, 3.0):
        elbo = GeneralizedELBO(w, **keywords)
        value, gradients = evaluate(elbo, guide)
        at[w] = value, gradients, elbo.terms
    assert at[0.0][2].divergence == 0
    assert at[0.0][2].loss == at[1.0][2].loss == at[3.0][2].loss
    torch.testing.assert_close(at[3.0][2].divergence, 3 * at[1.0][2].divergence)
    for name in at[0.0][1]:
        of_loss = at[0.0][1][name]
        of_divergence = at[1.0][1][name] - of_loss
        assert of_divergence.abs().max() > 0, name
        torch.testing.assert_close(at[3.0][1][name], of_loss + 3 * of_divergence, rtol=1e-4, atol=1e-4)


@all_divergences
def test_w_of_zero_leaves_the_gradient_of_the_loss(divergence):
    drawn: list[Tensor] = []

    def watched(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.3, 1.2))
        drawn.append(theta)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(theta, 0.7), obs=y)

    guide = AutoNormal(watched)
    guide(Y)
    elbo = GeneralizedELBO(0, divergence=divergence, num_particles=5, max_plate_nesting=1, retain_graph=True)
    elbo.loss_and_grads(watched, guide, Y)
    for parameter in parameters().values():
        parameter.grad = None
    drawn.clear()
    value = elbo.loss_and_grads(watched, guide, Y)
    theta = next(theta for theta in drawn if theta.shape == (5, 1))
    loss = -dist.Normal(theta, 0.7).log_prob(Y).sum(-1).mean()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.autograd.grad(loss, list(parameters().values()))
    for parameter, gradient in zip(parameters().values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("w", [2, 2.0, np.float64(2.0), np.int64(2), lambda step: 2, lambda step: np.float32(2.0)])
def test_numbers_of_all_kinds_are_weights(w):
    guide = ready()
    reference, elbo = GeneralizedELBO(2.0), GeneralizedELBO(w)
    assert evaluate(elbo, guide)[0] == evaluate(reference, guide)[0]


def test_a_callable_w_is_asked_at_every_evaluation_for_the_number_of_gradients_so_far():
    asked: list[int] = []

    def w(step: int) -> float:
        asked.append(step)
        return 1.0 + step

    guide = ready()
    elbo = GeneralizedELBO(w, num_particles=2)
    assert elbo.step == 0
    divergences = []
    evaluations = [elbo.loss_and_grads, elbo.loss, elbo.differentiable_loss, elbo.loss, elbo.loss, elbo.loss_and_grads]
    for evaluation in evaluations:
        pyro.set_rng_seed(1)
        evaluation(model, guide, Y)
        divergences.append(elbo.terms.divergence)
    assert asked == [0, 1, 1, 2, 2, 2]
    assert all(type(step) is int for step in asked)
    assert elbo.step == 3
    # All draws are the same, so that the divergences are to each other as the weights, but for the first, which the
    # guess of the plate nesting shifts.
    torch.testing.assert_close(torch.stack(divergences[1:]) / divergences[1], torch.tensor([1, 1, 1.5, 1.5, 1.5]))


def test_svi_counts_steps_and_evaluations_do_not():
    guide = ready()
    elbo = GeneralizedELBO(lambda step: 10.0 / (1 + step))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(3):
        svi.step(Y)
        svi.evaluate_loss(Y)
    assert elbo.step == 3


@pytest.mark.parametrize("particles", [{"num_particles": 3}, {"num_particles": 3, "vectorize_particles": False}])
def test_a_step_is_counted_once_whatever_the_particles(particles):
    guide = ready()
    elbo = GeneralizedELBO(divergence=KL(num_particles=4), **particles)
    elbo.loss_and_grads(model, guide, Y)
    assert elbo.step == 1


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, -math.inf])
def test_a_callable_w_that_returns_no_weight_raises(bad):
    guide = ready()
    elbo = GeneralizedELBO(lambda step: bad if step == 1 else 1.0)
    elbo.loss_and_grads(model, guide, Y)
    for evaluation in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
        with pytest.raises(ValueError, match=r"w at step 1 must be a finite number of at least 0, got"):
            evaluation(model, guide, Y)


@pytest.mark.parametrize("bad", ["1", None, True, [1.0]])
def test_a_callable_w_that_returns_no_number_raises(bad):
    with pytest.raises(TypeError, match=r"w at step 0 must be a number"):
        GeneralizedELBO(lambda step: bad).loss(model, ready(), Y)


# ---- the terms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_particles", "vectorized"), [(1, True), (3, True), (2, False)])
@all_divergences
def test_terms_after_every_kind_of_evaluation(divergence, num_particles, vectorized):
    guide = ready()
    elbo = GeneralizedELBO(2.0, divergence=divergence, num_particles=num_particles, vectorize_particles=vectorized)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    evaluations: dict[str, Callable[[], object]] = {
        "loss": lambda: elbo.loss(model, guide, Y),
        "loss_and_grads": lambda: elbo.loss_and_grads(model, guide, Y),
        "differentiable_loss": lambda: elbo.differentiable_loss(model, guide, Y),
        "module": lambda: elbo(model, guide)(Y),
        "step": lambda: svi.step(Y),
        "evaluate_loss": lambda: svi.evaluate_loss(Y),
    }
    before = elbo.terms
    for name, evaluation in evaluations.items():
        returned = torch.as_tensor(evaluation()).item()
        terms = elbo.terms
        assert terms is not before, name
        assert terms._fields == ("loss", "divergence", "total", "num_failed"), name
        for term in terms:
            assert isinstance(term, Tensor), name
            assert term.shape == (), name
            assert term.grad_fn is None, name
            assert not term.requires_grad, name
        assert terms.loss + terms.divergence == terms.total, name
        assert returned == terms.total.item(), name
        before = terms


def test_the_terms_are_what_they_are_called():
    # A guide that is a point has E[loss] and the divergence in closed form: -log p(y | theta) and -w log p(theta).
    def point(y: Tensor) -> None:
        pyro.sample("mu", dist.Delta(torch.tensor(0.4)))
        with pyro.plate("data", len(y)):
            pyro.sample("theta", dist.Delta(torch.tensor([0.1, 0.2, 0.3])))

    elbo = GeneralizedELBO(5.0)
    elbo.loss(model, point, Y)
    theta = torch.tensor([0.1, 0.2, 0.3])
    loss = -dist.Normal(theta, 0.7).log_prob(Y).sum()
    log_prior = dist.Normal(0.3, 1.2).log_prob(torch.tensor(0.4)) + dist.Normal(0.4, 0.8).log_prob(theta).sum()
    torch.testing.assert_close(elbo.terms.loss, loss)
    torch.testing.assert_close(elbo.terms.divergence, -5.0 * log_prior)


def test_there_are_no_terms_before_the_first_evaluation():
    assert GeneralizedELBO().terms is None


def test_factors_and_several_observed_sites_make_up_the_loss():
    def mixed(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Delta(torch.tensor(0.5)))
        pyro.factor("f", -3.0 * theta)
        pyro.sample("sum", dist.Normal(theta, 2.0), obs=y.sum())
        with pyro.plate("data", len(y)), poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(theta, 0.7), obs=y)

    def point(y: Tensor) -> None:
        pyro.sample("theta", dist.Delta(torch.tensor(0.5)))

    elbo = GeneralizedELBO(5.0)
    elbo.loss(mixed, point, Y)
    half = torch.tensor(0.5)
    expected = 1.5 - dist.Normal(half, 2.0).log_prob(Y.sum()) - 0.5 * dist.Normal(half, 0.7).log_prob(Y).sum()
    torch.testing.assert_close(elbo.terms.loss, expected)
    assert elbo.terms.divergence == 0


@all_divergences
def test_the_value_does_not_depend_on_whether_gradients_are_recorded(divergence):
    # Dependence between sites must not be read off requires_grad, which is off in evaluate_loss.
    guide = ready(AutoMultivariateNormal)
    values = []
    for first_without_gradients in (True, False):
        elbo = GeneralizedELBO(divergence=divergence, num_particles=3, max_plate_nesting=1)
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo)
        pyro.set_rng_seed(0)
        (svi.evaluate_loss if first_without_gradients else svi.step)(Y)
        for evaluation in (svi.evaluate_loss, svi.step):
            pyro.set_rng_seed(1)
            values.append(evaluation(Y))
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


def test_looking_for_closed_forms_draws_nothing_from_the_random_numbers():
    guide = ready()
    losses = []
    for divergence in (KL(), KL(analytic=False)):
        elbo = GeneralizedELBO(divergence=divergence, num_particles=3)
        evaluate(elbo, guide)
        losses.append((elbo.terms.loss, torch.rand(()), random.random()))
    assert losses[0] == losses[1]


def test_what_cannot_be_looked_into_is_monte_carlo_and_said_so_once():
    def hostile(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.3, 1.2))
        if type(theta) is not Tensor:
            raise TypeError("plain tensors only")
        pyro.sample("y", dist.Normal(theta, 0.7), obs=y.sum())

    guide = AutoNormal(hostile)
    guide(Y)
    values = []
    elbo = GeneralizedELBO(max_plate_nesting=0)
    with pytest.warns(
        UserWarning, match=r"Monte Carlo alone.*could not be found out \(TypeError: plain tensors only\)"
    ):
        elbo.loss(hostile, guide, Y)
    for each in (elbo, GeneralizedELBO(divergence=KL(analytic=False), max_plate_nesting=0)):
        pyro.set_rng_seed(1)
        values.append(each.loss(hostile, guide, Y))
    assert values[0] == values[1]


def test_one_elbo_serves_several_models_in_turn():
    def other(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.3, 1.2))
        with pyro.plate("data", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0 * mu + 5.0, 0.8))
            pyro.sample("y", dist.Normal(theta, 0.7), obs=y)

    guide = ready(AutoMultivariateNormal)
    shared = GeneralizedELBO(num_particles=3, max_plate_nesting=1)
    for _ in range(2):
        for each in (model, other):
            pyro.set_rng_seed(1)
            value = shared.loss(each, guide, Y)
            pyro.set_rng_seed(1)
            assert value == GeneralizedELBO(num_particles=3, max_plate_nesting=1).loss(each, guide, Y)


def test_the_dtype_is_the_models():
    def wide(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    elbo = GeneralizedELBO()
    elbo.loss_and_grads(wide, AutoNormal(wide), torch.ones((), dtype=torch.float64))
    assert {term.dtype for term in elbo.terms[:3]} == {torch.float64}
    pyro.clear_param_store()
    elbo = GeneralizedELBO()
    elbo.loss_and_grads(model, ready(), Y)
    assert {term.dtype for term in elbo.terms[:3]} == {torch.float32}


def test_mean_field_guides_have_the_value_of_pyros_own_mean_field_elbo():
    def guide(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.6))
        mu = pyro.sample("mu", dist.Normal(pyro.param("mu_at", torch.tensor(0.1)), scale))
        with pyro.plate("data", len(y)):
            pyro.sample("theta", dist.Normal(pyro.param("at", torch.tensor([0.1, -0.2, 0.4])) + mu, scale))

    keywords = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    values = []
    for elbo in (GeneralizedELBO(**keywords), TraceMeanField_ELBO(**keywords)):
        pyro.set_rng_seed(1)
        guide(Y)
        for parameter in parameters().values():
            parameter.grad = None
        pyro.set_rng_seed(1)
        values.append((elbo.loss_and_grads(model, guide, Y), [p.grad.clone() for p in parameters().values()]))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-5)
    for ours, theirs in zip(values[0][1], values[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- wrong arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"w": -1.0}, ValueError, r"w must be a finite number of at least 0, got -1\.0"),
        ({"w": -1e-9}, ValueError, r"w must be a finite number of at least 0"),
        ({"w": math.nan}, ValueError, r"w must be a finite number of at least 0, got nan"),
        ({"w": math.inf}, ValueError, r"w must be a finite number of at least 0, got inf"),
        ({"w": "100"}, TypeError, r"w must be a number of at least 0.*got '100'"),
        ({"w": True}, TypeError, r"w must be a number of at least 0.*got True"),
        ({"w": None}, TypeError, r"w must be a number of at least 0.*got None"),
        ({"w": [1.0]}, TypeError, r"w must be a number of at least 0.*got \[1\.0\]"),
        ({"num_particles": 0}, ValueError, r"num_particles must be at least 1, got 0"),
        ({"num_particles": -3}, ValueError, r"num_particles must be at least 1, got -3"),
        ({"num_particles": 1.5}, TypeError, r"num_particles must be a whole number.*got 1\.5"),
        ({"num_particles": True}, TypeError, r"num_particles must be a whole number.*got True"),
        ({"num_particles": "10"}, TypeError, r"num_particles must be a whole number.*got '10'"),
        ({"divergence": "KL"}, TypeError, r"divergence must be .*got 'KL'"),
        ({"divergence": None}, TypeError, r"divergence must be .*got None"),
        ({"divergence": KL}, TypeError, r"divergence must be .*got <class"),
        ({"unknown": 1}, TypeError, r"unknown"),
    ],
)
def test_wrong_arguments_raise_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        GeneralizedELBO(**arguments)


def test_only_w_is_positional():
    with pytest.raises(TypeError, match="positional"):
        GeneralizedELBO(1.0, KL())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_particles": 0}, ValueError, r"num_particles must be at least 1, got 0"),
        ({"num_particles": 2.5}, TypeError, r"num_particles must be a whole number.*got 2\.5"),
        ({"analytic": "yes"}, TypeError, r"analytic must be True or False, got 'yes'"),
        ({"analytic": 1}, TypeError, r"analytic must be True or False, got 1"),
    ],
)
def test_wrong_arguments_of_the_divergence_raise_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        KL(**arguments)


# ---- as a torch module, as a value ----------------------------------------------------------------------------------


def test_the_torch_module_trains():
    guide = AutoNormal(model)
    elbo = GeneralizedELBO(num_particles=20, max_plate_nesting=1)(model, guide)
    elbo(Y)
    optimiser = torch.optim.Adam(elbo.parameters(), lr=0.05)
    names = [name for name, _ in elbo.named_parameters()]
    assert len(names) == 4, names
    for _ in range(400):
        optimiser.zero_grad()
        elbo(Y).backward()
        optimiser.step()
    # The best mean-field Gaussian has the posterior's mean, and as variances the inverse diagonal of its precision.
    precision = torch.zeros(4, 4)
    precision[0, 0] = 1 / 1.2**2 + 3 / 0.8**2
    precision[0, 1:] = precision[1:, 0] = -1 / 0.8**2
    precision[1:, 1:] = torch.eye(3) * (1 / 0.8**2 + 1 / 0.7**2)
    mean = torch.linalg.solve(precision, torch.cat([torch.tensor([0.3 / 1.2**2]), Y / 0.7**2]))
    sd = precision.diagonal() ** -0.5
    at = torch.cat([guide._get_loc_and_scale(name)[0].reshape(-1) for name in ("mu", "theta")])
    scale = torch.cat([guide._get_loc_and_scale(name)[1].reshape(-1) for name in ("mu", "theta")])
    # One last iterate of Adam at 0.05 jitters by a fraction of its step, here at most 0.1 of a posterior sd.
    assert ((at - mean).abs() / sd).max() < 0.3
    assert (scale / sd).log().abs().max() < 0.3


def half(step: int) -> float:
    return 0.5 + step


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda elbo: pickle.loads(pickle.dumps(elbo))])
@pytest.mark.parametrize("evaluated", [False, True])
def test_copies(how, evaluated):
    guide = ready()
    elbo = GeneralizedELBO(half, divergence=KL(num_particles=4), num_particles=3, max_plate_nesting=1)
    if evaluated:
        evaluate(elbo, guide)
    other = how(elbo)
    assert other is not elbo
    assert (other.step, other.num_particles, other.max_plate_nesting) == (int(evaluated), 3, 2)
    value, gradients = evaluate(elbo, guide)
    other_value, other_gradients = evaluate(other, guide)
    assert other_value == value
    for name, gradient in gradients.items():
        assert torch.equal(other_gradients[name], gradient), name
    evaluate(other, guide)
    assert (elbo.step, other.step) == (1 + evaluated, 2 + evaluated)


def test_an_elbo_that_ran_on_local_functions_can_be_pickled():
    def local(y: Tensor) -> None:
        model(y)

    elbo = GeneralizedELBO()
    elbo.loss_and_grads(local, AutoNormal(local), Y)
    assert pickle.loads(pickle.dumps(elbo)).step == 1


# ---- nothing in a step waits for Python -----------------------------------------------------------------------------


@pytest.mark.parametrize("make_guide", [AutoNormal, AutoMultivariateNormal])
@all_divergences
def test_a_whole_gradient_evaluation_can_be_traced(divergence, make_guide):
    y = torch.tensor(TUTORIAL_WALK)
    guide = make_guide(models.random_walk)
    elbo = GeneralizedELBO(100.0, divergence=divergence)
    with pyro.validation_enabled(False):
        SVI(models.random_walk, guide, pyro.optim.Adam({"lr": 0.05}), elbo).step(y)
        at = list(parameters().values())

        def gradient_evaluation() -> tuple[Tensor, ...]:
            loss = elbo.differentiable_loss(models.random_walk, guide, y)
            return (*elbo.terms, *torch.autograd.grad(loss, at))

        pyro.set_rng_seed(1)
        traced = make_fx(gradient_evaluation)()
        operations = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
        assert not [name for name in operations if "_local_scalar_dense" in name or "nonzero" in name]
        assert [name for name in operations if "rand" in name or "normal" in name]

        for seed in (1, 2):
            pyro.set_rng_seed(seed)
            eager = gradient_evaluation()
            pyro.set_rng_seed(seed)
            for ours, theirs in zip(traced(), eager, strict=True):
                torch.testing.assert_close(ours, theirs)
            # The trace reads the parameters anew.
            with torch.no_grad():
                for parameter in at:
                    parameter.add_(0.1)
