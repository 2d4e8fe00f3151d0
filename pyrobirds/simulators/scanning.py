"""The time loop as one compiled program, by torch's ``scan`` operator.

``scan`` is a prototype in torch: whatever it refuses is handed on as :class:`NotCompiled`, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._C._functorch import peek_interpreter_stack
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
from torch._higher_order_ops.scan import scan, scan_op
from torch._inductor.custom_graph_pass import CustomGraphPass, get_custom_graph_passes, get_hash_for_files
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_leaves, tree_map

# Of one step function: by batch size, number of time steps, and any number in its closure that is not a tensor.
RECOMPILE_LIMIT = 32


class NotCompiled(Exception):
    """The loop could not be compiled; the message is the reason, in one line."""


def scanned(
    step: Callable[..., Any],
    state: Any,
    n_steps: int,
    *,
    inputs: Any,
    observe: Callable[[Any], Any],
    include_initial: bool,
    gradient_horizon: int | None,
    time_dim: int,
) -> Any:
    """What :func:`~pyrobirds.simulators.rollout` returns, computed by one compiled program.

    Args:
        step: ``step(state, t)``, or ``step(state, t, inputs)`` if there are ``inputs``; ``t`` is a 0-dim tensor.
        state: pytree of tensors, the initial state.
        n_steps: number of calls of ``step``, at least 1.
        inputs: pytree of tensors ``(n_steps, ...)``, or None.
        observe: what to keep of a state.
        include_initial: whether the history begins with the initial state.
        gradient_horizon: the state is detached before steps 0, h, 2h, ...; None for never.
        time_dim: the dimension of time in what is returned.

    Raises:
        NotCompiled: torch cannot compile it.
    """
    device = tree_leaves(state)[0].device
    arguments = (step, state, n_steps, inputs, observe, include_initial, gradient_horizon, time_dim, device)
    if torch.compiler.is_compiling():  # inside of a larger program, of which the scan becomes a part
        return _scan(*arguments)
    if get_proxy_mode() is not None:
        raise NotCompiled("it is being traced by make_fx, which does not trace compiled programs")
    if _transformed():
        raise NotCompiled("torch compiles neither forward-mode differentiation nor vmap of its scan operator")
    fallback_random = _with_inductor().config.fallback_random
    try:
        with _unvalidated():
            return _region(_code(step), _code(observe), device.type, fallback_random)(*arguments)
    # Most exceptions of the compiler are RuntimeErrors, and so is what its programs raise.
    except (FailOnRecompileLimitHit, RuntimeError, IndexError) as error:
        raise NotCompiled(_reason(error)) from error


def _scan(
    step: Callable[..., Any],
    initial: Any,
    n_steps: int,
    inputs: Any,
    observe: Callable[[Any], Any],
    include_initial: bool,
    gradient_horizon: int | None,
    time_dim: int,
    device: torch.device,
) -> Any:
    if not torch.compiler.is_compiling():
        raise NotCompiled("torch.compile is switched off (by TORCHDYNAMO_DISABLE or torch.compiler.set_stance)")

    def one(carried: Any, at: tuple[Any, ...]) -> tuple[Any, Any]:
        state = tree_map(lambda x, like: x.to(like.dtype), carried, initial)
        if gradient_horizon is not None:
            cut = at[0] % gradient_horizon == 0
            state = tree_map(lambda leaf: torch.where(cut, leaf.detach(), leaf), state)
        state = step(state, *at)
        # Said by the caller, who runs the step without compilation if this raises; the casts here would hide it.
        if any(x.dtype != like.dtype for x, like in zip(tree_leaves(state), tree_leaves(initial), strict=True)):
            raise TypeError("a step changes the dtype of the state")
        return _carried(state), _carried(observe(state))

    at = (torch.arange(n_steps, device=device), *([] if inputs is None else [inputs]))
    _, history = scan(one, _carried(initial), at)
    first = observe(initial)
    history = tree_map(lambda x, like: x.to(like.dtype), history, first)
    if include_initial:
        history = tree_map(lambda x, rest: torch.cat([x.unsqueeze(0), rest]), first, history)
    return tree_map(lambda x: x.movedim(0, time_dim), history)


def _carried(tree: Any) -> Any:
    """A contiguous copy of each leaf, integers as floating point.

    Because ``scan`` takes no two tensors that share memory, nor a state whose strides change, and has no backward pass
    if anything that comes out of a step is of a type without a gradient. Integers below 2^53 are exact in double
    precision.
    """

    def carried(x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype if x.dtype.is_floating_point or x.dtype.is_complex else torch.float64
        return x.to(dtype, copy=True, memory_format=torch.contiguous_format)

    return tree_map(carried, tree)


@functools.cache
def _region(step: Any, observe: Any, device: str, fallback_random: bool) -> Callable[..., Any]:
    """The compiled loop for one pair of functions, with recompilations counted for that pair alone.

    Functions count as the same by their code, so a closure that is made anew at each call is compiled once.
    ``fallback_random`` is told apart because torch does not look at it again once a program is compiled.
    """
    options: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, "isolate_recompiles": True}
    backend = functools.partial(_backend, device=device)
    return torch.compile(_scan, fullgraph=True, dynamic=False, backend=backend, **options)


def _code(fn: Callable[..., Any]) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__code__", type(fn))


def _backend(graph: Any, example_inputs: Any, *, device: str) -> Any:
    from torch._functorch import config as functorch_config
    from torch._functorch._aot_autograd import graph_compile

    inductor = _with_inductor()
    with (
        _quiet(),
        # A backward pass that cannot be compiled is an error now rather than in the backward pass.
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        # Else the backward pass would take the saved tensors for its own and refuse retain_graph=True. The setting of
        # that purpose, donated_buffer, is looked at again in the backward pass, where it is not ours to change.
        mock.patch.object(graph_compile, "collect_bw_donated_buffer_idxs", return_value=[]),
    ):
        settings = {
            "post_grad_custom_post_pass": (
                *get_custom_graph_passes(inductor.config.post_grad_custom_post_pass),
                _OwnMemory(),
            ),
            # On a CPU most of the time would go into a loop in Python around the kernels of a step.
            "cpp_wrapper": device == "cpu",
            # That wrapper is no valid C++ if what comes out of a loop is overwritten, as after a loop of one step.
            "inplace_buffers": False,
        }
        return inductor.compile_fx.compile_fx(graph, example_inputs, config_patches=settings)


class _OwnMemory(CustomGraphPass):
    """A pass of the compiler that gives each tensor of a scan's next state memory of its own.

    An earlier pass takes out the copies that :func:`_carried` makes, even where they keep two tensors of the state
    apart: it looks for outputs that share memory before it has taken out any. The same happens to gradients by two
    tensors of the state. The C++ wrapper moves each output out of the step, the second time from a null pointer. So
    the copies are put back once that pass is done; one that nobody needs costs nothing.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        for call in graph.find_nodes(op="call_function", target=scan_op):
            step, initial, *_ = call.args
            program: Any = getattr(graph.owning_module, step.target)
            output = program.graph.output_node()
            results = list(output.args[0])
            with program.graph.inserting_before(output):
                for i, result in enumerate(results[: len(initial)]):
                    results[i] = program.graph.call_function(torch.ops.aten.clone.default, (result,))
                    results[i].meta = result.meta.copy()
            output.args = (tuple(results),)
            program.recompile()

    def uuid(self) -> bytes:
        """What torch's cache of compiled programs tells passes apart by."""
        return get_hash_for_files((__file__,))


