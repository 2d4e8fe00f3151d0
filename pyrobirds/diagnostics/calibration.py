"""Whether intervals of a posterior hold the truth as often as they say."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrobirds import _checks, arviz_groups, checkpoints, sampling
from pyrobirds._checks import shape_text
from pyrobirds._rng import forked_rng
from pyrobirds.diagnostics.coverage_result import Compared, Coverage, collect, compare
from pyrobirds.progress import has_bar

if TYPE_CHECKING:
    import xarray as xr
    from arviz import InferenceData

Fn = Callable[..., Any]

_FORMAT = "pyrobirds coverage"
_LEVELS = tuple(i / 20 for i in range(1, 20))
_ALONE = threading.Lock()  # of a task in its process


def coverage(
    model: Fn,
    calibrate: Callable[[dict[str, Tensor]], InferenceData | xr.DataTree],
    *args: Any,
    num_datasets: int = 100,
    levels: Sequence[float] | None = None,
    executor: Executor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Coverage:
    r"""Simulate data from the prior, calibrate to each, and count how often intervals hold the true parameters.

    For each dataset parameters and data are drawn from the model, :math:`\theta^* \sim \pi,\ y^* \sim p(y |
    \theta^*)`, ``calibrate`` gives a posterior for :math:`y^*`, and its draws are compared with :math:`\theta^*`. Were
    it the Bayesian posterior of this very model, intervals of level p would hold :math:`\theta^*` with probability p,
    on average over the prior, and its rank among the draws would be uniform (Cook, Gelman and Rubin 2006,
    https://doi.org/10.1198/106186006X136976; Talts et al. 2018, https://arxiv.org/abs/1804.06788).

    For a generalised posterior this is not promised: its width is set by ``w``. The coverage curve is what ``w`` should
    be chosen by; posteriors that are too narrow ask for a larger ``w``, too wide ones for a smaller ``w``. (That the
    curve is right says that uncertainty is, not that the posterior is sharp: the prior's own curve is right too.)

    A hundred datasets tell a standard deviation that is wrong by a factor 1.3, or a mean that is wrong by 0.4 posterior
    standard deviations, about nine times out of ten.

    Results are the same to the last bit whatever ``executor`` is, on the same kind of machine: each dataset has a seed
    of its own, and one thread.

    Args:
        model: the Pyro model. All of its observed sites are drawn anew, so it may have no ``pyro.factor`` and no
            simulator without an output.
        calibrate: called with the simulated data by observed site, NaN where the real data are; returns exported data
            with a group ``posterior``, as from ``to_inference_data(model, guide, data["x"], fit=result,
            groups=["posterior"])``. It must start from scratch: make its guide inside. It runs with an empty parameter
            store of its own. Draws must be independent, as those of a guide are; thin those of MCMC.
        *args: the arguments of the model, as ``svi.step`` takes them, data included: they say which sites are data, of
            which shape.
        num_datasets: how many datasets to simulate, at least 2.
        levels: of the intervals, between 0 and 1. None: 0.05, 0.1, ..., 0.95.
        executor: of :mod:`concurrent.futures`, whose workers are processes: ``ProcessPoolExecutor``, loky, MPI, Dask
            with ``get_executor(pure=False)`` and one thread a worker. Model, arguments and ``calibrate`` must be
            picklable: functions at the top level of a module. None: one after another, in this process.
        checkpoint: a file of JSON lines to which each finished dataset is added, and from which finished ones are
            read if it is there. With larger ``num_datasets`` it goes on.
        seed: of everything that is drawn; the generators of torch, NumPy and Python are left as they were found.
        progress: show a bar, if there is a terminal or notebook.
        model_kwargs: keyword arguments of the model.

    Returns:
        What became of each dataset, the curve as a table, tests of it, and a verdict in words when printed.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, cannot be sent to another process, the
            model's data cannot be drawn, or the checkpoint is of other settings.
        RuntimeError: a dataset failed; it is named with its seed. Those that finished are in the checkpoint.

    Example:
        >>> import numpy as np, pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyrobirds.arviz_groups import Variable, collect, dataset
        >>> def model(y):
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> def calibrate(data):  # the exact posterior N(y / 2, 1 / 2), where one would fit
        ...     draws = data["y"] / 2 + torch.randn(1, 99) / 2**0.5
        ...     posterior = dataset({"theta": Variable(draws.numpy(), ("chain", "draw"))})
        ...     return collect({"posterior": posterior})
        >>> result = coverage(model, calibrate, torch.tensor(0.0), num_datasets=200, levels=[0.5, 0.9])
        >>> result.table()[["element", "expected", "lower", "upper"]].values.tolist()
        [['theta', 0.5, 0.43, 0.57], ['theta', 0.9, 0.855, 0.94]]
        >>> result.tests()["verdict"].tolist()
        ['']
    """
    for name, value in {"model": model, "calibrate": calibrate}.items():
        if not callable(value):
            raise TypeError(f"{name} must be callable, got {value!r}")
    if not isinstance(model_kwargs, Mapping | None):
        raise TypeError(f"model_kwargs must be a dict of keyword arguments, got {model_kwargs!r}")
    num_datasets = _checks.positive_int("num_datasets", num_datasets)
    if num_datasets < 2:
        raise ValueError(f"num_datasets must be at least 2, got {num_datasets}")
    _checks.boolean("progress", progress)
    task = _Task(
        model,
        calibrate,
        args,
        {**(model_kwargs or {})},
        _check_levels(levels),
        _checks.seed("seed", seed),
        torch.get_default_dtype(),
    )
    run = partial(_run_here, task) if executor is None else partial(_run_elsewhere, _pickled(task, executor), executor)
    finished = _Finished(checkpoint, task)
    todo = [index for index in range(num_datasets) if index not in finished.compared]

    def keep(index: int, compared: Compared) -> None:
        finished.add(index, compared)
        bar.update()

    with tqdm(total=num_datasets, initial=num_datasets - len(todo), disable=not (progress and has_bar())) as bar:
        try:
            run(todo, keep)
        except _DatasetError as error:
            raise RuntimeError(
                f"dataset {error.index} (seed {_random(task, error.index).seed}) failed: "
                f"{type(error.__cause__).__name__}: {error.__cause__}\n{finished}"
            ) from error.__cause__
    return collect([finished.compared[index] for index in range(num_datasets)], task.levels, task.seed)


def _check_levels(levels: Sequence[float] | None) -> tuple[float, ...]:
    if levels is None:
        return _LEVELS
    if isinstance(levels, str) or not isinstance(levels, Sequence | np.ndarray) or len(levels) == 0:
        raise TypeError(f"levels must be a list of numbers between 0 and 1, got {levels!r}")
    checked = tuple(_checks.share("levels", level) for level in levels)
    if [*checked] != sorted({*checked} - {0.0, 1.0}):
        raise ValueError(f"levels must increase and lie between 0 and 1, without these, got {[*levels]}")
    return checked


class _Task(NamedTuple):
    """What is to be done for each dataset."""

    model: Fn
    calibrate: Fn
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    levels: tuple[float, ...]
    seed: int
    dtype: torch.dtype


class _Simulated(NamedTuple):
    theta: dict[str, np.ndarray]
    data: dict[str, Tensor]


class _Random(NamedTuple):
    """The random numbers of a dataset."""

    seed: int  # of model and calibrate
    gaps: np.random.Generator


def _random(task: _Task, index: int) -> _Random:
    # The child that SeedSequence.spawn gives at this place, whatever was spawned before.
    first, second = np.random.SeedSequence(task.seed, spawn_key=(index,)).spawn(2)
    return _Random(int(first.generate_state(1)[0]), np.random.default_rng(second))


def _pickled(task: _Task, executor: Executor) -> bytes:
    """The task as it is sent, in bytes: tensors would be moved to memory that processes share."""
    if not isinstance(executor, Executor):
        raise TypeError(f"executor must be a concurrent.futures.Executor, got {executor!r}")
    if isinstance(executor, ThreadPoolExecutor):
        raise TypeError(
            "executor must run tasks in processes: threads share Pyro's handlers and parameter store. Take a "
            "ProcessPoolExecutor, or leave it out"
        )
    parts = {"model": task.model, "calibrate": task.calibrate, "args": task.args, "model_kwargs": task.kwargs}
    for name, part in parts.items():
        try:
            pickle.dumps(part)
        except Exception as error:  # pickle raises many kinds
            raise TypeError(
                f"{name} cannot be sent to another process ({type(error).__name__}: {error}): define functions at the "
                "top level of a module, without lambdas, or leave out executor"
            ) from error
    return pickle.dumps(task)


class _DatasetError(Exception):
    """A dataset failed, of the error that is its cause."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def _run_here(task: _Task, todo: list[int], keep: Callable[[int, Compared], None]) -> None:
    for index in todo:
        try:
            compared = _run(task, index)
        except Exception as error:
            raise _DatasetError(index) from error
        keep(index, compared)


def _run_elsewhere(payload: bytes, executor: Executor, todo: list[int], keep: Callable[[int, Compared], None]) -> None:
    """Run datasets in other processes. After a failure none is begun, and those that have begun are kept."""
    futures: dict[Future[Compared], int] = {executor.submit(_run_pickled, payload, index): index for index in todo}
    pending, failures = {*futures}, {}
    try:
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                if error := future.exception():
                    failures[futures[future]] = error
                else:
                    keep(futures[future], future.result())
            if failures:
                pending = {future for future in pending if not future.cancel()}
    finally:  # Ctrl-C too
        for future in pending:
            future.cancel()
    for index in sorted(failures)[:1]:
        raise _DatasetError(index) from failures[index]


def _run_pickled(payload: bytes, index: int) -> Compared:
    try:
        task = pickle.loads(payload)
    except (AttributeError, ImportError) as error:
        raise RuntimeError(
            "model and calibrate must be defined in a module that worker processes can import, not in a notebook"
        ) from error
    return _run(task, index)


def _run(task: _Task, index: int) -> Compared:
    """One dataset: simulate it, calibrate to it, and compare."""
    random = _random(task, index)
    with _isolated(task, random.seed):
        simulated = _simulate(_sites(task), task)
        posterior = arviz_groups.group(task.calibrate(simulated.data), "posterior")
        return compare(posterior, simulated.theta, task.levels, random.gaps)


@contextmanager
def _isolated(task: _Task, seed: int) -> Iterator[None]:
    """The same surroundings in every process, and this process left as it was found."""
    if not _ALONE.acquire(blocking=False):
        raise RuntimeError(
            "two datasets met in one process, where they would share Pyro's handlers and parameter store: give each "
            "worker of the executor a process, and one thread (Dask: threads_per_worker=1)"
        )
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        torch.set_num_threads(1)
        torch.set_default_dtype(task.dtype)
        with forked_rng(seed), pyro.get_param_store().scope():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        _ALONE.release()


def _sites(task: _Task) -> sampling.Model:
    """The model and what its sites are; raise if its data cannot be drawn."""
    model = sampling.Model(task.model, task.args, task.kwargs, {}, nesting=0, parallel=False)
    if fixed := [name for name in model.named("observed", "factor") if not model.sites[name].can_be_drawn]:
        raise ValueError(
            f"the sites {fixed} of the model cannot be drawn, so that no data can be simulated: a pyro.factor or a "
            "loss without an output says nothing of what the data would be. Make it a Simulator with an output, or a "
            "likelihood"
        )
    if not model.named("observed") or not model.named("latent"):
        raise ValueError(
            "the model must have latent and observed sites, got "
            f"latent ones {model.named('latent')} and observed ones {model.named('observed')}: pass the arguments that "
            "svi.step gets, data included"
        )
    return model


def _simulate(model: sampling.Model, task: _Task) -> _Simulated:
    latent, observed = model.named("latent"), model.named("observed")
    drawn = model.run(1, {}, values=[*latent, *observed], observed=False).values
    data = {name: drawn[name][0] for name in observed}
    for name, value in data.items():
        expected = model.sites[name].shape
        if value.shape != expected:
            raise ValueError(
                f"site {name!r} draws data of shape {shape_text(value.shape)}, but the data that were passed have "
                f"shape {shape_text(expected)}: let the model draw data like these"
            )
        missing = model.sites[name].value.isnan()
        if missing.any():
            data[name] = value.masked_fill(missing, torch.nan)
    return _Simulated({name: drawn[name][0].cpu().numpy() for name in latent}, data)


class _Finished:
    """The datasets that are finished, which a file holds too if there is one."""

    def __init__(self, path: str | os.PathLike[str] | None, task: _Task) -> None:
        self.compared: dict[int, Compared] = {}
        self.path = None if path is None else checkpoints.CheckpointFile(path).path
        settings = _settings(task)
        if self.path is not None:
            if self.path.exists():
                self._read(self.path, settings)
            else:
                _begin(self.path, settings)

    def add(self, index: int, compared: Compared) -> None:
        """Keep a dataset.

        Raises:
            ValueError: it differs from the others in its elements or number of draws.
        """
        first = next(iter(self.compared.values()), compared)
        if (compared.num_draws, compared.element) != (first.num_draws, first.element):
            raise ValueError(
                f"every posterior that calibrate returns must have the same elements and number of draws, but that of "
                f"dataset {index} has {compared.num_draws} draws of {compared.element}, those before have "
                f"{first.num_draws} draws of {first.element}"
            )
        if self.path is not None:
            with open(self.path, "ab") as file:
                file.write(_line({"dataset": index, **compared._asdict()}))
                file.flush()
                os.fsync(file.fileno())
        self.compared[index] = compared

    def __str__(self) -> str:
        where = "checkpoint= would keep them" if self.path is None else f"they are in {self.path}, to go on from"
        return f"datasets that are finished: {len(self.compared)}; {where}"

    def _read(self, path: Path, settings: Mapping[str, Any]) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # without the line that a kill tore off
        try:
            saved, *lines = map(json.loads, whole.splitlines())
            if saved.pop("format") != _FORMAT:
                raise ValueError(saved)
            self.compared = {line.pop("dataset"): Compared(**line) for line in lines}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"expected a checkpoint of coverage in {path}, found one that is damaged or of another kind: delete "
                "the file to start anew, or take another path"
            ) from error
        checkpoints.check_same(path, saved, settings)
        os.truncate(path, len(whole))


def _begin(path: Path, settings: Mapping[str, Any]) -> None:
    """Make a file with the settings; there is never a part of them."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(_line({"format": _FORMAT, **settings}))
    os.replace(temporary, path)


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def _settings(task: _Task) -> dict[str, Any]:
    """What a checkpoint must have in common with a call, the first parameters drawn from the prior among it."""
    with _isolated(task, _random(task, 0).seed):
        model = _sites(task)
        theta = _simulate(model, task).theta
    return {
        "pyrobirds": version("pyrobirds"),
        "seed": task.seed,
        "levels": [*task.levels],
        "sites": {name: f"{site.kind} of shape {shape_text(site.shape)}" for name, site in model.sites.items()},
        "first draw from the prior": {name: value.astype(float).ravel().tolist() for name, value in theta.items()},
    }
