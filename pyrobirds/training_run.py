"""A fit as far as it has come: its steps, what is known of them, its states."""

from __future__ import annotations

import copy
import math
import time
from array import array
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # exported at runtime

from pyrobirds import traces
from pyrobirds.averaging import IterateAverage
from pyrobirds.callbacks import Step
from pyrobirds.descent import Descent
from pyrobirds.elbo import GeneralizedELBO
from pyrobirds.fit_result import FitResult, StateName, StopReason
from pyrobirds.trained import TrainedParameters

_CHECK_EVERY = 20  # steps between looks at what is costly to look at
_LONG_NAMES = {
    "loss": "expected loss",
    "divergence": "w times the divergence from the prior",
    "total": "objective",
    "smoothed": "objective, median of 25 steps",
    "w": "weight of the divergence",
    "grad_norm": "norm of the gradient",
    "num_failed": "runs that failed",
}
_SAME = 1e-3  # relative difference below which weights count as one
_HUGE = 1e8  # times what a parameter was
_ADVICE = "Try a lower learning rate, max_grad_norm, more particles or a warm_start"


class TrainingRun:
    """A fit as far as it has come."""

    def __init__(
        self, svi: SVI, args: tuple[Any, ...], kwargs: dict[str, Any], num_steps: int, max_grad_norm: float | None
    ) -> None:
        self.svi, self.args, self.kwargs = svi, args, kwargs
        self.num_steps, self._max_grad_norm = num_steps, max_grad_norm
        self.objective = getattr(svi.loss_and_grads, "__self__", None)  # None if it is a function
        self.elbo = self.objective if isinstance(self.objective, GeneralizedELBO) else None
        names = ("loss", "divergence", "w", "num_failed") if self.elbo else ()
        self.columns = {name: array("d") for name in (*names, "total", "smoothed", "grad_norm")}
        self.parameters = TrainedParameters()
        self.average = IterateAverage()
        self.descent = Descent()
        self.judged = 0  # how many steps were judged and averaged
        self.judged_from = 0  # how many were taken before
        self.last = self.parameters.flat()  # all parameters as one vector: after the last step,
        self.best: Tensor | None = None  # where the smoothed total was lowest,
        self.first = self.last  # and before the first step that was judged
        self._seconds_before, self._began = 0.0, time.perf_counter()
        self._constant_from = 0  # the number of steps after which w no longer changes

    @property
    def num_taken(self) -> int:
        return len(self.columns["total"])

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._seconds_before, self._began = value, time.perf_counter()

    def start_at_prior(self, num_steps: int) -> None:
        if not num_steps:
            return
        if self.elbo is None:
            raise TypeError(f"warm_start needs a GeneralizedELBO as the loss of svi, got {self.objective!r}")
        alone, optim = self.elbo.divergence_only(), copy.copy(self.svi.optim)
        if isinstance(optim, PyroOptim):
            optim.optim_objs, optim.grad_clip, optim._state_waiting_to_be_consumed = {}, {}, {}
        for _ in range(num_steps):
            with poutine.trace(param_only=True) as capture:
                divergence = alone.loss_and_grads(self.svi.model, self.svi.guide, *self.args, **self.kwargs)
            tensors = [*traces.unconstrained(capture.trace).values()]
            norm = _norm(tensors)
            if not (math.isfinite(divergence) and bool(norm.isfinite())):
                zero_grads(tensors)
                raise RuntimeError(
                    f"the divergence from the prior is {divergence} in the warm start, and the norm of its gradient "
                    f"{norm:.4g}: the guide must not put mass where the prior has none; leave warm_start out, or start "
                    "the guide closer to the prior"
                )
            self._clip(tensors, norm)
            optim(tensors)
            zero_grads(tensors)

    def step(self) -> Step | None:
        """Take a step, judge it, and record it; None if the parameters have become such that none can be taken."""
        w = self.elbo.weight(self.elbo.step) if self.elbo else math.nan
        try:
            total, tensors = self._evaluate()
        except (ValueError, LinAlgError) as error:  # of a scale that is zero or infinite, say
            if not (self.num_taken and _is_of_impossible_values(error)):
                raise
            self.descent.diverged = f"a distribution got impossible values ({_first_sentence(error)})"
            self.undo_unfinished_step()
            return None
        before = self.last
        grad_norm = self._update(tensors)
        zero_grads(tensors)
        after = self.parameters.flat()
        if not bool(after.isfinite().all()):  # the optimiser's doing, for the gradient was finite
            self.parameters.load(before)
            after, grad_norm = before, math.inf
        finite = self.descent.is_finite(total, grad_norm)
        if self.num_taken >= self._constant_from:
            self._judge(total if finite else None, before, after)
        self.last = after
        return self._record(total, grad_norm, w)

    def _evaluate(self) -> tuple[float, list[Tensor]]:
        """The total, and the parameters, whose gradients are computed."""
        svi = self.svi
        with poutine.trace(param_only=True) as capture:
            total = _number(svi.loss_and_grads(svi.model, svi.guide, *self.args, **self.kwargs))
        found = traces.unconstrained(capture.trace)
        if self.parameters.take(found):
            self.last = self.parameters.flat()
            self._begin_judging()
        tensors = [*{id(tensor): tensor for tensor in found.values()}.values()]
        if self.elbo is None and not math.isfinite(total):
            zero_grads(tensors)
            raise RuntimeError(
                f"the objective is {total} at step {self.num_taken + 1}, and only a GeneralizedELBO can go on without "
                "the runs that failed: take GeneralizedELBO(w=1, on_failure='drop') as the loss of svi"
            )
        return total, tensors

    def _judge(self, total: float | None, before: Tensor, after: Tensor) -> None:
        if self.judged == 0:
            self.judged_from, self.first = self.num_taken, before
        if total is not None and self.descent.add(total):
            self.best = before
        if len(after):
            self.average.add(after)
        self.judged += 1

    def judge_again(self) -> None:
        """Judge what the history holds, as when it was recorded."""
        for step, (total, grad_norm) in enumerate(zip(self.columns["total"], self.columns["grad_norm"], strict=True)):
            if self.descent.is_finite(total, grad_norm) and self.judged_from <= step < self.judged_from + self.judged:
                self.descent.add(total)

    def _record(self, total: float, grad_norm: float, w: float) -> Step:
        terms = self.elbo.terms if self.elbo else None
        step = Step(
            step=self.num_taken + 1,
            num_steps=self.num_steps,
            loss=terms.loss.item() if terms else math.nan,
            divergence=terms.divergence.item() if terms else math.nan,
            total=total,
            smoothed=self.descent.smoothed,
            w=w,
            grad_norm=grad_norm,
            num_failed=int(terms.num_failed) if terms else 0,
            seconds=self.seconds,
        )
        for name, column in self.columns.items():
            column.append(getattr(step, name))
        return step

    def _update(self, tensors: list[Tensor]) -> float:
        """Let the optimiser take its step, unless the gradient is not finite; return the gradient's norm."""
        norm = _norm(tensors)
        if not math.isfinite(grad_norm := norm.item()):
            return grad_norm
        self._clip(tensors, norm)
        optim = self.svi.optim
        optim(tensors)
        if isinstance(optim, PyroLRScheduler):
            if optim.pt_scheduler_constructor is not torch.optim.lr_scheduler.ReduceLROnPlateau:
                optim.step()
            elif math.isfinite(self.descent.smoothed):
                optim.step(self.descent.smoothed)
        return grad_norm

    def _clip(self, tensors: list[Tensor], norm: Tensor) -> None:
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(tensors, self._max_grad_norm, norm)

    def _begin_judging(self) -> None:
        """Forget what was judged: the parameters or w are others than before."""
        self.best, self.first = None, self.last
        self.judged, self.descent, self.average = 0, Descent(), IterateAverage()

    def prepare(self) -> None:
        """Find out when w is constant, before the first step of a fit and of its resumption."""
        if self.elbo is None or not callable(self.elbo.w):
            return
        offset = self.elbo.step - self.num_taken
        step = self.num_steps - 1
        final = self.elbo.weight(offset + step)
        while step > 0 and abs(self.elbo.weight(offset + step - 1) - final) <= _SAME * final:
            step -= 1
        self._constant_from = step
        if self.judged and self.judged_from < step:  # it was constant for fewer steps only
            self._begin_judging()

    def reason_to_stop(self, patience: int | None, tolerance: float | None) -> StopReason | None:
        due = self.num_taken % _CHECK_EVERY == 0
        if due and self.judged:
            self._look_for_huge_parameters()
        if self.descent.diverged:
            return StopReason.DIVERGED
        if due and tolerance is not None and self.average.has_converged(tolerance):
            return StopReason.CONVERGED
        if self.num_taken >= self.num_steps:
            return StopReason.NUM_STEPS
        if patience is not None and self.descent.stall >= patience:
            return StopReason.PATIENCE
        return None

    def _look_for_huge_parameters(self) -> None:
        sizes = [
            {name: float(part.abs().max()) for name, part in self.parameters.by_name(flat).items() if part.numel()}
            for flat in (self.first, self.last)
        ]
        for name, size in sizes[1].items():
            if size > _HUGE * (1 + sizes[0][name]):
                self.descent.diverged = f"the parameter {name!r} grew to {size:.3g}"

    def undo_unfinished_step(self) -> None:
        zero_grads(self.parameters.tensors.values())
        self.parameters.load(self.last)

    def leave_in(self, state: StateName) -> StateName:
        self.parameters.load(self.states()[state])
        return state

    def state_when_cut_short(self) -> StateName:
        """The best state of a fit that did not come to its end."""
        stationary = self.average.stationary_since is not None
        return "averaged" if stationary and not self.descent.diverged else "best"

    def states(self) -> dict[StateName, Tensor]:
        average = self.average.average() if self.average.num_iterates else None
        best = self.best
        if self.descent.diverged and not self.descent.best < self.descent.first:
            best = self.first  # it never was better than at the start
        return {
            "averaged": self.last if average is None else average,
            "best": self.last if best is None else best,
            "last": self.last,
        }

    def advice(self) -> str:
        return f"{self.descent.diverged}. {_ADVICE}" if self.descent.diverged else ""

    def result(self, reason: StopReason, seed: int | None) -> FitResult:
        cut_short = reason in (StopReason.INTERRUPTED, StopReason.DIVERGED)
        state = self.leave_in(self.state_when_cut_short() if cut_short else "averaged")
        averaged = self.average.num_iterates > 0
        start, stop = self.average.window() if averaged else (-1, 0)
        offset = self.judged_from if averaged else self.num_taken
        errors = self.average.standard_error() if averaged else None
        return FitResult(
            history=self._history(),
            stop_reason=reason,
            advice=self.advice(),
            states={name: self.parameters.by_name(flat) for name, flat in self.states().items()},
            state=state,
            window=(offset + start + 1, offset + stop),
            stationary=self.average.stationary_since is not None,
            standard_errors=None if errors is None else self.parameters.by_name(errors),
            best=self.descent.best if math.isfinite(self.descent.best) else math.nan,
            w=self.columns["w"][-1] if self.elbo else None,
            divergence=type(self.elbo.divergence).__name__ if self.elbo else _divergence_of(self.objective),
            seed=seed,
            seconds=self.seconds,
            _tensors={**self.parameters.tensors},
        )

    def _history(self) -> xr.Dataset:
        variables = {}
        for name, column in self.columns.items():
            values = np.array(column)
            values = values.astype(int) if name == "num_failed" else values
            variables[name] = ("step", values, {"long_name": _LONG_NAMES[name]})
        steps = ("step", np.arange(1, self.num_taken + 1), {"long_name": "optimisation step"})
        return xr.Dataset(variables, coords={"step": steps})


def _divergence_of(objective: Any) -> str | None:
    """That of Pyro's own ELBOs: their objective is -E_q[log p(y | theta)] + KL(q || prior)."""
    return "KL" if isinstance(objective, Trace_ELBO | TraceGraph_ELBO | TraceEnum_ELBO) else None


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all their gradients together."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    return torch.nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])


def _number(total: Any) -> float:
    """A total as a float; the first where an objective returns several, as that of wake and sleep does."""
    return float(torch_item(total[0] if isinstance(total, tuple) else total))  # type: ignore[arg-type]


def _is_of_impossible_values(error: Exception) -> bool:
    """Whether an error is torch's for a distribution's parameter or value, or for a matrix."""
    signs = ("to satisfy the constraint", "to be within the support")
    return isinstance(error, LinAlgError) or any(sign in str(error) for sign in signs)


def _first_sentence(error: Exception) -> str:
    """What torch says, without the values."""
    lines = [line for line in str(error).splitlines() if "Expected " in line]
    return lines[0].split(" (")[0].removeprefix("Expected ") if lines else str(error).splitlines()[0]
