"""Whether a noisy objective improves, stalls or diverges."""

from __future__ import annotations

import math
from collections import deque
from statistics import quantiles

_WINDOW = 25  # totals that are smoothed
_RISE = 10.0  # times the scale of what was seen before
_EXPLOSION = 1000.0  # times the first total
_NOT_FINITE = 10  # in a row


class Descent:
    """The totals of a fit, smoothed and judged.

    One total is an estimate from one batch of simulations, noisy and often heavy-tailed, so that the lowest of many is
    luck. What is judged is the median of the last 25: outliers do not move it, and a lucky batch does not either.

    The objective diverges if for 25 totals in a row this median is above the first total, and above its own lowest
    value by ten times the largest of that value's size, of how far it had come down to it, and of the spread
    (interquartile range) of any window until then; or if each of the last 25 totals is a thousand times the first; or
    if ten totals or gradients in a row are not finite.

    Attributes:
        smoothed: the median of the last 25 totals, NaN before there are so many.
        best: its lowest value so far, infinite before there is one.
        stall: for how many totals there has been none lower.
        first: the first total.
        diverged: why the objective diverges, in words; empty if it does not.
    """

    def __init__(self) -> None:
        self.smoothed = math.nan
        self.best = math.inf
        self.stall = 0
        self.first = math.nan
        self.diverged = ""
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._spread = self._spread_until_best = 0.0  # the largest of any window
        self._risen = 0  # for how many totals in a row
        self._not_finite = 0  # in a row

    def is_finite(self, total: float, grad_norm: float) -> bool:
        """Whether a total and the norm of its gradient are; many in a row that are not make the fit diverge."""
        if math.isfinite(total) and math.isfinite(grad_norm):
            self._not_finite = 0
            return True
        self._not_finite += 1
        if self._not_finite >= _NOT_FINITE:
            self.diverged = f"the objective or its gradient was not finite in {_NOT_FINITE} steps in a row"
        return False

    def add(self, total: float) -> bool:
        """Take the next total, which is finite, and say whether the smoothed total is a new lowest."""
        if not self._recent:
            self.first = total
        self._recent.append(total)
        if len(self._recent) < _WINDOW:
            return False
        if min(self._recent) > self.first + _EXPLOSION * abs(self.first) and self.first != 0:
            self.diverged = f"the objective rose from {self.first:.4g} to more than {_EXPLOSION:g} times that"
        low, self.smoothed, high = quantiles(self._recent, n=4, method="inclusive")
        self._spread = max(self._spread, high - low)
        if self.smoothed < self.best:
            self.best, self._spread_until_best, self.stall = self.smoothed, self._spread, 0
            return True
        self.stall += 1
        scale = max(abs(self.best), abs(self.first - self.best), self._spread_until_best)
        self._risen = self._risen + 1 if self.smoothed > max(self.first, self.best + _RISE * scale) else 0
        if self._risen >= _WINDOW:
            self.diverged = f"the smoothed objective rose from {self.best:.4g} to {self.smoothed:.4g}"
        return False
