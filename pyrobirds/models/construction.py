"""How models make their Simulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from pyrobirds.simulators import Simulator

Loss = Callable[[Tensor, Tensor], Tensor]


def shared_simulator(fn: Callable[..., Any], loss: Loss | Mapping[str, Loss], **options: Any) -> Simulator:
    """Return one Simulator for all calls of a model, so that its contract is checked once and not at every step.

    Raises:
        TypeError: the loss or an option cannot be hashed; or what :class:`pyrobirds.Simulator` raises.
    """
    by_output = tuple(loss.items()) if isinstance(loss, Mapping) else loss
    for name, value in [("loss", by_output), *options.items()]:
        if not _is_hashable(value):
            Simulator(fn, loss, **options)  # may know better what is wrong
            raise TypeError(
                f"{name} of models.{fn.__name__} must be hashable, as functions, numbers and the losses of "
                f"pyrobirds.losses are, got {value!r}: pass it inside of a function"
            )
    return _made(fn, by_output, **options)


# Typed, for 2.0 and True are equal to 2 and 1 but are no number of time steps.
@lru_cache(typed=True)
def _made(fn: Callable[..., Any], loss: Loss | tuple[tuple[str, Loss], ...], **options: Any) -> Simulator:
    return Simulator(fn, dict(loss) if isinstance(loss, tuple) else loss, **options)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
