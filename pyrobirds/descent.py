"""Whether a noisy objective improves, stalls or diverges."""

from __future__ import annotations

import math
from collections import deque
from statistics import median, quantiles

_WINDOW = 25  # totals that are smoothed
_RISE = 10.0  # times the scale of the best window
_EXPLOSION = 1000.0  # times the first total
_NOT_FINITE = 10  # in a row


class Descent:
    """The totals of a fit, smoothed and judged.

    One total is an estimate from one batch of simulations, noisy and often heavy-tailed, so that the lowest of many is
    luck. What is judged is the median of the last 25: outliers do not move it, and a lucky batch does not either.

    The objective diverges if this median is above the first total and above its own lowest value by ten times the
    larger of that value's size and the spread (interquartile range) of its window; or if the last three totals are each
    a thousand times the first; or if ten totals or gradients in a row are not finite.

    Attributes:
        smoothed: the median of the last 25 totals, NaN before there are so many.
        best: its lowest value so far, infinite before there is one.
        stall: for how many totals there has been none lower.
        diverged: why the objective diverges, in words; empty if it does not.
    """

    def __init__(self) -> None:
        self.smoothed = math.nan
        self.best = math.inf
        self.stall = 0
        self.diverged = ""
        self.first = math.nan
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._spread = 0.0  # of the best window
        self._not_finite = 0  # in a row

    def add(self, total: float, grad_norm: float) -> bool:
        """Take the next total and the norm of its gradient, and say whether the smoothed total is a new lowest."""
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            self._not_finite += 1
            if self._not_finite >= _NOT_FINITE:
                self.diverged = f"the objective or its gradient was not finite in {_NOT_FINITE} steps in a row"
            return False
        self._not_finite = 0
        if not self._recent:
            self.first = total
        self._recent.append(total)
        exploded = self.first + _EXPLOSION * abs(self.first)
        if len(self._recent) >= 3 and self.first != 0 and min(list(self._recent)[-3:]) > exploded:
            self.diverged = f"the objective rose from {self.first:.4g} to more than {_EXPLOSION:g} times that"
        if len(self._recent) < _WINDOW:
            return False
        self.smoothed = median(self._recent)
        if self.smoothed < self.best:
            low, _, high = quantiles(self._recent, n=4)
            self.best, self._spread, self.stall = self.smoothed, high - low, 0
            return True
        self.stall += 1
        if self.smoothed > max(self.first, self.best + _RISE * max(abs(self.best), self._spread)):
            self.diverged = f"the smoothed objective rose from {self.best:.4g} to {self.smoothed:.4g}"
        return False
