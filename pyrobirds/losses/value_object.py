"""Losses with arguments: what is equal in all of them is the same loss."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor


class ValueObject:
    """A frozen dataclass, declared with ``eq=False, repr=False``, whose fields may hold tensors.

    Those of a plain dataclass can be neither compared, for the comparison of tensors has no truth value, nor read, for
    a repr of a loss with a hundred weights hides the loss.
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
            if value is not field.default
        ]
        return f"{type(self).__name__}({', '.join(parts)})"


def name_of(function: Any) -> str:
    """What a loss or a function is called in a message."""
    inner = getattr(function, "func", function)  # of a functools.partial
    return getattr(inner, "__name__", None) or repr(inner)


def _values(instance: Any) -> list[Any]:
    return [getattr(instance, field.name) for field in fields(instance)]


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return mine is theirs or (mine.device == theirs.device and torch.equal(mine, theirs))
    return not isinstance(mine, Tensor) and not isinstance(theirs, Tensor) and bool(mine == theirs)


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<tensor of shape {tuple(value.shape)}>"
    return name_of(value) if callable(value) else repr(value)
