"""How the parameters of a call are named, broadcast to one batch and flattened."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._checks import shape_text

EventDims = int | Sequence[int] | Mapping[str, int]

_OF_SIMULATOR = {"loss", "batched", "theta_event_dims", "event_dim", "differentiation", "replicates", "seed"}


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

    def differentiable(self, flat: list[Tensor]) -> dict[str, Tensor]:
        """Those of the flattened parameters, by name, with respect to which there is a gradient."""
        return {name: tensor for name, tensor in zip(self.names, flat, strict=True) if tensor.requires_grad}

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
        takes_data: whether one parameter takes the data: the one called y, or else the last without a default.
    """

    def __init__(
        self, name: str, fn: Callable[..., Any], settings: Mapping[str, Any], event_dims: EventDims, takes_data: bool
    ) -> None:
        self.name = name
        self.settings = dict(settings)
        self._signature = _signature(name, fn)
        try:
            self._signature.bind_partial(**settings)
        except TypeError as error:
            raise TypeError(
                f"{name} does not take the settings {sorted(settings)}: {error}; it is {name}{self._signature}"
            ) from None
        kinds = inspect.Parameter
        parameters = [
            parameter
            for parameter in self._signature.parameters.values()
            if parameter.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD) and parameter.name not in settings
        ]
        self._data = _data_parameter(name, self._signature, parameters) if takes_data else None
        self.names = [parameter.name for parameter in parameters if parameter is not self._data]
        self.event_dims = self._checked_event_dims(event_dims)

    def with_data(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with the data where the function takes them."""
        if self._data is None:
            return args, {**kwargs}
        if self._data.kind is inspect.Parameter.POSITIONAL_ONLY:
            return (*args, y), {**kwargs}
        return args, {**kwargs, self._data.name: y}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Theta:
        """Check and name the parameters of a call."""
        try:
            all_args, all_kwargs = self.with_data(args, kwargs, None)
            self._signature.bind(*all_args, **all_kwargs, **self.settings)
        except TypeError as error:
            data = f", the data are its {self._data.name!r}" if self._data else ""
            clashing = sorted(_OF_SIMULATOR & {*self.names})
            remedy = f". Fix {clashing}, which Simulator takes itself, by functools.partial" if clashing else ""
            raise TypeError(
                f"{self.name} was called with {len(args)} positional parameters and {sorted(kwargs)} by keyword: "
                f"{error}. Its parameters are {self.names}, its settings {sorted(self.settings)}{data}{remedy}"
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

    def _checked_event_dims(self, event_dims: Any) -> EventDims:
        if isinstance(event_dims, Mapping):
            if unknown := set(event_dims) - set(self.names):
                raise ValueError(
                    f"theta_event_dims names {sorted(unknown)}, but the parameters of {self.name} are {self.names}"
                )
            return {name: _checks.non_negative_int("theta_event_dims", dim) for name, dim in event_dims.items()}
        if isinstance(event_dims, Sequence) and not isinstance(event_dims, str):
            return [_checks.non_negative_int("theta_event_dims", dim) for dim in event_dims]
        return _checks.non_negative_int("theta_event_dims", event_dims)

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


def _data_parameter(name: str, signature: inspect.Signature, parameters: list[inspect.Parameter]) -> inspect.Parameter:
    called_y = [parameter for parameter in parameters if parameter.name == "y"]
    required = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    if len(parameters) < 2 or not (called_y or required):
        raise TypeError(
            f"{name}{signature} must take parameters and the data: in a parameter called y, or in the last one without "
            "a default"
        )
    return (called_y or required)[-1]


def _signature(name: str, fn: Callable[..., Any]) -> inspect.Signature:
    if not callable(fn):
        raise TypeError(f"a simulator must be a function, got {fn!r}")
    try:
        return inspect.signature(fn)
    except ValueError:  # a builtin that does not tell
        anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return inspect.Signature([inspect.Parameter(f"{name}_{kind.name.lower()}", kind) for kind in anything])
