"""Several losses on one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._checks import shape_text
from pyrobirds.losses.value_object import name_of, with_arguments

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Sum:
    r"""A weighted sum of losses of the same x and y.

    .. math:: \ell(x, y) = \sum_i a_i \ell_i(x, y).

    Losses add in the units that they have, so the weights carry the inverse units. Several outputs of a simulator need
    no sum: they are several sites, whose losses add in the model, with weights by ``pyro.poutine.scale``.

    Args:
        losses: callables ``(x, y) -> (B,)``, all for one run or all for replicates.
        weights: :math:`a_i`, a number of at least 0 for each loss; None for 1 each.

    Called with the x and y that its losses take, it returns one loss per batch element, shape ``(B,)``.

    Raises:
        TypeError, ValueError: there is no loss, or what is none, or not one weight of at least 0 for each, or a loss
            returns another shape than ``(B,)``.

    Example:
        >>> from pyrobirds import losses
        >>> both = Sum([losses.mse, losses.mae], weights=[1.0, 0.5])
        >>> both
        Sum(1.0 * mse + 0.5 * mae)
        >>> both(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([2.5000])
    """

    losses: Sequence[Loss]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if callable(self.losses) or isinstance(self.losses, str) or not isinstance(self.losses, Sequence):
            raise TypeError(f"Sum: losses must be a list of callables (x, y) -> (B,), got {self.losses!r}")
        losses = tuple(self.losses)
        for loss in losses:
            if not callable(loss):
                raise TypeError(f"Sum: each loss must be a callable (x, y) -> (B,), got {loss!r}")
        if not losses:
            raise ValueError("Sum: losses is empty, expected at least one")
        weights = (1.0,) * len(losses) if self.weights is None else tuple(self.weights)
        if len(weights) != len(losses):
            raise ValueError(f"Sum: {len(weights)} weights for {len(losses)} losses, expected one for each")
        weights = tuple(_checks.non_negative("each weight of Sum", weight) for weight in weights)
        # Tuples of numbers, whatever came, so that equal sums are equal and have a hash.
        object.__setattr__(self, "losses", losses)
        object.__setattr__(self, "weights", weights)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        values = []
        for loss, weight in zip(self.losses, self.weights or (), strict=True):
            value = loss(x, y)
            if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
                came = f"shape {shape_text(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(
                    f"Sum: the loss {name_of(loss)} returned {came} for {x.shape[0]} draws, expected "
                    f"({x.shape[0]},): reduce over the event only, e.g. by .mean(-1)"
                )
            values.append(weight * value)
        return torch.stack(values).sum(0)

    def __repr__(self) -> str:
        pairs = zip(self.losses, self.weights or (), strict=True)
        return f"Sum({' + '.join(f'{weight} * {with_arguments(loss)}' for loss, weight in pairs)})"
