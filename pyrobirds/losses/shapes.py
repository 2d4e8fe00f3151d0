"""What every loss checks of its arguments: shapes are stated, and nothing is broadcast."""

from __future__ import annotations

from torch import Tensor

from pyrobirds._checks import shape_text


def check_one_run(name: str, x: Tensor, y: Tensor) -> None:
    """Raise unless ``x`` and ``y`` are both ``(B, *event)``."""
    if x.shape == y.shape:
        return
    if _is_replicated(x, y):
        raise ValueError(
            f"{name}: x has shape {shape_text(x.shape)} and y has shape {shape_text(y.shape)}: {name} compares one run "
            "a draw, so leave replicates out of the Simulator, or take a loss for replicates"
        )
    raise ValueError(
        f"{name}: x has shape {shape_text(x.shape)} and y has shape {shape_text(y.shape)}; both must be (B, *event): "
        "expand y yourself if one series is to be compared with many"
    )


def check_replicates(name: str, x: Tensor, y: Tensor, least: int) -> int:
    """Raise unless ``x`` is ``(B, m, *event)`` with at least ``least`` replicates and ``y`` is ``(B, *event)``.

    Returns:
        The number m of replicates.
    """
    if _is_replicated(x, y) and x.shape[1] >= least:
        return x.shape[1]
    raise ValueError(
        f"{name}: x has shape {shape_text(x.shape)} and y has shape {shape_text(y.shape)}; expected x (B, m, *event) "
        f"with m of at least {least} and y (B, *event): pass replicates=m to the Simulator"
    )


def as_replicates(name: str, x: Tensor, y: Tensor) -> Tensor:
    """x as ``(B, m, *event)`` if it is that, or one run a draw, ``(B, *event)``; else raise."""
    if x.shape == y.shape:
        return x.unsqueeze(1)
    check_replicates(name, x, y, 1)
    return x


def _is_replicated(x: Tensor, y: Tensor) -> bool:
    return x.dim() == y.dim() + 1 and x.shape[:1] + x.shape[2:] == y.shape
