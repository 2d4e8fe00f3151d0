"""Functions of one draw, called on a batch of draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.util import get_rng_state
from torch import Tensor
from torch.utils._pytree import tree_map


class Unbatched:
    """A function of one draw that takes a batch of draws: by :func:`torch.vmap`, or by a loop where vmap cannot.

    Which of the two is found out at the first call. The loop is announced by a warning with the reason; it is also
    taken when the function draws from NumPy's or Python's global generator, whose numbers vmap would share.
    """

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        self._fn = fn
        self._name = name
        self._loops = False
        self._checked = False

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Call the function on each draw; every argument holds one entry a draw in its first dimension."""

        def one(*draw: Tensor) -> Any:
            return self._fn(*draw[: len(args)], **dict(zip(kwargs, draw[len(args) :], strict=True)))

        batch = [*args, *kwargs.values()]
        reason = None
        if not self._loops:
            before = None if self._checked else _outside_noise()
            try:
                with warnings.catch_warnings():
                    # Of an operation that vmap loops over inside torch, which is what the user would get otherwise.
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    result = torch.vmap(one, randomness="different")(*batch)
            except Exception as error:  # whatever it is: the loop raises it again if the function itself is at fault
                reason = f"{type(error).__name__}: {error}"
            else:
                if before is not None and before != _outside_noise():
                    reason = "it draws from NumPy's or Python's generator, whose numbers vmap would share between draws"
                else:
                    self._checked = True
                    return result
        draws = [one(*draw) for draw in zip(*batch, strict=True)]
        if reason is not None:
            self._loops = True
            warnings.warn(
                f"{self._name} runs in a Python loop over draws, because torch.vmap cannot take it: {reason}",
                stacklevel=2,
            )
        return tree_map(lambda *outputs: torch.stack([torch.as_tensor(output) for output in outputs]), *draws)


def _outside_noise() -> tuple[Any, ...]:
    state = get_rng_state()
    kind, keys, *rest = state["numpy"]
    return (kind, keys.tobytes(), *rest, state["random"])
