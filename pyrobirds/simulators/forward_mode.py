"""The gradient of a simulator by forward-mode differentiation: memory does not grow with the number of time steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyrobirds._rng import forked_rng, generators, set_generators
from pyrobirds.simulators.unbatched import Raised

Fn = Callable[..., tuple[Any, Raised | None]]
Pushed = tuple[list[Tensor], list[Tensor], list[Tensor]]


class NotForwardDifferentiable(RuntimeError):
    """A function works, but not in forward mode."""


class ForwardMode:
    r"""A simulator that brings its Jacobian along, :math:`\partial x_b / \partial\theta_b` for each draw b.

    One entry of theta at a time gets the tangent 1 in all draws at once, which gives the derivatives of each draw with
    respect to its own theta since no draw depends on another's. All entries go through :func:`torch.vmap` in one pass,
    in which x is computed once; where vmap cannot take the function, each has a pass of its own on the same random
    numbers, and a warning says so.

    Args:
        fn: takes tensors ``(B, *event)`` and returns its results, tensors ``(B, *event)`` in any structure, and which
            draws raised.
        name: the function's, for messages.
    """

    def __init__(self, fn: Fn, name: str) -> None:
        self._fn = fn
        self._name = name
        self._checked = False
        self._one_by_one = False

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> tuple[Any, Raised | None]:
        """Call the function; the results have a gradient with respect to the arguments, and no graph behind it."""
        tensors = [*args, *kwargs.values()]
        tracked = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
        if not tracked or not torch.is_grad_enabled():
            return self._fn(*args, **kwargs)

        def at(*primals: Tensor) -> tuple[Any, Raised | None]:
            inputs = [tensor.detach() for tensor in tensors]
            for i, primal in zip(tracked, primals, strict=True):
                inputs[i] = primal
            return self._fn(*inputs[: len(args)], **dict(zip(kwargs, inputs[len(args) :], strict=True)))

        inputs = [tensors[i] for i in tracked]
        primals = [tensor.detach() for tensor in inputs]
        if not self._checked:
            self._check_other_gradients(at, primals)
        with torch.no_grad(), nullcontext() if self._checked else _quiet_imports():
            traced = self._differentiate(at, primals)
        if traced is None:
            return at(*primals)
        if not self._checked:
            self._checked = True
            if not any(bool(jacobian.any()) for jacobian in traced.jacobians) and _is_independent(at, primals):
                return traced.result()  # without a gradient, which is what a caller looks for
        return traced.with_gradient(inputs)

    def _check_other_gradients(self, at: Fn, primals: list[Tensor]) -> None:
        """Raise if the function depends on tensors with a gradient that are not among its arguments."""
        with forked_rng():
            result, _ = at(*primals)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            raise ValueError(
                f"{self._name} depends on tensors with a gradient that are not among its parameters (a module's, say), "
                "which differentiation='forward' would lose: pass them as parameters, or take differentiation='reverse'"
            )

    def _differentiate(self, at: Fn, primals: list[Tensor]) -> _Traced | None:
        """The results and their Jacobians; None if the function itself raises in all draws."""
        states, reason = generators(), ""
        if not self._one_by_one:
            try:
                return _together(at, primals)
            except Exception as error:  # whatever it is: the passes find out whether the function itself is at fault
                reason = f"{type(error).__name__}: {error}"
            set_generators(states)
        try:
            traced, equal = _one_by_one(at, primals, compare=not self._checked)
        except Exception as error:
            set_generators(states)
            with forked_rng():
                _, raised = at(*primals)  # raises what the function raises
            if raised is not None and len(raised.draws) == len(primals[0]):
                return None
            raise NotForwardDifferentiable(
                f"{self._name} cannot be differentiated in forward mode ({type(error).__name__}: {error}). Give "
                "your own autograd nodes a jvp (torch.autograd.Function), or take differentiation='reverse'"
            ) from error
        if not equal:
            raise NotForwardDifferentiable(
                f"two runs of {self._name} from the same state of torch's, NumPy's and Python's generators differ, so "
                "that forward mode cannot take one parameter after another. Draw random numbers from these generators, "
                f"or make torch.vmap take the function ({reason}), or take differentiation='reverse'"
            )
        if reason:
            self._one_by_one = True
            warnings.warn(
                f"{self._name} runs once for each of its parameters in forward mode, because torch.vmap cannot take "
                f"it: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        return traced


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """Torch loads its rules for forward mode at first use, and these warn of how they are written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        yield


