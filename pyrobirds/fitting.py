"""The training loop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from pyro.infer import SVI

from pyrobirds import _checks, checkpoints
from pyrobirds._rng import forked_rng
from pyrobirds.callbacks import Step
from pyrobirds.fit_result import FitResult, StopReason
from pyrobirds.interrupts import DeferredInterrupt
from pyrobirds.progress import Progress
from pyrobirds.saving import Saving
from pyrobirds.training_run import TrainingRun


def fit(
    svi: SVI,
    *args: Any,
    num_steps: int,
    patience: int | None = None,
    tolerance: float | None = None,
    warm_start: int = 0,
    max_grad_norm: float | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_interval: float = 30.0,
    callbacks: Iterable[Callable[[Step], object]] = (),
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> FitResult:
    r"""Take steps of an SVI until it is done, and leave the guide in a state that is better than the last step's.

    Stochastic optimisation at a fixed learning rate ends up wandering about the optimum. The guide is left at the
    average of its unconstrained parameters over the steps since they became stationary, found by the split
    :math:`\hat R` of the parameters as in Welandawe et al. 2022 (https://arxiv.org/abs/2203.15945, after Dhaka et al.
    2020, https://arxiv.org/abs/2009.00666), or over the last half of the steps where that was not found; see
    :class:`~pyrobirds.averaging.IterateAverage`. A fit that diverges leaves it in the best state: where the median of
    the last 25 totals was lowest; so does one that is interrupted or ends by an error, unless the parameters were
    stationary, for then their average is better still. ``FitResult.load`` puts it in another one.

    While ``w`` of a :class:`~pyrobirds.GeneralizedELBO` changes, nothing is averaged or judged: that begins with the
    first step from which on ``w`` stays the same. A step whose gradient is not finite is not taken. A learning-rate
    scheduler of :mod:`pyro.optim` advances once a step, that on plateaus by the smoothed total.

    The first Ctrl-C ends the fit after the current step, a second one at once.

    Args:
        svi: any :class:`pyro.infer.SVI`, with any ELBO.
        *args: the arguments of model and guide, as ``svi.step`` takes them.
        num_steps: how many steps at most, those before a resumption counted.
        patience: stop after so many steps in a row in which the smoothed total had no new lowest value; None: never.
        tolerance: stop once the standard error of every averaged parameter, in its unconstrained space, is below this
            and its effective sample size above 50 (Welandawe et al. 2022); None: never.
        warm_start: for how many steps to minimise the divergence alone before, without simulating, so that the fit
            begins with the guide at the prior. They need a :class:`~pyrobirds.GeneralizedELBO`, use an optimiser of
            their own made like that of ``svi``, and do not count.
        max_grad_norm: scale the gradient down to this norm, over all parameters together, where it is larger.
        seed: for the fit's random numbers, so that it can be reproduced; the generators of torch, NumPy and Python are
            left as they were found. None: draw from them.
        checkpoint: a file to resume from, if it is there, and to save to. The resumed fit ends bitwise as one that was
            never stopped. With larger ``num_steps`` a finished fit goes on.
        checkpoint_interval: how many seconds to let pass, at least, between two savings; the last step is always saved.
        callbacks: called with a :class:`~pyrobirds.callbacks.Step` after each step; see :mod:`pyrobirds.callbacks`. One
            that has a method ``close`` is closed when the fit ends. What they draw at random does not change the fit.
        progress: show a bar with the terms of the last step, ``best`` (lowest smoothed total) and ``stall`` (steps
            since); without a terminal or notebook, a line every half minute and at the end.
        model_kwargs: keyword arguments of model and guide.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, or the checkpoint is of another fit.
        OSError: the checkpoint cannot be written.
        RuntimeError: runs fail, and ``on_failure`` of the :class:`~pyrobirds.GeneralizedELBO` makes that an error; the
            total of another ELBO is not finite; the divergence is not finite in the warm start.

    Warns:
        UserWarning: the fit diverged; it ends with this reason.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro.optim import Adam
        >>> from pyrobirds import GeneralizedELBO, models
        >>> y = models.random_walk()
        >>> svi = SVI(models.random_walk, AutoNormal(models.random_walk), Adam({"lr": 0.05}), GeneralizedELBO(w=100))
        >>> result = fit(svi, y, num_steps=60, seed=1, progress=False)
        >>> result.stop_reason.value, result.state, result.window
        ('all steps taken', 'averaged', (29, 60))
        >>> result.history["total"].shape
        (60,)
    """
    if not isinstance(svi, SVI):
        raise TypeError(f"svi must be a pyro.infer.SVI, got {svi!r}")
    if getattr(svi.step, "__func__", None) is not SVI.step:
        raise TypeError(f"svi must take steps as pyro.infer.SVI does, but {type(svi).__name__} has a step of its own")
    num_steps = _checks.positive_int("num_steps", num_steps)
    patience = None if patience is None else _checks.positive_int("patience", patience)
    tolerance = None if tolerance is None else _checks.positive("tolerance", tolerance)
    warm_start = _checks.non_negative_int("warm_start", warm_start)
    max_grad_norm = None if max_grad_norm is None else _checks.positive("max_grad_norm", max_grad_norm)
    seed = None if seed is None else _checks.seed("seed", seed)
    checkpoint_interval = _checks.non_negative("checkpoint_interval", checkpoint_interval)
    if callable(callbacks) or not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks must be several callables, as in callbacks=(a, b) or (a,), got {callbacks!r}")
    callbacks = [*callbacks]
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"callbacks must be callables that take a Step, got {callback!r}")
    if not isinstance(model_kwargs, Mapping | None):
        raise TypeError(f"model_kwargs must be a dict of keyword arguments, got {model_kwargs!r}")
    file = None if checkpoint is None else checkpoints.CheckpointFile(checkpoint)
    settings = {"seed": seed, "warm_start": warm_start, "max_grad_norm": max_grad_norm}
    with _closing(callbacks), nullcontext() if seed is None else forked_rng(seed):
        run = TrainingRun(svi, args, {**(model_kwargs or {})}, num_steps, max_grad_norm)
        saving = None if file is None else Saving(run, file, settings, checkpoint_interval)
        if not (saving and saving.resume()):
            run.start_at_prior(warm_start)
        run.prepare()
        bar = Progress(num_steps, run.num_taken, show=progress)
        try:
            reason = _take_steps(run, saving, patience, tolerance, callbacks, bar)
        except Exception:
            run.undo_unfinished_step()
            run.leave_in(run.state_when_cut_short())
            raise
        finally:
            bar.close()
    result = run.result(reason, seed)
    if reason is StopReason.DIVERGED:
        warnings.warn(f"the fit diverged at step {result.num_steps}: {result.advice}", stacklevel=2)
    return result


@contextmanager
def _closing(callbacks: list[Callable[[Step], object]]) -> Iterator[None]:
    """Close callbacks when the block ends, however it ends; that one cannot be closed loses neither fit nor error."""
    try:
        yield
    finally:
        for callback in callbacks:
            try:
                getattr(callback, "close", lambda: None)()
            except Exception as error:
                warnings.warn(f"{callback!r} could not be closed: {type(error).__name__}: {error}", stacklevel=4)


def _take_steps(
    run: TrainingRun,
    saving: Saving | None,
    patience: int | None,
    tolerance: float | None,
    callbacks: list[Callable[[Step], object]],
    bar: Progress,
) -> StopReason:
    try:
        with DeferredInterrupt() as interrupt:
            while (reason := run.reason_to_stop(patience, tolerance)) is None and not interrupt.requested:
                if (step := run.step()) is None:
                    continue
                bar.update(step, run.descent.best, run.descent.stall)
                with forked_rng() if callbacks else nullcontext():  # what they draw does not change the fit
                    for callback in callbacks:
                        callback(step)
                if saving:
                    saving.write_if_due()
            if saving and run.num_taken:
                saving.write()
            return StopReason.INTERRUPTED if interrupt.requested or reason is None else reason
    except KeyboardInterrupt:  # in the middle of a step, whose random numbers are spent: the last saving stands
        if not run.num_taken:
            raise
        run.undo_unfinished_step()
        return StopReason.INTERRUPTED
