"""The contract between a Simulator, the user's function and the user's loss; each violation has its own message."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrobirds._checks import shape_text


def check_shape(what: str, x: Any, n: int, event_dim: int, batched: bool) -> Tensor:
    """``x`` if it is ``(n, *event)`` with ``event_dim`` dimensions after the batch, else an error."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} is a {type(x).__name__}, expected a torch tensor")
    if x.dim() == 1 + event_dim and x.shape[0] == n:
        return x
    expected = ", ".join([str(n), *["..."] * event_dim])
    remedy = (
        "put the batch of draws in front, or pass batched=False if the function simulates ONE draw, or set event_dim"
        if batched
        else "set event_dim to the number of dimensions of ONE draw"
    )
    raise ValueError(
        f"{what} has shape {shape_text(x.shape)}, expected ({expected}), that is {n} draws and event_dim={event_dim} "
        f"dimensions for each: {remedy}"
    )


def check_finite(what: str, x: Tensor) -> None:
    """Raise unless all of ``x``, ``(B, *event)``, is finite."""
    bad = ~x.isfinite().reshape(len(x), -1).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"{what} is not finite (NaN or infinity) in {int(bad.sum())} of {len(x)} draws of its first run: mend it, "
            "or choose a prior that does not reach parameters which it cannot take"
        )


def check_gradient(what: str, results: Sequence[Tensor], inputs: dict[str, Tensor]) -> None:
    """Raise unless ``results`` together depend differentiably on ``inputs``; warn of an input that has no effect."""
    # Weights that differ, because results that add up to a constant have a gradient nevertheless.
    weights = [
        torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape) * (i + 1)
        for i, x in enumerate(results)
        if x.requires_grad
    ]
    found = _gradients([x for x in results if x.requires_grad], inputs, weights)
    if found is None:
        return
    if not found:
        raise ValueError(
            f"{what} does not depend differentiably on {_names(inputs)}: compute it by torch operations that keep the "
            "graph (no .item(), .detach(), torch.tensor(theta) or NumPy), and draw discrete choices from a relaxation "
            "such as pyrobirds.simulators.relaxations.bernoulli"
        )
    if without := [name for name in inputs if name not in found or not bool(found[name].any())]:
        warnings.warn(
            f"{what} has no gradient, or one of zero, in {_names(without)} at its first run. If that should matter, "
            "mind that rounding, comparisons, .item() and .detach() pass no gradient on",
            stacklevel=2,
        )


def check_loss_gradient(what: str, value: Tensor, inputs: dict[str, Tensor]) -> None:
    """Raise unless ``value``, ``(B,)``, has a gradient, and the first draw's is one in its own parameters only."""
    found = _gradients([value[0]] if value.requires_grad else [], inputs, None)
    if found is None:
        return
    if not found:
        raise ValueError(
            f"{what} does not depend differentiably on {_names(inputs)}: compute it from x by torch operations that "
            "keep the graph (no .item(), .detach() or NumPy)"
        )
    if mixed := [name for name, gradient in found.items() if bool(gradient[1:].nan_to_num().any())]:
        raise ValueError(
            f"{what} mixes up the draws of a batch: that of the first draw depends on {_names(mixed)} of others. The "
            "batch is the FIRST dimension of parameters, x, y and loss; reduce over the others only"
        )


def _gradients(
    results: list[Tensor], inputs: dict[str, Tensor], weights: list[Tensor] | None
) -> dict[str, Tensor] | None:
    """The gradients by name of those inputs that have one; None where the graph takes no such question."""
    if not results:
        return {}
    try:
        gradients = torch.autograd.grad(results, [*inputs.values()], weights, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" in str(error).lower():  # a reentrant checkpoint, which only takes backward()
            return None
        raise
    return {name: gradient for name, gradient in zip(inputs, gradients, strict=True) if gradient is not None}


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def check_loss(what: str, value: Any, n: int, remedy: str) -> Tensor:
    """``value`` if it is one loss for each of ``n`` draws, else an error."""
    if isinstance(value, Tensor) and value.shape == (n,):
        return value
    came = f"shape {shape_text(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise ValueError(f"{what} returned {came}, expected shape ({n},), one loss for each draw: {remedy}")


def event_shape_of(what: str, y: Any, event_dim: int) -> torch.Size:
    """The shape of one draw of the data, its ``event_dim`` rightmost dimensions."""
    shape = y.shape if isinstance(y, Tensor) else torch.Size()
    if isinstance(y, Tensor) and len(shape) < event_dim:
        raise ValueError(
            f"the data of {what} has shape {shape_text(shape)}, expected at least event_dim={event_dim} dimensions: "
            "set event_dim to the number of dimensions of one draw"
        )
    return shape[len(shape) - event_dim :]


def expand_data(what: str, y: Any, event_shape: torch.Size, batch_shape: torch.Size) -> Tensor:
    """The data ``y`` expanded to ``(B, *event)``; its batch dimensions must be those that ``batch_shape`` ends in."""
    if not isinstance(y, Tensor):
        raise TypeError(f"the data of {what} must be a torch tensor, got {type(y).__name__}: pass torch.as_tensor(y)")
    n_batch_dims = y.dim() - len(event_shape)
    if n_batch_dims < 0 or y.shape[n_batch_dims:] != event_shape:
        raise ValueError(
            f"the data of {what} has shape {shape_text(y.shape)}, but one draw of the simulator has shape "
            f"{shape_text(event_shape)}: make them equal, e.g. by the simulator's number of time steps"
        )
    if n_batch_dims > len(batch_shape) or y.shape[:n_batch_dims] != batch_shape[len(batch_shape) - n_batch_dims :]:
        raise ValueError(
            f"the data of {what} has batch shape {shape_text(y.shape[:n_batch_dims])}, which the batch shape "
            f"{shape_text(batch_shape)} of its parameters and plates does not end in: put several series into a "
            "pyro.plate, and give one series no dimension in front of its event"
        )
    return y.expand(batch_shape + event_shape).reshape(batch_shape.numel(), *event_shape)
