"""The method of simulated moments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrobirds._checks import shape_text
from pyrobirds.losses.distances import common_dtype
from pyrobirds.losses.shapes import as_replicates
from pyrobirds.losses.statistics import SeriesMoments, Statistics, check_statistics, evaluate, of_both
from pyrobirds.losses.value_object import ValueObject


@dataclass(frozen=True, eq=False, repr=False)
class Moments(ValueObject):
    r"""Distance of summary statistics, as in the method of simulated moments.

    .. math:: \ell_b = (\bar s_b - s(y_b))^\top W (\bar s_b - s(y_b)) - \frac{\mathrm{tr}(W S_b)}{m},

    with the mean :math:`\bar s_b` and the unbiased covariance matrix :math:`S_b` of the statistics :math:`s(x_{b,j})`
    of m replicates. The second term takes away what the noise of the m runs adds to the first, so that the expectation
    is :math:`(E s(x) - s(y))^\top W (E s(x) - s(y))` for every m of at least 2; the loss can be negative for that. E
    s(x) is the expectation over series as long as the data.

    Of ONE run a draw, x of shape ``(B, *event)``, the loss is :math:`(s(x) - s(y))^\top W (s(x) - s(y))`, whose
    expectation is larger by :math:`\mathrm{tr}(W \mathrm{Cov}\, s(x))`: it rewards parameters with steady statistics,
    as the mean squared error of one run does (see :class:`~pyrobirds.losses.DebiasedMSE`).

    McFadden 1989 (https://doi.org/10.2307/1913621); for models of agents Gilli and Winker 2003
    (https://doi.org/10.1016/S0167-9473(02)00214-1), Franke and Westerhoff 2012
    (https://doi.org/10.1016/j.jedc.2011.10.004), who take for W the inverse of the covariance matrix of s(y).

    Args:
        statistics: s, a callable of series of shape ``(B, *event)`` that returns ``(B, k)``, differentiable and finite.
            Where y is NaN, x becomes NaN, too, before it is called, so that both have the same gaps; with gaps in the
            data it must know what to do with them, as :func:`torch.nanmean` does. A statistic that is NaN makes the
            loss NaN, that is, a failed run: it is not left out silently.
        weight: W. A vector ``(k,)`` of at least 0 for a diagonal matrix, or a symmetric matrix ``(k, k)`` without
            negative eigenvalues; None for the identity, which suits statistics of equal units and spread only. See
            :meth:`weight_from`.

    Called with x of shape ``(B, *event)`` or ``(B, m, *event)`` and y of shape ``(B, *event)``, NaN where missing, it
    returns one loss per batch element, shape ``(B,)``.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or shape, W is no such matrix, the statistics are not of
            shape ``(B, k)``, or the shapes of x and y are others.

    Example:
        >>> def mean_and_size(series):
        ...     return torch.stack([series.mean(-1), series.square().mean(-1)], -1)
        >>> moments = Moments(mean_and_size, weight=torch.tensor([1.0, 0.5]))
        >>> moments
        Moments(statistics=mean_and_size, weight=<tensor of shape (2,), checksum ee85c9db>)
        >>> moments(torch.tensor([[[0.0, 2.0], [3.0, 3.0]]]), torch.tensor([[1.0, 1.0]]))
        tensor([4.])
    """

    statistics: Statistics = field(default=SeriesMoments())
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        check_statistics("Moments", self.statistics)
        if self.weight is not None:
            _check_weight(self.weight)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        x, dtype = as_replicates("Moments", x, y), common_dtype(x, y)
        simulated, observed = of_both("Moments", self.statistics, x.to(dtype), y.to(dtype))
        errors = simulated - observed.unsqueeze(1)
        m = errors.shape[1]
        if m == 1:
            return self._squared(errors.squeeze(1))
        # The mean of the products of the errors of two different replicates, which is the formula above.
        return (self._squared(errors.sum(1)) - self._squared(errors).sum(1)) / (m * (m - 1))

    def weight_from(self, x: Tensor) -> Tensor:
        """The inverse of the covariance matrix of the statistics, a weight in which each statistic counts by its noise.

        Args:
            x: n runs at one reference parameter, such as a first estimate, shape ``(n, *event)``, n above k; or
                bootstrapped data, as Franke and Westerhoff take them. NaN where y is missing.

        Returns:
            W, shape ``(k, k)``, in the inverse squared units of the statistics; for ``Moments(..., weight=W)``.

        Raises:
            ValueError: there are too few runs, or statistics that do not vary, or not independently of each other.

        Example:
            >>> moments = Moments(SeriesMoments(lags=(1,)))
            >>> moments.weight_from(torch.randn(200, 50)).shape
            torch.Size([6, 6])
        """
        with torch.no_grad():
            found = evaluate("Moments", self.statistics, x)
            n, k = found.shape
            if n <= k:
                raise ValueError(
                    f"x has {n} runs, but {k} statistics need at least {k + 1} for an invertible covariance matrix"
                )
            sd = found.std(0)
            constant = ~(sd > 8 * torch.finfo(found.dtype).eps * found.abs().amax(0))  # true of NaN, too
            if bool(constant.any()):
                raise ValueError(
                    f"the statistics {self._names(constant)} do not vary between the {n} runs of x, or are not finite: "
                    "leave them out, or give a weight of your own"
                )
            scaled = (found - found.mean(0)) / sd
            correlation = scaled.T @ scaled / (n - 1)
            if torch.linalg.eigvalsh(correlation)[0] <= k * torch.finfo(found.dtype).eps * 8:
                raise ValueError(
                    f"the {k} statistics are linearly dependent over the {n} runs of x: leave out what follows from "
                    "the others, or give a weight of your own"
                )
            return torch.linalg.inv(correlation) / (sd.unsqueeze(1) * sd)

    def _names(self, chosen: Tensor) -> list[str] | list[int]:
        indices: list[int] = chosen.nonzero().flatten().tolist()
        names = getattr(self.statistics, "names", None)
        return indices if names is None else [names[index] for index in indices]

    def _squared(self, errors: Tensor) -> Tensor:
        if self.weight is None:
            return errors.square().sum(-1)
        k = errors.shape[-1]
        if self.weight.shape[0] != k:
            raise ValueError(
                f"Moments: weight has shape {shape_text(self.weight.shape)}, but there are {k} statistics: expected "
                f"({k},) or ({k}, {k})"
            )
        weight = self.weight.to(errors)
        return ((errors * weight if weight.dim() == 1 else errors @ weight) * errors).sum(-1)


def _check_weight(weight: object) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"Moments: weight must be a tensor (k,) or (k, k), or None, got a {type(weight).__name__}")
    if weight.dim() not in (1, 2) or (weight.dim() == 2 and weight.shape[0] != weight.shape[1]):
        raise ValueError(f"Moments: weight must be of shape (k,) or (k, k), got {shape_text(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"Moments: weight must be of a floating-point dtype, got {weight.dtype}")
    if not bool(weight.isfinite().all()):
        raise ValueError("Moments: weight has entries that are not finite")
    rounding = 1e3 * torch.finfo(weight.dtype).eps
    size = float(weight.abs().amax()) if weight.numel() else 0.0
    if weight.dim() == 1:
        least = float(weight.amin()) if weight.numel() else 0.0
        if least < 0:
            raise ValueError(f"Moments: a diagonal weight must be of at least 0, its least entry is {least:.4g}")
        return
    if float((weight - weight.T).abs().amax()) > rounding * size:
        raise ValueError("Moments: weight must be symmetric: only (W + W.T) / 2 counts, pass that")
    least = float(torch.linalg.eigvalsh(weight)[0])
    if least < -rounding * size * len(weight):
        raise ValueError(
            f"Moments: weight must have no negative eigenvalue, else there is a loss below that of equal statistics; "
            f"its least is {least:.4g}"
        )
