"""The gradient of the SIR epidemic: that of the relaxed formulas at the same random numbers, in both modes."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyrobirds import losses
from pyrobirds.simulators import Graph, Simulator, sir
from pyrobirds.simulators.sir import _Epidemic

N = 30
THETA = torch.tensor([[-0.8, -0.9, -0.6], [-0.5, -0.4, -0.3], [-0.3, -1.3, -1.0], [-0.9, -0.1, -0.05]])
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, in jvp
EDGES = torch.tensor([[i, (i + k) % N] for i in range(N) for k in (1, 2, 5)]).T


def uniforms(theta: Tensor, n_agents: int, n_timesteps: int, seed: int) -> list[Tensor]:
    """The uniform numbers of a run: from a generator that is seeded by the first number of the global one."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
    least = 4 * torch.finfo(theta.dtype).tiny
    blank = torch.empty(n_agents, len(theta), dtype=theta.dtype)
    return [blank.clone().uniform_(least, 1, generator=generator) for _ in range(n_timesteps)]


def relaxed(p: Tensor, u: Tensor, tau: float) -> Tensor:
    """Hard at u, with the gradient of the sigmoid; none where p is 0 or 1, for there it is not a number but zero."""
    sure = (p == 0) | (p == 1)
    inside = torch.where(sure, 0.5, p)
    soft = torch.sigmoid((torch.logit(inside) + torch.logit(u)) / tau)
    return (u >= 1 - p.detach()).to(p.dtype) + torch.where(sure, 0, soft - soft.detach())


def by_formulas(
    theta: Tensor, edges: Tensor, us: list[Tensor], tau: float, horizon: int | None = None
) -> dict[str, Tensor]:
    """The epidemic in plain operations."""
    fraction, beta, gamma = 10**theta.T
    i = relaxed(fraction.expand_as(us[0]), us[0], tau)
    r = torch.zeros_like(i)
    infected, recovered = [i.sum(0)], [r.sum(0)]
    for t, u in enumerate(us[1:]):
        if horizon is not None and t % horizon == 0:
            i, r = i.detach(), r.detach()
        n = torch.zeros_like(i).index_add(0, edges[1], i[edges[0]])
        catches = relaxed(1 - (1 - beta) ** n, u, tau)
        recovers = relaxed(gamma.expand_as(u), u, tau)
        i, r = i + (1 - i - r) * catches - i * recovers, r + i * recovers
        infected.append(i.sum(0))
        recovered.append(r.sum(0))
    return {"infected": torch.stack(infected, -1), "recovered": torch.stack(recovered, -1)}


def scalar(counts: dict[str, Tensor]) -> Tensor:
    """A number in which each count has a weight of its own."""
    weights = torch.linspace(-1, 2, counts["infected"].shape[-1])
    return (counts["infected"] * weights).sum() + (counts["recovered"].square() * weights.flip(0)).sum() / 10


def gradient(theta: Tensor, counts_of: Any) -> Tensor:
    theta = theta.clone().requires_grad_()
    (grad,) = torch.autograd.grad(scalar(counts_of(theta)), theta)
    return grad


