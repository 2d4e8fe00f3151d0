"""The maximum mean discrepancy between time points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrobirds.losses.distances import Bandwidth, check_bandwidth, distances, median_or, points
from pyrobirds.losses.shapes import check_one_run
from pyrobirds.losses.value_object import ValueObject

_MOST_KERNEL_VALUES = 2**20  # held at a time; more of them leave the cache


@dataclass(frozen=True, eq=False, repr=False)
class MMD(ValueObject):
    r"""Squared maximum mean discrepancy between the time points of one run and of the data, taken as exchangeable.

    .. math::

        \ell_b = \frac{1}{n (n - 1)} \sum_{s \ne t} \left[ k(x_{b,s}, x_{b,t}) + k(y_{b,s}, y_{b,t}) \right]
            - \frac{2}{n^2} \sum_{s, t} k(x_{b,s}, y_{b,t}), \qquad k(a, b) = e^{-\|a - b\|^2 / h^2},

    over the n times at which ``y`` is observed. It compares the values that a series takes, and nothing of their order:
    a run and the same run shuffled have the same loss. For independent points it is the unbiased estimate of Gretton et
    al. 2012, equation 3 (https://jmlr.org/papers/v13/gretton12a.html), and can be below 0; points of one time series
    depend on each other, and then it estimates nothing exactly. It equals ``UnivariateMMDLoss`` of blackbirds 1.3
    (https://github.com/arnauqb/blackbirds), also in its bandwidth.

    Args:
        bandwidth: h in units of ``y``, or "median": :math:`h^2` is the median of all :math:`n^2` squared distances
            between points of ``y``, those of points to themselves included; their mean where more than half of them are
            0, and 1 where all are. Runs that are many bandwidths away from the data get no gradient.

    Called with ``x`` and ``y`` of shape ``(B, T)``, or ``(B, T, d)`` for points with d coordinates, it returns ``(B,)``
    without a unit. A time at which ``y`` is NaN (in any coordinate) is left out of ``x`` too, so that both have seen
    the same times; with fewer than two times left the loss is 0. The gradient is that of ``x`` alone.

    Time grows with B T^2. The pairs of times within the data take 17 T^2 bytes in single precision (1.7 GB for 10,000
    times) for each series in ``y``, or once if ``y`` was expanded from one series, as by a Simulator. Of the pairs with
    ``x`` a million are held at a time, but for second derivatives all of them.

    Raises:
        TypeError, ValueError: ``bandwidth`` is neither "median" nor a number above 0; when called, ``x`` and ``y``
            differ in shape or are of another one.

    Example:
        >>> x, y = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> MMD(bandwidth=1.0)(x, y)  # 2 exp(-1) - (1 + exp(-1))
        tensor([-0.6321])
    """

    bandwidth: Bandwidth = "median"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidth", check_bandwidth(self.bandwidth))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        check_one_run("MMD", x, y)
        x, y, observed = points("MMD", x, y)
        if y.shape[1] < 2:
            raise ValueError(
                f"MMD: y has {y.shape[1]} time points; expected at least two, for it compares pairs of them"
            )
        n = observed.sum(1, keepdim=True).to(x.dtype)  # (R, 1)
        counts = (observed & (n > 1)).to(x.dtype)  # (R, T)
        pair, cross = counts / (n * (n - 1)).clamp(min=1), counts / n.square().clamp(min=1)
        # Small numbers lose little where they are subtracted. What is far from the centre of x is so from x, and has a
        # kernel of 0 with it.
        centre, own = (_centre(cloud, observed, n) for cloud in (y, x.detach()))
        x, relative, y = x - own, y - own, (y - centre) * counts.unsqueeze(2)
        squares = distances(y, y).square()
        square = self._square_of_bandwidth(y, squares, observed, n)  # (R, 1, 1)
        within_y = (pair.unsqueeze(1) @ torch.exp(squares * (-1 / square)) @ counts.unsqueeze(2)).flatten()
        root = square.sqrt()
        with_x, _ = _KernelSums.apply(x / root, relative / root, pair.expand(x.shape[:2]), cross.expand(x.shape[:2]))
        return with_x + (within_y - 2 * pair.sum(1))  # without the pairs of points with themselves

    def _square_of_bandwidth(self, y: Tensor, squares: Tensor, observed: Tensor, n: Tensor) -> Tensor:
        if not isinstance(self.bandwidth, str):
            return torch.full_like(squares[:, :1, :1], self.bandwidth**2)
        both = observed.unsqueeze(1) & observed.unsqueeze(2)
        pairs = torch.where(both, squares, torch.nan).flatten(1)
        mean = 2 * y.square().sum((1, 2)) / n.squeeze(1).clamp(min=1)  # y is centred
        return median_or(mean, pairs)[:, None, None]


def _centre(cloud: Tensor, observed: Tensor, n: Tensor) -> Tensor:
    """The mean of the observed points ``(B, T, d)``, of which there are n ``(B, 1)``; 0 if there are none."""
    return (cloud * observed.unsqueeze(2)).sum(1, keepdim=True) / n.unsqueeze(2).clamp(min=1)


class _KernelSums(torch.autograd.Function):
    """:func:`_sums` with its gradient, of which the first derivative keeps nothing of size T^2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, pair: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        return _sums(x, y, pair, cross)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])  # the same as for backward, as generate_vmap_rule wants it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            _, gradient = _sums(*inputs, by_differences=True)
        return gradient * gradients[0][:, None, None], None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, None]:
        *_, gradient = ctx.saved_tensors
        return (gradient * tangents[0]).sum((1, 2)), None


