"""The time loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
)
from torch.utils._pytree import keystr as path_text
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from pyrobirds import _checks
from pyrobirds._checks import shape_text
from pyrobirds._rng import forked_rng


def rollout(
    step: Callable[..., Any],
    state: Any,
    n_timesteps: int,
    *,
    inputs: Any = None,
    observe: Callable[[Any], Any] = lambda state: state,
    include_initial: bool = False,
    time_dim: int = 1,
    gradient_horizon: int | None = None,
    checkpoint_every: int | None = None,
    compile: bool = False,
) -> Any:
    r"""Run a simulator through time and stack what is observed.

    .. math:: s_{t+1} = \mathrm{step}(s_t, t), \qquad t = 0, 1, \ldots

    The history holds :math:`\mathrm{observe}(s_1), \mathrm{observe}(s_2), \ldots`, with ``include_initial`` it begins
    with :math:`\mathrm{observe}(s_0)`. It is stacked once; nothing else is kept of the states but what autograd saves.

    ``gradient_horizon=h`` is truncated backpropagation through time: the state is a constant at the start of each
    block of h steps, so that

    .. math:: \frac{d s_{t}}{d \theta} = \sum_{u = h \lfloor (t - 1) / h \rfloor}^{t - 1}
        \Big(\prod_{v = u + 1}^{t - 1} \frac{\partial s_{v + 1}}{\partial s_v}\Big)
        \frac{\partial s_{u + 1}}{\partial \theta}

    in place of the sum from u = 0. Parameters that ``step`` uses are never detached; the initial state is, at step 0,
    so put what should have a gradient into ``step``. The values are the same. (Williams and Peng 1990,
    https://doi.org/10.1162/neco.1990.2.4.490)

    ``checkpoint_every=k`` is activation checkpointing (Chen et al. 2016, https://arxiv.org/abs/1604.06174): autograd
    saves the state at every k-th step and runs the k steps in between again during the backward pass, with the same
    random numbers of torch's global generators. The gradient is the same; what is saved grows with k + T / k for one
    more forward run. In forward mode nothing is saved, and it does nothing.

    ``compile=True`` runs the loop by torch's ``scan`` operator, compiled as a whole: some seconds for a new ``step``,
    batch size or number of time steps, and much faster from then on if the state is small. The values follow the same
    law; they are the same path by path if ``inputs`` hold the noise, or if ``torch._inductor.config.fallback_random``
    is set and a step draws once. See ``docs/time_loops.md``.

    Args:
        step: ``step(state, t)`` that returns the next state, of the same structure, shapes and dtypes, in new tensors;
            with ``inputs`` it is ``step(state, t, inputs)``. ``t`` is an int, or a 0-dim integer tensor if compiled.
        state: the initial state, any pytree of tensors such as ``(B,)`` or ``(agents, B)``.
        n_timesteps: number of values in the history, the initial one included if ``include_initial``.
        inputs: pytree of tensors ``(number of steps, ...)`` such as noise drawn beforehand; each step gets its own
            entry. Time is in their FIRST dimension.
        observe: what to keep of a state: returns a pytree of tensors, ``(B, ...)`` if time is in dimension 1.
        include_initial: whether the history begins with the initial state; there is one step less then.
        time_dim: the dimension of time in the history: 1 behind one batch dimension, -1 behind any number of them if
            each observed value is a number.
        gradient_horizon: number of steps, at least 1, that gradients reach back through the state; None for all.
        checkpoint_every: number of steps, at least 1, between the states that are saved; None to save all.
        compile: whether to compile the loop.

    Returns:
        The pytree that ``observe`` returns, each leaf with time in ``time_dim``: ``(B, n_timesteps, ...)``.

    Raises:
        TypeError, ValueError: an argument is none of the above, the state changes its structure, shapes, dtypes or
            device in the first step, what is observed changes in any step, or a tensor of the history was written to.
        RuntimeError: ``compile=True`` where torch cannot compile the loop (the reason is given), or
            ``checkpoint_every`` inside of ``torch.vmap`` or ``torch.func.grad``.

    Example:
        >>> theta = torch.tensor([0.5, 0.9], requires_grad=True)
        >>> x = rollout(lambda x, t: theta * x, torch.ones(2), n_timesteps=3, include_initial=True)
        >>> x.shape, x[0].tolist()
        (torch.Size([2, 3]), [1.0, 0.5, 0.25])
        >>> x[0, -1].backward()
        >>> theta.grad[0]  # of theta squared
        tensor(1.)
    """
    n_timesteps = _checks.positive_int("n_timesteps", n_timesteps)
    include_initial = _checks.boolean("include_initial", include_initial)
    n_steps = n_timesteps - include_initial
    if gradient_horizon is not None:
        gradient_horizon = _checks.positive_int("gradient_horizon", gradient_horizon)
    if checkpoint_every is not None:
        checkpoint_every = _checks.positive_int("checkpoint_every", checkpoint_every)
    if isinstance(time_dim, bool) or not isinstance(time_dim, int):
        raise TypeError(f"time_dim must be a whole number, got {time_dim!r}")
    _check_state(state)
    if inputs is not None:
        _check_inputs(inputs, n_steps)
    if _checks.boolean("compile", compile):
        if checkpoint_every is not None:
            raise ValueError(
                "compile=True and checkpoint_every exclude each other: the compiled loop chooses itself what to save. "
                "Leave one of them out"
            )
        if n_steps:
            return _compiled(step, state, n_steps, inputs, observe, include_initial, gradient_horizon, time_dim)

    history = _History(observe, time_dim)
    if include_initial:
        history.add(state)
    at = _by_step(inputs, n_steps)
    if checkpoint_every is None or not _saves():
        _run(step, state, range(n_steps), at, gradient_horizon, history.add)
        return history.stacked()

    def segment(state: Any, ts: range) -> tuple[Any, list[Any]]:
        seen: list[Any] = []
        state = _run(step, state, ts, at, gradient_horizon, lambda state: seen.append(observe(state)))
        return state, seen

    for start in range(0, n_steps, checkpoint_every):
        ts = range(start, min(start + checkpoint_every, n_steps))
        state, seen = checkpoint(segment, state, ts, use_reentrant=False)
        for x in seen:
            history.add_observed(x)
    return history.stacked()


def _run(
    step: Callable[..., Any],
    state: Any,
    ts: range,
    at: Callable[[int], tuple[Any, ...]],
    gradient_horizon: int | None,
    see: Callable[[Any], None],
) -> Any:
    # Containers of its own, for a step may write to them: the caller's stay as they are, and so does the state from
    # which a segment runs a second time.
    state = _copied(state)
    for t in ts:
        if gradient_horizon is not None and t % gradient_horizon == 0:
            state = tree_map(lambda leaf: leaf.detach(), state)
        if t == 0:
            before, state = _copied(state), step(state, t, *at(t))
            _check_same("the state", before, state, "step 0", "the step must return a state like the one it got")
            del before
        else:
            state = step(state, t, *at(t))
        see(state)
    return state


def _copied(state: Any) -> Any:
    """The same tensors in new containers."""
    return tree_map(lambda leaf: leaf, state)


class _History:
    """What was observed so far, by leaf; the states themselves are not kept."""

    def __init__(self, observe: Callable[[Any], Any], time_dim: int) -> None:
        self._observe = observe
        self._time_dim = time_dim
        self._first: Any = None
        self._series: list[list[Tensor]] = []
        self._versions: list[list[int]] = []

    def add(self, state: Any) -> None:
        self.add_observed(self._observe(state))

    def add_observed(self, observed: Any) -> None:
        leaves, spec = tree_flatten(observed)
        if not self._series:
            _check_tensors("what observe returns", observed)
            self._first = (tree_map(lambda leaf: leaf.detach(), observed), spec)
            self._series = [[] for _ in leaves]
            self._versions = [[] for _ in leaves]
        elif spec != self._first[1]:
            self._refuse(observed)
        for leaf, series, versions in zip(leaves, self._series, self._versions, strict=True):
            if series and not _alike(leaf, series[0]):
                self._refuse(observed)
            # A view would keep the whole state, and of inference tensors nobody counts how often they are written to.
            if leaf.is_inference() or (leaf._base is not None and leaf._base.numel() > leaf.numel()):
                leaf = leaf.clone()
            series.append(leaf)
            versions.append(_version(leaf))

    def _refuse(self, observed: Any) -> None:
        when = f"value {len(self._series[0])} of the history"
        _check_same("what observe returns", self._first[0], observed, when, "each value of the history must be alike")

    def stacked(self) -> Any:
        for series, versions in zip(self._series, self._versions, strict=True):
            if any(_version(x) != version for x, version in zip(series, versions, strict=True)):
                raise ValueError(
                    "a tensor of the history was written to by a later step, so that its value at its own time is "
                    "lost: let the step return new tensors instead of writing into the state (x = x + dx, not x += dx)"
                )
            if not -series[0].dim() - 1 <= self._time_dim <= series[0].dim():
                raise ValueError(_time_dim_error(self._time_dim, series[0]))
        return tree_unflatten([torch.stack(series, self._time_dim) for series in self._series], self._first[1])


def _version(x: Tensor) -> int:
    """How often the tensor was written to, where torch counts it."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x._version


def _time_dim_error(time_dim: int, x: Tensor) -> str:
    return (
        f"time_dim={time_dim} has no place in a history of values of shape {shape_text(x.shape)}: put a batch "
        "dimension in front of the state, or pass time_dim=-1, which puts time last"
    )


def _compiled(
    step: Callable[..., Any],
    state: Any,
    n_steps: int,
    inputs: Any,
    observe: Callable[[Any], Any],
    include_initial: bool,
    gradient_horizon: int | None,
    time_dim: int,
) -> Any:
    from pyrobirds.simulators import scanning  # loads torch's compiler, which takes seconds

    try:
        return scanning.scanned(
            step,
            state,
            n_steps,
            inputs=inputs,
            observe=observe,
            include_initial=include_initial,
            gradient_horizon=gradient_horizon,
            time_dim=time_dim,
        )
    except scanning.NotCompiled as error:
        # What is wrong with the step itself is said better by the step itself.
        with forked_rng(), torch.no_grad():
            first = None if inputs is None else tree_map(lambda x: x[:1], inputs)
            rollout(step, state, 1, inputs=first, observe=observe, time_dim=time_dim)
        raise RuntimeError(
            f"rollout(compile=True) cannot compile this simulator: {error}. Pass compile=False, or change the "
            "step: see 'Compiled' in docs/time_loops.md"
        ) from error.__cause__


def _saves() -> bool:
    """Whether there is a backward pass to save activations for; raises where they cannot be left out."""
    if not torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return False
    transforms = {interpreter.key() for interpreter in get_interpreter_stack() or ()}
    if TransformType.Jvp in transforms:
        return False
    if transforms:
        raise RuntimeError(
            "checkpoint_every works neither inside of torch.vmap nor of torch.func.grad, which cannot run a segment "
            "again: let the step take a batch of draws, or leave checkpoint_every out"
        )
    return True


def _by_step(inputs: Any, n_steps: int) -> Callable[[int], tuple[Any, ...]]:
    """The arguments of the step after ``t``: its entry of the inputs, if there are any."""
    if inputs is None:
        return lambda t: ()
    leaves, spec = tree_flatten(inputs)
    entries = [tree_unflatten(entry, spec) for entry in zip(*(leaf.unbind(0) for leaf in leaves), strict=True)]
    return lambda t: (entries[t],)


def _check_state(state: Any) -> None:
    if not tree_leaves(state):
        raise ValueError(f"state has no tensor in it, got {state!r}: pass the initial state, a pytree of tensors")
    _check_tensors("state", state)


def _check_inputs(inputs: Any, n_steps: int) -> None:
    _check_tensors("inputs", inputs)
    for path, leaf in tree_flatten_with_path(inputs)[0]:
        if leaf.dim() == 0 or len(leaf) != n_steps:
            raise ValueError(
                f"inputs{path_text(path)} has shape {shape_text(leaf.shape)}, expected ({n_steps}, ...), one entry for "
                "each step in its first dimension (n_timesteps, less one with include_initial=True)"
            )


def _check_tensors(what: str, tree: Any) -> None:
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{what}{path_text(path)} is of type {type(leaf).__name__}, expected a torch tensor: wrap numbers by "
                "torch.as_tensor, and let the step keep what does not change in its closure"
            )


def _check_same(what: str, before: Any, after: Any, when: str, remedy: str) -> None:
    """Raise unless two pytrees of tensors have the same structure, and their leaves the same shapes and dtypes."""
    structures = [tree_flatten(tree)[1] for tree in (before, after)]
    if structures[0] != structures[1]:
        old, new = ("one tensor" if spec.is_leaf() else " ".join(str(spec).split()) for spec in structures)
        raise ValueError(f"{what} was {old} and is {new} after {when}: {remedy}")
    for (path, old), (_, new) in zip(*(tree_flatten_with_path(tree)[0] for tree in (before, after)), strict=True):
        if not isinstance(new, Tensor) or not _alike(old, new):
            came = _kind(new) if isinstance(new, Tensor) else f"a {type(new).__name__}"
            raise ValueError(f"{what}{path_text(path)} was {_kind(old)} and is {came} after {when}: {remedy}")


def _alike(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _kind(x: Tensor) -> str:
    return f"{shape_text(x.shape)} of {x.dtype} on {x.device}"