@functools.cache
def _with_inductor() -> Any:
    with _quiet():
        import torch._inductor.compile_fx
    return torch._inductor


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Without the checks of values in torch's distributions, which branch on data.

    torch.compile switches them off when it is first used, and leaves them so.
    """
    validate = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validate)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says about its own modules and about the way the operators of ``scan`` are called."""
    log = logging.getLogger("torch._inductor.ir")

    def of_others(record: logging.LogRecord) -> bool:
        return "missing a c-shim" not in record.getMessage()

    log.addFilter(of_others)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        log.removeFilter(of_others)


def _transformed() -> bool:
    """Whether a transformation of ``torch.func`` or a forward-mode pass is under way."""
    return peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _reason(error: BaseException) -> str:
    """What torch says about a failed compilation, in one line; the rest is in the error itself."""
    if isinstance(error, FailOnRecompileLimitHit):
        return (
            f"it has been compiled {RECOMPILE_LIMIT} times, once for each batch size, number of time steps and number "
            "in its closure (make those 0-dim tensors)"
        )
    while isinstance(error, BackendCompilerFailed):
        error = error.inner_exception
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    headed = [line for line in lines if not line.startswith("This higher order operator")]
    explanation = [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
    return ": ".join([*headed[:1], *explanation[:1]]) or type(error).__name__
