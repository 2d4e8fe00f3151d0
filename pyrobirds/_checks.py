"""Checks of what users pass in: each names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import torch


def positive_int(name: str, value: object) -> int:
    """Return ``value`` as an int of at least 1, or raise."""
    return _int_of_at_least(1, name, value)


def non_negative_int(name: str, value: object) -> int:
    """Return ``value`` as an int of at least 0, or raise."""
    return _int_of_at_least(0, name, value)


def seed(name: str, value: object) -> int:
    """Return ``value`` as a seed that torch, NumPy and Python all take, or raise."""
    number = non_negative_int(name, value)
    if number >= 2**32:
        raise ValueError(f"{name} must be below 2**32, got {value!r}")
    return number


def _int_of_at_least(least: int, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(value)


def non_negative(name: str, value: object) -> float:
    """Return ``value`` as a finite float of at least 0, or raise."""
    return _in_range("number of at least 0", lambda number: number >= 0, name, value)


def finite(name: str, value: object) -> float:
    """Return ``value`` as a finite float, or raise."""
    return _in_range("number", lambda number: True, name, value)


def share(name: str, value: object) -> float:
    """Return ``value`` as a float between 0 and 1, or raise."""
    return _in_range("number between 0 and 1", lambda number: 0 <= number <= 1, name, value)


def boolean(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False, or raise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _in_range(expected: str, holds: Callable[[float], bool], name: str, value: object) -> float:
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a {expected}, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or not holds(number):
        raise ValueError(f"{name} must be a finite {expected}, got {value!r}")
    return number


def positive(name: str, value: object) -> float:
    """Return ``value`` as a finite float above 0, or raise."""
    return _in_range("number above 0", lambda number: number > 0, name, value)


def shape_text(shape: Sequence[int]) -> str:
    """A shape as users write it: ``(10, 100)``."""
    return str(tuple(shape))
