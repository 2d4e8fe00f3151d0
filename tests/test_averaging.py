"""Iterate averaging against the same rules written plainly, on stored iterates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor

from pyrobirds.averaging import IterateAverage, _pool, _precision


def feed(iterates: np.ndarray | Tensor, average: IterateAverage | None = None) -> IterateAverage:
    average = IterateAverage() if average is None else average
    for iterate in torch.as_tensor(iterates):
        average.add(iterate)
    return average


def autoregression(seed: int, num_iterates: int, num_parameters: int, rho: float = 0.9) -> np.ndarray:
    """Stationary, of mean 0, variance 1 and autocorrelation rho^lag; shape (num_iterates, num_parameters)."""
    noise = np.random.default_rng(seed).standard_normal((num_iterates, num_parameters))
    noise[1:] *= math.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], noise, axis=0)


def approach(num_iterates: int, time: float, start: float = 10.0) -> np.ndarray:
    """An exponential decay towards 0, shape (num_iterates, 1)."""
    return start * np.exp(-np.arange(num_iterates) / time)[:, None]


# The rules, plainly.


class Plain(NamedTuple):
    window: tuple[int, int]
    stationary_since: int | None
    r_hat: float
    length: int  # of a block


def split_r_hat(iterates: np.ndarray) -> float:
    first, second = np.split(iterates, 2)
    within = (first.var(0, ddof=1) + second.var(0, ddof=1)) / 2
    between = len(first) * np.stack([first.mean(0), second.mean(0)]).var(0, ddof=1)
    h = len(first)
    return float(np.sqrt(((h - 1) / h * within + between / h) / within).max())


def batch_means(iterates: np.ndarray, length: int) -> np.ndarray:
    return iterates.reshape(-1, length, iterates.shape[1]).mean(1)


def worst_relative_error(iterates: np.ndarray, length: int, scale: np.ndarray) -> float:
    means = batch_means(iterates, length)
    return float((means.std(0, ddof=1) / math.sqrt(len(means)) / scale).max())


def plain(iterates: np.ndarray) -> Plain:
    begin, length, since, r_hat = 0, 1, None, math.nan
    for stop in range(1, len(iterates) + 1):
        if (stop - begin) % length:
            continue
        blocks = (stop - begin) // length
        if since is None:
            starts = [stop - k * length for k in range(4, blocks + 1, 2) if 200 <= k * length <= 0.95 * stop]
            if starts:
                r_hat, start = min((split_r_hat(iterates[start:stop]), start) for start in starts)
                if r_hat <= 1.1:
                    begin = since = start
        elif blocks == 20:
            scale = iterates[stop - 10 * length : stop].std(0, ddof=1)
            starts = range(begin, begin + 10 * length + 1, length)
            begin = since = min(starts, key=lambda s: worst_relative_error(iterates[s:stop], length, scale))
        if stop - begin == 20 * length:
            length *= 2
    total = len(iterates)
    if since is None:
        begin = min(range(0, total, length), key=lambda start: abs(2 * start - total))
    return Plain((begin, total), since, r_hat, length)


PROCESSES = {
    "stationary": autoregression(1, 2500, 2),
    "approach": autoregression(2, 2500, 3) + approach(2500, 60.0),
    "slow approach of one parameter": autoregression(3, 2500, 2) + approach(2500, 200.0) * [1.0, 0.0],
    "drift": autoregression(4, 2500, 2) + 0.05 * np.arange(2500)[:, None],
    "other scales": (autoregression(5, 2500, 3) + approach(2500, 30.0)) * [1e-6, 1.0, 1e6] + [1.0, -1.0, 0.0],
}


@pytest.mark.parametrize("name", PROCESSES)
def test_the_rules_on_stored_iterates(name: str) -> None:
    iterates = PROCESSES[name]
    average = IterateAverage()
    for stop in range(1, len(iterates) + 1):
        average.add(torch.tensor(iterates[stop - 1]))
        if stop % 53 and stop % 64:  # in the middle of a block, and at its end
            continue
        expected = plain(iterates[:stop])
        assert average.num_iterates == stop
        assert average.window() == expected.window
        assert average.stationary_since == expected.stationary_since
        assert average.r_hat == pytest.approx(expected.r_hat, rel=1e-9, nan_ok=True)
        start = expected.window[0]
        mean = average.average()
        assert mean is not None
        np.testing.assert_allclose(mean.numpy(), iterates[start:stop].mean(0), rtol=1e-9, atol=1e-12)
        complete = iterates[start : stop - (stop - start) % expected.length]
        assert_precision(average, complete, expected)
    assert (average.stationary_since is None) == (name == "drift")


def assert_precision(average: IterateAverage, complete: np.ndarray, expected: Plain) -> None:
    """Standard error and effective sample size are those of the complete blocks, and there if they should be."""
    error, size = average.standard_error(), average.effective_sample_size()
    if expected.stationary_since is None or len(complete) < 10 * expected.length:
        assert error is None
        assert size is None
        assert not average.has_converged(1e9)
        return
    assert error is not None
    assert size is not None
    means = batch_means(complete, expected.length)
    plain_error = means.std(0, ddof=1) / math.sqrt(len(means))
    plain_size = complete.var(0, ddof=1) / plain_error**2
    np.testing.assert_allclose(error.numpy(), plain_error, rtol=1e-7)
    np.testing.assert_allclose(size.numpy(), plain_size, rtol=1e-7)
    enough = bool(plain_size.min() > 50)
    assert average.has_converged(1.001 * plain_error.max()) == enough
    assert not average.has_converged(0.999 * plain_error.max())


def test_the_processes_have_windows_of_their_own() -> None:
    """Else the test above would not tell windows apart."""
    since = {name: plain(iterates).stationary_since for name, iterates in PROCESSES.items()}
    assert len(set(since.values())) == len(PROCESSES)
    assert since["drift"] is None


def test_merged_blocks_have_the_moments_of_their_iterates() -> None:
    iterates = torch.randn(24, 5, dtype=torch.float64) * 3 + 7
    blocks = iterates.unflatten(0, (6, 4))
    m2s = (blocks - blocks.mean(1, keepdim=True)).square().sum(1)
    for groups in (1, 2, 3, 6):
        mean, m2 = _pool(blocks.mean(1), m2s, 4, groups)
        merged = iterates.unflatten(0, (groups, -1))
        torch.testing.assert_close(mean, merged.mean(1))
        torch.testing.assert_close(m2, (merged - merged.mean(1, keepdim=True)).square().sum(1))


def test_before_the_rule_can_be_met_the_last_half_counts() -> None:
    iterates = autoregression(0, 200, 2)
    average = IterateAverage()
    for total in range(1, 201):
        average.add(torch.tensor(iterates[total - 1]))
        length = 1
        while total >= 20 * length:
            length *= 2
        start, stop = average.window()
        assert stop == total
        assert start % length == 0
        assert abs(start - total / 2) <= length / 2
        mean = average.average()
        assert mean is not None
        np.testing.assert_allclose(mean.numpy(), iterates[start:stop].mean(0), rtol=1e-12, atol=1e-14)
    assert math.isnan(average.r_hat)


def test_precision_of_an_autoregression() -> None:
    """Over many parameters, squared standard errors average to the exact expectation of batch means, near the truth.

    The tolerance is 5 standard errors over 2,000 independent parameters: one failure in a million seeds.
    """
    rho, num_iterates = 0.9, 20_000
    average = feed(autoregression(0, num_iterates, 2000, rho))
    error, size = average.standard_error(), average.effective_sample_size()
    assert error is not None
    assert size is not None
    length = average.state_dict()["_length"]
    start, stop = average.window()
    blocks = (stop - start) // length

    def variance_of_mean(n: int) -> float:
        lags = np.arange(1, n)
        return (1 + 2 * np.sum((1 - lags / n) * rho**lags)) / n

    between = (variance_of_mean(length) - variance_of_mean(blocks * length)) * blocks / (blocks - 1)
    squared = error.double().square()
    tolerance = 5 * float(squared.std()) / math.sqrt(len(squared))
    assert abs(float(squared.mean()) - between / blocks) < tolerance
    # In the limit of many iterates the squared standard error is (1 + rho) / (1 - rho) / n, the inverse of the size.
    theory = (1 + rho) / (1 - rho) / (blocks * length)
    assert abs(float(squared.mean()) / theory - 1) < 0.03 + tolerance / theory
    inverse = 1 / size
    assert abs(float(inverse.mean()) / theory - 1) < 0.03 + 5 * float(inverse.std()) / theory / math.sqrt(len(size))
    # The average itself varies as the standard errors say; a mean of squares of 2,000 normals has s.d. sqrt(2 / 2000).
    mean = average.average()
    assert mean is not None
    truth = variance_of_mean(stop - start)
    assert abs(float(mean.square().mean()) / truth - 1) < 5 * math.sqrt(2 / 2000)


def test_the_window_lies_behind_the_approach() -> None:
    """An approach from 10 standard deviations away with time constant 300, under noise with correlation time 10.

    Of 150 seeds the rule was met in all, with never more than 1 standard deviation to go where the window begins. The
    average is nearer to the optimum than the best that the last half can do; without dropping the front of the window
    its error is 0.13 where 0.08 is allowed.
    """
    num_iterates, time, squares = 6000, 300.0, []
    for seed in range(40):
        iterates = autoregression(seed, num_iterates, 2) + approach(num_iterates, time)
        average = feed(iterates)
        assert average.stationary_since is not None
        assert approach(num_iterates, time)[average.stationary_since, 0] < 1
        mean, error = average.average(), average.standard_error()
        assert mean is not None
        assert error is not None
        assert float((mean / error).abs().max()) < 6
        squares.append(float(mean.square().mean()))
    assert np.mean(squares) < 19 / (num_iterates / 2)


def test_a_steady_drift_is_never_stationary() -> None:
    """From half to half of the smallest window it moves by 5 standard deviations: R-hat is 2.2, of longer ones more."""
    average = IterateAverage()
    for iterate in torch.tensor(PROCESSES["drift"]):
        average.add(iterate)
        assert average.stationary_since is None
        assert not average.r_hat < 1.5
    assert average.r_hat > 1.5


def test_long_runs_in_single_precision() -> None:
    num_iterates = 100_000
    iterates = 1e4 + 0.1 * torch.randn(num_iterates, 2)
    assert iterates.dtype == torch.float32
    average = feed(iterates)
    start, stop = average.window()
    window = iterates[start:stop].double()
    mean, error, size = average.average(), average.standard_error(), average.effective_sample_size()
    assert mean is not None
    assert error is not None
    assert size is not None
    torch.testing.assert_close(mean.double(), window.mean(0), rtol=6e-8, atol=0)  # half of float32's last bit
    length = average.state_dict()["_length"]
    complete = window[: (stop - start) // length * length]
    means = complete.unflatten(0, (-1, length)).mean(1)
    torch.testing.assert_close(error.double(), (means.var(0) / len(means)).sqrt(), rtol=1e-5, atol=0)
    variance = size.double() * error.double().square()
    torch.testing.assert_close(variance, complete.var(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_memory_does_not_grow(drift: float) -> None:
    def live(average: IterateAverage) -> int:
        """Bytes of all tensors: of what they are views of, once."""
        storages = [value.untyped_storage() for value in vars(average).values() if isinstance(value, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    average = IterateAverage()
    iterates = torch.tensor(autoregression(0, 10_000, 3) + drift * np.arange(10_000)[:, None])
    most, sizes = 0, []
    for step, iterate in enumerate(iterates):
        average.add(iterate)
        most = max(most, len(average.state_dict()["_means"]))
        sizes.append(live(average))
        if step == 1000:
            early = max(sizes)
    assert most < 20
    assert max(sizes) <= (2 * 20 + 2) * 3 * 8
    assert max(sizes) <= early


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name
            assert value.dtype == theirs[name].dtype, name
        else:
            assert value == theirs[name] or (value != value and theirs[name] != theirs[name]), name


@pytest.mark.parametrize("stop", [0, 1, 107, 250, 1005])
def test_state_survives_a_file(stop: int, tmp_path: Path) -> None:
    iterates = torch.tensor(PROCESSES["approach"], dtype=torch.float32)
    average = feed(iterates[:stop])
    torch.save(average.state_dict(), tmp_path / "state.pt")
    resumed = IterateAverage()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(resumed.state_dict(), average.state_dict())
    for iterate in iterates[stop:]:
        average.add(iterate)
        resumed.add(iterate)
        assert resumed.stationary_since == average.stationary_since
    assert_same(resumed.state_dict(), average.state_dict())
    assert resumed.has_converged(0.5)
    assert average.has_converged(0.5)


def test_states_are_taken_in_the_middle_of_a_block() -> None:
    """Else the test above would not show much."""
    states = [feed(PROCESSES["approach"][:stop]).state_dict() for stop in (107, 250, 1005)]
    assert all(state["_count"] > 0 for state in states)
    assert [state["stationary_since"] is None for state in states] == [True, True, False]


def test_a_state_is_a_copy() -> None:
    average = feed(PROCESSES["stationary"][:107])
    state = average.state_dict()
    other = IterateAverage()
    other.load_state_dict(state)
    feed(PROCESSES["stationary"][107:], average)
    feed(PROCESSES["drift"][:500], other)
    assert_same(state, feed(PROCESSES["stationary"][:107]).state_dict())


def test_the_state_of_something_else_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"state must be what IterateAverage.state_dict\(\) returned.*'num_iterates'.*got \['mean'\]"
    ):
        IterateAverage().load_state_dict({"mean": torch.zeros(2)})


def test_restart_forgets_all_but_the_count() -> None:
    average = feed(PROCESSES["stationary"])
    assert average.has_converged(10.0)
    average.restart()
    assert average.num_iterates == 2500
    assert average.window() == (2500, 2500)
    assert average.average() is None
    assert average.standard_error() is None
    assert average.effective_sample_size() is None
    assert average.stationary_since is None
    assert math.isnan(average.r_hat)
    assert not average.has_converged(10.0)
    iterates = PROCESSES["approach"]  # of another length
    feed(iterates, average)
    fresh = feed(iterates)
    assert fresh.stationary_since is not None
    assert average.stationary_since == 2500 + fresh.stationary_since
    assert average.window() == (2500 + fresh.window()[0], 5000)
    assert torch.equal(average.average(), fresh.average())  # type: ignore[arg-type]
    assert average.r_hat == fresh.r_hat


def test_before_the_first_iterate() -> None:
    average = IterateAverage()
    assert average.num_iterates == 0
    assert average.window() == (0, 0)
    assert average.average() is None
    assert average.standard_error() is None
    assert average.effective_sample_size() is None
    assert not average.has_converged(1.0)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-30, 1e30])
def test_parameters_that_never_move_do_not_count(value: float) -> None:
    moving = torch.tensor(PROCESSES["approach"], dtype=torch.float32)
    still = torch.full((len(moving), 1), value)
    alone, together = feed(moving), feed(torch.cat([moving, still], 1))
    assert together.window() == alone.window()
    assert together.r_hat == alone.r_hat
    mean, error, size = together.average(), together.standard_error(), together.effective_sample_size()
    assert mean is not None
    assert error is not None
    assert size is not None
    assert mean[-1] == still[0]
    assert error[-1] <= 1e-15 * abs(value)
    assert size[-1] == size_of(together)
    assert together.has_converged(0.5) == alone.has_converged(0.5) is True


def size_of(average: IterateAverage) -> int:
    """How many iterates the complete blocks of the window hold."""
    state = average.state_dict()
    return len(state["_means"]) * state["_length"]


def test_a_parameter_that_comes_to_rest_leaves_its_motion_behind() -> None:
    iterates = torch.tensor(PROCESSES["stationary"])
    iterates[500:, 1] = 0.3
    assert feed(iterates[:500]).window()[0] < 100
    average = feed(iterates)
    assert average.window()[0] >= 500
    assert average.average()[1] == pytest.approx(0.3, rel=1e-14)  # type: ignore[index]


def test_nothing_moves() -> None:
    average = feed(torch.full((3000, 2), 0.1))
    assert average.stationary_since is not None
    assert 0.9 < average.r_hat < 1
    assert average.has_converged(1e-12)


def test_a_parameter_that_jumps_by_the_last_bit_is_still() -> None:
    """A jump without any noise would make R-hat infinite."""
    moving = torch.tensor(PROCESSES["approach"], dtype=torch.float32)
    jump = torch.full((len(moving), 1), 1.0)
    jump[270:] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert feed(torch.cat([moving, jump], 1)).window() == feed(moving).window()
    jump[270:] = 1.001
    assert feed(torch.cat([moving, jump], 1)).window() != feed(moving).window()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype(dtype: torch.dtype) -> None:
    iterates = (torch.tensor(PROCESSES["approach"][:1500]) + 1).to(dtype)
    average = feed(iterates)
    start, stop = average.window()
    mean, error, size = average.average(), average.standard_error(), average.effective_sample_size()
    assert mean is not None
    assert error is not None
    assert size is not None
    assert mean.dtype == error.dtype == size.dtype == dtype
    torch.testing.assert_close(mean, iterates[start:stop].double().mean(0).to(dtype))


def test_iterates_are_neither_kept_nor_differentiated() -> None:
    parameters = torch.nn.Parameter(torch.zeros(2))
    average = IterateAverage()
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            parameters.fill_(value)
        average.add(parameters)
    mean = average.average()
    assert mean is not None
    assert mean.tolist() == [4.0, 4.0]
    assert not mean.requires_grad
    assert not any(value.requires_grad for value in average.state_dict().values() if isinstance(value, Tensor))


def test_statistics_follow_the_iterates_and_nothing_is_looked_at_within_a_block() -> None:
    """Tensors of the device "meta" have no values: whoever looks at one fails."""
    average = feed(torch.zeros(81, 2))
    assert average.state_dict()["_length"] == 8
    for _ in range(6):
        average.add(torch.zeros(2, device="meta"))
    mean = average.average()
    assert mean is not None
    assert mean.device.type == "meta"
    with pytest.raises(Exception, match="meta"):
        average.add(torch.zeros(2, device="meta"))


def test_double_precision_where_there_is_any() -> None:
    assert _precision(torch.device("cpu")) == torch.float64
    assert _precision(torch.device("mps")) == torch.float32


def test_what_is_no_flat_tensor_is_refused() -> None:
    for wrong, text in (
        (torch.zeros(2, 3), r"torch.float32 of shape \(2, 3\)"),
        (torch.tensor(1.0), r"torch.float32 of shape \(\)"),
        (torch.zeros(0), r"torch.float32 of shape \(0,\)"),
        (torch.zeros(2, dtype=torch.int64), r"torch.int64 of shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=rf"flat floating-point tensor of shape \(num_parameters,\), got {text}"):
            IterateAverage().add(wrong)


def test_another_length_is_refused() -> None:
    average = feed(torch.zeros(5, 3))
    before = average.state_dict()
    with pytest.raises(ValueError, match=r"length of those before, 3, got 2; call restart\(\)"):
        average.add(torch.zeros(2))
    assert_same(average.state_dict(), before)
    average.restart()
    average.add(torch.zeros(2))
    assert average.num_iterates == 6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 85])
def test_what_is_not_finite_is_refused(value: float, position: int) -> None:
    iterates = torch.zeros(200, 2)
    iterates[position, 1] = value
    average = IterateAverage()
    message = r"iterate must be finite, but among the last \d+ there was a NaN or an infinity.*call restart\(\)"
    with pytest.raises(ValueError, match=message):
        feed(iterates, average)
    assert position < average.num_iterates <= position + 8
    with pytest.raises(ValueError, match=message):  # until restart() is called
        average.add(torch.zeros(2))
    average.restart()
    assert feed(torch.zeros(5, 2), average).average().tolist() == [0.0, 0.0]  # type: ignore[union-attr]


def test_a_tolerance_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="tolerance must be a finite number above 0, got 0"):
        IterateAverage().has_converged(0)
    with pytest.raises(TypeError, match="tolerance must be a number above 0, got None"):
        IterateAverage().has_converged(None)  # type: ignore[arg-type]
