"""What a fit did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from pyrobirds import trained

StateName = Literal["averaged", "best", "last"]


class StopReason(Enum):
    """Why a fit ended."""

    NUM_STEPS = "all steps taken"
    CONVERGED = "converged to the tolerance"
    PATIENCE = "no improvement within the patience"
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"


@dataclass(frozen=True, repr=False, eq=False)
class FitResult:
    """What a fit did.

    Attributes:
        history: by ``step``, from 1: ``total``, ``smoothed`` (the median of the last 25 totals), ``grad_norm`` (over
            all parameters, before clipping); of a :class:`~pyrobirds.GeneralizedELBO` also ``loss``, ``divergence``
            (times w), ``w`` and ``num_failed`` (runs of simulators that failed). The terms of a step are those of the
            parameters before its update.
        stop_reason: why the fit ended.
        advice: what happened and what to do about it, if the fit diverged; else empty.
        states: the unconstrained parameters by name in three states. ``"averaged"``: the mean over ``window``;
            ``"best"``: where the smoothed total was lowest; ``"last"``: after the last step.
        state: the name of the state that this result left model and guide in.
        window: the steps ``(first, last)`` that were averaged over. It is the last step alone if ``w`` changed to the
            end.
        stationary: whether the window is one in which the parameters were found to be stationary; else it is the last
            half of the steps since ``w`` was constant.
        standard_errors: of the averaged parameters, by name, in their unconstrained space; None unless they were
            stationary over at least ten blocks of steps.
        best: the lowest smoothed total; NaN after less than 25 steps.
        w: the weight of the divergence at the last step; None with another ELBO.
        divergence: its name, such as "KL", which is also that of Pyro's own ELBOs; None where it is not known.
        seed: what ``fit`` was given.
        seconds: how long the fit took, all sessions together if it was resumed.
    """

    history: xr.Dataset
    stop_reason: StopReason
    advice: str
    states: Mapping[StateName, Mapping[str, Tensor]]
    state: StateName
    window: tuple[int, int]
    stationary: bool
    standard_errors: Mapping[str, Tensor] | None
    best: float
    w: float | None
    divergence: str | None
    seed: int | None
    seconds: float
    _tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """How many steps were taken."""
        return self.history.sizes["step"]

    def load(self, state: StateName) -> None:
        """Put the parameters of model and guide into a state: "averaged", "best" or "last".

        Raises:
            ValueError: there is no such state.
            RuntimeError: parameters that belong to no module have left Pyro's parameter store since; or the result is
                a copy, or was unpickled, and knows of no guide.
        """
        if state not in self.states:
            raise ValueError(f"state must be one of {[*self.states]}, got {state!r}")
        if self._tensors.keys() != self.states[state].keys():
            raise RuntimeError(
                "this result is a copy and belongs to no guide: call load() of the one that fit() returned, or take "
                "the values from result.states"
            )
        stored = {id(tensor) for _, tensor in pyro.get_param_store().named_parameters()}
        gone = [
            name
            for name, tensor in self._tensors.items()
            if not isinstance(tensor, torch.nn.Parameter) and id(tensor) not in stored
        ]
        if gone:
            raise RuntimeError(
                f"the parameters {gone} are no longer in Pyro's parameter store (was it cleared?): load a state before "
                "clearing it, or take the values from result.states"
            )
        trained.load(self._tensors, self.states[state])
        object.__setattr__(self, "state", state)

    def __getstate__(self) -> dict[str, object]:
        # Copies of the parameters would not be those of the guide.
        return {**self.__dict__, "_tensors": {}}

    def __str__(self) -> str:
        first, last = self.window
        kind = "stationary" if self.stationary else "the last half" if first < last else "w was not constant before"
        lines = [
            f"{self.num_steps:,} steps in {self.seconds:.1f} s: {self.stop_reason.value}",
            *([self.advice] if self.advice else []),
            f"parameters: {self.state} (averaged is over the steps {first:,} to {last:,}, {kind})",
        ]
        recent = self.history.isel(step=slice(-100, None))
        terms = [name for name in ("loss", "divergence", "total") if name in recent]
        means = ", ".join(f"{name} {float(recent[name].mean()):.4g}" for name in terms)
        lines.append(f"mean of the last {recent.sizes['step']} steps: {means}")
        failed = int(self.history["num_failed"].sum()) if "num_failed" in self.history else 0
        if failed:
            lines.append(f"failed runs: {failed:,}, in {int((self.history['num_failed'] > 0).sum()):,} steps")
        skipped = int((~np.isfinite(self.history["grad_norm"])).sum())
        if skipped:
            lines.append(f"steps not taken, for the gradient was not finite: {skipped:,}")
        return "\n".join(lines)

    __repr__ = __str__
