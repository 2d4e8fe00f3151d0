"""Random numbers of a block's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro import util
from torch import Tensor


class Generators(NamedTuple):
    """The states of the global generators of torch, NumPy and Python, and of CUDA devices once CUDA is in use."""

    host: dict[str, Any]  # as Pyro has them: "torch", "numpy", "random"
    cuda: list[Tensor]


def generators() -> Generators:
    """The states as they are."""
    return Generators(util.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])


def set_generators(states: Generators) -> None:
    """Put the generators back into these states, of as many CUDA devices as there are."""
    util.set_rng_state(states.host)
    for device, state in zip(range(torch.cuda.device_count()) if states.cuda else (), states.cuda, strict=False):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Run a block, from ``seed`` if given, and leave the generators as they were found."""
    states = generators()
    try:
        if seed is not None:
            util.set_rng_seed(seed)
        yield
    finally:
        set_generators(states)
