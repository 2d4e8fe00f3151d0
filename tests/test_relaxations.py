"""Choices that are hard forward and relaxed backward: their law, and their derivatives path by path."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import gumbel_softmax

from pyrobirds.simulators.relaxations import bernoulli, categorical, threshold

# Torch's own, when it first differentiates forward.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TAUS = [0.1, 0.5, 1.0]
Function = Callable[..., Tensor]


def relaxed_bernoulli(logits: Tensor, u: Tensor, tau: float) -> Tensor:
    return torch.sigmoid((logits + torch.logit(u)) / tau)


def relaxed_categorical(probs: Tensor, u: Tensor, tau: float) -> Tensor:
    beyond = 1 - probs.cumsum(-1)[..., :-1] / probs.sum(-1, keepdim=True)
    soft = relaxed_bernoulli(torch.logit(beyond), u.unsqueeze(-1), tau)
    ones, zeros = torch.ones_like(u.unsqueeze(-1)), torch.zeros_like(u.unsqueeze(-1))
    return torch.cat([ones, soft], -1) - torch.cat([soft, zeros], -1)


def argument(name: str) -> Tensor:
    return torch.rand(7, 4) if "probs" in name else torch.randn(7, 4)


def noise(name: str) -> Tensor:
    return torch.rand(7) if "categorical" in name else torch.rand(7, 4)


# By name: the node and its relaxed function in plain operations, both of an argument and uniform numbers.
PAIRS: dict[str, tuple[Function, Function]] = {
    "threshold": (
        lambda x, u, tau: threshold(x - u, tau=tau),
        lambda x, u, tau: torch.sigmoid((x - u) / tau),
    ),
    "bernoulli of probs": (
        lambda p, u, tau: bernoulli(p, u=u, tau=tau),
        lambda p, u, tau: relaxed_bernoulli(torch.logit(p), u, tau),
    ),
    "bernoulli of logits": (
        lambda x, u, tau: bernoulli(logits=x, u=u, tau=tau),
        relaxed_bernoulli,
    ),
    "categorical of probs": (
        lambda p, u, tau: categorical(p, u=u, tau=tau),
        relaxed_categorical,
    ),
    "categorical of logits": (
        lambda x, u, tau: categorical(logits=x, u=u, tau=tau),
        lambda x, u, tau: relaxed_categorical(x.softmax(-1), u, tau),
    ),
}
FRESH: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli of probs": lambda p: bernoulli(p, tau=0.4),
    "bernoulli of logits": lambda x: bernoulli(logits=x, tau=0.4),
    "categorical of probs": lambda p: categorical(p, tau=0.4),
    "categorical of logits": lambda x: categorical(logits=x, tau=0.4),
}


def agree(a: Tensor, b: Tensor) -> bool:
    """Up to rounding, which the largest entries decide where a slope is steep."""
    return bool((a - b).abs().max() <= 1e-10 * b.abs().max())


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", PAIRS)
def test_derivatives_are_those_of_the_relaxed_function(name: str, tau: float) -> None:
    """First ones backward and forward, and second ones backward over backward and forward over backward."""
    hard, soft = (lambda x, f=f: weights * f(x, u, tau) for f in PAIRS[name])
    x, u, weights, direction = argument(name), noise(name), torch.randn(7, 4), torch.randn(7, 4)
    found = []
    for function in (hard, soft):
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(at).sum(), at, create_graph=True)
        (second,) = torch.autograd.grad(gradient, at, direction)
        over = torch.func.jvp(torch.func.grad(lambda x, f=function: f(x).sum()), (x,), (direction,))[1]
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
        found.append((gradient, second, over, tangent, torch.func.jvp(function, (x,), (direction,))[1]))
    for of_node, of_relaxed in zip(*found, strict=True):
        assert agree(of_node, of_relaxed)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", PAIRS)
def test_values_are_the_relaxed_ones_rounded(name: str) -> None:
    hard, soft = PAIRS[name]
    x, u = argument(name), noise(name)
    values, relaxed = hard(x, u, 0.01), soft(x, u, 0.01)
    assert torch.equal(values, relaxed.round())
    assert values.dtype == torch.float64
    assert values.float().equal(hard(x.float(), u.float(), 0.01))


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("tau", [2.0, 5.0])
def test_logits_take_a_temperature_above_one(tau: float) -> None:
    x, u = torch.randn(50, requires_grad=True), torch.rand(50)
    (gradient,) = torch.autograd.grad(bernoulli(logits=x, u=u, tau=tau).sum(), x)
    (expected,) = torch.autograd.grad(relaxed_bernoulli(x, u, tau).sum(), x)
    assert agree(gradient, expected)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", FRESH)
def test_all_tangents_in_one_pass_are_those_one_by_one(name: str) -> None:
    """With the noise of a pass without tangents."""
    draw, x, tangents = FRESH[name], argument(name), torch.randn(3, 7, 4)
    torch.manual_seed(1)
    value = draw(x)
    torch.manual_seed(1)
    values, batched = torch.vmap(lambda t: torch.func.jvp(draw, (x,), (t,)), randomness="same")(tangents)
    assert all(value.equal(one) for one in values)
    for tangent, of_batch in zip(tangents, batched, strict=True):
        torch.manual_seed(1)
        alone, derivative = torch.func.jvp(draw, (x,), (tangent,))
        assert alone.equal(value)
        assert torch.equal(derivative, of_batch)


@pytest.mark.parametrize("name", FRESH)
def test_functions_of_one_draw_go_through_vmap(name: str) -> None:
    """Each draw with its own noise, and its gradient from it: the two agree on what the noise was."""
    x = argument(name)[:1].expand(500, 4).clone().requires_grad_()
    draws = torch.vmap(FRESH[name], randomness="different")(x)
    assert len(draws.unique(dim=0)) > 1
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    weights = torch.arange(4.0)
    (gradient,) = torch.autograd.grad((draws * weights).sum(), x)
    assert len(gradient.unique(dim=0)) > 400


def test_threshold_goes_through_vmap() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    y = torch.vmap(lambda x: threshold(x, tau=0.5))(x)
    assert y.equal((x > 0).float())
    soft = torch.sigmoid(x.detach() / 0.5)
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], soft * (1 - soft) / 0.5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compile_takes_the_nodes() -> None:
    """Whole, and with the gradient of the eager ones."""

    def both(p: Tensor, u: Tensor) -> Tensor:
        by_class = categorical(torch.stack([1 - p, p / 3, 2 * p / 3], -1), u=u, tau=0.5)
        return bernoulli(p, u=u, tau=0.5) + by_class[..., 2] + threshold(p - u, tau=0.5)

    p, u = torch.rand(20, requires_grad=True), torch.rand(20)
    with pyro.settings.context(validate_distributions_torch=True):  # torch's compiler turns it off for good
        compiled = torch.compile(both, fullgraph=True, backend="eager")(p, u)
    eager = both(p, u)
    assert compiled.equal(eager)
    assert torch.autograd.grad(compiled.sum(), p)[0].equal(torch.autograd.grad(eager.sum(), p)[0])


PROBS = [0.0, 1e-6, 0.01, 0.3, 0.5, 0.9, 1 - 1e-6, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of", ["probs", "logits"])
def test_choices_have_their_probabilities(of: str, dtype: torch.dtype) -> None:
    """By binomial tests that fail once in 10^6, each: all 32 once in 30,000."""
    n = 1_000_000
    for p in PROBS:
        probs = torch.tensor(p, dtype=dtype)
        argument = probs if of == "probs" else probs.logit()
        ones = int(bernoulli(**{of: argument.expand(n)}, tau=0.5).sum(dtype=torch.float64))
        assert p not in (0, 1) or ones == p * n
        assert stats.binomtest(ones, n, p).pvalue > 1e-6


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("of", ["probs", "logits"])
def test_the_share_of_uniform_numbers_that_give_a_one_is_the_probability(of: str) -> None:
    """By enumeration of a grid: to one part of it, without chance."""
    n = 100_000
    u = (torch.arange(n) + 0.5) / n
    for p in [*PROBS, 0.123456]:
        argument = torch.tensor(p if of == "probs" else math.log(p / (1 - p)) if 0 < p < 1 else (2 * p - 1) * math.inf)
        draws = bernoulli(**{of: argument.expand(n)}, tau=0.5, u=u)
        assert abs(float(draws.sum()) - n * p) <= 1
        assert (draws.diff() >= 0).all()  # the larger ones give the ones


def ends_of_the_unit_interval(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return torch.tensor([0.0, info.tiny, info.eps / 4, 0.5, 1 - info.eps / 2], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_certain_happens_and_what_is_impossible_does_not(dtype: torch.dtype) -> None:
    u = ends_of_the_unit_interval(dtype)
    for certain in (1e4, torch.finfo(dtype).max, math.inf):
        logits = torch.full_like(u, certain)
        assert (bernoulli(logits=logits, u=u, tau=0.1) == 1).all()
        assert (bernoulli(logits=-logits, u=u, tau=0.1) == 0).all()
        for k in range(3):
            of_k = torch.zeros(len(u), 3, dtype=dtype)
            of_k[:, k] = logits
            assert (categorical(logits=of_k, u=u, tau=0.1).argmax(-1) == k).all()
    assert (bernoulli(torch.ones_like(u), u=u, tau=0.1) == 1).all()
    assert (bernoulli(torch.zeros_like(u), u=u, tau=0.1) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_of_probability_zero_are_never_drawn(dtype: torch.dtype) -> None:
    """Also for the largest uniform number, where the probabilities before them add up to less than 1 by rounding."""
    n = 300
    positive = torch.rand(n, 9, dtype=dtype) + 0.1
    positive /= positive.sum(-1, keepdim=True)
    zeros = torch.zeros(n, 1, dtype=dtype)
    probs = torch.cat([zeros, positive[:, :4], zeros, positive[:, 4:], zeros], -1)
    assert (probs.cumsum(-1)[:, -1] < 1).any()
    for number in ends_of_the_unit_interval(dtype):
        for draws in (
            categorical(probs, u=number.expand(n), tau=0.1),
            categorical(logits=probs.log(), u=number.expand(n), tau=0.1),
        ):
            assert (draws.sum(-1) == 1).all()
            assert (draws[:, [0, 5, 11]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of", ["probs", "logits"])
def test_classes_have_their_frequencies(of: str, dtype: torch.dtype) -> None:
    """By a chi-square test that fails once in 10^6."""
    n = 500_000
    probs = torch.tensor([0.2, 1e-4, 0.5, 0.0, 0.2999], dtype=dtype)
    counts = categorical(**{of: (probs if of == "probs" else probs.log()).expand(n, 5)}, tau=0.5).sum(0).double()
    assert counts[3] == 0
    drawn = [0, 1, 2, 4]
    assert stats.chisquare(counts[drawn], n * probs[drawn].double() / probs.double().sum()).pvalue > 1e-6


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("tau", TAUS)
def test_of_two_classes_the_second_is_a_bernoulli_choice(tau: float) -> None:
    p, u, weights = torch.rand(100, requires_grad=True), torch.rand(100), torch.randn(100)
    one = bernoulli(p, u=u, tau=tau)
    two = categorical(torch.stack([1 - p, p], -1), u=u, tau=tau)
    assert two[:, 1].equal(one)
    assert two[:, 0].equal(1 - one)
    for of_one, of_two in ((one, two[:, 1]), (-one, two[:, 0])):
        gradients = [torch.autograd.grad((weights * y).sum(), p, retain_graph=True)[0] for y in (of_one, of_two)]
        assert agree(*gradients)


def test_one_class_is_certain() -> None:
    logits = torch.randn(4, 1, requires_grad=True)
    draws = categorical(logits=logits, tau=0.5)
    assert draws.tolist() == [[1.0]] * 4
    assert torch.autograd.grad(draws.sum(), logits)[0].tolist() == [[0.0]] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_derivatives_at_the_ends_are_finite(tau: float, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    probs = [0.0, info.tiny, 1e-30, 1e-6, 0.5, 1 - info.eps / 2, 1.0]
    p, u = torch.tensor([*product(probs, ends_of_the_unit_interval(dtype).tolist())], dtype=dtype).unbind(-1)
    logits = torch.tensor([-math.inf, -info.max, -1e4, -100, 0, 100, 1e4, info.max, math.inf], dtype=dtype)
    x, v = torch.cartesian_prod(logits, ends_of_the_unit_interval(dtype)).unbind(-1)
    classes = torch.stack([x, torch.zeros_like(x), -x], -1)
    cases: list[tuple[Function, Tensor]] = [
        (lambda p: bernoulli(p, u=u, tau=tau), p),
        (lambda x: bernoulli(logits=x, u=v, tau=tau), x),
        (lambda x: threshold(x, tau=tau), x),
        (lambda p: categorical(torch.stack([p / 2, 1 - p, p / 2], -1), u=u, tau=tau), p),
        (lambda x: categorical(logits=x, u=v, tau=tau), classes),
    ]
    for function, at in cases:
        at = at.clone().requires_grad_()
        value = function(at)
        weights = torch.linspace(0, 1, value.shape[-1], dtype=dtype)
        assert torch.autograd.grad((value * weights).sum(), at)[0].isfinite().all()
        assert torch.func.jvp(function, (at.detach(),), (torch.ones_like(at),))[1].isfinite().all()


def test_with_respect_to_probs_the_gradient_at_the_ends_is_the_limit() -> None:
    u = torch.tensor([0.1, 0.5, 0.8])
    odds = u / (1 - u)
    for end, limit in ((0.0, odds), (1.0, 1 / odds)):
        p = torch.full((3,), end, requires_grad=True)
        (gradient,) = torch.autograd.grad(bernoulli(p, tau=1.0, u=u).sum(), p)
        assert torch.allclose(gradient, limit)
        for tau in (0.1, 0.9):
            assert torch.autograd.grad(bernoulli(p, tau=tau, u=u).sum(), p)[0].tolist() == [0, 0, 0]


def test_probs_that_rounding_has_brought_out_of_range_count_as_the_end() -> None:
    p = torch.tensor([-1e-8, 1 + 1.2e-7], requires_grad=True)
    for tau in (0.3, 0.9):
        draws = bernoulli(p, tau=tau)
        assert draws.tolist() == [0, 1]
        assert torch.autograd.grad(draws.sum(), p)[0].tolist() == [0, 0]


def test_nan_stays() -> None:
    nan = torch.tensor([math.nan, 0.5])
    assert threshold(nan, tau=1.0).isnan().tolist() == [True, False]
    assert bernoulli(nan, tau=1.0).isnan().tolist() == [True, False]
    assert bernoulli(logits=nan, tau=1.0).isnan().tolist() == [True, False]
    for of in ("probs", "logits"):
        rows = torch.stack([torch.tensor([0.5, 0.5, math.nan]), torch.ones(3)])
        assert categorical(**{of: rows}, tau=1.0).isnan().any(-1).tolist() == [True, False]
    assert categorical(torch.zeros(1, 3), tau=1.0).isnan().any()
    assert categorical(logits=torch.full((1, 3), -math.inf), tau=1.0).isnan().any()


def expected_slope(p: float, tau: float) -> float:
    """E_u[d/dp sigmoid((logit p + logit u) / tau)] by quadrature over the relaxed choice; 1 would be unbiased.

    With a = tau logit(s) = logit p + logit u the density of logit u, which is logistic, is taken at a - logit p, and
    the integral over the real line of d/dp is that of the slope s (1 - s) / tau over p (1 - p).
    """
    logit = math.log(p / (1 - p))

    def integrand(a: float) -> float:
        soft = 1 / (1 + math.exp(-a / tau)) if abs(a / tau) < 700 else float(a > 0)
        e = math.exp(-abs(a - logit))
        return soft * (1 - soft) / tau / (p * (1 - p)) * e / (1 + e) ** 2

    return integrate.quad(integrand, -40 * tau - 40, 40 * tau + 40, points=[0, logit], limit=500)[0]


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    ("p", "tau", "documented"),
    [
        (0.5, 0.1, 0.992),
        (0.5, 0.5, 0.858),
        (0.5, 1.0, 0.667),
        (0.05, 0.1, 1.012),
        (0.05, 0.5, 1.250),
        (0.05, 1.0, 1.570),
    ],
)
def test_the_mean_gradient_is_biased_as_documented(p: float, tau: float, documented: float) -> None:
    """The mean over fresh draws, ours and those of the two-class Gumbel-softmax, within 5 standard errors."""
    expected = expected_slope(p, tau)
    assert expected == pytest.approx(documented, abs=6e-4)
    n = 200_000
    probs = torch.full((n,), p, requires_grad=True)
    ours = bernoulli(probs, tau=tau)
    theirs = gumbel_softmax(torch.stack([probs, 1 - probs], -1).log(), tau=tau, hard=True)[:, 0]
    for draws in (ours, theirs):
        (slopes,) = torch.autograd.grad(draws.sum(), probs)
        assert abs(float(slopes.mean()) - expected) < 5 * float(slopes.std()) / math.sqrt(n)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_the_mean_gradient_of_rare_events_has_a_limit(tau: float) -> None:
    """For small p the relaxed choice is (p u / (1 - u))^(1/tau), the slope at p of its mean pi tau / sin(pi tau)."""
    assert expected_slope(1e-6, tau) == pytest.approx(math.pi * tau / math.sin(math.pi * tau), rel=0.002)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("of", ["probs", "logits"])
def test_draws_and_gradients_are_those_of_pyro_for_the_same_noise(of: str, tau: float) -> None:
    at = (torch.rand(1000) * 0.98 + 0.01 if of == "probs" else torch.randn(1000)).requires_grad_()
    site = dist.RelaxedBernoulliStraightThrough(torch.tensor(tau), **{of: at})  # type: ignore[arg-type]
    torch.manual_seed(2)
    theirs = site.rsample()
    torch.manual_seed(2)
    ours = bernoulli(**{of: at}, tau=tau)
    assert ours.equal(theirs)
    assert agree(*(torch.autograd.grad(draws.sum(), at)[0] for draws in (ours, theirs)))


def test_choices_keep_no_more_than_one_number_each() -> None:
    """Beside their arguments, which are views of a few numbers here."""
    n = 1000
    p, logits = torch.full((), 0.3, requires_grad=True), torch.randn(3, requires_grad=True)
    for draw, numbers in (
        (lambda: bernoulli(p.expand(n), tau=0.5), n + 1),
        (lambda: bernoulli(logits=p.expand(n), tau=0.5), n),
        (lambda: threshold(p.expand(n), tau=0.5), 1),
        (lambda: categorical(p.expand(n, 3), tau=0.5), n + 1),
        (lambda: categorical(logits=logits.expand(n, 3), tau=0.5), n + 3),
    ):
        kept: dict[int, int] = {}

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(keep, lambda x: x):
            draws = draw()
        assert draws.requires_grad
        assert sum(kept.values()) == 4 * numbers


P = torch.full((3,), 0.5)
K = torch.full((2, 3), 0.5)
U = torch.rand(3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: bernoulli(tau=0.5), ValueError, "bernoulli takes probs or logits, got neither: pass one of them"),
        (lambda: bernoulli(P, logits=P, tau=0.5), ValueError, "bernoulli takes probs or logits, got both: leave out"),
        (lambda: categorical(tau=0.5), ValueError, "categorical takes probs or logits, got neither"),
        (lambda: categorical(K, logits=K, tau=0.5), ValueError, "categorical takes probs or logits, got both"),
        (lambda: bernoulli(0.5, tau=0.5), TypeError, "probs must be a tensor of float32 or float64, got a float"),
        (lambda: bernoulli(logits=[0.5], tau=0.5), TypeError, "logits must be a tensor of float32 or .*, got a list"),
        (lambda: bernoulli(P > 0, tau=0.5), TypeError, "probs must be .* float64, got one of torch.bool"),
        (lambda: categorical(K.half(), tau=0.5), TypeError, "probs must be .* float64, got one of torch.float16"),
        (lambda: categorical(logits=0.5, tau=0.5), TypeError, "logits must be a tensor"),
        (lambda: threshold(P.long(), tau=0.5), TypeError, "x must be .* float64, got one of torch.int64"),
        (lambda: bernoulli(P, tau=0), ValueError, "tau must be a finite number above 0, got 0"),
        (lambda: bernoulli(logits=P, tau=-1), ValueError, "tau must be a finite number above 0, got -1"),
        (lambda: threshold(P, tau="hot"), TypeError, "tau must be a number above 0, got 'hot'"),
        (lambda: bernoulli(P, tau=2), ValueError, r"tau must be at most 1, got 2.0: .*; lower tau, or pass logits"),
        (lambda: categorical(K, tau=1.5), ValueError, r"tau must be at most 1, got 1.5: .* infinite at 0 and 1; lower"),
        (lambda: categorical(logits=K, tau=1.5), ValueError, "tau must be at most 1, got 1.5"),
        (
            lambda: categorical(torch.tensor(0.5), tau=0.5),
            ValueError,
            r"probs of categorical must .* \(\*batch, K\).*\(\)",
        ),
        (lambda: categorical(logits=K[:, :0], tau=0.5), ValueError, r"logits of categorical .*one class, got \(2, 0\)"),
        (
            lambda: bernoulli(P, tau=0.5, u=0.3),
            TypeError,
            r"u must be a tensor of uniform numbers in \[0, 1\).*a float",
        ),
        (lambda: bernoulli(P, tau=0.5, u=U[:1]), ValueError, r"u must have one number a choice, shape \(3,\).*\(1,\)"),
        (
            lambda: bernoulli(P, tau=0.5, u=U.double()),
            ValueError,
            r"torch.float32 on cpu, got .*, torch.float64 on cpu",
        ),
        (lambda: categorical(K, tau=0.5, u=U), ValueError, r"shape \(2,\), .* got shape \(3,\)"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_gradients_are_finite_for_a_given_u_of_zero() -> None:
    u = torch.zeros(())
    for probs in ([0.0, 0.0, 1.0], [1e-8, 1e-8, 1.0]):
        p = torch.tensor(probs, requires_grad=True)
        (gradient,) = torch.autograd.grad(categorical(p, tau=1.0, u=u)[2], p)
        assert bool(gradient.isfinite().all())
    logits = torch.tensor([1e30, -1e30, 3e38], requires_grad=True)
    (gradient,) = torch.autograd.grad(categorical(logits=logits, tau=1.0, u=u)[0], logits)
    assert bool(gradient.isfinite().all())


def test_uniform_numbers_have_no_gradient() -> None:
    u = torch.full((3,), 0.5, requires_grad=True)
    logits = torch.ones(3, requires_grad=True)
    draws = bernoulli(logits=logits, tau=0.5, u=u)
    assert torch.autograd.grad(draws.sum(), u, allow_unused=True) == (None,)