def _sums(x: Tensor, y: Tensor, pair: Tensor, cross: Tensor, *, by_differences: bool = False) -> tuple[Tensor, Tensor]:
    """Weighted sums of exp(-|x_s - x_t|^2) minus twice those of exp(-|x_s - y_t|^2), and their gradient by x.

    The gradient is made of the same kernel values, so both are computed at once, and for a few points at a time.

    Args:
        x: ``(B, T, d)``.
        y: ``(B, T, d)``.
        pair: the weight of a pair of x, given to one of its points; 0 where missing, ``(B, T)``.
        cross: the weight of a pair of x and y likewise, ``(B, T)``.
        by_differences: take operations only that can be differentiated in any mode.

    Returns:
        The sums over all s and t, ``(B,)``, and their gradient ``(B, T, d)``.
    """
    z = torch.cat([x, y], 1)
    # The gradient meets a pair of x twice, as (s, t) and as (t, s).
    slopes = torch.cat([2 * pair, -2 * cross], 1).unsqueeze(2)
    weights = torch.cat([torch.cat([pair, -2 * cross], 1).unsqueeze(2), slopes, slopes * z], 2).mT  # (B, 2 + d, 2 T)
    num_rows = max(1, _MOST_KERNEL_VALUES // max(1, len(x) * z.shape[1]))
    # Parts that were kept one by one would lie between the large tensors, whose memory could not be used again.
    values, gradient = torch.empty_like(x[..., 0]), torch.empty_like(x)
    for first in range(0, x.shape[1], num_rows):
        part = slice(first, first + num_rows)
        rows = x[:, part]
        # (B, 2 T, rows): this way round, the product with a few columns of weights is eight times as fast.
        if by_differences:
            squares = (z.unsqueeze(2) - rows.unsqueeze(1)).square().sum(3)
        elif x.shape[2] == 1:
            differences = z - rows.mT
            squares = differences.mul_(differences)  # square_() has no rule for vmap
        else:
            squares = distances(z, rows).square()
        sums = (weights @ squares.neg_().exp_()).mT
        values[:, part] = sums[..., 0]
        gradient[:, part] = -2 * (sums[..., 1:2] * rows - sums[..., 2:])
    seen = pair > 0
    return (values * seen).sum(1), gradient * seen.unsqueeze(2)
