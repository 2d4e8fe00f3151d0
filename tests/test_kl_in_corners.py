"""The divergence in corners: closed forms that torch lacks or gets wrong, hidden dependence, densities in Deltas."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from pyrobirds import GeneralizedELBO, dependence, tempered
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


def test_what_was_found_out_is_kept_for_each_kind_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    analyse, asked = dependence.analyse, []

    def counted(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> dependence.Dependence:
        asked.append(args)
        return analyse(model, guide, args, kwargs)

    monkeypatch.setattr(dependence, "analyse", counted)

    def model(training: bool, temperature: float) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0 if training else 2.0))

    guide, elbo = AutoMultivariateNormal(model), GeneralizedELBO()
    for i in range(5):
        elbo.loss_and_grads(model, guide, True, 0.1 * i)
        elbo.loss(model, guide, False, 0.1 * i)
    assert [training for training, _ in asked] == [True, False]


@pytest.mark.parametrize("flat", [torch.relu, lambda x: torch.where(x > 100, x, 0 * x)], ids=["relu", "where"])
def test_a_dependence_inside_vmap_that_does_not_show_at_the_draws(flat: Callable[[Tensor], Tensor]) -> None:
    """The guide starts where the prior of z is flat in t; the joint closed form would be kept, and wrong, later."""

    def model() -> None:
        t = pyro.sample("t", dist.Normal(-3.0, 1.0))
        pyro.sample("z", dist.Normal(torch.vmap(flat)(t.reshape(-1)).reshape(t.shape), 1.0))

    guide = AutoMultivariateNormal(model, init_scale=0.1)
    guide()
    guide.loc.data.copy_(torch.tensor([-3.0, 0.0]))
    assert dependence.analyse(model, guide, (), {}).closed == {}


def reparameterised(y: Tensor) -> None:
    """z ~ N(0, 1) as Pyro's NeuTraReparam leaves it: the density of the prior is kept in an observed Delta."""
    u = pyro.sample("u", dist.Normal(0.0, 1.0).mask(False))
    z = pyro.sample("z", dist.Delta(u, log_density=dist.Normal(0.0, 1.0).log_prob(u)), obs=u)
    pyro.deterministic("twice", 2 * z)
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_a_prior_kept_in_an_observed_delta_is_weighed_as_the_prior() -> None:
    """Best Gaussian at weight w: precision 1 + 1 / w, mean y / w over it; the gradient there is zero."""
    w, y = 10.0, torch.tensor(3.0)
    precision = 1 + 1 / w
    at = torch.tensor(3.0 / w / precision, requires_grad=True)

    def guide(y: Tensor) -> None:
        pyro.sample("u", dist.Normal(pyro.param("at", at), precision**-0.5))

    elbo = GeneralizedELBO(w=w, num_particles=4000)
    gradients = []
    for _ in range(20):
        gradients.append(torch.autograd.grad(elbo.differentiable_loss(reparameterised, guide, y), pyro.param("at"))[0])
    sample = torch.stack(gradients)
    assert sample.mean().abs() < 5 * sample.std() / len(sample) ** 0.5
    trace = pyro.poutine.trace(tempered(reparameterised, w)).get_trace(y)
    assert {name: trace.nodes[name]["scale"] for name in ("z", "y")} == {"z": 1.0, "y": 1 / w}


def test_a_dependence_that_only_other_draws_show_reaches_all_that_hang_on_it() -> None:
    """b depends on the integer a through vmap, theta on b: whoever depends on b depends on a, if a was found out."""
    table = torch.tensor([-1.0, 1.0])

    def pair() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.5))
        b = pyro.sample("b", dist.Normal(torch.vmap(lambda k: table[k])(a.long().reshape(-1)).reshape(a.shape), 1.0))
        pyro.sample("theta", dist.Normal(b, 1.0))

    found_out = 0
    for seed in range(10):
        pyro.set_rng_seed(seed)
        known = dependence.analyse(pair, pair, (), {})
        found_out += "a" in known.guide["b"]
        for names in (*known.guide.values(), *known.prior.values()):
            assert all(known.guide[name] <= names for name in names)
    assert found_out >= 3  # a redraw of a fair coin shows it every other time
