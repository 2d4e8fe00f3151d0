"""Iterate averaging: the mean of an optimiser's iterates once they are stationary."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrobirds import _checks

_MAX_R_HAT = 1.1
_MIN_ITERATES = 200  # of a window
_MAX_SHARE = 0.95  # of all iterates, in a window
_MIN_EFFECTIVE_SIZE = 50
_MAX_BLOCKS = 20
_MIN_BLOCKS = 4  # of a window: two in each half
_MIN_BATCHES = 10  # with fewer a variance between block means says little


class IterateAverage:
    r"""The mean of an optimiser's iterates over the window in which they are stationary.

    At a fixed step size the iterates :math:`x_1, x_2, \dots` of a stochastic optimiser end up wandering about the
    optimum; their mean is much nearer to it than the last of them. A window of the last :math:`2h` iterates is judged
    by its split :math:`\hat R`: with means :math:`m_1, m_2` and variances :math:`s_1^2, s_2^2` of its two halves,

    .. math:: \hat R^2 = \frac{h - 1}{h} + \frac{(m_1 - m_2)^2 / 2}{(s_1^2 + s_2^2) / 2},

    of which the largest over all parameters counts. The iterates are stationary as soon as the smallest
    :math:`\hat R` over windows of at least 200 and at most 95 % of all iterates is at most 1.1. That window is averaged
    over, and every later iterate with it. Until then the average is that of the last half of the iterates.

    Iterates that still approach the optimum, but by less than they wander, pass that rule and would shift the average
    for good. So each time that the window has about doubled it loses those iterates at its front without which the
    standard error of the average is smallest, at most half of them. The parameter that counts is the one whose standard
    error is largest, relative to the standard deviation of its iterates.

    Source: Welandawe, Andersen, Vehtari and Huggins 2022, "A Framework for Improving the Reliability of Black-box
    Variational Inference", https://arxiv.org/abs/2203.15945, after Dhaka, Catalina, Andersen, Magnusson, Huggins and
    Vehtari 2020, "Robust, Accurate Stochastic Optimization for Variational Inference",
    https://arxiv.org/abs/2009.00666. The front of the window is not in these papers: White 1997, "An Effective
    Truncation Heuristic for Bias Reduction in Simulation Output", https://doi.org/10.1177/003754979706900601.

    The papers store all iterates. Here memory does not grow with their number: consecutive blocks of equal length, at
    most 20, keep their mean and their sum of squared deviations, 40 numbers of 64 bits per parameter; when there are
    20, neighbours are merged in pairs. Hence these differences:

    - windows begin where a block begins and have an even number of blocks, at least 4, hence at least a fifth of the
      iterates;
    - the rule is checked when a block is complete, every 5 to 10 % of the iterates;
    - standard errors come from batch means, the blocks being the batches (Flegal and Jones 2010,
      https://doi.org/10.1214/09-AOS735), not from autocorrelations, and need 10 blocks. With 10 to 19 blocks they are
      themselves uncertain by a sixth to a quarter.

    A parameter that moves by no more than the rounding of its dtype counts as stationary, with as many effective draws
    as iterates.

    Attributes:
        num_iterates: how many iterates were added in all.
        stationary_since: the number, from 0, of the first iterate of the stationary window; None before there is one.
        r_hat: split :math:`\hat R` of the best window at the last check, NaN before any.

    Example:
        >>> noise = torch.Generator().manual_seed(0)
        >>> average = IterateAverage()
        >>> for step in range(2000):
        ...     iterate = 3 + 10 * 0.98**step + torch.randn(1, generator=noise)
        ...     average.add(iterate)
        >>> average.window()
        (912, 2000)
        >>> error = average.standard_error()
        >>> bool((average.average() - 3).abs() < 3 * error), bool(error < 0.05)
        (True, True)
    """

    num_iterates: int
    stationary_since: int | None
    r_hat: float

    def __init__(self) -> None:
        self.num_iterates = 0
        self.restart()

    def restart(self) -> None:
        """Forget every iterate, as when the objective has changed; ``num_iterates`` goes on."""
        self.stationary_since = None
        self.r_hat = math.nan
        self._first = self.num_iterates  # the number of the first block's first iterate
        self._length = 1  # of a block
        self._means = self._m2s = torch.empty(0, 0)  # of the complete blocks, shape (blocks, num_parameters)
        self._mean = self._m2 = torch.empty(0, 0)  # of the block that is being filled, shape (num_parameters,)
        self._count = 0  # iterates in it
        self._like = torch.empty(0)  # has the dtype and the device of the iterates
        self._largest_error = math.inf
        self._smallest_size = 0.0

    def add(self, iterate: Tensor) -> None:
        """Take in the next iterate; it is not kept.

        That it is finite is checked when its block is complete: looking at values waits for the device.

        Args:
            iterate: all parameters, shape ``(num_parameters,)``, in the space in which they shall be averaged.

        Raises:
            ValueError: the iterate is no flat floating-point tensor, its length differs from that of those before, or
                an iterate of the block that it completes is not finite.
        """
        iterate = iterate.detach()
        if iterate.shape != self._mean.shape or iterate.device != self._mean.device:
            self._prepare(iterate)
        self.num_iterates += 1
        self._count += 1
        deviation = iterate - self._mean
        self._mean.add_(deviation, alpha=1 / self._count)
        self._m2.addcmul_(deviation, deviation, value=1 - 1 / self._count)
        if self._count >= self._length:
            self._complete_block()

    def window(self) -> tuple[int, int]:
        """The numbers, from 0, of the first iterate that is averaged over and of the one after the last.

        It is the stationary window with all that followed, or else the last half, which begins where a block begins, as
        near as possible to the middle.
        """
        if self.stationary_since is not None:
            return self.stationary_since, self.num_iterates
        num_iterates = self.num_iterates - self._first
        blocks_left_out = -((self._length - num_iterates) // (2 * self._length))  # half of them, rounded
        return self._first + blocks_left_out * self._length, self.num_iterates

    def average(self) -> Tensor | None:
        """The mean over :meth:`window`, shape ``(num_parameters,)``; None before the first iterate."""
        start, stop = self.window()
        if start == stop:
            return None
        complete = self._means[(start - self._first) // self._length :].sum(0) * self._length
        return ((complete + self._mean * self._count) / (stop - start)).to(self._like)

    def standard_error(self) -> Tensor | None:
        r"""The Monte Carlo standard error of the average, shape ``(num_parameters,)``.

        .. math:: \sqrt{s_b^2 / b}

        with :math:`s_b^2` the variance between the means of the window's :math:`b` complete blocks. None before the
        iterates are stationary and fill 10 blocks.
        """
        return None if not self._has_batches() else self._standard_error().to(self._like)

    def effective_sample_size(self) -> Tensor | None:
        """How many independent draws have the same standard error, shape ``(num_parameters,)``.

        The variance of the iterates over the squared standard error of their mean; None when that is.
        """
        return None if not self._has_batches() else self._effective_sample_size().to(self._like)

    def has_converged(self, tolerance: float) -> bool:
        """Whether every standard error is below ``tolerance`` and every effective sample size above 50.

        Judged when the last block was complete, so that asking costs nothing.

        Args:
            tolerance: above 0, in the units of the parameters.

        Raises:
            TypeError, ValueError: ``tolerance`` is no finite number above 0.
        """
        tolerance = _checks.positive("tolerance", tolerance)
        return self._largest_error < tolerance and self._smallest_size > _MIN_EFFECTIVE_SIZE

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that is known: numbers, tensors and None, by name."""
        return {name: _copy(value) for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called.

        Args:
            state: what it returned. Its tensors may have moved to another device: they follow the next iterate.

        Raises:
            ValueError: ``state`` is the state of something else.
        """
        if state.keys() != vars(self).keys():
            raise ValueError(
                f"state must be what IterateAverage.state_dict() returned, with the entries {sorted(vars(self))}, "
                f"got {sorted(state)}"
            )
        vars(self).update({name: _copy(value) for name, value in state.items()})

    def _prepare(self, iterate: Tensor) -> None:
        """Make the first block ready for an iterate, or follow the iterates to another device."""
        if iterate.dim() != 1 or not len(iterate) or not iterate.is_floating_point():
            raise ValueError(
                "iterate must be a flat floating-point tensor of shape (num_parameters,), got "
                f"{iterate.dtype} of shape {_checks.shape_text(iterate.shape)}; "
                "torch.nn.utils.parameters_to_vector flattens parameters"
            )
        if self.num_iterates == self._first:
            self._like = iterate.new_empty(0)
            self._mean, self._m2 = iterate.new_zeros(2, len(iterate), dtype=_precision(iterate.device))
            self._means = self._m2s = self._mean.new_empty(0, len(iterate))
        elif iterate.shape != self._mean.shape:
            raise ValueError(
                f"iterate must have the length of those before, {len(self._mean)}, got {len(iterate)}; "
                "call restart() when the parameters have changed"
            )
        else:
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(iterate.device))

    def _complete_block(self) -> None:
        if not self._mean.isfinite().all():
            raise ValueError(
                f"iterate must be finite, but among the last {self._count} there was a NaN or an infinity; "
                "leave such iterates out, and call restart() to go on"
            )
        self._means = torch.cat((self._means, self._mean[None]))
        self._m2s = torch.cat((self._m2s, self._m2[None]))
        self._mean.zero_()
        self._m2.zero_()
        self._count = 0
        if self.stationary_since is None:
            self._look_for_stationarity()
        elif len(self._means) == _MAX_BLOCKS:
            self._drop_front()
        if len(self._means) == _MAX_BLOCKS:
            self._means, self._m2s = _pool(self._means, self._m2s, self._length, _MAX_BLOCKS // 2)
            self._length *= 2
        if self._has_batches():
            worst = torch.stack((self._standard_error().max(), self._effective_sample_size().min()))
            self._largest_error, self._smallest_size = worst.tolist()

    def _look_for_stationarity(self) -> None:
        longest = _MAX_SHARE * (self.num_iterates - self._first)
        windows = [
            blocks
            for blocks in range(_MIN_BLOCKS, len(self._means) + 1, 2)
            if _MIN_ITERATES <= blocks * self._length <= longest
        ]
        if not windows:
            return
        r_hats = torch.stack([self._r_hat(blocks) for blocks in windows]).tolist()
        self.r_hat, blocks = min(zip(r_hats, windows, strict=True))
        if self.r_hat <= _MAX_R_HAT:
            self._begin_window(blocks)

    def _drop_front(self) -> None:
        """Of at most half of the blocks, leave out those without which the worst standard error is smallest."""
        half = _MAX_BLOCKS // 2
        mean, m2 = _pool(self._means[half:], self._m2s[half:], self._length, 1)
        variance = m2[0] / (half * self._length - 1)
        sizes = range(_MAX_BLOCKS, half - 1, -1)
        errors = [self._squared_error(size) for size in sizes]
        relative = [(error / variance).where(~self._is_still(error, mean[0]), 0).max() for error in errors]
        worst = torch.stack(relative).tolist()
        self._begin_window(sizes[worst.index(min(worst))])

    def _begin_window(self, blocks: int) -> None:
        self._means, self._m2s = self._means[-blocks:].clone(), self._m2s[-blocks:].clone()
        self._first = self.stationary_since = self.num_iterates - blocks * self._length

    def _r_hat(self, blocks: int) -> Tensor:
        """Split R-hat of the last blocks, the largest over all parameters."""
        half = blocks // 2 * self._length
        means, m2s = _pool(self._means[-blocks:], self._m2s[-blocks:], self._length, 2)
        within = m2s.sum(0) / (2 * (half - 1))
        between = (means[0] - means[1]).square() / 2
        ratio = (between / within).where(~self._is_still(within + between, means[0]), 0)
        return ((half - 1) / half + ratio).sqrt().max()

    def _has_batches(self) -> bool:
        return self.stationary_since is not None and len(self._means) >= _MIN_BATCHES

    def _squared_error(self, blocks: int) -> Tensor:
        """The squared standard error of the mean over the last blocks."""
        return _squared_deviations(self._means[-blocks:], 0) / (blocks - 1) / blocks

    def _standard_error(self) -> Tensor:
        return self._squared_error(len(self._means)).sqrt()

    def _effective_sample_size(self) -> Tensor:
        num_iterates = len(self._means) * self._length
        mean, m2 = _pool(self._means, self._m2s, self._length, 1)
        variance = m2[0] / (num_iterates - 1)
        size = variance / self._squared_error(len(self._means))
        return size.where(~self._is_still(variance, mean[0]), num_iterates)

    def _is_still(self, variance: Tensor, mean: Tensor) -> Tensor:
        # A ratio of variances that are nothing but rounding would hold up the parameters that do move.
        return variance <= (torch.finfo(self._like.dtype).eps * mean).square()


def _pool(means: Tensor, m2s: Tensor, length: int, groups: int) -> tuple[Tensor, Tensor]:
    """Merge consecutive blocks into equally many for each group: their means and sums of squared deviations.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance",
    https://doi.org/10.1080/00031305.1983.10483115, for any number of blocks of one length.
    """
    means, m2s = (blocks.unflatten(0, (groups, -1)) for blocks in (means, m2s))
    return means.mean(1), m2s.sum(1) + length * _squared_deviations(means, 1)


def _squared_deviations(values: Tensor, dim: int) -> Tensor:
    # Along a dimension that is not the last torch.var takes ten times as long.
    return (values - values.mean(dim, keepdim=True)).square_().sum(dim)


def _precision(device: torch.device) -> torch.dtype:
    # In float32 the mean of a long block would stand still, but Metal has nothing better.
    return torch.float32 if device.type == "mps" else torch.float64


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
