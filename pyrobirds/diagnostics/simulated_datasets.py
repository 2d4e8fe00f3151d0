"""Data that are simulated from the prior of a model, and calibrated to."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from pyrobirds import arviz_groups, sampling
from pyrobirds._checks import shape_text
from pyrobirds._rng import forked_rng
from pyrobirds.diagnostics.coverage_result import Compared, compare

Fn = Callable[..., Any]

_ALONE = threading.Lock()  # of a task in its process


class Task(NamedTuple):
    """What is to be done for each dataset."""

    model: Fn
    calibrate: Fn
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    levels: tuple[float, ...]
    seed: int
    dtype: torch.dtype


class Simulated(NamedTuple):
    """Parameters drawn from the prior, and data drawn with them, by site."""

    theta: dict[str, np.ndarray]
    data: dict[str, Tensor]


class Random(NamedTuple):
    """The random numbers of a dataset."""

    seed: int  # of model and calibrate
    gaps: np.random.Generator


def random_of(task: Task, index: int) -> Random:
    """Those of a dataset, whatever executor it runs on, and when."""
    # The child that SeedSequence.spawn gives at this place, whatever was spawned before.
    first, second = np.random.SeedSequence(task.seed, spawn_key=(index,)).spawn(2)
    return Random(int(first.generate_state(1)[0]), np.random.default_rng(second))


def run(task: Task, index: int) -> Compared:
    """One dataset: simulate it, calibrate to it, and compare."""
    random = random_of(task, index)
    with isolated(task, random.seed):
        model = prepared(task)
        simulated = simulated_of(model, drawn_of(model))
        _check_finite(model, simulated)
        posterior = arviz_groups.group(task.calibrate(simulated.data), "posterior")
        return compare(posterior, simulated.theta, task.levels, random.gaps)


@contextmanager
def isolated(task: Task, seed: int) -> Iterator[None]:
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


def prepared(task: Task) -> sampling.Model:
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


def drawn_of(model: sampling.Model) -> sampling.Values:
    """Parameters and data, of one draw."""
    names = model.named("latent", "observed")
    drawn = model.run(1, {}, values=names, observed=False).values
    for name in model.named("observed"):
        expected, shape = model.sites[name].shape, drawn[name].shape[1:]
        if shape != expected:
            raise ValueError(
                f"site {name!r} draws data of shape {shape_text(shape)}, but the data that were passed have shape "
                f"{shape_text(expected)}: let the model draw data like these"
            )
    return drawn


def simulated_of(model: sampling.Model, drawn: sampling.Values) -> Simulated:
    """The parameters, and the data with gaps where the real ones have them."""
    return Simulated(
        {name: drawn[name][0].cpu().numpy() for name in model.named("latent")},
        {name: _with_gaps(drawn[name][0], _missing(model, name)) for name in model.named("observed")},
    )


def _missing(model: sampling.Model, name: str) -> Tensor:
    return model.sites[name].data.isnan()


def _with_gaps(value: Tensor, missing: Tensor) -> Tensor:
    return torch.where(missing, torch.nan, value) if missing.any() else value  # whole numbers stay whole


def _check_finite(model: sampling.Model, simulated: Simulated) -> None:
    for name, value in simulated.data.items():
        bad = ~(value.isfinite() | _missing(model, name))
        if bad.any():
            theta = "; ".join(f"{key} = {np.array2string(at, 4, threshold=8)}" for key, at in simulated.theta.items())
            raise RuntimeError(
                f"{int(bad.sum())} of {bad.numel()} values drawn at site {name!r} are not finite, at {theta}. They are "
                "not left out, for the prior says that such parameters occur: mend the simulator for them, or take a "
                "prior without them"
            )


def check_data_are_observed_only(model: sampling.Model, task: Task, drawn: sampling.Values) -> None:
    """Raise if densities change when simulated data take the place of the real ones, wherever arguments hold these."""
    try:
        args, kwargs = copy.deepcopy((task.args, task.kwargs))  # views of one tensor remain views of its copy
    except Exception:  # arguments of any kind: their data stay unseen
        return
    copied = sampling.Model(task.model, args, kwargs, {}, nesting=0, parallel=False)
    scored = [name for name in copied.named("latent", "observed") if not copied.sites[name].can_fail]

    def log_probs() -> dict[str, Tensor]:
        with forked_rng(0):  # the model's own noise is the same
            return copied.run(1, drawn, score=scored, observed=False).log_probs

    before = log_probs()
    for name in model.named("observed"):
        place, real = copied.sites[name].value, model.sites[name].value
        if place.untyped_storage().data_ptr() != real.untyped_storage().data_ptr():  # else it is no argument
            with torch.no_grad(), suppress(RuntimeError):  # some cannot be written to, such as expanded ones
                place.copy_(torch.where(_missing(model, name), real, drawn[name][0]))
    after = log_probs()
    if moved := [name for name in scored if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())]:
        raise ValueError(
            f"the model uses data outside of obs=: the densities of {moved} at fixed values change when simulated data "
            "take the place of the real ones in its arguments, so that draws from them would hang on the real data. "
            'Write a series so that each step takes what the step before returned, last = pyro.sample(f"y_{t}", '
            "Normal(phi * last, 1), obs=y[t]), or as a simulator; and give priors numbers of their own"
        )
