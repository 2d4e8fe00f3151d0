"""What every test and doctest of the repository runs in: one thread, a fixed seed, and global state that stays put."""

from collections.abc import Iterator
from typing import Any

import matplotlib
import pyro
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)  # pytest-xdist already keeps every core busy


def global_state() -> dict[str, Any]:
    """The settings of this process that a test, or an import, must leave as it found them."""
    return {
        "torch default dtype": torch.get_default_dtype(),
        "torch default device": torch.get_default_device(),
        "torch gradient mode": torch.is_grad_enabled(),
        "torch threads": torch.get_num_threads(),
        "matplotlib backend": matplotlib.get_backend(),
        **{f"pyro setting {name}": value for name, value in pyro.settings.get().items()},
    }


def restore(state: dict[str, Any]) -> None:
    torch.set_default_dtype(state["torch default dtype"])
    torch.set_default_device(None)
    torch.set_grad_enabled(state["torch gradient mode"])
    torch.set_num_threads(state["torch threads"])
    matplotlib.use(state["matplotlib backend"])
    prefix = "pyro setting "
    pyro.settings.set(**{key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})


@pytest.fixture(autouse=True)
def isolation() -> Iterator[None]:
    """Start from an empty param store and seed 0; fail the test that changes global state, and only that one."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = global_state()
    yield
    after = global_state()
    changed = [f"{key}: {before[key]} before, {after[key]} after" for key in before if before[key] != after[key]]
    if changed:
        restore(before)
        pytest.fail("the test changed global state and did not put it back:\n  " + "\n  ".join(changed), pytrace=False)


@pytest.fixture
def double_precision() -> Iterator[None]:
    """New tensors have 64 bits, so that an estimate differs from the exact answer by its error, not by rounding."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)
