"""The contract between a Simulator, the user's function and the user's loss.

Each violation has its own message. Draws that fail are none: they are kept from the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

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


def all_of_event(x: Tensor) -> Tensor:
    """By draw, ``(B,)``, whether every entry of the bool tensor ``x``, ``(B, *event)``, is true."""
    return x.flatten(1).all(1) if x.dim() > 1 else x


def check_gradient(what: str, results: Sequence[Tensor], inputs: dict[str, Tensor]) -> bool:
    """Raise unless ``results`` together depend differentiably on ``inputs``; warn of an input that has no effect.

    Draws of which nothing, or no gradient, is finite say nothing about it. Returns whether there was another draw.
    """
    survived = reduce(torch.logical_or, (~all_of_event(~x.isfinite()) for x in results))
    if not bool(survived.any()):
        return False
    # Weights that differ, because results that add up to a constant have a gradient nevertheless.
    weights = [
        torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape) * (i + 1)
        for i, x in enumerate(results)
        if x.requires_grad
    ]
    found = _gradients([x for x in results if x.requires_grad], inputs, weights)
    if found is None:
        return True
    if not found:
        raise ValueError(
            f"{what} does not depend differentiably on {_names(inputs)}: compute it by torch operations that keep the "
            "graph (no .item(), .detach(), torch.tensor(theta) or NumPy), and draw discrete choices from a relaxation "
            "such as pyrobirds.simulators.relaxations.bernoulli"
        )
    survived = survived & ~_not_finite(found.values())
    if not bool(survived.any()):
        return False
    if without := [name for name in inputs if name not in found or not bool(found[name][survived].any())]:
        warnings.warn(
            f"{what} has no gradient, or one of zero, in {_names(without)} at its first run. If that should matter, "
            "mind that rounding, comparisons, .item() and .detach() pass no gradient on",
            stacklevel=2,
        )
    return True


def check_loss_gradient(what: str, value: Tensor, worked: Tensor, inputs: dict[str, Tensor]) -> bool:
    """Raise unless ``value``, ``(B,)``, has a gradient, and that of one draw is in its own parameters only.

    Returns whether there was a draw to look at, one that ``worked``.
    """
    survivors = worked.nonzero().flatten().tolist()
    if not survivors:
        return False
    draw = survivors[0]
    found = _gradients([value[draw]] if value.requires_grad else [], inputs, None)
    if found is None:
        return True
    if not found:
        raise ValueError(
            f"{what} does not depend differentiably on {_names(inputs)}: compute it from x by torch operations that "
            "keep the graph (no .item(), .detach() or NumPy)"
        )
    others = torch.arange(len(value), device=value.device) != draw
    # A gradient of zero becomes NaN on its way through draws that failed; that of another draw is not among these.
    if mixed := [name for name, gradient in found.items() if bool(gradient[others].nan_to_num().any())]:
        raise ValueError(
            f"{what} mixes up the draws of a batch: that of draw {draw} depends on {_names(mixed)} of others. The "
            "batch is the FIRST dimension of parameters, x, y and loss; reduce over the others only"
        )
    return True


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


@dataclass
class Backward:
    """What the last backward pass met: the draws, ``(B,)``, whose gradient was not finite; None before it."""

    failed: Tensor | None = None


def guard(backward: Backward, parameters: list[Tensor]) -> list[Tensor]:
    """The same parameters, ``(B, *event)``, that pass on the gradients of draws in which they are all finite.

    Those of the other draws become zero. Where a loss is left out, its gradient of zero times an infinite derivative
    inside the user's function is NaN, which would spoil whatever is computed from all draws.
    """
    tracked = [parameter for parameter in parameters if parameter.requires_grad]
    guarded = iter(_guard(backward, *tracked)) if tracked else iter(())
    # All of them are copies: a function may write to its parameters, and these may share memory with the guide's draws.
    return [next(guarded) if parameter.requires_grad else parameter.clone() for parameter in parameters]


def _guard(backward: Backward, *parameters: Tensor) -> tuple[Tensor, ...]:
    # What any operation of torch does for subclasses of tensors, such as those by which Pyro tracks provenance.
    if has_torch_function(parameters):
        return handle_torch_function(_guard, parameters, backward, *parameters)
    return _Guard.apply(backward, *parameters)


class _Guard(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(backward: Backward, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(parameter.clone() for parameter in parameters)  # views could not be written to

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.met = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        failed = _not_finite(gradient for gradient in gradients if gradient is not None)
        ctx.met.failed = failed
        return None, *(
            None if gradient is None else gradient.masked_fill(like(failed, gradient), 0) for gradient in gradients
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[1:]


def _not_finite(tensors: Iterable[Tensor]) -> Tensor:
    """The draws, ``(B,)``, in which one of these, ``(B, *event)``, is not finite."""
    return ~reduce(torch.logical_and, (all_of_event(tensor.isfinite()) for tensor in tensors))


def like(draws: Tensor, x: Tensor) -> Tensor:
    """``draws``, ``(B,)``, in a shape that broadcasts over the event of ``x``, ``(B, *event)``."""
    return draws.reshape(-1, *[1] * (x.dim() - 1))


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
