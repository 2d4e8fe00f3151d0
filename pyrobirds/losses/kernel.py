"""The kernel score of replicates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyrobirds._checks import shape_text
from pyrobirds.losses.distances import (
    Bandwidth,
    check_bandwidth,
    common_dtype,
    distinct,
    median_or,
    powers_of_distances,
    runs,
    score_of_pairs,
)
from pyrobirds.losses.shapes import check_replicates
from pyrobirds.losses.value_object import ValueObject

_MOST_ENTRIES = 256  # of an event whose pairs are compared for the median


@dataclass(frozen=True, eq=False, repr=False)
class KernelScore(ValueObject):
    r"""The kernel score of m replicates (MMD of the simulator's law to one observation), unbiased from m = 2.

    .. math::

        \ell_b = \frac{1}{m (m - 1)} \sum_{i \ne j} k(x_{b,i}, x_{b,j}) - \frac{2}{m} \sum_{i} k(x_{b,i}, y_b),
        \qquad k(a, b) = \kappa\left(\|a - b\|^2 / h^2\right),

    with Euclidean norms over the observed entries of the whole event, and :math:`\kappa(s) = e^{-s}` for the Gaussian
    kernel: h is :math:`\sqrt 2` times the scale of a kernel written :math:`e^{-d^2 / (2 \gamma^2)}`. The expectation
    over the replicates is :math:`E k(X, X') - 2 E k(X, y)`; for a characteristic kernel of fixed bandwidth it is least
    in expectation over data where the simulator's law is that of the data. A bounded kernel caps what an outlying
    series can cost, and gives no gradient to replicates that are many bandwidths away.

    Gneiting and Raftery 2007, section 5 (https://doi.org/10.1198/016214506000001437), define half of it; the factor is
    that of Pacchiardi, Khoo and Dutta (https://arxiv.org/abs/2104.03889).

    Args:
        kernel: "gaussian", or a callable that maps a tensor of squared distances, in units of :math:`h^2`, to kernel
            values entry by entry, for instance ``lambda s: (1 + s).rsqrt()``; 0 is among the distances.
        bandwidth: h in units of ``y``, or "median": :math:`h^2` is the number of observed entries times the median
            squared difference between two of them (of more than 256 entries, between that many evenly spaced order
            statistics), or their mean or 1 where that is 0. A series of which a single entry is observed has no
            difference: its score is NaN, that is, a failed run. The bandwidth depends on ``y`` alone: one that follows
            ``x`` would change with the parameters, and reward those that change it rather than those that fit. It suits
            entries in one unit, whose spread over time is like the spread between runs. Elsewhere, and where the
            score is to be proper over many data sets, fix it by :meth:`with_median_bandwidth`.

    Called with ``x`` of shape ``(B, m, *event)`` and ``y`` of shape ``(B, *event)``, NaN where missing, it returns
    ``(B,)`` without a unit. A series without any observed entry has the constant score minus kappa(0). Time grows with
    B m^2 D for D entries, memory with B m^2, and in forward mode and for second derivatives with B m^2 D.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; when called, ``x`` or ``y`` is of another shape, m is
            1, or "median" meets an event of one entry, which has no pairs.

    Example:
        >>> x, y = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[0.0]])
        >>> KernelScore(bandwidth=1.0)(x, y)  # exp(-1) - (1 + exp(-1))
        tensor([-1.])
    """

    kernel: Literal["gaussian"] | Callable[[Tensor], Tensor] = "gaussian"
    bandwidth: Bandwidth = "median"

    def __post_init__(self) -> None:
        if self.kernel != "gaussian" and not callable(self.kernel):
            raise ValueError(f'kernel must be "gaussian" or a callable of squared distances, got {self.kernel!r}')
        object.__setattr__(self, "bandwidth", check_bandwidth(self.bandwidth))

    @classmethod
    def with_median_bandwidth(
        cls,
        x: Tensor,
        kernel: Literal["gaussian"] | Callable[[Tensor], Tensor] = "gaussian",
        *,
        y: Tensor | None = None,
    ) -> KernelScore:
        """Make a score whose bandwidth is the median distance between pilot runs, which stays what it is.

        Args:
            x: pilot runs at a plausible parameter, or at draws of the prior, shape ``(n, *event)``, n of at least 2.
            kernel: as for :class:`KernelScore`.
            y: data with gaps, shape ``event``: entries at which they are NaN are left out of the distances, as the
                score leaves them out. None for all entries.

        Raises:
            ValueError: fewer than two runs, ``y`` is not of the shape of one, or the median of the distances is not a
                finite number above 0.

        Example:
            >>> KernelScore.with_median_bandwidth(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
            KernelScore(bandwidth=5.0)
        """
        if x.dim() < 1 or len(x) < 2:
            raise ValueError(f"x has shape {shape_text(x.shape)}; expected at least two pilot runs, (n, *event)")
        if y is not None and y.shape != x.shape[1:]:
            raise ValueError(
                f"y has shape {shape_text(y.shape)}, but each of the {len(x)} pilot runs x has shape "
                f"{shape_text(x.shape[1:])}: pass one series of data, without a batch dimension"
            )
        seen = x if y is None else torch.where(y.isnan(), 0, x)
        flat = seen.detach().reshape(len(x), math.prod(x.shape[1:])).to(common_dtype(x, x))
        median = float(torch.nn.functional.pdist(flat).median())
        if not (math.isfinite(median) and median > 0):
            raise ValueError(
                f"the median distance between the {len(x)} pilot runs x is {median}, and a bandwidth must be a finite "
                "number above 0: pass runs that differ and have not failed, or a number as the bandwidth"
            )
        return cls(kernel, median)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        check_replicates("KernelScore", x, y, least=2)
        square = self._square_of_bandwidth(y)
        x, y = runs(x, y)
        squares = powers_of_distances(torch.cat([x, y.unsqueeze(1)], 1), 2)
        return -score_of_pairs(self._kernel(squares / square))

    def _kernel(self, squares: Tensor) -> Tensor:
        if callable(self.kernel):
            return self.kernel(squares)
        return torch.exp(-squares)

    def _square_of_bandwidth(self, y: Tensor) -> Tensor | float:
        """The square of the bandwidth: a number, or one for each series, shape ``(R, 1, 1)``."""
        if not isinstance(self.bandwidth, str):
            return self.bandwidth**2
        n = math.prod(y.shape[1:])
        if n < 2:
            raise ValueError(
                'KernelScore: bandwidth="median" compares the entries of an event with one another, but y has one: '
                "pass a number, or take KernelScore.with_median_bandwidth(pilot runs)"
            )
        entries = distinct(y).flatten(1)
        entries = entries.detach().to(common_dtype(y, y))
        num_observed = (~entries.isnan()).sum(1)
        most = min(n, _MOST_ENTRIES)
        # NaN is sorted to the end. Of no more than `most` values the ranks are 0, 1, 2, ...
        ranks = (2 * torch.arange(most, device=y.device) + 1) * num_observed.clamp(min=most).unsqueeze(1) // (2 * most)
        entries = entries.sort(1).values.gather(1, ranks)
        squares = (entries.unsqueeze(1) - entries.unsqueeze(2)).square()
        squares.diagonal(dim1=1, dim2=2).fill_(torch.nan)
        squares = squares.flatten(1)
        scale = torch.where(num_observed == 1, torch.nan, median_or(squares.nanmean(1), squares))
        return (num_observed.clamp(min=1) * scale)[:, None, None]
