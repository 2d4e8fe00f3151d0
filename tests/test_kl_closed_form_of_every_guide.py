"""Closed forms change neither the mean value nor the mean gradient, for every guide on every problem.

Two independent samples, one with and one without closed forms, are compared by their standard errors.
"""

import math

import pyro
import pytest
import torch
from model_guide_pairs import ACCEPTED, PAIRS, PROBLEMS
from pyro import poutine
from sampling_checks import ALLOWED, randomise, repeat

from pyrobirds import GeneralizedELBO
from pyrobirds.divergences import KL

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.filterwarnings("ignore:ConditionalAutoRegressiveNN input_dim = 1")
@pytest.mark.filterwarnings("ignore:.*Found sample sites configured for enumeration")
@pytest.mark.parametrize("pair", ACCEPTED, ids=" with ".join)
def test_the_same_on_average(pair):
    problem = PROBLEMS[pair[0]]
    y = problem.data()
    guide = PAIRS[pair](problem.model)
    guide(y)
    poutine.trace(problem.model).get_trace(y)  # a model may have parameters, too
    randomise(0.2)
    samples = []
    for analytic, first_seed in ((True, 0), (False, 1000)):
        pyro.set_rng_seed(first_seed)
        elbo = GeneralizedELBO(
            w=2.0,
            divergence=KL(analytic=analytic),
            num_particles=50,
            max_plate_nesting=problem.max_plate_nesting,
        )
        samples.append(repeat(elbo, problem.model, guide, y, repetitions=40, first_seed=first_seed))
    closed, drawn = samples
    pairs = {"total": (closed.totals, drawn.totals), "divergence": (closed.divergences, drawn.divergences)}
    pairs |= {name: (gradient, drawn.gradients[name]) for name, gradient in closed.gradients.items()}
    away = {name: apart(*of_both) for name, of_both in pairs.items()}
    assert max(away.values()) < ALLOWED, away


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest distance, over elements, between two sample means, in standard errors of their difference."""
    if not one.numel():
        return 0.0
    distance = (one.mean(0) - other.mean(0)).abs()
    standard_error = ((one.var(0) + other.var(0)) / len(one)).sqrt()
    rounding = 1e-9 * (1 + other.mean(0).abs())
    return ((distance - rounding).clamp(min=0) / (standard_error + 1e-300)).max().item()


def test_a_difference_would_be_found():
    one = torch.randn(40)
    assert apart(one, one + 2.0) > ALLOWED > apart(one, torch.randn(40))
    assert apart(torch.zeros(40), torch.full((40,), 1e-6)) > ALLOWED
    assert math.isclose(apart(torch.zeros(40), torch.zeros(40)), 0.0)
