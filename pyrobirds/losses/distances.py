"""Distances between runs and between points, and the bandwidths that are read off them."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._checks import shape_text

Bandwidth = float | Literal["median"]


class Runs(NamedTuple):
    """Replicates and data with the event flattened to D entries; zero in both where y is missing."""

    x: Tensor  # (B, m, D)
    y: Tensor  # (B, D)
    observed: Tensor  # (B, D)


class Points(NamedTuple):
    """The time points of x and y as unordered points; zero in both where y is missing.

    R is 1 where the B series of ``y`` are one that was expanded, so that what depends on it alone is computed once.
    """

    x: Tensor  # (B, T, d)
    y: Tensor  # (R, T, d)
    observed: Tensor  # (R, T)


def runs(x: Tensor, y: Tensor) -> Runs:
    """Replicates ``(B, m, *event)`` and data ``(B, *event)`` as vectors of their entries."""
    observed, dtype, n = ~y.isnan(), common_dtype(x, y), math.prod(y.shape[1:])
    x = torch.where(observed.unsqueeze(1), x, 0).to(dtype)  # here, since NaN times a zero gradient is NaN
    y = torch.where(observed, y, 0).to(dtype)
    return Runs(x.reshape(*x.shape[:2], n), y.reshape(len(y), n), observed.reshape(len(y), n))


def points(name: str, x: Tensor, y: Tensor) -> Points:
    """A run ``(B, T)`` or ``(B, T, d)`` and data of the same shape as points; one that misses a coordinate is missing.

    Raises:
        ValueError: the event is neither ``(T,)`` nor ``(T, d)``.
    """
    if y.dim() not in (2, 3):
        raise ValueError(
            f"{name}: x and y have shape {shape_text(y.shape)}; expected (B, T), a number at each time, or (B, T, d), "
            "a point with d coordinates at each time"
        )
    y = distinct(y)
    if y.dim() == 2:
        x, y = x.unsqueeze(-1), y.unsqueeze(-1)
    observed, dtype = ~y.isnan().any(-1), common_dtype(x, y)
    seen = observed.unsqueeze(-1)
    return Points(torch.where(seen, x, 0).to(dtype), torch.where(seen, y, 0).to(dtype).detach(), observed)


def distinct(y: Tensor) -> Tensor:
    """The data without their copies if they are one series that was expanded, as a Simulator does."""
    return y[:1] if y.stride(0) == 0 else y


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of ``(..., n, d)`` to ``(..., k, d)``, shape ``(..., n, k)``; their gradient at 0 is 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # the other mode loses half of the digits


def median_or(mean: Tensor, squares: Tensor) -> Tensor:
    """The median of squared distances ``(R, n)`` without NaN, or else ``mean``, or else 1: always above 0, ``(R,)``.

    More than half of the distances are 0 in data of few values, such as counts; all of them are in a constant series.
    """
    median = squares.nanmedian(1).values
    scale = torch.where(median > 0, median, mean)
    return torch.where(scale > 0, scale, 1)


def check_bandwidth(bandwidth: Any) -> None:
    """Raise unless ``bandwidth`` is "median" or a number above 0."""
    if isinstance(bandwidth, str):
        if bandwidth != "median":
            raise ValueError(f'bandwidth must be "median" or a number above 0, got {bandwidth!r}')
        return
    _checks.positive("bandwidth", bandwidth)


def common_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """The floating dtype in which x and y are compared; counts alone are compared in torch's default one."""
    dtype = torch.result_type(x, y)
    return dtype if dtype.is_floating_point else torch.get_default_dtype()
