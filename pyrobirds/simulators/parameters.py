"""How the parameters of a call are named, broadcast to one batch and flattened."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrobirds._checks import shape_text

EventDims = int | Sequence[int] | Mapping[str, int]


class Theta(NamedTuple):
    """The parameters of one call: tensors ``(*batch, *event)`` whose batches broadcast to ``batch_shape``."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    event_dims: tuple[int, ...]
    n_positional: int
    batch_shape: torch.Size

    def flat(self, batch_shape: torch.Size) -> list[Tensor]:
        """The parameters broadcast to ``batch_shape`` and flattened to ``(B, *event)``."""
        n = math.prod(batch_shape)
        events = [tensor.shape[tensor.dim() - dim :] for tensor, dim in zip(self.tensors, self.event_dims, strict=True)]
        return [
            tensor.expand(batch_shape + event).reshape(n, *event)
            for tensor, event in zip(self.tensors, events, strict=True)
        ]

    def arguments(self, flat: list[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Flattened parameters as the positional and the keyword arguments that they were passed as."""
        n = self.n_positional
        return tuple(flat[:n]), dict(zip(self.names[n:], flat[n:], strict=True))


class Parameters:
    """What a user's function takes: settings, fixed once, and parameters, given at every call.

    Args:
        name: the function's name, for messages.
        fn: the function.
        settings: its settings by name.
        event_dims: as of :class:`pyrobirds.Simulator`.
        data_last: whether the last parameter that is not a setting takes the data.
    """

    def __init__(
        self, name: str, fn: Callable[..., Any], settings: Mapping[str, Any], event_dims: EventDims, data_last: bool
    ) -> None:
        self.name = name
        self.settings = dict(settings)
        self.event_dims = event_dims
        self._signature = _signature(name, fn)
        try:
            self._signature.bind_partial(**settings)
        except TypeError as error:
            raise TypeError(
                f"{name} does not take the settings {sorted(settings)}: {error}; it is {name}{self._signature}"
            ) from None
        named = (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.POSITIONAL_ONLY,
        )
        self.names = [
            parameter.name
            for parameter in self._signature.parameters.values()
            if parameter.kind in named and parameter.name not in settings
        ]
        self.data_name = ""
        if data_last:
            if not self.names:
                raise TypeError(f"{name}{self._signature} must take parameters and, as its last parameter, the data y")
            self.data_name = self.names.pop()
        if isinstance(event_dims, Mapping) and set(event_dims) - set(self.names):
            raise ValueError(
                f"theta_event_dims names {sorted(event_dims)}, but the parameters of {name} are {self.names}"
            )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Theta:
        """Check and name the parameters of a call."""
        data = {self.data_name: None} if self.data_name else {}
        try:
            self._signature.bind(*args, **kwargs, **self.settings, **data)
        except TypeError as error:
            raise TypeError(
                f"{self.name} was called with {len(args)} positional parameters and {sorted(kwargs)} by keyword: "
                f"{error}. Its parameters are {self.names}, its settings {sorted(self.settings)}"
            ) from None
        positional = [*self.names, *(f"argument {i}" for i in range(len(self.names), len(args)))][: len(args)]
        names = [*positional, *kwargs]
        tensors = [self._tensor(name, value) for name, value in zip(names, [*args, *kwargs.values()], strict=True)]
        dims = self._dims_of(names)
        batch_shapes = []
        for name, tensor, dim in zip(names, tensors, dims, strict=True):
            if tensor.dim() < dim:
                raise ValueError(
                    f"parameter {name!r} of {self.name} has shape {shape_text(tensor.shape)}, but theta_event_dims "
                    f"says that {dim} of its dimensions belong to one draw"
                )
            batch_shapes.append(tensor.shape[: tensor.dim() - dim])
        try:
            batch_shape = torch.broadcast_shapes(*batch_shapes)
        except RuntimeError:
            shapes = ", ".join(f"{name} {shape_text(shape)}" for name, shape in zip(names, batch_shapes, strict=True))
            raise ValueError(
                f"the parameters of {self.name} do not broadcast to one batch, their batch shapes are {shapes}: if a "
                f"parameter is a vector, say so in theta_event_dims (now {self.event_dims!r})"
            ) from None
        return Theta(tuple(names), tuple(tensors), tuple(dims), len(args), batch_shape)

    def _tensor(self, name: str, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value
        try:
            return torch.as_tensor(value, dtype=torch.get_default_dtype())
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"parameter {name!r} of {self.name} must be a tensor or a number, got {value!r}") from None

    def _dims_of(self, names: list[str]) -> list[int]:
        dims = self.event_dims
        if isinstance(dims, Mapping):
            return [dims.get(name, 0) for name in names]
        if isinstance(dims, int):
            return [dims] * len(names)
        if len(dims) != len(names):
            raise ValueError(
                f"theta_event_dims of {self.name} has {len(dims)} entries for its {len(names)} parameters {names}"
            )
        in_order = sorted(names, key=lambda name: self.names.index(name) if name in self.names else len(self.names))
        return [dims[in_order.index(name)] for name in names]


def _signature(name: str, fn: Callable[..., Any]) -> inspect.Signature:
    if not callable(fn):
        raise TypeError(f"a simulator must be a function, got {fn!r}")
    try:
        return inspect.signature(fn)
    except ValueError:  # a builtin that does not tell
        anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return inspect.Signature([inspect.Parameter(f"{name}_{kind.name.lower()}", kind) for kind in anything])