class _Traced:
    """The results of a call, and the Jacobians of those that are floating-point tensors."""

    def __init__(self, shape: _Shape, results: list[Tensor], others: list[Tensor], jacobians: list[Tensor]) -> None:
        self._shape = shape
        self._results = results
        self._others = others
        self.jacobians = jacobians  # (number of entries of theta, B, *event)

    def result(self) -> tuple[Any, Raised | None]:
        return self._shape.join(self._results, self._others)

    def with_gradient(self, inputs: list[Tensor]) -> tuple[Any, Raised | None]:
        results = _Linearised.apply(self.jacobians, self._results, *inputs)
        return self._shape.join([*results], self._others)


class _Shape:
    """What a function returned, taken apart: the structure and what is not a tensor."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._spec: Any = None
        self._raised: Raised | None = None

    def split(self, called: tuple[Any, Raised | None]) -> tuple[list[Tensor], list[Tensor]]:
        """The floating-point tensors of the result, and its other ones."""
        result, self._raised = called
        leaves, self._spec = tree_flatten(result)
        kinds = [leaf.is_floating_point() if isinstance(leaf, Tensor) else None for leaf in leaves]
        self._leaves = [leaf if kind is None else kind for leaf, kind in zip(leaves, kinds, strict=True)]
        results = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind is True]
        others = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind is False]
        return results, others

    def join(self, results: list[Tensor], others: list[Tensor]) -> tuple[Any, Raised | None]:
        tensors = {True: iter(results), False: iter(others)}
        leaves = [next(tensors[leaf]) if isinstance(leaf, bool) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._spec), self._raised


def _push(at: Fn, primals: list[Tensor], direction: Tensor, shape: _Shape) -> Pushed:
    """The tangents of the results along one direction of theta, the same for all draws; the results; the others."""
    sizes = [primal[0].numel() for primal in primals]
    tangents = tuple(
        part.reshape(primal.shape[1:]).to(primal).expand_as(primal)
        for part, primal in zip(direction.split(sizes), primals, strict=True)
    )
    jvp: Any = torch.func.jvp(lambda *theta: shape.split(at(*theta)), tuple(primals), tangents, has_aux=True)
    results, pushed, others = jvp
    return pushed, results, others


def _directions(primals: list[Tensor]) -> Tensor:
    """The entries of theta one by one, as rows."""
    return torch.eye(sum(primal[0].numel() for primal in primals), dtype=primals[0].dtype, device=primals[0].device)


def _together(at: Fn, primals: list[Tensor]) -> _Traced:
    """All directions in one pass, in which the tangents alone are batched."""
    shape = _Shape()
    out_dims: Any = (0, None, None)
    push = torch.vmap(lambda one: _push(at, primals, one, shape), out_dims=out_dims, randomness="same")
    pushed: Any = push(_directions(primals))
    jacobians, results, others = pushed
    return _Traced(shape, results, others, jacobians)


def _one_by_one(at: Fn, primals: list[Tensor], *, compare: bool) -> tuple[_Traced, bool]:
    """One direction after another, on the same random numbers; and whether all passes had the same results."""
    states, shape, equal = generators(), _Shape(), True
    columns, results, others = [], [], []
    for direction in _directions(primals):
        set_generators(states)
        pushed, again, others = _push(at, primals, direction, shape)
        if columns and compare:
            equal = equal and all(
                torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in zip(results, again, strict=True)
            )
        columns.append(pushed)
        results = again
    return _Traced(shape, results, others, [torch.stack(column) for column in zip(*columns, strict=True)]), equal


def _is_independent(at: Fn, primals: list[Tensor]) -> bool:
    """Whether nothing connects the results with theta, which a derivative of zero leaves open."""

    def total(*theta: Tensor) -> Tensor:
        results, _ = _Shape().split(at(*theta))
        return torch.stack([result.sum().to(theta[0].dtype) for result in results]).sum()

    with forked_rng(), torch.no_grad():
        try:
            torch.func.jvp(total, tuple(primals), tuple(map(torch.ones_like, primals)), strict=True)
        except RuntimeError as error:
            return "independent" in str(error)
    return False


class _Linearised(torch.autograd.Function):
    """Results as they are, whose backward pass multiplies by Jacobians that are known already."""

    @staticmethod
    def forward(ctx: Any, jacobians: list[Tensor], results: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*jacobians)
        ctx.shapes = [tensor.shape for tensor in inputs]
        ctx.set_materialize_grads(False)
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # type: ignore[override]
        by_entry = [
            (gradient * jacobian).flatten(2).sum(2) if gradient.dim() > 1 else gradient * jacobian
            for gradient, jacobian in zip(gradients, ctx.saved_tensors, strict=True)
            if gradient is not None
        ]
        if not by_entry:
            return (None, None, *(None for _ in ctx.shapes))
        total = torch.stack(by_entry).sum(0).T  # (B, number of entries of theta)
        parts = total.split([shape[1:].numel() for shape in ctx.shapes], 1)
        return (None, None, *(part.reshape(shape) for part, shape in zip(parts, ctx.shapes, strict=True)))
