"""The error of the simulator's mean, without what its own noise adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobirds.losses.averages import check_weights, mean_over_observed
from pyrobirds.losses.distances import common_dtype
from pyrobirds.losses.shapes import check_replicates
from pyrobirds.losses.value_object import ValueObject


@dataclass(frozen=True, eq=False, repr=False)
class DebiasedMSE(ValueObject):
    r"""Squared error of the simulator's mean, estimated without bias from replicates.

    .. math:: \ell_b = \frac{\sum_{i \in O_b} w_i e_{b,i}}{\sum_{i \in O_b} w_i}, \qquad
        e_{b,i} = (\bar x_{b,i} - y_{b,i})^2 - \frac{s_{b,i}^2}{m},

    with the mean and the unbiased variance :math:`s^2` of the m replicates, and :math:`O_b` the entries at which ``y``
    is observed. Because :math:`E (\bar x - y)^2 = (E x - y)^2 + \mathrm{Var}(x) / m`, the expectation of e is
    :math:`(E x - y)^2` exactly, for every m of at least 2.

    The mean squared error of ONE run has the expectation

    .. math:: E (x - y)^2 = (E x - y)^2 + \mathrm{Var}(x),

    so it adds the simulator's own variance and rewards quiet parameters: of two parameters with the same mean path, the
    one with less noise has the lower loss, even if the data are as noisy as the other. The mean of m such losses is no
    better, for it has the same expectation. Where the spread is to be fitted, too, take a scoring rule, such as the
    energy score, or :class:`~pyrobirds.losses.SyntheticLikelihood`: this loss says nothing about it.

    Being unbiased it can be negative. It is the mean of the products of the errors of two different replicates,
    :math:`e = \sum_{j \neq k} (x_j - y)(x_k - y) / (m (m - 1))`.

    Args:
        weights: of the entries; see :func:`~pyrobirds.losses.mse`.

    Called with x of shape ``(B, m, *event)``, m of at least 2, and y of shape ``(B, *event)``, NaN where missing, it
    returns one loss per batch element, shape ``(B,)``, in squared units of ``y``.

    Raises:
        TypeError, ValueError: the weights are not a tensor of finite numbers of at least 0, of the event's shape; the
            shapes of x and y are others, or there is one replicate.

    Example:
        >>> x = torch.tensor([[[1.0, 1.0], [3.0, 1.0]]])  # one draw, two replicates, two times
        >>> DebiasedMSE()(x, torch.tensor([[2.0, 0.0]]))  # means 2 and 1, variances 2 and 0
        tensor([0.])
    """

    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            check_weights("DebiasedMSE", self.weights)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        m = check_replicates("DebiasedMSE", x, y, 2)
        observed, dtype = ~torch.isnan(y), common_dtype(x, y)
        data = torch.where(observed, y, 0).to(dtype).unsqueeze(1)
        errors = torch.where(observed.unsqueeze(1), x.to(dtype) - data, 0)
        products = (errors.sum(1).square() - errors.square().sum(1)) / (m * (m - 1))
        return mean_over_observed("DebiasedMSE", products, observed, self.weights)
