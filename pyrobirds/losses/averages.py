"""The mean over those entries of an event that are observed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyrobirds._checks import shape_text

# The version of a tensor of weights when its values were looked at: a look waits for the device, so there is one for
# each version, which torch counts up at every change in place.
_checked = WeakTensorKeyDictionary()


def mean_over_observed(name: str, errors: Tensor, observed: Tensor, weights: Tensor | None) -> Tensor:
    r"""The weighted mean over the event, :math:`\sum_{i \in O_b} w_i e_{b,i} / \sum_{i \in O_b} w_i`.

    Args:
        name: of the loss, for messages.
        errors: ``(B, *event)``, 0 where y is not observed.
        observed: where y is observed, bool, ``(B, *event)``.
        weights: ``event``, of at least 0; None for equal ones.

    Returns:
        Shape ``(B,)``; 0 where no weight is on what is observed.

    Raises:
        TypeError, ValueError: the weights are none.
    """
    event = tuple(range(1, errors.dim()))
    if weights is None:
        return errors.sum(event) / observed.sum(event).clamp(min=1) if event else errors
    check_weights(name, weights)
    if weights.shape != errors.shape[1:]:
        raise ValueError(
            f"{name}: weights has shape {shape_text(weights.shape)}, but the event has shape "
            f"{shape_text(errors.shape[1:])}: give each entry of the event its weight"
        )
    weights = weights.to(errors)
    if not event:  # torch takes a sum over no dimension for one over all of them
        return errors * (weights > 0)
    total = (weights * observed).sum(event)
    return (weights * errors).sum(event) / torch.where(total > 0, total, 1)


def check_weights(name: str, weights: object) -> None:
    """Raise unless ``weights`` is a tensor of finite numbers of at least 0."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name}: weights must be a tensor of the shape of the event, got a {type(weights).__name__}")
    version = 0 if weights.is_inference() else weights._version  # torch does not count those of inference tensors
    if _checked.get(weights) == version:
        return
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"{name}: weights must be finite numbers of at least 0, got {weights!r}")
    _checked[weights] = version
