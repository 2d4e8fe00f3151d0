"""The time loop: what it returns, how far its gradients reach, and what it keeps in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

from pyrobirds import Simulator, losses
from pyrobirds.simulators import rollout

T = 7
A = 0.8


class Prices(NamedTuple):
    old: Tensor
    new: Tensor


def test_history_holds_the_states_after_each_step() -> None:
    seen: list[int] = []

    def step(x: Tensor, t: int) -> Tensor:
        seen.append(t)
        return x + 10**t

    assert rollout(step, torch.zeros(2), 3).tolist() == [[1.0, 11.0, 111.0]] * 2
    assert seen == [0, 1, 2]
    seen.clear()
    assert rollout(step, torch.zeros(2), 3, include_initial=True).tolist() == [[0.0, 1.0, 11.0]] * 2
    assert seen == [0, 1]
    assert rollout(step, torch.zeros(2), 1, include_initial=True).tolist() == [[0.0]] * 2


def test_state_and_history_are_any_pytrees() -> None:
    def step(state: dict[str, Any], t: int) -> dict[str, Any]:
        prices, count = state["prices"], state["count"]
        return {"prices": Prices(prices.new, prices.old + prices.new), "count": count + 1}

    def observe(state: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return state["count"], {"price": state["prices"].new}

    one = torch.ones(2, 3)
    start = {"prices": Prices(one, one), "count": torch.zeros(2, dtype=torch.int64)}
    counts, prices = rollout(step, start, 5, observe=observe)
    assert counts.tolist() == [[1, 2, 3, 4, 5]] * 2
    assert prices["price"].shape == (2, 5, 3)
    assert prices["price"][1, :, 2].tolist() == [2.0, 3.0, 5.0, 8.0, 13.0]


@pytest.mark.parametrize(
    ("batch", "time_dim", "shape"), [((), -1, (T,)), ((), 0, (T,)), ((2, 3), -1, (2, 3, T)), ((2, 3), 1, (2, T, 3))]
)
def test_time_goes_where_it_is_asked_for(batch: tuple[int, ...], time_dim: int, shape: tuple[int, ...]) -> None:
    x = rollout(lambda x, t: x + 1, torch.zeros(batch), T, time_dim=time_dim)
    assert x.shape == shape
    assert torch.equal(x.movedim(time_dim, 0).flatten(1)[:, 0] if batch else x, torch.arange(1.0, T + 1))


@pytest.mark.parametrize("include_initial", [False, True])
def test_each_step_gets_its_entry_of_the_inputs(include_initial: bool) -> None:
    n_steps = T - include_initial
    inputs = {"noise": torch.randn(n_steps, 2), "rate": torch.randn(n_steps)}
    x = rollout(
        lambda x, t, now: x + now["rate"] * now["noise"],
        torch.zeros(2),
        T,
        inputs=inputs,
        include_initial=include_initial,
    )
    by_hand = (inputs["rate"].unsqueeze(1) * inputs["noise"]).cumsum(0).T
    torch.testing.assert_close(x[:, include_initial:], by_hand)


def linear(theta: Tensor, x_0: Tensor, **options: Any) -> Tensor:
    """Paths of x_{t+1} = A x_t + theta, with the initial value: (B, T)."""
    return rollout(lambda x, t: A * x + theta, x_0, T, include_initial=True, **options)


def exact_by_theta(t: int, horizon: int | None) -> float:
    """The derivative of x_t by theta if gradients reach back to the start of the block of `horizon` steps."""
    start = 0 if horizon is None or t == 0 else horizon * ((t - 1) // horizon)
    return sum((A**j for j in range(t - start)), 0.0)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("checkpoint_every", [None, 2, 3])
@pytest.mark.parametrize("horizon", [None, 1, 2, 3, 4, T, 100])
def test_gradient_horizon_truncates_the_gradient_of_a_linear_recursion(
    horizon: int | None, checkpoint_every: int | None
) -> None:
    theta, x_0 = torch.tensor([0.3, -1.0], requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    x = linear(theta, x_0, gradient_horizon=horizon, checkpoint_every=checkpoint_every)
    assert torch.equal(x, linear(theta, x_0))
    for t in range(T):
        by_theta, by_x_0 = torch.autograd.grad(
            x[:, t].sum(), (theta, x_0), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(by_theta, torch.full((2,), exact_by_theta(t, horizon)))
        reaches = horizon is None or t == 0  # the initial value as observed is not cut off
        torch.testing.assert_close(by_x_0, torch.full((2,), A**t if reaches else 0.0))


def test_gradient_horizon_leaves_integers_alone() -> None:
    theta = torch.tensor([2.0], requires_grad=True)
    x, n = rollout(
        lambda s, t: (s[0] * theta, s[1] + 1), (torch.ones(1), torch.zeros(1, dtype=torch.int64)), 4, gradient_horizon=2
    )
    assert n.tolist() == [[1, 2, 3, 4]]
    (gradient,) = torch.autograd.grad(x[:, -1].sum(), theta)
    assert gradient.item() == 4 * 2 * 2.0  # of 4 theta^2, where 4 is the state after two steps


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch.func.jvp itself
@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("options", [{}, {"gradient_horizon": 3}, {"gradient_horizon": 2, "checkpoint_every": 3}])
def test_forward_mode_equals_reverse_mode(options: dict[str, int]) -> None:
    """By jvp one by one, by vmap over the tangents, and by dual tensors; checkpoints have nothing to do there."""
    noise = torch.randn(T, 3)

    def simulate(theta: Tensor) -> Tensor:
        def step(x: Tensor, t: int) -> Tensor:
            return torch.sin(theta[0] * x + theta[1] * noise[t] + 0.1 * torch.randn(3))

        return rollout(step, torch.ones(3) * theta[2], T, **options)

    def seeded(theta: Tensor) -> Tensor:
        torch.manual_seed(1)
        return simulate(theta)

    theta = torch.tensor([0.9, 0.5, 1.1])
    reverse = torch.autograd.functional.jacobian(seeded, theta)
    basis = torch.eye(3)
    one_by_one = [torch.func.jvp(seeded, (theta,), (v,))[1] for v in basis]
    torch.testing.assert_close(torch.stack(one_by_one, -1), reverse)
    torch.manual_seed(1)
    at_once = torch.vmap(lambda v: torch.func.jvp(simulate, (theta,), (v,))[1], randomness="same")(basis)
    torch.testing.assert_close(at_once.movedim(0, -1), reverse)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(seeded(forward_ad.make_dual(theta, basis[0]))).tangent
    torch.testing.assert_close(tangent, reverse[..., 0])


def test_under_vmap_one_draw_has_time_last() -> None:
    def walk(theta: Tensor) -> Tensor:
        return rollout(lambda x, t: x + theta * torch.randn(()), torch.zeros(()), T, time_dim=-1)

    simulate = Simulator(walk, losses.mse, batched=False)
    assert simulate(torch.ones(4)).sample().shape == (4, T)
    theta = torch.ones(4, requires_grad=True)
    x = torch.vmap(walk, randomness="different")(theta)
    (gradient,) = torch.autograd.grad(x[:, -1].sum(), theta)
    torch.testing.assert_close(gradient, x[:, -1].detach())  # x is theta times a sum of noise


def noisy(theta: Tensor, n_timesteps: int, n: int, **options: Any) -> Tensor:
    """A random recursion on a state of n numbers, of which the mean is observed."""

    def step(x: Tensor, t: int) -> Tensor:
        return torch.tanh(theta * x + 0.1 * torch.randn(1, n))

    return rollout(step, torch.ones(1, n), n_timesteps, observe=lambda x: x.mean(1), **options)


@pytest.mark.parametrize("horizon", [None, 5])
@pytest.mark.parametrize("k", [1, 4, 13, 100])
def test_checkpoints_leave_values_gradients_and_random_numbers_as_they_are(k: int, horizon: int | None) -> None:
    results = []
    for checkpoint_every in (None, k):
        torch.manual_seed(2)
        theta = torch.tensor(0.9, requires_grad=True)
        x = noisy(theta, 13, 20, gradient_horizon=horizon, checkpoint_every=checkpoint_every)
        after_forward = torch.rand(())
        (gradient,) = torch.autograd.grad(x.square().sum(), theta)
        results.append((x.detach(), gradient, after_forward, torch.rand(())))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-6)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that were allocated at one time during a run, beyond those before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_checkpoints_keep_k_plus_t_over_k_states() -> None:
    """Peak of forward and backward, the recomputed segment included, in units of one state.

    Without checkpoints a step keeps its result and its argument, and the noise is dropped. Above that: the four or
    five tensors that one step works on.
    """
    n, n_timesteps = 20_000, 64
    states = {}
    for k in (None, 1, 8, 32):

        def run(k: int | None = k) -> None:
            theta = torch.tensor(0.9, requires_grad=True)
            noisy(theta, n_timesteps, n, checkpoint_every=k).sum().backward()

        run()
        states[k] = peak_bytes(run) / (4 * n)
    assert n_timesteps <= states[None] <= n_timesteps + 8
    for k in (1, 8, 32):
        # A segment's start is kept together with torch's random state of 5 kB, a sixteenth of a state here.
        assert k + n_timesteps / k <= states[k] + 2
        assert states[k] <= 1.1 * (k + n_timesteps / k) + 8


def test_saved_tensors_with_checkpoints_are_those_at_the_start_of_a_segment() -> None:
    saved = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        noisy(torch.tensor(0.9, requires_grad=True), 60, 1000, checkpoint_every=12)
    assert sum(size >= 1000 for size in saved) == 60 / 12


def test_only_what_is_observed_is_kept() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def step(x: Tensor, t: int) -> Tensor:
        nonlocal most
        most = max(most, len(alive))
        x = x + 1
        alive.add(x)
        return x

    rollout(step, torch.zeros(2, 100), 20, observe=lambda x: x.sum(1))
    assert most <= 2


def test_a_view_of_the_state_does_not_keep_the_state() -> None:
    run = lambda: rollout(lambda x, t: x + 1, torch.zeros(1, 10_000), 50, observe=lambda x: x[:, 0])  # noqa: E731
    assert peak_bytes(run) < 5 * 4 * 10_000
    assert run().tolist() == [[float(t) for t in range(1, 51)]]


def test_checkpoints_do_nothing_without_a_gradient() -> None:
    with torch.no_grad():
        x = torch.vmap(lambda s: rollout(lambda x, t: x + s, s, 3, time_dim=-1, checkpoint_every=2))(torch.ones(2))
    assert x.tolist() == [[2.0, 3.0, 4.0]] * 2


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
def test_checkpoints_are_refused_where_a_segment_cannot_be_run_again(transform: Callable[..., Any]) -> None:
    def total(theta: Tensor) -> Tensor:
        return rollout(lambda x, t: x * theta, theta, 3, time_dim=-1, checkpoint_every=2).sum()

    theta = torch.ones(2 if transform is torch.vmap else (), requires_grad=True)
    with pytest.raises(RuntimeError, match=r"checkpoint_every works neither inside of torch\.vmap nor"):
        transform(total)(theta)


def same(x: Any, t: Any, *inputs: Any) -> Any:
    return x


X = torch.zeros(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((same, X, 0), {}, ValueError, "n_timesteps must be at least 1, got 0"),
        ((same, X, 2.0), {}, TypeError, "n_timesteps must be a whole number"),
        ((same, X, 2), {"gradient_horizon": 0}, ValueError, "gradient_horizon must be at least 1"),
        ((same, X, 2), {"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
        ((same, X, 2), {"include_initial": 1}, TypeError, "include_initial must be True or False"),
        ((same, X, 2), {"compile": None}, TypeError, "compile must be True or False"),
        ((same, X, 2), {"compile": True, "checkpoint_every": 1}, ValueError, "exclude each other"),
        ((same, X, 2), {"time_dim": 2}, ValueError, r"time_dim=2 has no place in a history of values of shape \(2,\)"),
        ((same, torch.zeros(()), 2), {}, ValueError, "pass time_dim=-1"),
        ((same, X, 2), {"time_dim": "last"}, TypeError, "time_dim must be a whole number, got 'last'"),
        ((same, (), 2), {}, ValueError, r"state has no tensor in it, got \(\)"),
        ((same, (X, 3.0), 2), {}, TypeError, r"state\[1\] is of type float, expected a torch tensor"),
        ((same, X, 2), {"inputs": torch.zeros(3, 2)}, ValueError, r"inputs has shape \(3, 2\), expected \(2, ...\)"),
        ((same, X, 2), {"inputs": {"eps": 1.0}}, TypeError, r"inputs\['eps'\] is of type float"),
        ((same, X, 2), {"observe": lambda x: x.sum().item()}, TypeError, "what observe returns is of type float"),
        ((lambda x, t: (x, x), X, 2), {}, ValueError, r"the state was .* and is .* after step 0"),
        ((lambda x, t: None, X, 2), {}, ValueError, r"the state was \(2,\) of torch.float32 on cpu and is a NoneType"),
        (
            (lambda x, t: x.unsqueeze(-1) + X, X, 2),
            {},
            ValueError,
            r"the state was \(2,\) of torch.float32 on cpu and is \(2, 2\) of torch.float32 on cpu after step 0: the "
            "step must return a state like the one it got",
        ),
        (
            (lambda s, t: {"a": s["a"], "n": s["n"] + 0.5}, {"a": X, "n": torch.zeros(2, dtype=torch.int64)}, 2),
            {},
            ValueError,
            r"the state\['n'\] was \(2,\) of torch.int64 on cpu and is \(2,\) of torch.float32",
        ),
        (
            (lambda x, t: x if t < 2 else torch.zeros(3), X, 4),
            {},
            ValueError,
            r"what observe returns was \(2,\) .* and is \(3,\) .* after value 2 of the history",
        ),
        (
            (lambda x, t: x + 1, X, 4),
            {"observe": lambda x: x if x[0] < 3 else (x, x)},
            ValueError,
            "what observe returns was .* and is .* after value 2 of the history",
        ),
    ],
)
def test_what_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rollout(*arguments, **options)


def test_a_step_that_writes_into_the_state_is_found_out() -> None:
    with pytest.raises(ValueError, match="a tensor of the history was written to by a later step"):
        rollout(lambda x, t: x.add_(1), torch.zeros(2), 3)
    assert rollout(lambda x, t: x.clone().add_(1), torch.zeros(2), 3).tolist() == [[1.0, 2.0, 3.0]] * 2
    with torch.inference_mode():
        assert rollout(lambda x, t: x + 1, torch.zeros(2), 3).tolist() == [[1.0, 2.0, 3.0]] * 2


def updates_its_container(state: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
    state["x"] = state["x"] + (p * state["x"]).sin()
    return state


@pytest.mark.parametrize("k", [None, 1, 2, 3, 6])
def test_a_step_may_write_to_the_container_of_the_state(k: int | None) -> None:
    p = torch.tensor(0.5, requires_grad=True)
    initial = {"x": torch.ones(1)}
    x = rollout(
        lambda state, t: updates_its_container(state, p),
        initial,
        6,
        observe=lambda state: state["x"] * 1.0,
        checkpoint_every=k,
    )
    assert initial["x"].item() == 1
    by_hand = torch.ones(1)
    for _ in range(6):
        by_hand = by_hand + (p * by_hand).sin()
    torch.testing.assert_close(torch.autograd.grad(x[0, -1], p), torch.autograd.grad(by_hand.sum(), p))


def test_a_dtype_that_changes_in_the_same_container_is_refused() -> None:
    def step(state: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        state["n"] = state["n"] * 0.5
        return state

    with pytest.raises(ValueError, match=r"the state\['n'\] was \(1,\) of torch.int64 on cpu and is"):
        rollout(step, {"n": torch.ones(1, dtype=torch.long)}, 3)


def test_writing_into_the_state_is_seen_inside_of_vmap_and_harmless_in_inference_mode() -> None:
    def one(x: Tensor) -> Tensor:
        return rollout(lambda x, t: x.add_(1), x.clone(), 3, time_dim=-1)

    with pytest.raises(ValueError, match="a tensor of the history was written to by a later step"):
        torch.vmap(one)(torch.zeros(2))
    with torch.inference_mode():
        assert one(torch.zeros(2)).tolist() == [[1, 2, 3]] * 2
