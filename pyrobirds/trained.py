"""The parameters that a fit trains, as one vector and by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor


class TrainedParameters:
    """The unconstrained parameters of model and guide by name, in the order in which they were first used."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def take(self, found: Mapping[str, Tensor]) -> bool:
        """Take the parameters of a step; say whether their number or shape is not what it was."""
        before = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.tensors.update(found)
        return before != {name: tensor.shape for name, tensor in self.tensors.items()}

    def flat(self) -> Tensor:
        """A copy of them as one vector."""
        if not self.tensors:
            return torch.zeros(0)
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors.values()))
        device = next(iter(self.tensors.values())).device
        return torch.cat([tensor.detach().reshape(-1).to(device, dtype) for tensor in self.tensors.values()])

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of such a vector, each with the shape and kind of its parameter."""
        parts = flat.split([tensor.numel() for tensor in self.tensors.values()]) if self.tensors else ()
        return {
            name: part.reshape(tensor.shape).to(tensor, copy=True)
            for (name, tensor), part in zip(self.tensors.items(), parts, strict=True)
        }

    def load(self, flat: Tensor) -> None:
        """Write such a vector into the parameters."""
        load(self.tensors, self.by_name(flat))


def load(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into tensors of the same names."""
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