def seeded(seed: int, theta: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return sir(theta, *args, **kwargs)


CASES = {
    "undirected": (torch.cat([EDGES, EDGES.flip(0)], 1), N),
    "directed, parallel edges": (
        torch.cat([EDGES, EDGES[:, ::7], torch.stack([torch.zeros(N - 1, dtype=int), torch.arange(1, N)])], 1),
        N,
    ),
    "complete": (torch.cartesian_prod(torch.arange(12), torch.arange(12)).T, 12),
    "a hub, two bytes": (torch.stack([torch.arange(1, 100), torch.zeros(99, dtype=int)]), 100),
    "a hub, four bytes": (torch.stack([torch.arange(1, 8300), torch.zeros(8299, dtype=int)]), 8300),
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("tau", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formulas(case: str, tau: float) -> None:
    edges, n = CASES[case]
    edges = edges[:, edges[0] != edges[1]]
    theta, graph = THETA.double(), Graph(edges, n)
    assert graph.is_complete == (case == "complete")
    assert _Epidemic(graph, tau, theta).code.itemsize == 2 if "two bytes" in case else 4 if "four bytes" in case else 1
    for seed in range(3):
        us = uniforms(theta, n, 8, seed)
        expected = by_formulas(theta, edges, us, tau)
        got = seeded(seed, theta, graph, 8, tau)
        for output in expected:
            assert torch.equal(got[output], expected[output])
        reference = gradient(theta, lambda theta, us=us: by_formulas(theta, edges, us, tau))
        assert bool(reference.any())
        assert_near(gradient(theta, lambda theta, s=seed: seeded(s, theta, graph, 8, tau)), reference, 1e-10)


def assert_near(x: Tensor, reference: Tensor, tolerance: float) -> None:
    assert float(((x - reference).abs() / reference.abs().clamp(min=1)).max()) < tolerance


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("horizon", [1, 3])
def test_the_gradient_horizon_cuts_the_state(horizon: int) -> None:
    theta, edges, graph = THETA.double(), CASES["undirected"][0], Graph(EDGES, undirected=True)
    us = uniforms(theta, N, 8, 0)
    reference = gradient(theta, lambda theta: by_formulas(theta, edges, us, 0.5, horizon))
    got = gradient(theta, lambda theta: seeded(0, theta, graph, 8, 0.5, gradient_horizon=horizon))
    assert_near(got, reference, 1e-10)
    assert float((reference - gradient(theta, lambda theta: seeded(0, theta, graph, 8, 0.5))).abs().max()) > 1


def test_float32_agrees_with_the_formulas_in_float64() -> None:
    """At the numbers of the float32 run; rounding, of sums of some hundred terms, is below 1e-5 of the gradient."""
    us = [u.double() for u in uniforms(THETA, N, 8, 0)]
    edges, graph = CASES["undirected"][0], Graph(EDGES, undirected=True)
    reference = gradient(THETA.double(), lambda theta: by_formulas(theta, edges, us, 0.5))
    got = gradient(THETA, lambda theta: seeded(0, theta, graph, 8, 0.5))
    assert got.dtype == torch.float32
    assert_near(got, reference, 1e-5)


@pytest.mark.usefixtures("double_precision")
def test_blocks_of_agents_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    theta, graph = THETA.double(), Graph(EDGES)
    whole = gradient(theta, lambda theta: seeded(0, theta, graph, 8, 0.5))
    tangent = torch.randn_like(theta)

    def along(theta: Tensor) -> Tensor:
        return scalar(seeded(0, theta, graph, 8, 0.5))

    slope = torch.func.jvp(along, (theta,), (tangent,))[1]
    monkeypatch.setattr(sys.modules[_Epidemic.__module__], "_BLOCK", 28)
    assert _Epidemic(graph, 0.5, theta).rows == 7  # four blocks and a rest
    assert_near(gradient(theta, lambda theta: seeded(0, theta, graph, 8, 0.5)), whole, 1e-12)
    assert_near(torch.func.jvp(along, (theta,), (tangent,))[1], slope, 1e-12)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("graph", [Graph(EDGES), Graph.complete(N)], ids=["directed", "complete"])
@pytest.mark.parametrize("horizon", [None, 3])
def test_forward_mode_gives_the_gradient_of_reverse_mode(graph: Graph, horizon: int | None) -> None:
    theta = THETA.double()

    def loss(theta: Tensor) -> Tensor:
        return scalar(seeded(0, theta, graph, 8, 0.5, gradient_horizon=horizon))

    reference = gradient(theta, lambda theta: seeded(0, theta, graph, 8, 0.5, gradient_horizon=horizon))
    tangents = torch.eye(theta.numel()).reshape(-1, *theta.shape)

    def along(tangent: Tensor) -> Tensor:
        return torch.func.jvp(loss, (theta,), (tangent,))[1]

    at_once = torch.vmap(along, randomness="same")(tangents)
    assert_near(at_once.reshape(theta.shape), reference, 1e-12)
    one_by_one = torch.stack([along(tangent) for tangent in tangents])
    assert_near(one_by_one.reshape(theta.shape), reference, 1e-12)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(theta, tangents[4]))
        assert_near(forward_ad.unpack_dual(dual).tangent, reference.flatten()[4], 1e-12)


def test_forward_mode_without_a_tangent_of_the_rates() -> None:
    """The initial fraction alone is a parameter, or the rates alone."""
    graph = Graph.complete(N)
    for free in ([0], [1, 2]):
        tangent = torch.zeros(3)
        tangent[free] = 1

        def counts(x: Tensor, free: list[int] = free) -> Tensor:
            theta = [x if k in free else torch.tensor(-0.7) for k in range(3)]
            return seeded(0, torch.stack(theta), graph, 6, 0.5)["infected"]

        slope = torch.func.jvp(counts, (torch.tensor(-0.7),), (torch.tensor(1.0),))[1]
        whole = torch.func.jvp(
            lambda theta: seeded(0, theta, graph, 6, 0.5)["infected"], (torch.full((3,), -0.7),), (tangent,)
        )[1]
        assert torch.allclose(slope, whole)
        assert bool(slope.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.1, 0.9])
def test_gradients_are_finite_at_every_corner(dtype: torch.dtype, tau: float) -> None:
    ends = torch.tensor([-math.inf, -1e30, -50, -8, -1e-7, -1e-30, 0, 1e-7, 50, 1e30, math.inf, -1], dtype=dtype)
    theta = torch.cartesian_prod(ends, ends, ends).requires_grad_()
    for graph in (Graph(EDGES, undirected=True), Graph.complete(10)):
        counts = sir(theta, graph, 4, tau)
        (grad,) = torch.autograd.grad(
            scalar({name: count.to(torch.get_default_dtype()) for name, count in counts.items()}), theta
        )
        assert all(bool(x.isfinite().all()) for x in (*counts.values(), grad))
        assert not bool(grad[theta > 0].any())
        assert bool(grad[theta == -1].any())


def test_a_batch_of_parameters_is_no_case_for_vmap() -> None:
    for graph, randomness in itertools.product([Graph.complete(N), Graph(EDGES)], ["same", "different", "error"]):
        with pytest.raises(NotImplementedError, match=r"pass the whole batch of theta, \(\*batch, 3\), in one call"):
            torch.vmap(lambda theta, graph=graph: sir(theta, graph, 3)["infected"], randomness=randomness)(THETA)


@pytest.mark.parametrize("graph", [Graph(EDGES), Graph(EDGES, undirected=True), Graph.complete(N)])
def test_gradients_by_torch_func(graph: Graph) -> None:
    def loss(theta: Tensor) -> Tensor:
        return scalar(seeded(0, theta, graph, 8, 0.5))

    assert torch.equal(torch.func.grad(loss)(THETA), gradient(THETA, lambda theta: seeded(0, theta, graph, 8, 0.5)))
    with pytest.raises(NotImplementedError, match=r"as in torch.func.jacrev: take torch.func.jacfwd"):
        torch.func.jacrev(lambda theta: sir(theta, graph, 3)["infected"])(THETA)
    jacobian = torch.func.jacfwd(lambda theta: seeded(0, theta, graph, 8, 0.5)["infected"], randomness="same")(THETA)
    assert jacobian.shape == (4, 8, 4, 3)


def test_the_default_temperature_is_a_half() -> None:
    """Its bias is documented, and its noise lower than that of 0.1."""
    graph = Graph(EDGES)
    assert torch.equal(
        gradient(THETA, lambda theta: seeded(0, theta, graph, 8)),
        gradient(THETA, lambda theta: seeded(0, theta, graph, 8, 0.5)),
    )


def test_second_derivatives_are_refused() -> None:
    theta = THETA[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(sir(theta, Graph.complete(N), 5)["infected"].sum(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match=r"sir has no second derivatives.*first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("n_steps", [10, 40])
def test_a_step_keeps_one_byte_for_each_agent_and_draw(n_steps: int) -> None:
    """The first values keep two probabilities and numbers, the parameters some tiles."""
    n, n_draws = 5000, 4
    edges = torch.arange(n)
    theta = THETA.clone().requires_grad_()
    graph = Graph(torch.stack([edges, edges.roll(1)]), undirected=True)
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or pack(x), lambda x: x):
        counts = sir(theta, graph, n_steps + 1)
    size = n * n_draws
    assert sum(saved.values()) < n_steps * (size + 500) + 4 * size * 6 + 2000
    assert bool(counts["infected"].requires_grad)


def test_the_backward_pass_leaves_the_global_generator_alone() -> None:
    theta = THETA.clone().requires_grad_()
    counts = sir(theta, Graph.complete(N), 5)
    before = torch.get_rng_state()
    scalar(counts).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gradient_is_repeated_by_a_second_backward_pass() -> None:
    theta = THETA.clone().requires_grad_()
    loss = scalar(sir(theta, Graph(EDGES), 6))
    first, second = (torch.autograd.grad(loss, theta, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_draws_have_gradients_of_their_own() -> None:
    theta = THETA.clone().requires_grad_()
    counts = sir(theta, Graph(EDGES), 6)
    (grad,) = torch.autograd.grad(counts["infected"][1].sum() + counts["recovered"][1, 2], theta)
    assert bool(grad[1].all())
    assert not bool(grad[[0, 2, 3]].any())


def test_in_a_simulator() -> None:
    theta = THETA.clone().requires_grad_()
    simulate = Simulator(
        sir, {"infected": losses.mse, "recovered": losses.mse}, theta_event_dims=1, graph=Graph(EDGES), n_timesteps=6
    )
    run = simulate(theta)
    score = run["infected"].log_prob(torch.zeros(6)) + run["recovered"].log_prob(torch.zeros(6))
    score.sum().backward()
    assert bool((theta.grad != 0).any(1).all())
