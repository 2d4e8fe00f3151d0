"""Where torch's own closed forms are missing, wrong or not meant, the divergence is estimated by Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from pyrobirds import GeneralizedELBO
from pyrobirds.divergences import KL


class Shifted(dist.Gamma):
    """A Gamma whose density is not the Gamma's."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) + 3.0


PAIRS: dict[str, tuple[Callable[[], dist.Distribution], Callable[[], dist.Distribution]]] = {
    "Wishart": (
        lambda: dist.Wishart(torch.tensor(5.0), 2 * torch.eye(2)),
        lambda: dist.Wishart(torch.tensor(4.0), torch.eye(2)),
    ),
    "subclass": (lambda: dist.Gamma(2.5, 2.0), lambda: Shifted(2.0, 3.0)),
    "Multinomial": (
        lambda: dist.Multinomial(3, torch.tensor([0.4, 0.6])),
        lambda: dist.Multinomial(3, torch.tensor([0.2, 0.8])),
    ),
}


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # by torch's Wishart
@pytest.mark.parametrize("pair", PAIRS)
def test_default_equals_monte_carlo(pair: str) -> None:
    q, p = PAIRS[pair]

    def value(divergence: KL) -> float:
        pyro.set_rng_seed(2)
        elbo = GeneralizedELBO(num_particles=50, divergence=divergence)
        return elbo.loss(lambda: pyro.sample("z", p()), lambda: pyro.sample("z", q()))

    assert value(KL()) == value(KL(analytic=False))


def test_a_subclass_of_kl_is_refused() -> None:
    class Mine(KL):
        pass

    with pytest.raises(TypeError, match=r"divergence must be a pyrobirds.divergences.KL, got .*Mine"):
        GeneralizedELBO(divergence=Mine())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"vectorize_particles": "no"}, TypeError, "vectorize_particles must be True or False, got 'no'"),
        ({"max_plate_nesting": -1}, ValueError, "max_plate_nesting must be at least 0, got -1"),
        ({"max_plate_nesting": "x"}, TypeError, "max_plate_nesting must be a whole number of at least 0, got 'x'"),
    ],
)
def test_options_of_pyro_are_checked(arguments: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        GeneralizedELBO(**arguments)


def test_dependence_is_asked_for_again_when_the_arguments_change() -> None:
    """Each flag makes another model; what was found out for the first must not serve the second."""

    def model(linked: bool) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("theta", dist.Normal(2 * mu if linked else 0.0, 1.0))

    guide = AutoMultivariateNormal(model, init_scale=0.8)
    guide(True)
    guide.scale_tril = torch.tensor([[1.0, 0.0], [0.9, 0.4]])
    elbo = GeneralizedELBO(num_particles=100, max_plate_nesting=0)
    for linked in (False, True, False):
        pyro.set_rng_seed(0)
        here = elbo.loss(model, guide, linked)
        pyro.set_rng_seed(0)
        assert here == GeneralizedELBO(num_particles=100, max_plate_nesting=0).loss(model, guide, linked)
