"""Functions of one draw, called on a batch of draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyrobirds._rng import forked_rng, generators, set_generators


@dataclass
class Raised:
    """The draws of a batch in which a function raised an exception."""

    draws: list[int]
    error: Exception | None  # that of the first of them


class Unbatched:
    """A function of one draw that takes a batch of draws: by :func:`torch.vmap`, or by a loop where vmap cannot.

    Which of the two is found out at the first call. The loop is announced by a warning with the reason; it is also
    taken when the function draws from a generator outside of torch, whose numbers vmap would share between draws, and
    for a batch in which a draw raises an exception, for vmap cannot say which.
    """

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        self._fn = fn
        self._name = name
        self._loops = False
        self._checked = False

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> tuple[Any, Raised | None]:
        """Call the function on each draw; every argument holds one entry a draw in its first dimension.

        Returns:
            What the function returned, with NaN for the draws that raised, or None if all did; and who raised.
        """

        def one(*draw: Tensor) -> Any:
            return self._fn(*draw[: len(args)], **dict(zip(kwargs, draw[len(args) :], strict=True)))

        batch = [*args, *kwargs.values()]
        reason = None
        if not self._loops:
            # The loop draws what it would draw had vmap not been tried, so that a fit can be resumed.
            states = generators()
            try:
                result = _vmap(one, batch)
                if not self._checked and len(batch[0]) > 1:
                    if _draws_outside_torch(one, batch):
                        reason = "it draws from a generator outside of torch, whose numbers vmap would share"
                    self._checked = reason is None
            except Exception as error:  # whatever it is: the loop finds out whether the function itself is at fault
                reason = f"{type(error).__name__}: {error}"
            else:
                if reason is None:
                    return result, None
            set_generators(states)
        draws, raised = _loop(one, batch)
        if reason is not None and raised is None:
            self._loops = True
            warnings.warn(
                f"{self._name} runs in a Python loop over draws, because torch.vmap cannot take it: {reason}",
                stacklevel=2,
            )
        if raised is not None and len(raised.draws) == len(draws):
            return None, raised
        return tree_map(lambda *outputs: torch.stack(outputs), *draws), raised


def _vmap(one: Callable[..., Any], batch: list[Tensor]) -> Any:
    with warnings.catch_warnings():
        # Of an operation that vmap loops over inside torch, which is what the user would get otherwise.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return torch.vmap(one, randomness="different")(*batch)


def _loop(one: Callable[..., Any], batch: list[Tensor]) -> tuple[list[Any], Raised | None]:
    """What each draw returned, as tensors; NaN, in the shape of the others, for a draw that raised."""
    returned: dict[int, Any] = {}
    raised = Raised([], None)
    for i, draw in enumerate(zip(*batch, strict=True)):
        try:
            result = one(*draw)
        except Exception as error:
            raised.draws.append(i)
            raised.error = error if raised.error is None else raised.error
        else:
            returned[i] = tree_map(torch.as_tensor, result)
    blank = tree_map(_nan_like, next(iter(returned.values()), None))
    return [returned.get(i, blank) for i in range(len(batch[0]))], raised if raised.draws else None


def _nan_like(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.full_like(x, torch.nan, dtype=None if x.is_floating_point() else torch.get_default_dtype())


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
