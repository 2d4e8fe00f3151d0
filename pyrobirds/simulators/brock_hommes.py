"""The asset pricing model of Brock and Hommes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._checks import shape_text
from pyrobirds.simulators.floats import float_tensor
from pyrobirds.simulators.rollout import rollout

_BLOCK = 128  # time steps whose derivatives are solved for at once: a matrix of that size for each draw
_FEW_DRAWS = 50
_LARGEST_BOUND = 1e6


def brock_hommes(
    *,
    g1: Tensor | float = 0.0,
    b1: Tensor | float = 0.0,
    g2: Tensor | float = 0.9,
    b2: Tensor | float = 0.2,
    g3: Tensor | float = 0.9,
    b3: Tensor | float = -0.2,
    g4: Tensor | float = 1.01,
    b4: Tensor | float = 0.0,
    beta: Tensor | float = 120.0,
    sigma: Tensor | float = 0.04,
    r: Tensor | float = 0.01,
    n_timesteps: int,
    bound: float = 1e3,
    gradient_horizon: int | None = None,
    compile: bool = False,
) -> Tensor:
    r"""Simulate the price of an asset that four types of traders hold, who follow what has paid.

    .. math::

        x_{t+1} = \frac{1}{R} \Big( \sum_{h=1}^4 n_{h,t+1} (g_h x_t + b_h) + \sigma \epsilon_{t+1} \Big), \qquad
        n_{h,t+1} = \frac{e^{\beta U_{h,t}}}{\sum_j e^{\beta U_{j,t}}}, \qquad
        U_{h,t} = (x_t - R x_{t-1}) (g_h x_{t-2} + b_h - R x_{t-1}),

    with :math:`R = 1 + r`, standard normal :math:`\epsilon_t` and :math:`x_0 = x_{-1} = x_{-2} = 0`. The price is given
    as its deviation x from the fundamental one. Traders of type h expect :math:`g_h x + b_h`, a trend and a bias;
    :math:`U_h` is the profit that their last trade made, and :math:`n_h` their share, a discrete choice.

    ==========  =================================  ==================  =======
    parameter   meaning                            unit                range
    ==========  =================================  ==================  =======
    g1 ... g4   trend that type h expects          1                   real
    b1 ... b4   bias that type h expects           price               real
    beta        intensity of choice                1 / price^2         >= 0
    sigma       scale of the noise                 price               >= 0
    r           interest per time step             1                   > -1
    ==========  =================================  ==================  =======

    Each is a number or a tensor; any subset may be free. One that is out of its range or not finite gives prices of
    NaN in its draw, which :class:`pyrobirds.Simulator` counts as a failed run. The defaults are the four types of
    section 4.3 of Brock and Hommes (fundamentalists, an optimistic and a pessimistic bias with a trend, pure trend)
    with the ``beta``, ``sigma`` and ``r`` that have become customary for calibrating g2, b2, g3 and b3. Risk aversion
    and the variance that traders expect are absorbed into ``beta``, strategies are free of charge, and the noise is
    that of the later literature.

    The gradient is exact: that of each path with its noise held. Where the dynamics are chaotic it grows exponentially
    with the number of time steps, and says little about the expected loss then, until it is not finite at all; a
    ``gradient_horizon`` bounds it, and is recommended for paths of some hundred values or more.

    Sources: W. A. Brock and C. H. Hommes (1998), Heterogeneous beliefs and routes to chaos in a simple asset pricing
    model, J. Econ. Dyn. Control 22, 1235-1274, https://doi.org/10.1016/S0165-1889(98)00011-6; equations (39) and (40)
    of J. Dyer, P. Cannon, J. D. Farmer and S. Schmon (2022), https://arxiv.org/abs/2202.00625, are the form above.

    Args:
        g1: as in the table, like the others; tensors ``(*batch,)`` broadcast to one batch.
        b1: see the table.
        g2: see the table.
        b2: see the table.
        g3: see the table.
        b3: see the table.
        g4: see the table.
        b4: see the table.
        beta: see the table.
        sigma: see the table.
        r: see the table.
        n_timesteps: number of values of a path, the first, 0, included.
        bound: prices are cut off at plus and minus this, in units of price, above 0 and at most a million: with a trend
            above R they would grow without end, and their products overflow. The gradient of a value that was cut off
            is zero. Paths that stay within are not touched.
        gradient_horizon: how many time steps a gradient goes back, see :func:`pyrobirds.simulators.rollout`.
        compile: whether to compile the time loop, see :func:`pyrobirds.simulators.rollout`; it pays for many calls.

    Returns:
        Paths of shape ``(*batch, n_timesteps)``, in units of price; ``(n_timesteps,)`` if all parameters are numbers.

    Raises:
        TypeError, ValueError: ``n_timesteps`` or ``gradient_horizon`` is not a whole number of at least 1, ``bound``
            not a number above 0 and at most a million, a parameter neither a tensor of float32 or float64 nor a finite
            number, or the batches of the parameters do not broadcast.

    Example:
        >>> x = brock_hommes(g2=torch.tensor([0.9, 1.2]), b2=torch.tensor([0.2, 0.3]), n_timesteps=50)
        >>> x.shape, x[:, 0]
        (torch.Size([2, 50]), tensor([0., 0.]))
    """
    n_timesteps = _checks.positive_int("n_timesteps", n_timesteps)
    bound = _checks.positive("bound", bound)
    if bound > _LARGEST_BOUND:
        raise ValueError(
            f"bound must be at most {_LARGEST_BOUND:g}, got {bound:g}: products of larger prices overflow. Take a "
            "larger unit of price"
        )
    if gradient_horizon is not None:
        gradient_horizon = _checks.positive_int("gradient_horizon", gradient_horizon)
    compile = _checks.boolean("compile", compile)
    named = {
        **{"g1": g1, "g2": g2, "g3": g3, "g4": g4, "b1": b1, "b2": b2, "b3": b3, "b4": b4},
        **{"beta": beta, "sigma": sigma, "r": r},
    }
    theta, batch_shape = _stacked(named)
    valid = _in_range(theta.detach())
    # The other draws run with values that do no harm, so that their gradients are zero and not NaN.
    theta = torch.where(valid, theta, 0)
    noise = torch.randn(n_timesteps - 1, theta.shape[1], 1, dtype=theta.dtype, device=theta.device)
    x: Any = _Path.apply(theta, noise, bound, gradient_horizon, compile)
    return torch.where(valid.unsqueeze(-1), x, torch.nan).reshape(*batch_shape, n_timesteps)


def _stacked(parameters: dict[str, Any]) -> tuple[Tensor, torch.Size]:
    """The parameters as one tensor ``(parameters, B)``, and the shape of their batch."""
    tensors = {name: value for name, value in parameters.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        float_tensor(name, tensor)
    dtype, device = torch.get_default_dtype(), None
    for i, tensor in enumerate(tensors.values()):
        dtype = tensor.dtype if i == 0 else torch.promote_types(dtype, tensor.dtype)
        device = tensor.device
    try:
        batch_shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {shape_text(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"the parameters of brock_hommes must broadcast to one batch, got {shapes}") from None
    rows = [
        value.to(dtype).expand(batch_shape)
        if isinstance(value, Tensor)
        else torch.full(batch_shape, _checks.finite(name, value), dtype=dtype, device=device)
        for name, value in parameters.items()
    ]
    return torch.stack(rows).reshape(len(rows), -1), batch_shape


def _in_range(theta: Tensor) -> Tensor:
    """Which draws, ``(B,)``, have parameters that the model knows."""
    beta, sigma, r = theta[8:]
    return theta.isfinite().all(0) & (beta >= 0) & (sigma >= 0) & (r > -1)


class _Path(torch.autograd.Function):
    """The paths ``(B, T)`` for theta ``(11, B)`` and noise ``(T - 1, B, 1)``.

    One node for all time steps: the derivatives of all of them follow from the path at once, so that the backward pass
    is one linear recursion, and nothing but the path is kept for it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, noise: Tensor, bound: float, gradient_horizon: int | None, compile: bool) -> Tensor:
        g, b, beta, sigma, R = _unstacked(theta)
        g, b = g / R, b / R
        choice = beta * R

        def step(state: tuple[Tensor, ...], t: Any, shock: Tensor) -> tuple[Tensor, ...]:
            x, x1, f1, f2 = state
            f = torch.addcmul(b, g, x)  # what the types expect, discounted
            # The share does not change if all profits do by the same amount, so that R x1 in their last factor goes.
            n = torch.softmax(choice * torch.addcmul(x, -R, x1) * f2, -1)
            return ((n * f).sum(-1, keepdim=True) + shock).clamp(-bound, bound), x, f, f1

        zero = torch.zeros_like(R)
        x = rollout(
            step,
            (zero, zero, b, b),
            len(noise) + 1,
            inputs=sigma / R * noise,
            observe=lambda state: state[0],
            include_initial=True,
            compile=compile,
        )
        return x.squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        theta, noise, *ctx.settings, _ = inputs
        ctx.save_for_backward(theta, noise, output)
        ctx.save_for_forward(theta, noise, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        by_state, by_theta = _derivatives(*ctx.saved_tensors, *ctx.settings)
        # The derivative by x_t takes in that by x_{t+1} at lag 0, that by x_{t+2} at lag 1, that by x_{t+3} at lag 2.
        lags = [torch.cat((lag[i + 1 :], torch.zeros_like(lag[: i + 1])))[: len(lag)] for i, lag in enumerate(by_state)]
        adjoint = _recursion(gradient[:, 1:].mT.flip(0), [lag.flip(0) for lag in lags]).flip(0)
        return (by_theta * adjoint).sum(1), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tangent: Tensor = tangents[0]
        by_state, by_theta = _derivatives(*ctx.saved_tensors, *ctx.settings)
        x = _recursion((by_theta * tangent.unsqueeze(1)).sum(0), by_state)
        return torch.nn.functional.pad(x.mT, (1, 0))


def _unstacked(theta: Tensor) -> tuple[Tensor, ...]:
    """``g`` and ``b``, ``(B, 4)``, and ``beta``, ``sigma`` and ``R``, ``(B, 1)``."""
    columns = theta.mT.contiguous()  # a compiled loop wants strides that stay the same
    return columns[:, :4], columns[:, 4:8], columns[:, 8:9], columns[:, 9:10], 1 + columns[:, 10:]


def _derivatives(
    theta: Tensor, noise: Tensor, x: Tensor, bound: float, gradient_horizon: int | None
) -> tuple[list[Tensor], Tensor]:
    """The derivatives of each step's result by the three prices before it, latest first, and by theta.

    Of shape ``(T - 1, B)`` each, those by theta ``(11, T - 1, B)``.
    """
    g, b, beta, _, R = _unstacked(theta)
    before = torch.nn.functional.pad(x.mT, (0, 0, 2, 0)).unsqueeze(-1)  # from time -2 on
    x2, x1, x0, z = before[:-3], before[1:-2], before[2:-1], before[3:]
    expected, bet = g * x0 + b, g * x2 + b
    gain = x0 - R * x1
    push = beta * gain
    n = torch.softmax(push * bet, -1)
    # How the mean of what is expected changes with beta U_h.
    w = n * (expected - (n * expected).sum(-1, keepdim=True))
    pushed = w * push
    c = (w * bet).sum(-1, keepdim=True)
    by_state = [(n * g).sum(-1, keepdim=True) + beta * c, -beta * R * c, (pushed * g).sum(-1, keepdim=True)]
    in_order = (n * x0 + pushed * x2, n + pushed, c * gain, noise, -beta * c * x1 - z)
    inside = z.abs() < bound
    by_theta = torch.where(inside, torch.cat(in_order, -1) / R, 0)
    if gradient_horizon is None:
        reaches = [inside] * 3
    else:
        age = torch.arange(len(noise), device=x.device)[:, None, None] % gradient_horizon
        reaches = [inside & (age > lag) for lag in range(3)]
    by_state = [torch.where(reach, lag / R, 0).squeeze(-1) for reach, lag in zip(reaches, by_state, strict=True)]
    return by_state, by_theta.movedim(-1, 0)


def _recursion(drive: Tensor, lags: list[Tensor]) -> Tensor:
    """The y with ``y[t] = drive[t] + lags[0][t] y[t-1] + lags[1][t] y[t-2] + lags[2][t] y[t-3]``, zero before 0."""
    start = drive.new_zeros(3, drive.shape[1])
    blocks = zip(*(tensor.split(_BLOCK) for tensor in (drive, *lags)), strict=True)
    solve = _solved if drive.shape[1] <= _FEW_DRAWS else _stepped
    ys = [start]
    for block, *block_lags in blocks:
        ys.append(solve(block, block_lags, ys[-1][-3:]))
    return torch.cat(ys[1:]) if len(drive) else drive


def _solved(drive: Tensor, lags: list[Tensor], start: Tensor) -> Tensor:
    """The recursion as one triangular system, an order of magnitude faster than a loop for a few draws.

    Its first three unknowns are those before the block.
    """
    n = len(drive) + 3
    # The matrix, row after row, has the three lags of row i in the places up to i n + i - 1. So they end the rows of a
    # matrix with one column more.
    rows = torch.nn.functional.pad(-torch.stack(lags[::-1], -1).transpose(0, 1), (n - 2, 0, 2, 1))
    matrix = rows.flatten(1)[:, : n * n].unflatten(1, (n, n))
    known = torch.cat((start, drive)).mT.unsqueeze(-1)
    return torch.linalg.solve_triangular(matrix, known, upper=False, unitriangular=True).squeeze(-1).mT[3:]


def _stepped(drive: Tensor, lags: list[Tensor], start: Tensor) -> Tensor:
    """The recursion step by step."""
    y3, y2, y1 = start.unbind(0)
    ys = []
    for d, a, b, c in zip(drive.unbind(0), *(lag.unbind(0) for lag in lags), strict=True):
        y1, y2, y3 = torch.addcmul(torch.addcmul(torch.addcmul(d, a, y1), b, y2), c, y3), y1, y2
        ys.append(y1)
    return torch.stack(ys)
