"""Losses that compare entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds.losses.averages import mean_over_observed
from pyrobirds.losses.distances import common_dtype
from pyrobirds.losses.shapes import check_one_run


def mse(x: Tensor, y: Tensor, *, weights: Tensor | None = None) -> Tensor:
    r"""Mean squared error over the event.

    .. math:: \ell_b = \frac{\sum_{i \in O_b} w_i (x_{b,i} - y_{b,i})^2}{\sum_{i \in O_b} w_i},

    where :math:`O_b` holds the entries of the event at which ``y`` is observed (not NaN). A series without any observed
    entry says nothing and has loss 0. Of a stochastic simulator it measures the mean and the spread together; see
    :class:`~pyrobirds.losses.DebiasedMSE`.

    Args:
        x: simulated data, shape ``(B, *event)``, in the units of ``y``.
        y: observed data, shape ``(B, *event)``; NaN where missing.
        weights: of the entries, such as the times of a series: shape ``event``, finite, at least 0. Only their ratios
            count. Fix them by ``functools.partial(losses.mse, weights=weights)``. Whole outputs are weighed by
            ``pyro.poutine.scale``.

    Returns:
        One loss per batch element, shape ``(B,)``, in squared units of ``y``.

    Raises:
        ValueError: ``x`` and ``y`` differ in shape, or ``weights`` is not of the event's; nothing is broadcast. A
            weight is negative or not finite.
        TypeError: ``weights`` is not a tensor.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
        >>> y = torch.tensor([[0.0, 1.0, 4.0], [1.0, float("nan"), 1.0]])
        >>> mse(x, y)
        tensor([1.3333, 1.0000])
        >>> mse(x, y, weights=torch.tensor([0.0, 1.0, 1.0]))
        tensor([2., 1.])
    """
    errors, observed = _errors("mse", x, y)
    return mean_over_observed("mse", errors.square(), observed, weights)


def mae(x: Tensor, y: Tensor, *, weights: Tensor | None = None) -> Tensor:
    r"""Mean absolute error over the event.

    .. math:: \ell_b = \frac{\sum_{i \in O_b} w_i |x_{b,i} - y_{b,i}|}{\sum_{i \in O_b} w_i},

    with :math:`O_b` as in :func:`~pyrobirds.losses.mse`. A single outlier in ``y`` moves it less than the mean squared
    error. The gradient at an error of 0 is 0. The loss is piecewise linear in x: its second derivative is 0, so that a
    Laplace approximation sees no curvature of it.

    Args:
        x: simulated data, shape ``(B, *event)``, in the units of ``y``.
        y: observed data, shape ``(B, *event)``; NaN where missing.
        weights: of the entries; see :func:`~pyrobirds.losses.mse`.

    Returns:
        One loss per batch element, shape ``(B,)``, in units of ``y``.

    Raises:
        TypeError, ValueError: as for :func:`~pyrobirds.losses.mse`.

    Example:
        >>> mae(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 4.0]]))
        tensor([0.6667])
    """
    errors, observed = _errors("mae", x, y)
    return mean_over_observed("mae", errors.abs(), observed, weights)


def log_mse(x: Tensor, y: Tensor, *, weights: Tensor | None = None, offset: float = 1.0) -> Tensor:
    r"""Mean squared log ratio over the event, for counts over orders of magnitude.

    .. math:: \ell_b = \frac{\sum_{i \in O_b} w_i (g(x_{b,i}) - g(y_{b,i}))^2}{\sum_{i \in O_b} w_i}, \qquad
        g(z) = \mathrm{sign}(z) \log(1 + |z| / c),

    with :math:`O_b` as in :func:`~pyrobirds.losses.mse` and the offset c. For x and y of at least 0 the error is
    :math:`\log((x + c) / (y + c))`: a relative one far above c, an absolute one (in units of c) far below it. A factor
    of two at the start of an epidemic weighs as much as at its peak. The odd continuation of g to negative numbers
    keeps the loss and its gradient finite for every x.

    Args:
        x: simulated data, shape ``(B, *event)``, in the units of ``y``.
        y: observed data, shape ``(B, *event)``; NaN where missing.
        weights: of the entries; see :func:`~pyrobirds.losses.mse`.
        offset: c, the size below which differences are small, in the units of ``y``; above 0.

    Returns:
        One loss per batch element, shape ``(B,)``, without units.

    Raises:
        TypeError, ValueError: as for :func:`~pyrobirds.losses.mse`, or ``offset`` is not above 0.

    Example:
        >>> log_mse(torch.tensor([[0.0, 19.0, 1999.0]]), torch.tensor([[0, 9, 999]]))
        tensor([0.3203])
    """
    offset = _checks.positive("offset", offset)
    check_one_run("log_mse", x, y)
    observed, dtype = ~torch.isnan(y), common_dtype(x, y)
    sizes = [_log_size(torch.where(observed, values, 0).to(dtype), offset) for values in (x, y)]
    errors = sizes[0] - sizes[1]
    return mean_over_observed("log_mse", errors.square(), observed, weights)


def _errors(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x - y, 0 where y is missing, and where it is not."""
    check_one_run(name, x, y)
    observed, dtype = ~torch.isnan(y), common_dtype(x, y)
    # NaN must go before the square, not after: where() passes NaN gradients through the branch that it does not take.
    return torch.where(observed, x.to(dtype) - torch.where(observed, y, 0).to(dtype), 0), observed


def _log_size(z: Tensor, offset: float) -> Tensor:
    # By two where(), for the derivative of sign(z) * log1p(|z|) by autograd is 0 at z = 0, where it should be 1 / c.
    negative = z < 0
    log = torch.log1p(torch.where(negative, -z, z) / offset)
    return torch.where(negative, -log, log)
