"""Cont's model of volatility clustering."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._checks import shape_text
from pyrobirds.simulators.floats import float_tensor
from pyrobirds.simulators.rollout import rollout


def rama_cont(
    nu_loc: Tensor,
    nu_scale: Tensor,
    sigma: Tensor,
    eta: Tensor,
    *,
    n_timesteps: int,
    n_agents: int = 1000,
    s: float = 0.1,
    tau: float = 1.0,
    gradient_horizon: int | None = None,
    checkpoint_every: int | None = None,
) -> Tensor:
    r"""Simulate the returns of an asset whose traders react to news beyond a threshold, and reset it to past returns.

    .. math::

        r_t = \frac{1}{\eta N} \sum_{i=1}^N \big( 1[\epsilon_t > \nu_{i,t}] - 1[\epsilon_t < -\nu_{i,t}] \big), \qquad
        \nu_{i,t+1} = \begin{cases} |r_t| & \text{with probability } s, \\ \nu_{i,t} & \text{else,} \end{cases}

    with news :math:`\epsilon_t \sim N(0, \sigma^2)` common to all, :math:`\log \nu_{i,1} \sim N(\mu, \varsigma^2)` and
    :math:`r_0 = 0`. Traders buy on good and sell on bad news; those who did not adapt lately sit still in quiet times.

    ===========  ==================================================  ==========  ======
    parameter    meaning                                             unit        range
    ===========  ==================================================  ==========  ======
    nu_loc       mu, mean of the logarithm of the first thresholds   log return  real
    nu_scale     its standard deviation                              1           >= 0
    sigma        standard deviation of the news                      return      >= 0
    eta          market depth: abs(r) is at most 1 / eta             1 / return  > 0
    s            chance of a trader to adapt the threshold           1           [0, 1]
    ===========  ==================================================  ==========  ======

    A parameter out of its range, or one that is not finite, gives returns of NaN in its draw, which
    :class:`pyrobirds.Simulator` counts as a failed run: to raise an error, its values would have to be waited for.

    Exact in law. The gradient takes each order for
    :math:`\operatorname{sigmoid}\frac{\epsilon - \nu}{\tau\sigma} - \operatorname{sigmoid}\frac{-\epsilon - \nu}
    {\tau\sigma}` with :math:`\tau\sigma` held: a straight-through gradient and biased, too small in nu_loc and nu_scale
    above all. Smaller ``tau`` is less biased, but thresholds feed back on returns: below about 0.5 the gradient of many
    time steps explodes, and needs a ``gradient_horizon``. ``docs/reference_simulators.md`` has a table. Who adapts when
    depends on no parameter; ``s`` is a setting and has no gradient.

    Sources: R. Cont (2007), Volatility clustering in financial markets: empirical facts and agent-based models, in Long
    Memory in Economics, 289-309, https://doi.org/10.1007/978-3-540-34625-8_10; F. Ghoulmie, R. Cont and J.-P. Nadal
    (2005), Heterogeneity and feedback in an agent-based market model, J. Phys.: Condens. Matter 17, S1259,
    https://doi.org/10.1088/0953-8984/17/14/015.

    Args:
        nu_loc: as in the table, ``(*batch,)``, like the others.
        nu_scale: see the table.
        sigma: see the table.
        eta: see the table.
        n_timesteps: number of values of a path, the first, 0, included.
        n_agents: N, the number of traders.
        s: see the table; a number.
        tau: temperature of the gradient in units of sigma, above 0.
        gradient_horizon: how many time steps a gradient goes back, see :func:`pyrobirds.simulators.rollout`; to the
            first thresholds it goes from wherever they are still held.
        checkpoint_every: saves memory at the price of time, see :func:`pyrobirds.simulators.rollout`. Without it 5
            bytes are kept for each trader, time step and element of the batch (9 in double precision).

    Returns:
        Returns of shape ``(*batch, n_timesteps)``.

    Raises:
        TypeError, ValueError: ``n_timesteps``, ``n_agents``, ``gradient_horizon`` or ``checkpoint_every`` is not a
            whole number of at least 1, ``s`` not a number between 0 and 1, ``tau`` not one above 0, or the parameters
            are not tensors of float32 or float64 of one shape.

    Example:
        >>> parameters = torch.tensor([-7.0, 0.5, 0.001, 10.0]).expand(3, 4).unbind(-1)
        >>> returns = rama_cont(*parameters, n_timesteps=50, n_agents=100)
        >>> returns.shape, bool((returns.abs() <= 0.1).all())
        (torch.Size([3, 50]), True)
    """
    n_timesteps = _checks.positive_int("n_timesteps", n_timesteps)
    n_agents = _checks.positive_int("n_agents", n_agents)
    s = _checks.share("s", s)
    tau = _checks.positive("tau", tau)
    _check_parameters({"nu_loc": nu_loc, "nu_scale": nu_scale, "sigma": sigma, "eta": eta})
    batch_shape = sigma.shape
    parameters = [theta.reshape(-1, 1) for theta in (nu_loc, nu_scale, sigma, eta)]
    valid = torch.cat([theta.detach().isfinite() for theta in parameters], -1).all(-1, keepdim=True)
    valid = valid & (nu_scale.reshape(-1, 1) >= 0) & (sigma.reshape(-1, 1) >= 0) & (eta.reshape(-1, 1) > 0)
    # The other draws run with values that do no harm, so that their gradients are zero and not NaN.
    nu_loc, nu_scale, sigma, eta = (torch.where(valid, theta, 1) for theta in parameters)
    kind: dict[str, Any] = {"dtype": sigma.dtype, "device": sigma.device}

    log_nu = nu_loc + nu_scale * torch.randn(len(sigma), n_agents, **kind)
    first_nu = log_nu.clamp(max=math.log(torch.finfo(sigma.dtype).max) - 1).exp()  # beyond all news, and finite
    news = sigma * torch.randn(n_timesteps - 1, len(sigma), 1, **kind)
    # Where it is narrower, one over it overflows.
    width = (tau * sigma.detach()).clamp(min=math.sqrt(torch.finfo(sigma.dtype).tiny))

    def step(state: tuple[Tensor, ...], t: int, news: Tensor) -> tuple[Tensor, ...]:
        nu, _, *first = state
        adapts = torch.rand(nu.shape, **kind) < s
        if first:
            nu = torch.where(first[0], first_nu, nu)
            first = [first[0] & ~adapts]
        stepped: Any = _Step.apply(nu, news, eta, width, adapts)
        return *stepped, *first

    state = (first_nu, torch.zeros_like(sigma))
    if gradient_horizon is not None:  # the first thresholds are functions of the parameters as long as they are held
        state = (*state, torch.ones_like(first_nu, dtype=torch.bool))

    x = rollout(
        step,
        state,
        n_timesteps,
        inputs=news,
        observe=lambda state: state[1],
        include_initial=True,
        gradient_horizon=gradient_horizon,
        checkpoint_every=checkpoint_every,
    )
    return torch.where(valid.unsqueeze(-1), x, torch.nan).reshape(*batch_shape, n_timesteps)


def _check_parameters(parameters: dict[str, Any]) -> None:
    for name, value in parameters.items():
        float_tensor(name, value)
    shapes = {name: shape_text(value.shape) for name, value in parameters.items()}
    if len({*shapes.values()}) > 1:
        came = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the parameters of rama_cont must have one shape, (*batch,), got {came}: expand them")


class _Step(torch.autograd.Function):
    """One time step: the thresholds ``(B, N)`` after it and the return ``(B, 1)``.

    News, ``eta`` and the ``width`` of the relaxation are ``(B, 1)``. One node for all of it, because at a thousand
    traders a node costs as much as its arithmetic.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(nu: Tensor, news: Tensor, eta: Tensor, width: Tensor, adapts: Tensor) -> tuple[Tensor, Tensor]:
        r = news.sign() * (nu < news.abs()).sum(-1, keepdim=True) / (eta * nu.shape[-1])
        return _blend(nu, r.abs(), adapts.to(nu.dtype)), r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_nu, by_r = gradients
        nu, news, eta, width, adapts, r = ctx.saved_tensors
        by_adapted = by_nu * adapts.to(nu.dtype)
        by_r = by_r + r.sign() * by_adapted.sum(-1, keepdim=True)
        buys, sells, scale = _slopes(nu, news, eta, width)
        scale = scale * by_r
        by_news = scale * (buys.sum(-1, keepdim=True) + sells.sum(-1, keepdim=True))
        return torch.addcmul(by_nu - by_adapted, scale, sells - buys), by_news, -by_r * r / eta, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        nu_tangent, news_tangent, eta_tangent, *_ = tangents
        nu, news, eta, width, adapts, r = ctx.saved_tensors
        buys, sells, scale = _slopes(nu, news, eta, width)
        pushed = (buys * (news_tangent - nu_tangent) + sells * (news_tangent + nu_tangent)).sum(-1, keepdim=True)
        r_tangent = scale * pushed - r / eta * eta_tangent
        return _blend(nu_tangent, r.sign() * r_tangent, adapts.to(nu.dtype)), r_tangent


def _blend(nu: Tensor, r: Tensor, adapted: Tensor) -> Tensor:
    """``r`` where ``adapted`` is 1, ``nu`` where it is 0, both exactly; several times faster than ``torch.where``."""
    return torch.addcmul(torch.addcmul(nu, nu, adapted, value=-1), r, adapted)


def _slopes(nu: Tensor, news: Tensor, eta: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slopes of the sigmoids of buying and selling, ``(B, N)``, and what turns them into those of the return."""
    relative, news = nu / width, news / width
    buys, sells = torch.sigmoid(news - relative), torch.sigmoid(-news - relative)
    slopes = [torch.addcmul(soft, soft, soft, value=-1) for soft in (buys, sells)]
    return slopes[0], slopes[1], 1 / (eta * width * nu.shape[-1])
