"""The gradient of a simulator by forward-mode differentiation: memory does not grow with the number of time steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyrobirds._rng import forked_rng, generators, set_generators
from pyrobirds.simulators.unbatched import Raised, Unbatched

Fn = Callable[..., tuple[Any, Raised | None]]
Pushed = tuple[list[Tensor], list[Tensor], list[Tensor]]


class NotForwardDifferentiable(ValueError):
    """A function works, but not in forward mode; this is never taken for a failed run."""


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
        self._draws_checked = False
        self._replays = False  # whether runs from the same state of the generators were seen to be equal
        self._is_independent = False
        self._one_by_one = False

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> tuple[Any, Raised | None]:
        """Call the function; the results have a gradient with respect to the arguments, and no graph behind it."""
        tensors = [*args, *kwargs.values()]
        # What any operation of torch does for subclasses of tensors, such as those by which Pyro tracks provenance.
        if has_torch_function(tensors):
            return handle_torch_function(self.__call__, tensors, *args, **kwargs)
        tracked = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
        if not tracked or not torch.is_grad_enabled() or self._is_independent:
            return self._fn(*args, **kwargs)

        def at(*primals: Tensor) -> tuple[Any, Raised | None]:
            inputs = [tensor.detach() for tensor in tensors]
            for i, primal in zip(tracked, primals, strict=True):
                inputs[i] = primal
            copies = [tensor.clone() for tensor in inputs]  # a function may write to its parameters
            return self._fn(*copies[: len(args)], **dict(zip(kwargs, copies[len(args) :], strict=True)))

        inputs = [tensors[i] for i in tracked]
        primals = [tensor.detach() for tensor in inputs]
        with nullcontext() if self._checked else _quiet_imports():
            if isinstance(self._fn, Unbatched):
                self._try_without_tangents(at, primals)
            else:
                self._check_draws_apart(at, primals)
            traced = self._differentiate(at, primals)
        if traced is None:
            return at(*primals)
        self._check_other_gradients(traced.results)
        if not self._checked:
            self._checked = True
            if not any(bool(jacobian.any()) for jacobian in traced.jacobians) and _is_independent(at, primals):
                self._is_independent = True
                return traced.result()  # without a gradient, which is what a caller looks for
        return traced.with_gradient(inputs)

    def _try_without_tangents(self, at: Fn, primals: list[Tensor]) -> None:
        """Let a function of one draw decide at first by plain numbers whether vmap takes it."""
        if not self._checked:
            with forked_rng():
                at(*primals)

    def _check_draws_apart(self, at: Fn, primals: list[Tensor]) -> None:
        """Raise if other draws change with the parameters of the first, in the first batch of several draws."""
        if self._draws_checked or len(primals[0]) < 2:
            return
        tangents = tuple(torch.zeros_like(primal) for primal in primals)
        for tangent in tangents:
            tangent[0] = 1
        with forked_rng():
            try:
                pushed, _, _ = _push(at, primals, tangents, _Shape())
            except Exception:  # said by the passes that follow
                return
        if any(bool(tangent[1:].nan_to_num().any()) for tangent in pushed if len(tangent) == len(primals[0])):
            raise NotForwardDifferentiable(
                f"{self._name} mixes up the draws of a batch: others depend on the parameters of draw 0. The batch is "
                "the FIRST dimension of parameters and results; reduce over the others only"
            )
        self._draws_checked = True

    def _check_other_gradients(self, results: list[Any]) -> None:
        """Raise if the function depends on tensors with a gradient that are not among its arguments."""
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in results):
            raise NotForwardDifferentiable(
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
            traced, equal = _one_by_one(at, primals, compare=not self._replays)
        except Exception as error:
            set_generators(states)
            with forked_rng():
                _, raised = at(*primals)  # raises what the function raises
            if raised is not None and len(raised.draws) == len(primals[0]):
                return None
            raise NotForwardDifferentiable(
                f"{self._name} cannot be differentiated in forward mode ({type(error).__name__}: {error}). Take "
                "differentiation='reverse', or, if this is about an autograd node of your own, give it a jvp"
            ) from error
        if equal is False:
            raise NotForwardDifferentiable(
                f"two runs of {self._name} from the same state of torch's, NumPy's and Python's generators differ, so "
                "that forward mode cannot take one parameter after another. Draw random numbers from these generators, "
                f"or make torch.vmap take the function ({reason}), or take differentiation='reverse'"
            )
        self._replays = self._replays or equal is True
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


class _FollowGradMode(TorchFunctionMode):
    """Makes ``torch.no_grad()`` stop tangents too, so that both modes of differentiation have the same gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **(kwargs or {}))


