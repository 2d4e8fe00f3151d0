"""Losses with arguments: what is equal in all of them is the same loss."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor


class ValueObject:
    """A frozen dataclass, declared with ``eq=False, repr=False``, whose fields may hold tensors.

    Those of a plain dataclass can be neither compared, for the comparison of tensors has no truth value, nor read, for
    a repr of a loss with a hundred weights hides the loss. Here tensors are compared by their values, and read as a
    shape and a checksum, since a fit is resumed if the repr of its loss is what it was.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(mine, theirs) for mine, theirs in zip(_values(self), _values(other), strict=True))

    def __hash__(self) -> int:
        # Tensors change in place, and their values are on a device: equal objects need equal hashes, no more.
        return hash((type(self), *(None if isinstance(value, Tensor) else value for value in _values(self))))

    def __repr__(self) -> str:
        parts = [
            f"{field.name}={_text(value)}"
            for field, value in zip(fields(self), _values(self), strict=True)  # type: ignore[arg-type]
            if not _same(value, field.default)
        ]
        return f"{type(self).__name__}({', '.join(parts)})"


def name_of(function: Any) -> str:
    """What a loss or a function is called in a message: never an address, which is another one in each process."""
    inner = getattr(function, "func", function)  # of a functools.partial
    named = getattr(inner, "__name__", None)
    return named or (type(inner).__name__ if type(inner).__repr__ is object.__repr__ else repr(inner))


def with_arguments(function: Any) -> str:
    """The name of a loss or a function, and the arguments that a :func:`functools.partial` has fixed."""
    if not isinstance(function, partial):
        return name_of(function)
    arguments = [*map(_text, function.args), *(f"{name}={_text(value)}" for name, value in function.keywords.items())]
    return f"{name_of(function)}({', '.join(arguments)})"


def _values(instance: Any) -> list[Any]:
    return [getattr(instance, field.name) for field in fields(instance)]


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        alike = mine.device == theirs.device and mine.dtype == theirs.dtype
        return mine is theirs or (alike and torch.equal(mine, theirs))
    return not isinstance(mine, Tensor) and not isinstance(theirs, Tensor) and bool(mine == theirs)


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<tensor of shape {tuple(value.shape)}, checksum {_checksum(value):08x}>"
    return with_arguments(value) if callable(value) else repr(value)


def _checksum(values: Tensor) -> int:
    """Of the bytes of the values: equal for equal tensors, for which reason -0 becomes 0."""
    return crc32((values.detach().cpu().flatten() + 0).view(torch.uint8).numpy().tobytes())
