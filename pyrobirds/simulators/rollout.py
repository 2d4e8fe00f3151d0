"""The time loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map


def rollout(
    step: Callable[[Any, int], Any],
    state: Any,
    n_timesteps: int,
    *,
    observe: Callable[[Any], Any] = lambda state: state,
    include_initial: bool = False,
) -> Any:
    """Run a simulator through time and stack what is observed, time in dimension 1: ``(B, n_timesteps, ...)``."""
    seen = [observe(state)] if include_initial else []
    for t in range(n_timesteps - len(seen)):
        state = step(state, t)
        seen.append(observe(state))
    return tree_map(lambda *values: torch.stack(values, 1), *seen)
