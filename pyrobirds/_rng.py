"""Random numbers of a block's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pyro.util import get_rng_state, set_rng_seed, set_rng_state


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Run a block, from ``seed`` if given, and leave the generators of torch, NumPy and Python as they were found."""
    state = get_rng_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            if seed is not None:
                set_rng_seed(seed)
            yield
        finally:
            set_rng_state(state)
