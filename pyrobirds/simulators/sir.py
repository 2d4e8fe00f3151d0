"""The SIR epidemic on a network of agents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._checks import shape_text
from pyrobirds.simulators import relaxations
from pyrobirds.simulators.floats import float_tensor
from pyrobirds.simulators.graphs import Graph
from pyrobirds.simulators.rollout import rollout

_LOG_10 = math.log(10)
# A step keeps four times the number of infected contacts plus a state: exact in the floats, and in 32-bit integers.
_MOST_CONTACTS = {torch.float32: 2**22, torch.float64: 2**29}
_BLOCK = 2**15  # entries to a thread whose temporaries, a dozen at a time, stay in the cache


def sir(
    theta: Tensor, graph: Any, n_timesteps: int, tau: float = 0.5, *, gradient_horizon: int | None = None
) -> dict[str, Tensor]:
    r"""Simulate epidemics among agents that are susceptible, infected or recovered (SIR).

    With f, :math:`\beta` and :math:`\gamma` ten to the power of theta's entries, each agent is infected at t = 0 with
    probability f, independently. In a step from t to t + 1, all at once,

    .. math::
        P(\text{S} \to \text{I}) = 1 - (1 - \beta)^{n}, \qquad P(\text{I} \to \text{R}) = \gamma,

    with n the number of edges that come from agents infected at t. So each contact with an infected agent transmits
    with probability :math:`\beta` in a step, and an infection lasts :math:`1 / \gamma` steps on average, at least one.

    ========== ============================================================== ============== ===============
    theta      10 to its power                                                unit           range
    ========== ============================================================== ============== ===============
    theta[0]   f, the expected share of agents that are infected at t = 0     1              0 to 1
    theta[1]   beta, the probability of a transmission by contact and step    1 per step     0 to 1
    theta[2]   gamma, the probability to recover in a step                    1 per step     0 to 1
    ========== ============================================================== ============== ===============

    Entries of theta above 0 mean a probability of 1, with a gradient of zero; ``-inf`` means 0. Nothing overflows for
    any theta; NaN in theta gives NaN.

    The model is the chain-binomial one of Reed and Frost, on a network and with an infection of geometric length: see
    Pastor-Satorras et al. 2015 (Rev. Mod. Phys. 87, 925, https://doi.org/10.1103/RevModPhys.87.925, section IV) on
    epidemics on networks, and Kermack and McKendrick 1927 (https://doi.org/10.1098/rspa.1927.0118) for SIR. The
    parameters are those of blackbirds (https://github.com/arnauqb/blackbirds), without its limit of five infected
    neighbours and its soft limit of the probabilities.

    **Gradient.** Straight-through, so biased. With I, R and S = 1 - I - R in place of the states, the backward pass is
    exactly that of

    .. math::
        I' = I + S\, b(1 - (1 - \beta)^{AI}, u) - I\, b(\gamma, u), \qquad R' = R + I\, b(\gamma, u),

    where b(p, u) is :func:`~pyrobirds.simulators.relaxations.bernoulli`, 1 where u is at least 1 - p, with the gradient
    of :math:`\sigma((\mathrm{logit} p + \mathrm{logit} u) / \tau)`. One u decides both choices of an agent in a step,
    as they exclude each other.

    The derivative by theta[0] is a twentieth to two thirds of the true one, so that its posterior stays near its prior,
    and that by theta[1] half to nine tenths of it. A ``gradient_horizon`` makes this worse: theta[1] then has too large
    a derivative, and theta[0] none by later values. Smaller ``tau`` is little nearer where it is, and much noisier;
    ``docs/reference_simulators.md`` has a table.

    **Cost.** A step keeps one byte for each agent and draw for the backward pass (two where an agent has more than 63
    neighbours, four above 8,191), which repeats the random numbers instead of keeping them. They come from a generator
    of the run's own, seeded by one number of torch's global generator of the CPU. Uniform numbers of 32 bits are
    multiples of 6e-8, and so are in effect the probabilities: take float64 for rarer events, and for graphs in which
    an agent has 4,194,304 neighbours (2^22) or more, which float32 cannot count.

    Args:
        theta: shape ``(*batch, 3)``, float32 or float64.
        graph: the contacts of the agents: a :class:`~pyrobirds.simulators.Graph`, or what one is made of, then anew
            in every call.
        n_timesteps: number of values, that at t = 0 included.
        tau: temperature of the straight-through gradient, above 0 and below 1: for others the slope of
            :math:`b(1 - (1 - \beta)^n, u)` at n = 0 does not vanish.
        gradient_horizon: how many steps the gradient reaches back through the state, see
            :func:`~pyrobirds.simulators.rollout`; f then has a gradient in the first value only. None for all.

    Returns:
        The numbers of agents that are ``"infected"`` and ``"recovered"``, each ``(*batch, n_timesteps)``.

    Raises:
        TypeError, ValueError: theta is not a tensor of floats with 3 entries in its last dimension, the graph cannot
            be taken or has an agent with too many neighbours, ``n_timesteps`` is not a whole number of at least 1, or
            ``tau`` not between 0 and 1.

    Example:
        >>> from pyrobirds.simulators import Graph
        >>> theta = torch.tensor([[-1.0, -0.5, -1.0], [-1.0, -0.5, -0.3]])
        >>> epidemics = sir(theta, Graph.complete(100), n_timesteps=20)
        >>> epidemics["infected"].shape
        torch.Size([2, 20])
        >>> bool((epidemics["recovered"].diff() >= 0).all())
        True
    """
    _check_theta(theta)
    tau = _checks.positive("tau", tau)
    if tau >= 1:
        raise ValueError(f"tau must be below 1, got {tau}: else susceptible agents without infected neighbours matter")
    n_timesteps = _checks.positive_int("n_timesteps", n_timesteps)
    if not isinstance(graph, Graph):
        graph = Graph(graph)
    _check_contacts(graph, theta.dtype)
    theta = _Batch.apply(theta)
    epidemic = _Epidemic(graph, tau, theta)
    fraction, *rates = theta.reshape(-1, 3).unbind(-1)
    log10_rates = torch.stack(rates)
    chain, *tiles = _constants(log10_rates.detach(), tau, epidemic.rows)

    def step(state: _State, t: int) -> _State:
        return _advance(state, log10_rates, chain, epidemic, tiles)

    counts = rollout(
        step,
        _start(fraction, epidemic),
        n_timesteps,
        observe=lambda state: {"infected": state.n_infected, "recovered": state.n_recovered},
        include_initial=True,
        gradient_horizon=gradient_horizon,
    )
    valid = ~theta.detach().isnan().any(-1, keepdim=True)
    return {
        name: torch.where(valid, count.reshape(*theta.shape[:-1], n_timesteps), torch.nan)
        for name, count in counts.items()
    }


class _State(NamedTuple):
    """0 or 1 for each agent and draw, ``(n_agents, P)``, and their sums, ``(P,)``."""

    infected: Tensor
    recovered: Tensor
    n_infected: Tensor
    n_recovered: Tensor


class _Epidemic:
    """What the steps of one run share besides tensors that depend on theta."""

    def __init__(self, graph: Graph, tau: float, theta: Tensor) -> None:
        self.graph = graph
        self.tau = tau
        self.rows = graph.n_agents
        if theta.device.type == "cpu":
            entries = _BLOCK * torch.get_num_threads()
            self.rows = min(self.rows, max(entries // max(theta.shape[:-1].numel(), 1), 1))
        self.kind = {"dtype": theta.dtype, "device": theta.device}
        # What stands for zero among the uniform numbers; its odds and their reciprocal are finite.
        self.least = 4 * torch.finfo(theta.dtype).tiny
        largest = 4 * graph.max_in_degree + 3
        kinds = (torch.uint8, torch.int16, torch.int32)
        self.code = next(kind for kind in kinds if largest <= torch.iinfo(kind).max)
        self.generator = torch.Generator(theta.device)
        # From the generator of the CPU, whatever the device: to read a number of another one would wait for it.
        self.generator.manual_seed(int(torch.randint(2**63 - 1, (), device="cpu")))

    def blocks(self, tiles: Sequence[Tensor], *states: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """What the agents are gone through in, so that temporaries stay in the cache: tiles as they are, states cut."""
        if self.rows == self.graph.n_agents:
            return [(*tiles, *states)]
        cut = zip(*(state.split(self.rows) for state in states), strict=True)
        return ((*(tile[: len(parts[0])] for tile in tiles), *parts) for parts in cut)

    def uniform(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, **self.kind).uniform_(self.least, 1, generator=generator)


class _Choices(NamedTuple):
    """The choices of agents in a step, and the slopes of the relaxed ones where they matter."""

    contacts: Tensor  # n
    catches: Tensor  # b(1 - (1 - beta)^n, u), of all agents
    recovers: Tensor  # b(gamma, u), of all agents
    by_contacts: Tensor  # S times the derivative of the first by n
    by_logit: Tensor  # tau I times the derivative of the second by logit(gamma)


def _choices(epidemic: _Epidemic, u: Tensor, tiles: Sequence[Tensor], code: Tensor) -> _Choices:
    """What happened to a block of agents at the uniform numbers ``u``, which are used up."""
    minus_hazard, stays, minus_odds, minus_hazard_by_tau = tiles
    info = torch.finfo(u.dtype)
    contacts = (code >> 2).to(u.dtype)
    state = code & 3
    infected = torch.eq(state, 1, out=torch.empty_like(u))
    # The slope of those without contacts is zero, the limit for n = 0.
    in_contact = torch.eq(state, 0, out=torch.empty_like(u))
    torch.minimum(in_contact, contacts, out=in_contact)
    # Negative hazards h = n log(1 - beta); from these, 1 - p = exp(h) and -p = expm1(h) without cancellation.
    hazard = torch.mul(contacts, minus_hazard).clamp_(min=math.log(2 * info.tiny))
    escapes = hazard.exp()
    minus_p = hazard.expm1_()
    # Each agent has at most one choice that matters. Its -p / (1 - p) times -u / (1 - u); logarithms of 0 take long.
    odds = torch.div(minus_p, escapes).lerp_(minus_odds, infected).mul_(u).div_(u - 1).clamp_(info.tiny, info.max)
    soft = odds.log_().abs_().mul_(-1 / epidemic.tau).sigmoid_()
    by_contacts = _times_slope(in_contact, soft).mul_(minus_hazard_by_tau).div_(minus_p.clamp_(max=-info.tiny))
    return _Choices(contacts, escapes.le_(u), u.ge_(stays), by_contacts, _times_slope(infected, soft))


def _times_slope(x: Tensor, s: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(x, s)  # x s (1 - s)


def _no_vmap() -> NoReturn:
    # Not asked in the vmap over tangents of forward mode, in which neither parameters nor states are a batch.
    raise NotImplementedError("sir has no rule for torch.vmap: pass the whole batch of theta, (*batch, 3), in one call")


class _Step(torch.autograd.Function):
    """A step, which keeps for its backward pass one small integer for each agent, and its generator."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        # Torch binds the arguments to the signature in every call, which takes a tenth of a small step for ten names.
        infected, recovered, _, _, epidemic, _, *tiles = inputs
        contacts = epidemic.graph.add_sum(torch.zeros_like(infected), infected)
        now_infected, now_recovered = torch.empty_like(infected), torch.empty_like(infected)
        code = torch.empty_like(infected, dtype=epidemic.code)
        states = infected, recovered, contacts, now_infected, now_recovered, code
        for minus_hazard, stays, _, _, i, r, n, now_i, now_r, c in epidemic.blocks(tiles, *states):
            # Nothing happens if u is below this, as it is below 1 and so for those who have recovered.
            bound = torch.mul(n, minus_hazard).exp_().lerp_(stays, i).add_(r)
            happens = epidemic.uniform(epidemic.generator, i.shape).ge_(bound)
            torch.ne(i, happens, out=now_i)
            torch.addcmul(r, i, happens, out=now_r)
            c.copy_(torch.add(i, r, alpha=2).add_(n, alpha=4))
        return now_infected, now_recovered, now_infected.sum(0), now_recovered.sum(0), code

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, rates, chain, ctx.epidemic, ctx.noise, *tiles = inputs
        *_, code = output
        ctx.mark_non_differentiable(code)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rates, code, chain, *tiles)
        ctx.save_for_forward(code, chain, *tiles)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # A node takes a tenth of a small step. Without a graph of the gradient there is no need for one.
        before_of = _StepGradient.apply if torch.is_grad_enabled() else _StepGradient.forward
        before = before_of(ctx.epidemic, ctx.noise, *grads[:4], *ctx.saved_tensors)
        return *before, *[None] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        code, chain, *tiles = ctx.saved_tensors
        epidemic = ctx.epidemic
        zero = torch.zeros(code.shape, **epidemic.kind)
        d_infected, d_recovered = (zero if tangent is None else tangent for tangent in tangents[:2])
        d_rates = torch.zeros_like(chain) if tangents[2] is None else tangents[2] * chain
        states = d_infected, d_recovered, epidemic.graph.neighbour_sum(d_infected), code
        generator = ctx.noise.clone_state()
        now = []
        for *tile, i, r, n, c in epidemic.blocks(tiles, *states):
            choices = _choices(epidemic, epidemic.uniform(generator, c.shape), tile, c)
            catch = choices.by_contacts * (n + choices.contacts * d_rates[0]) - (i + r) * choices.catches
            recover = choices.by_logit * d_rates[1] + i * choices.recovers
            now.append((i + catch - recover, r + recover))
        now_infected, now_recovered = (torch.cat(parts) for parts in zip(*now, strict=True))
        return now_infected, now_recovered, now_infected.sum(0), now_recovered.sum(0), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> NoReturn:
        _no_vmap()


class _StepGradient(torch.autograd.Function):
    """The backward pass of a step: a node that refuses second derivatives.

    Torch's transforms hand plain tensors to nodes alone, and sparse products take no others.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        epidemic, noise, by_infected, by_recovered, by_n_infected, by_n_recovered, _, code, chain, *tiles = inputs
        shape = code.shape
        states = [torch.zeros(shape, **epidemic.kind) if x is None else x for x in (by_infected, by_recovered)]
        counts = [chain.new_zeros(shape[1]) if x is None else x for x in (by_n_infected, by_n_recovered)]
        # The gradient by a sum over agents is one by each of them.
        tiles += [_tile(count, epidemic.rows) for count in counts]
        before_infected, before_recovered, by_contacts = (torch.empty(shape, **epidemic.kind) for _ in range(3))
        by_rates = []
        states += [before_infected, before_recovered, by_contacts, code]
        generator = noise.clone_state()
        for *tile, of_i, of_r, i, r, before_i, before_r, by_n, c in epidemic.blocks(tiles, *states):
            choices = _choices(epidemic, epidemic.uniform(generator, c.shape), tile, c)
            i, r = i + of_i, r + of_r
            torch.mul(i, choices.by_contacts, out=by_n)
            lost = i * choices.catches
            torch.sub(r, lost, out=before_r)
            torch.sub(i, lost, out=before_i)
            r.sub_(i)
            before_i.addcmul_(r, choices.recovers)
            by_rates.append(torch.stack([choices.contacts.mul_(by_n).sum(0), r.mul_(choices.by_logit).sum(0)]))
        epidemic.graph.add_sum(before_infected, by_contacts, transposed=True)
        return before_infected, before_recovered, sum(by_rates) * chain

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "sir has no second derivatives: its gradient is that of a straight-through estimator. Take an autoguide or "
            "sampler that needs first derivatives only"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> NoReturn:
        raise NotImplementedError(
            "sir has no rule for torch.vmap over gradients, as in torch.func.jacrev: take "
            "torch.func.jacfwd(..., randomness='same')"
        )


class _Batch(torch.autograd.Function):
    """The parameters as they are, of which :func:`torch.vmap` is told what to do before any random number is drawn."""

    @staticmethod
    def forward(theta: Tensor) -> Tensor:
        return theta.view_as(theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent.view_as(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> NoReturn:
        _no_vmap()


def _start(fraction: Tensor, epidemic: _Epidemic) -> _State:
    u = epidemic.uniform(epidemic.generator, (epidemic.graph.n_agents, len(fraction)))
    probs = _tile(10 ** fraction.clamp(max=0), len(u))
    infected = relaxations.bernoulli(probs, tau=epidemic.tau, u=u)
    recovered = torch.zeros_like(infected)
    return _State(infected, recovered, infected.sum(0), recovered.sum(0))


def _advance(state: _State, rates: Tensor, chain: Tensor, epidemic: _Epidemic, tiles: Sequence[Tensor]) -> _State:
    # The generator as it stands; its state as a tensor would come back wrapped inside of torch.func's transforms.
    noise = epidemic.generator.clone_state()
    *after, _ = _Step.apply(state.infected, state.recovered, rates, chain, epidemic, noise, *tiles)
    return _State(*after)


def _tile(x: Tensor, n_rows: int) -> Tensor:
    # Operations on two tensors of one layout are several times faster than those that broadcast a short row.
    return x.expand(n_rows, -1).contiguous()


def _constants(rates: Tensor, tau: float, n_rows: int) -> tuple[Tensor, ...]:
    """What the steps compute with, of log10 of beta and gamma, ``(2, P)``.

    Returns:
        d log(lambda) / d theta and d logit(gamma) / d theta / tau, ``(2, P)``, with the hazard of a contact lambda =
        -log(1 - beta); and -lambda, 1 - gamma, -gamma / (1 - gamma) and -lambda / tau, each tiled to ``(n_rows, P)``.
    """
    info = torch.finfo(rates.dtype)
    log_p = (rates * _LOG_10).clamp(-69, 0)  # below 1e-30 the derivatives have their limits, and nothing ever happens
    p, q = log_p.exp(), log_p.expm1().abs()
    hazard = torch.where(p[0] > 0.5, -q[0].log(), -torch.log1p(-p[0])).clamp(max=-math.log(2 * info.tiny))
    by_theta = torch.stack([p[0] / (q[0] * hazard), 1 / (q[1] * tau)]) * _LOG_10
    odds = (p[1] / q[1]).clamp(max=1 / (2 * info.tiny))
    tiles = (_tile(x, n_rows) for x in (-hazard, q[1], -odds, -hazard / tau))
    return torch.where(rates < 0, by_theta, 0), *tiles


def _check_theta(theta: Any) -> None:
    float_tensor("theta", theta)
    if theta.dim() == 0 or theta.shape[-1] != 3:
        raise ValueError(
            f"theta has shape {shape_text(theta.shape)}, expected (*batch, 3): log10 of the initial fraction, beta and "
            "gamma in the last dimension"
        )


def _check_contacts(graph: Graph, dtype: torch.dtype) -> None:
    limit = _MOST_CONTACTS[dtype]
    if graph.max_in_degree >= limit:
        remedy = "take float64, theta.double()" if dtype == torch.float32 else "take a sparser graph"
        raise ValueError(
            f"graph has an agent with {graph.max_in_degree} contacts, of which a step counts fewer than {limit} in "
            f"{dtype}: {remedy}"
        )
