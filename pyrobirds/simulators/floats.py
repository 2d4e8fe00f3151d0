"""What the parameters of the reference simulators are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def float_tensor(name: str, value: Any) -> Tensor:
    """Return ``value`` if it is a tensor of 32 or 64 bits, or raise; with fewer bits counts and long sums are wrong."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of float32 or float64, got a {type(value).__name__}: pass a tensor")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be of float32 or float64, got {value.dtype}: use {name}.float()")
    return value
