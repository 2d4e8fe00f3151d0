"""Losses: how far simulated paths are from the observed one.

A loss is any callable ``(x, y) -> (B,)`` of simulated ``x`` and observed ``y``, both of shape ``(B, *event)``; a loss
for a simulator with ``replicates=m`` takes ``x`` of shape ``(B, m, *event)``. It knows nothing of simulators. NaN in
``y`` marks missing data and is masked.
"""

from pyrobirds.losses.errors import mse

__all__ = ["mse"]
