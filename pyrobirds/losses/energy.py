"""The energy score of replicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds.losses.distances import powers_of_distances, runs, score_of_pairs
from pyrobirds.losses.shapes import check_replicates
from pyrobirds.losses.value_object import ValueObject


@dataclass(frozen=True, eq=False, repr=False)
class EnergyScore(ValueObject):
    r"""The energy score of m replicates, unbiased from m = 2.

    .. math::

        \ell_b = \frac{2}{m} \sum_{i} \|x_{b,i} - y_b\|^\beta
            - \frac{1}{m (m - 1)} \sum_{i \ne j} \|x_{b,i} - x_{b,j}\|^\beta,

    with Euclidean norms over the observed entries of the whole event. Its expectation over the replicates is
    :math:`2 E\|X - y\|^\beta - E\|X - X'\|^\beta`, which for :math:`\beta < 2` is least in expectation over data where
    the simulator's law is that of the data, in all its moments and dependences; for :math:`\beta = 2` it is
    :math:`2 \|E X - y\|^2`, and only the mean counts.

    Gneiting and Raftery 2007, equation 22 (https://doi.org/10.1198/016214506000001437), define half of it; the factor
    is that of Pacchiardi, Khoo and Dutta (https://arxiv.org/abs/2104.03889), who put it into generalised
    posteriors. For one entry and :math:`\beta = 1` it is twice the CRPS.

    Args:
        beta: the power of the distance, above 0 and at most 2. Below 1 the gradient grows without bound where a
            replicate comes near ``y`` or another one (it is zero where they are equal).

    Called with ``x`` of shape ``(B, m, *event)`` and ``y`` of shape ``(B, *event)``, NaN where missing, it returns
    ``(B,)`` in units of ``y`` to the power ``beta``; a series without any observed entry has score 0. Single values can
    be below 0. Time grows with B m^2 D for D entries, memory with B m^2, and in forward mode and for second derivatives
    with B m^2 D.

    Raises:
        TypeError, ValueError: ``beta`` is not a number above 0 and at most 2; when called, ``x`` or ``y`` is of another
            shape, or m is 1.

    Example:
        >>> x, y = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]), torch.tensor([[0.0, 4.0]])
        >>> EnergyScore()(x, y)  # distances 4 and 3 to y, 5 to each other
        tensor([2.])
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        beta = _checks.positive("beta", self.beta)
        if beta > 2:
            raise ValueError(f"beta must be at most 2, got {self.beta!r}: the score is not proper above")
        object.__setattr__(self, "beta", beta)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        check_replicates("EnergyScore", x, y, least=2)
        x, y = runs(x, y)
        return score_of_pairs(powers_of_distances(torch.cat([x, y.unsqueeze(1)], 1), self.beta))
