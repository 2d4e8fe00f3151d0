"""The continuous ranked probability score of replicates, time by time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pyro.ops.stats import crps_empirical
from torch import Tensor

from pyrobirds.losses.averages import check_weights, mean_over_observed
from pyrobirds.losses.distances import common_dtype
from pyrobirds.losses.shapes import check_replicates
from pyrobirds.losses.value_object import ValueObject


@dataclass(frozen=True, eq=False, repr=False)
class CRPS(ValueObject):
    r"""The continuous ranked probability score of m replicates at each entry, averaged; unbiased from m = 2.

    .. math::

        \ell_b = \frac{\sum_{t \in O_b} w_t c_{b,t}}{\sum_{t \in O_b} w_t}, \qquad
        c_{b,t} = \frac{1}{m} \sum_{i} |x_{b,i,t} - y_{b,t}|
            - \frac{1}{2 m (m - 1)} \sum_{i, j} |x_{b,i,t} - x_{b,j,t}|,

    over the entries :math:`O_b` at which ``y`` is observed. The expectation of c over the replicates is
    :math:`E|X_t - y_t| - E|X_t - X_t'| / 2`, least in expectation over data where the simulator's law *at t* is that of
    the data: the score knows the distribution at every time, and nothing of the dependence between times. For that
    take :class:`~pyrobirds.losses.EnergyScore`.

    The division by m (m - 1) makes it fair: with :math:`m^2`, as in :func:`pyro.ops.stats.crps_empirical`, which does
    the work here, few replicates favour a simulator whose runs are too much alike (Ferro 2014,
    https://doi.org/10.1002/qj.2270). The score: Gneiting and Raftery 2007, equations 20 and 21
    (https://doi.org/10.1198/016214506000001437).

    Args:
        weights: of the entries; see :func:`~pyrobirds.losses.mse`.

    Called with ``x`` of shape ``(B, m, *event)`` and ``y`` of shape ``(B, *event)``, NaN where missing, it returns
    ``(B,)`` in units of ``y``; a series without any observed entry has score 0. Single values can be below 0. Equal
    replicates are taken in some order, so that their gradients differ while their sum is right. The score is piecewise
    linear in ``x``: its second derivative is 0, so that a Laplace approximation sees no curvature of it. Time grows
    with B m log m, memory with B m.

    Raises:
        TypeError, ValueError: the weights are not a tensor of finite numbers of at least 0, of the event's shape; when
            called, ``x`` or ``y`` is of another shape, or m is 1.

    Example:
        >>> CRPS()(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[3.0]]))  # (3 + 2) / 2 - 1 / 2
        tensor([2.])
    """

    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            check_weights("CRPS", self.weights)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        m = check_replicates("CRPS", x, y, least=2)
        observed, dtype = ~y.isnan(), common_dtype(x, y)
        x = torch.where(observed.unsqueeze(1), x, 0).to(dtype).transpose(0, 1)
        y = torch.where(observed, y, 0).to(dtype)
        # Pyro divides the sum over pairs by m^2.
        scores = (m * crps_empirical(x, y) - (x - y).abs().mean(0)) / (m - 1)
        return mean_over_observed("CRPS", scores, observed, self.weights)
