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
    return Runs(x.reshape(*x.shape[:2], n), y.reshape(len(y), n))


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


def powers_of_distances(points: Tensor, power: float) -> Tensor:
    r"""The distances between all points to a power, :math:`\|z_i - z_j\|^p`, in any mode of differentiation.

    Args:
        points: ``(B, n, D)``.
        power: p, above 0.

    Returns:
        Shape ``(B, n, n)``. The gradient at a distance of 0 is 0. The first derivative in reverse keeps nothing of size
        B n^2 D; tangents and further derivatives do.
    """
    return _PowersOfDistances.apply(points, power)


class _PowersOfDistances(torch.autograd.Function):
    """Torch's own distances have neither a second derivative nor one in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(points: Tensor, power: float) -> Tensor:
        distance = distances(points, points)
        return distance if power == 1 else distance**power

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        points, ctx.power = inputs
        ctx.save_for_backward(points, output)
        ctx.save_for_forward(points, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        points, output = ctx.saved_tensors
        both = gradients[0] + gradients[0].mT  # a pair of points is met as (i, j) and as (j, i)
        if torch.is_grad_enabled():  # a second derivative is asked for
            differences = _differences(points)
            slopes = both * _slopes(differences, ctx.power)
            return (slopes.unsqueeze(-2) @ differences).squeeze(-2), None
        distance = output if ctx.power == 1 else output ** (1 / ctx.power)
        if ctx.power != 1:
            both = both * ctx.power * torch.where(distance > 0, distance, 1) ** (ctx.power - 1)
        # What torch's own node calls: exact for near points far from 0, of which a product of matrices keeps no digit.
        return torch.ops.aten._cdist_backward(both, points, points, 2.0, distance), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        points, _ = ctx.saved_tensors
        differences = _differences(points)
        along = (differences @ tangents[0].unsqueeze(-1)).squeeze(-1)  # how i moves away from j
        return _slopes(differences, ctx.power) * (along + along.mT)


def _differences(points: Tensor) -> Tensor:
    """z_i - z_j, shape ``(B, n, n, D)``."""
    return points.unsqueeze(-2) - points.unsqueeze(-3)


def _slopes(differences: Tensor, power: float) -> Tensor:
    """By which a difference is multiplied in the gradient of its norm to the power, ``(B, n, n)``."""
    squares = differences.square().sum(-1)
    apart = squares > 0
    return torch.where(apart, power * torch.where(apart, squares, 1) ** (power / 2 - 1), 2.0 if power == 2 else 0.0)


def score_of_pairs(values: Tensor) -> Tensor:
    r"""The fair score of m runs and data by values f of their pairs, which do not depend on the pair's order.

    .. math:: \frac{2}{m} \sum_i f(x_i, y) - \frac{1}{m (m - 1)} \sum_{i \ne j} f(x_i, x_j).

    Args:
        values: f of all pairs of the m runs and, last, the data: ``(B, m + 1, m + 1)``.

    Returns:
        Shape ``(B,)``.
    """
    m = values.shape[1] - 1
    weights = torch.full((m + 1, m + 1), -1 / (m * (m - 1)), dtype=values.dtype, device=values.device)
    weights[m] = weights[:, m] = 1 / m
    weights.fill_diagonal_(0)
    return values.flatten(1) @ weights.flatten()


def median_or(mean: Tensor, squares: Tensor) -> Tensor:
    """The median of squared distances ``(R, n)`` without NaN, or else ``mean``, or else 1: always above 0, ``(R,)``.

    More than half of the distances are 0 in data of few values, such as counts; all of them are in a constant series.
    """
    median = squares.nanmedian(1).values
    scale = torch.where(median > 0, median, mean)
    return torch.where(scale > 0, scale, 1)


def check_bandwidth(bandwidth: Any) -> Bandwidth:
    """Return "median" or a float above 0, or raise."""
    if isinstance(bandwidth, str):
        if bandwidth != "median":
            raise ValueError(f'bandwidth must be "median" or a number above 0, got {bandwidth!r}')
        return "median"
    return _checks.positive("bandwidth", bandwidth)


def common_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """The floating dtype in which x and y are compared; counts alone are compared in torch's default one."""
    dtype = torch.result_type(x, y)
    return dtype if dtype.is_floating_point else torch.get_default_dtype()
