"""Whether intervals of a posterior hold the truth as often as they say."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrobirds import _checks
from pyrobirds.diagnostics.coverage_file import Finished
from pyrobirds.diagnostics.coverage_result import Compared, Coverage, collect
from pyrobirds.diagnostics.simulated_datasets import Task, random_of, run
from pyrobirds.progress import has_bar

if TYPE_CHECKING:
    import xarray as xr
    from arviz import InferenceData

Fn = Callable[..., Any]

_LEVELS = tuple(i / 20 for i in range(1, 20))


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

    For a model with one scalar parameter a hundred datasets tell a standard deviation that is wrong by a factor 1.3, or
    a mean that is wrong by 0.4 posterior standard deviations, about nine times out of ten. With ten of them, of which
    one is wrong, six to eight times out of ten: the more there are to be told apart from chance, the more it takes.

    **Data may enter the model through** ``obs=`` **only.** They are drawn with all arguments as they were passed, so
    that ``pyro.sample("y", Normal(phi * y[:-1], 1.0), obs=y[1:])`` would be drawn given the real ``y[:-1]``, and a
    prior scaled by ``y.std()`` would keep the real scale: the curve would be that of another model. Write a series so
    that each step takes what the step before returned, ``last = pyro.sample(f"y_{t}", Normal(phi * last, 1.0),
    obs=y[t])``, or as a simulator. Other uses of data are refused where they can be seen: what is observed must be an
    argument or a view of one, such as a slice, also of one in a dict or list; copies, such as ``y.double()`` or
    ``y.log()``, hide the use, and so do data that are no argument, and simulators that are given data.

    Results are the same to the last bit whatever ``executor`` is, on the same kind of machine: each dataset has a seed
    of its own, and one thread.

    Args:
        model: the Pyro model. All of its observed sites are drawn anew, so it may have no ``pyro.factor`` and no
            simulator without an output.
        calibrate: called with the simulated data by observed site, NaN where the real data are missing (a model that
            has a mask instead takes ``data["x"].nan_to_num()``); returns exported data with a group ``posterior``, as
            from ``to_inference_data(model, guide, data["x"], fit=result, groups=["posterior"])``. It must start from
            scratch: make its guide inside. It runs with an empty parameter store of its own. Draws must be independent,
            as those of a guide are; thin those of MCMC.
        *args: the arguments of the model, as ``svi.step`` takes them, data included: they say which sites are data, of
            which shape.
        num_datasets: how many datasets to simulate, at least 2.
        levels: of the intervals, between 0 and 1. None: 0.05, 0.1, ..., 0.95.
        executor: of :mod:`concurrent.futures`, whose workers are processes: ``ProcessPoolExecutor``, loky, MPI, Dask
            with ``get_executor(pure=False)`` and one thread a worker. Model, arguments and ``calibrate`` must be
            picklable: functions at the top level of a module. None: one after another, in this process.
        checkpoint: a file of JSON lines to which each finished dataset is added, and from which finished ones are
            read if it is there. With larger ``num_datasets`` it goes on. One file for each ``calibrate``, ``w`` and
            model: settings, arguments and simulated data are compared with the file's, and the first dataset in it is
            calibrated to again, as ``calibrate`` can change in ways that cannot be seen. A ``calibrate`` whose random
            numbers are not of the generators below cannot go on from a file.
        seed: of everything that is drawn; the generators of torch, NumPy and Python are left as they were found.
        progress: show a bar, if there is a terminal or notebook.
        model_kwargs: keyword arguments of the model.

    Returns:
        What became of each dataset, the curve as a table, tests of it, and a verdict in words when printed.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, cannot be sent to another process, the
            model's data cannot be drawn, the model uses them outside of ``obs=``, or the checkpoint is of other
            settings, arguments, another model or ``calibrate``.
        RuntimeError: a dataset failed; it is named with its seed. Those that finished are in the checkpoint. Data that
            are drawn and not finite, as those of a simulator that failed, are such a failure: to leave them out would
            leave out the parameters, too, that lead to them.

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
    task = Task(
        model,
        calibrate,
        args,
        {**(model_kwargs or {})},
        _check_levels(levels),
        _checks.seed("seed", seed),
        torch.get_default_dtype(),
    )
    run_all = (
        partial(_run_here, task) if executor is None else partial(_run_elsewhere, _pickled(task, executor), executor)
    )
    finished = Finished(checkpoint, task)
    again = [*finished.compared][:1]
    todo = [index for index in range(num_datasets) if index not in finished.compared]

    def keep(index: int, compared: Compared) -> None:
        finished.add(index, compared)
        bar.update()

    with tqdm(total=num_datasets, initial=num_datasets - len(todo), disable=not (progress and has_bar())) as bar:
        try:
            run_all(again, finished.check)
            run_all(todo, keep)
        except _DatasetError as error:
            raise RuntimeError(
                f"dataset {error.index} (seed {random_of(task, error.index).seed}) failed: "
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


def _pickled(task: Task, executor: Executor) -> bytes:
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


def _run_here(task: Task, todo: list[int], keep: Callable[[int, Compared], None]) -> None:
    for index in todo:
        try:
            compared = run(task, index)
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
    return run(task, index)
