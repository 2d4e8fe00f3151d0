"""Functions of one draw, called on a batch of draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.util import get_rng_state
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
            before = _outside_noise()
            try:
                result = _vmap(one, batch)
                if not self._checked and len(batch[0]) > 1:
                    self._checked = True
                    if before != _outside_noise() or _shares_noise(one, batch):
                        reason = "it draws from a generator outside of torch, whose numbers vmap would share"
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


def _shares_noise(one: Callable[..., Any], batch: list[Tensor]) -> bool:
    """Whether two copies of a draw get the same noise under vmap, but different noise by themselves.

    Finds generators of the function's own, such as ``numpy.random.default_rng()``, unless torch adds noise to theirs.
    """
    with forked_rng(), torch.no_grad():
        twice = [entry[:1].expand(2, *entry.shape[1:]) for entry in batch]
        first, second = zip(*map(torch.unbind, tree_leaves(_vmap(one, twice))), strict=True)
        if not _all_equal(first, second):
            return False
        draw = [entry[0] for entry in batch]
        return not _all_equal(tree_leaves(one(*draw)), tree_leaves(one(*draw)))


def _all_equal(a: Any, b: Any) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def _outside_noise() -> tuple[Any, ...]:
    state = get_rng_state()
    kind, keys, *rest = state["numpy"]
    return (kind, keys.tobytes(), *rest, state["random"])