class _Traced:
    """The results of a call, and the Jacobians of those that are floating-point tensors."""

    def __init__(self, shape: _Shape, results: list[Tensor], others: list[Tensor], jacobians: list[Tensor]) -> None:
        self._shape = shape
        self.results = results
        self._others = others
        self.jacobians = jacobians  # (number of entries of theta, B, *event)

    def result(self) -> tuple[Any, Raised | None]:
        return self._shape.join(self.results, self._others)

    def with_gradient(self, inputs: list[Tensor]) -> tuple[Any, Raised | None]:
        results = _Linearised.apply(self.jacobians, self.results, *inputs)
        return self._shape.join([*results], self._others)


_RESULT, _OTHER = object(), object()  # the places of floating-point tensors and of other ones


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
        tensors = {_RESULT: [], _OTHER: []}
        self._leaves = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.is_complex():
                    raise TypeError("what it returns is complex; return real and imaginary parts")
                place = _RESULT if leaf.is_floating_point() else _OTHER
                tensors[place].append(leaf)
                self._leaves.append(place)
            else:
                self._leaves.append(leaf)
        return tensors[_RESULT], tensors[_OTHER]

    def join(self, results: list[Tensor], others: list[Tensor]) -> tuple[Any, Raised | None]:
        tensors = {_RESULT: iter(results), _OTHER: iter(others)}
        leaves = [next(tensors[leaf]) if leaf is _RESULT or leaf is _OTHER else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._spec), self._raised


def _push(at: Fn, primals: list[Tensor], tangents: tuple[Tensor, ...], shape: _Shape) -> Pushed:
    """The tangents of the results; the results; and what else the function returned."""
    # With gradients enabled, although nothing has one, for what switches them off to be seen.
    with torch.enable_grad(), _FollowGradMode():
        jvp: Any = torch.func.jvp(lambda *theta: shape.split(at(*theta)), tuple(primals), tangents, has_aux=True)
    results, pushed, others = jvp
    return pushed, results, others


def _along(direction: Tensor, primals: list[Tensor]) -> tuple[Tensor, ...]:
    """A direction of theta as tangents, the same for all draws."""
    sizes = [primal.shape[1:].numel() for primal in primals]
    return tuple(
        part.reshape(primal.shape[1:]).to(primal).expand_as(primal)
        for part, primal in zip(direction.split(sizes), primals, strict=True)
    )


def _directions(primals: list[Tensor]) -> Tensor:
    """The entries of theta one by one, as rows."""
    return torch.eye(
        sum(primal.shape[1:].numel() for primal in primals), dtype=primals[0].dtype, device=primals[0].device
    )


def _together(at: Fn, primals: list[Tensor]) -> _Traced:
    """All directions in one pass, in which the tangents alone are batched."""
    shape = _Shape()
    out_dims: Any = (0, None, None)
    push = torch.vmap(lambda one: _push(at, primals, _along(one, primals), shape), out_dims=out_dims, randomness="same")
    pushed: Any = push(_directions(primals))
    jacobians, results, others = pushed
    return _Traced(shape, results, others, jacobians)


def _one_by_one(at: Fn, primals: list[Tensor], *, compare: bool) -> tuple[_Traced, bool | None]:
    """One direction after another, on the same random numbers; and whether all passes had the same results."""
    states, shape = generators(), _Shape()
    equal: bool | None = None
    columns, results, others = [], [], []
    for direction in _directions(primals):
        set_generators(states)
        pushed, again, others = _push(at, primals, _along(direction, primals), shape)
        if columns and compare:
            equal = equal is not False and all(map(_equal, results, again))
        columns.append(pushed)
        results = again
    return _Traced(shape, results, others, [torch.stack(column) for column in zip(*columns, strict=True)]), equal


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, 0, 0, equal_nan=True)


def _is_independent(at: Fn, primals: list[Tensor]) -> bool:
    """Whether nothing connects the results with theta, which a derivative of zero leaves open."""

    def total(*theta: Tensor) -> Tensor:
        results, _ = _Shape().split(at(*theta))
        return torch.stack([result.sum().to(theta[0].dtype) for result in results]).sum()

    with forked_rng(), _FollowGradMode():
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
        # A derivative that overflowed is of no matter where the loss does not look: zero times infinity is zero here.
        products = [
            torch.where(gradient == 0, 0, gradient * jacobian)
            for gradient, jacobian in zip(gradients, ctx.saved_tensors, strict=True)
            if gradient is not None
        ]
        by_entry = [product.flatten(2).sum(2) if product.dim() > 2 else product for product in products]
        if not by_entry:
            return (None, None, *(None for _ in ctx.shapes))
        total = torch.stack(by_entry).sum(0).T  # (B, number of entries of theta)
        parts = total.split([shape[1:].numel() for shape in ctx.shapes], 1)
        return (None, None, *(part.reshape(shape) for part, shape in zip(parts, ctx.shapes, strict=True)))
