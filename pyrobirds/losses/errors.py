"""Losses that compare entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobirds.losses.shapes import check_one_run


def mse(x: Tensor, y: Tensor) -> Tensor:
    r"""Mean squared error over the event.

    .. math:: \ell_b = \frac{1}{|O_b|} \sum_{i \in O_b} (x_{b,i} - y_{b,i})^2,

    where :math:`O_b` holds the entries of the event at which ``y`` is observed (not NaN). A series without any observed
    entry says nothing and has loss 0.

    Args:
        x: simulated data, shape ``(B, *event)``, in the units of ``y``.
        y: observed data, shape ``(B, *event)``; NaN where missing.

    Returns:
        One loss per batch element, shape ``(B,)``, in squared units of ``y``.

    Raises:
        ValueError: ``x`` and ``y`` differ in shape; nothing is broadcast.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
        >>> y = torch.tensor([[0.0, 1.0, 4.0], [1.0, float("nan"), 1.0]])
        >>> mse(x, y)
        tensor([1.3333, 1.0000])
    """
    check_one_run("mse", x, y)
    observed = ~torch.isnan(y)
    # NaN must go before the square, not after: where() passes NaN gradients through the branch that it does not take.
    errors = torch.where(observed, x - torch.where(observed, y, 0), 0)
    event = tuple(range(1, x.dim()))
    if not event:
        return errors.square()
    return errors.square().sum(event) / observed.sum(event).clamp(min=1)
