"""With w = 1 and KL(analytic=False), GeneralizedELBO is Trace_ELBO: same seed, same value, same gradients.

Every guide is paired with every problem. The pairs that Pyro itself cannot do (`REFUSED`, with the reason) must fail in
the same way.
"""

import inspect
import math

import pyro
import pytest
import torch
from evaluating import METHODS, assert_same, evaluate
from model_guide_pairs import ACCEPTED, AUTOGUIDES, PAIRS, PROBLEMS, REFUSED
from pyro.infer import ELBO, Trace_ELBO, autoguide

from pyrobirds import GeneralizedELBO
from pyrobirds.divergences import KL

# num_particles, vectorize_particles, whether max_plate_nesting is given
PARTICLES = [(1, True, False), (1, False, True), (3, True, True), (3, True, False), (2, False, False)]


pytestmark = pytest.mark.usefixtures("double_precision")


def ids(value: object) -> str:
    return " with ".join(value) if isinstance(value, tuple) and isinstance(value[0], str) else str(value)


def both(problem: str, num_particles: int, vectorized: bool, nesting_given: bool) -> tuple[ELBO, ELBO]:
    keywords = {
        "num_particles": num_particles,
        "vectorize_particles": vectorized,
        "max_plate_nesting": PROBLEMS[problem].max_plate_nesting if nesting_given else math.inf,
    }
    return GeneralizedELBO(1.0, divergence=KL(analytic=False), **keywords), Trace_ELBO(**keywords)


@pytest.mark.parametrize(("num_particles", "vectorized", "nesting_given"), PARTICLES)
@pytest.mark.parametrize("pair", ACCEPTED, ids=ids)
def test_value_and_gradients(pair, num_particles, vectorized, nesting_given):
    problem, make_guide = PROBLEMS[pair[0]], PAIRS[pair]
    ours, theirs = both(pair[0], num_particles, vectorized, nesting_given)
    assert_same(
        evaluate(ours, "loss_and_grads", problem, make_guide), evaluate(theirs, "loss_and_grads", problem, make_guide)
    )


@pytest.mark.parametrize("method", [method for method in METHODS if method != "loss_and_grads"])
@pytest.mark.parametrize("pair", ACCEPTED, ids=ids)
def test_every_entry_point(pair, method):
    problem, make_guide = PROBLEMS[pair[0]], PAIRS[pair]
    for particles in [(3, True, False), (2, False, False)]:
        ours, theirs = both(pair[0], *particles)
        assert_same(evaluate(ours, method, problem, make_guide), evaluate(theirs, method, problem, make_guide))


@pytest.mark.parametrize("pair", ACCEPTED, ids=ids)
def test_the_guide_is_set_up_by_the_first_evaluation(pair):
    problem, make_guide = PROBLEMS[pair[0]], PAIRS[pair]
    for particles in [(3, True, True), (3, True, False), (2, False, False)]:
        ours, theirs = both(pair[0], *particles)
        first = evaluate(ours, "loss_and_grads", problem, make_guide, set_up=False)
        assert_same(first, evaluate(theirs, "loss_and_grads", problem, make_guide, set_up=False))


@pytest.mark.parametrize(("pair", "error"), [(pair, error) for pair, (error, _) in REFUSED.items()], ids=ids)
def test_what_pyro_cannot_do_fails_in_the_same_way(pair, error):
    problem, make_guide = PROBLEMS[pair[0]], PAIRS[pair]
    messages = []
    for elbo in both(pair[0], 3, True, False):
        with pytest.raises(error) as caught:
            evaluate(elbo, "loss_and_grads", problem, make_guide, set_up=False)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("method", METHODS)
def test_many_steps_in_a_row_stay_together(method):
    pair = ("nested plates", "score function")
    problem, make_guide = PROBLEMS[pair[0]], PAIRS[pair]
    ours, theirs = both(pair[0], 3, True, False)
    for seed in range(3):
        assert_same(
            evaluate(ours, method, problem, make_guide, seed=seed),
            evaluate(theirs, method, problem, make_guide, seed=seed),
        )


def test_the_score_function_guides_do_need_the_score_function():
    for name, problem in PROBLEMS.items():
        pyro.clear_param_store()
        with pyro.plate("particles", 2, dim=-1 - problem.max_plate_nesting):
            trace = pyro.poutine.trace(problem.guides["score function"]).get_trace(problem.data())
        trace.compute_score_parts()
        scores = [site["score_parts"].score_function for site in trace.nodes.values() if site["type"] == "sample"]
        assert any(isinstance(score, torch.Tensor) and score.requires_grad for score in scores), name


def test_every_autoguide_that_pyro_ships_is_here():
    shipped = {
        name
        for name in autoguide.__all__
        if inspect.isclass(getattr(autoguide, name)) and not inspect.isabstract(getattr(autoguide, name))
    }
    bases = {"AutoGuide", "AutoContinuous", "AutoMessenger"}
    wrapper = {"AutoCallable"}  # what AutoGuideList makes of a plain function; see the test below
    covered = {kind.split()[0] for kind in AUTOGUIDES}
    assert shipped | {"AutoGaussian"} == covered | (shipped & bases) | wrapper


def test_autocallable_in_a_guide_list():
    problem = PROBLEMS["one latent"]

    def make_guide(model):
        guide = autoguide.AutoGuideList(model)
        guide.append(problem.guides["score function"])
        return guide

    ours, theirs = both("one latent", 3, True, False)
    assert_same(
        evaluate(ours, "loss_and_grads", problem, make_guide), evaluate(theirs, "loss_and_grads", problem, make_guide)
    )
