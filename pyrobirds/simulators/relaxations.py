"""Random choices whose draws are exact and whose gradients are relaxed."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobirds import _checks


def bernoulli(logits: Tensor, tau: float) -> Tensor:
    r"""Draw 0 or 1 with a straight-through gradient.

    The draw is :math:`\xi = 1[\lambda + \epsilon > 0]` with log-odds :math:`\lambda` and logistic noise
    :math:`\epsilon = \log u - \log(1 - u)`, so exactly Bernoulli(sigmoid(:math:`\lambda`)). The gradient is that of
    :math:`\sigma((\lambda + \epsilon) / \tau)`: biased, the less so the smaller ``tau``, and noisier. One uniform
    number a draw; in law equal to the first class of a two-class Gumbel-softmax with ``hard=True`` (Maddison, Mnih and
    Teh 2017, https://arxiv.org/abs/1611.00712; Jang, Gu and Poole 2017, https://arxiv.org/abs/1611.01144).

    Args:
        logits: log-odds of a 1, any shape.
        tau: temperature of the relaxation, above 0.

    Raises:
        TypeError, ValueError: ``tau`` is not a number above 0.

    Returns:
        Zeros and ones in the shape and dtype of ``logits``.

    Example:
        >>> logits = torch.zeros(5, requires_grad=True)
        >>> draws = bernoulli(logits, tau=0.5)
        >>> bool(((draws == 0) | (draws == 1)).all())
        True
        >>> draws.sum().backward()
        >>> bool((logits.grad > 0).all())
        True
    """
    tau = _checks.positive("tau", tau)
    u = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)  # keeps the noise above minus infinity
    soft = torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / tau)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())
