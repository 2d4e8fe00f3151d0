"""Functions of one draw, called on a batch of draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyrobirds._rng import forked_rng


class Unbatched:
    """A function of one draw that takes a batch of draws: by :func:`torch.vmap`, or by a loop where vmap cannot.

    Which of the two is found out at the first call. The loop is announced by a warning with the reason; it is also
    taken when the function draws from a generator outside of torch, whose numbers vmap would share between draws.
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
            try:
                result = _vmap(one, batch)
                if not self._checked and len(batch[0]) > 1:
                    if _draws_outside_torch(one, batch):
                        reason = "it draws from a generator outside of torch, whose numbers vmap would share"
                    self._checked = True
            except Exception as error:  # whatever it is: the loop raises it again if the function itself is at fault
                reason = f"{type(error).__name__}: {error}"
            else:
                if reason is None:
                    return result
        draws = [one(*draw) for draw in zip(*batch, strict=True)]
        if reason is not None:
            self._loops = True
            warnings.warn(
                f"{self._name} runs in a Python loop over draws, because torch.vmap cannot take it: {reason}",
                stacklevel=2,
            )
        return tree_map(lambda *outputs: torch.stack([torch.as_tensor(output) for output in outputs]), *draws)


def _vmap(one: Callable[..., Any], batch: list[Tensor]) -> Any:
    with warnings.catch_warnings():
        # Of an operation that vmap loops over inside torch, which is what the user would get otherwise.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return torch.vmap(one, randomness="different")(*batch)


def _draws_outside_torch(one: Callable[..., Any], batch: list[Tensor]) -> bool:
    """Whether two runs of one draw differ although torch's generators stand the same.

    Two more runs, once, for numbers that a batch would share without a sign of it.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    results = []
    with forked_rng(), torch.no_grad():
        for _ in range(2):
            with torch.random.fork_rng(devices):
                results.append(tree_leaves(one(*(entry[0] for entry in batch))))
    return not all(torch.allclose(a, b, equal_nan=True) for a, b in zip(*results, strict=True))
