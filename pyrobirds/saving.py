"""A training run saved to a file, and resumed from it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrobirds import checkpoints, traces, trained
from pyrobirds._rng import forked_rng
from pyrobirds.elbo import GeneralizedELBO
from pyrobirds.training_run import TrainingRun, unconstrained

_COUNTERS = ("step", "max_plate_nesting")  # of an objective


class Saving:
    """Saves a run to a file, and resumes it from there."""

    def __init__(
        self, run: TrainingRun, file: checkpoints.CheckpointFile, settings: Mapping[str, Any], interval: float
    ) -> None:
        checkpoints.optimiser_state(run.svi.optim, {})  # refuses optimisers that cannot be saved, before the first step
        self._run, self._file, self._interval = run, file, interval
        self._settings = {
            "fit": settings,
            "objective": _describe(run.objective),
            "optimiser": _optimiser(run.svi.optim),
        }
        self._fingerprint: dict[str, Any] | None = None
        self._saved_at = time.monotonic()

    def resume(self) -> bool:
        """Go on from the file, if it is there."""
        if not self._file.exists():
            return False
        run, state = self._run, self._file.read()
        checkpoints.check_same(self._file.path, state["settings"], self._all_settings())
        with poutine.trace(param_only=True) as capture, forked_rng(0), torch.no_grad():
            traces.run(run.svi.model, run.svi.guide, run.args, run.kwargs)
        found = unconstrained(capture.trace)
        parameters = state["parameters"]
        run.parameters.take({name: found[name] for name in parameters})
        trained.load(run.parameters.tensors, parameters)
        trained.load(self._buffers(), state["buffers"])
        checkpoints.load_optimiser_state(run.svi.optim, run.parameters.tensors, state["optimiser"])
        for name, value in state["objective"].items():
            setattr(run.objective, name, value)
        for name, column in state["history"].items():
            run.columns[name].extend(column.tolist())
        run.last = run.parameters.flat()
        run.first, run.best = state["first"].to(run.last), state["best"]
        run.best = None if run.best is None else run.best.to(run.last)
        run.judged, run.judged_from = state["judged"], state["judged_from"]
        run.average.load_state_dict(state["average"])
        for step in range(run.judged_from, run.judged_from + run.judged):
            run.descent.add(run.columns["total"][step], run.columns["grad_norm"][step])
        run.seconds = state["seconds"]
        checkpoints.set_rng_state(state["rng"])  # the last, for making the parameters drew numbers
        return True

    def write_if_due(self) -> None:
        if time.monotonic() - self._saved_at >= self._interval:
            self.write()

    def write(self) -> None:
        run = self._run
        self._file.write(
            {
                "settings": self._all_settings(),
                "parameters": {name: tensor.detach() for name, tensor in run.parameters.tensors.items()},
                "buffers": self._buffers(),
                "optimiser": checkpoints.optimiser_state(run.svi.optim, run.parameters.tensors),
                "objective": {name: getattr(run.objective, name) for name in _COUNTERS if hasattr(run.objective, name)},
                "history": {name: torch.tensor(column, dtype=torch.float64) for name, column in run.columns.items()},
                "best": run.best,
                "first": run.first,
                "judged": run.judged,
                "judged_from": run.judged_from,
                "average": run.average.state_dict(),
                "seconds": run.seconds,
                "rng": checkpoints.rng_state(),
            }
        )
        self._saved_at = time.monotonic()

    def _all_settings(self) -> dict[str, Any]:
        if self._fingerprint is None:
            run = self._run
            self._fingerprint = checkpoints.fingerprint(run.svi.model, run.svi.guide, run.args, run.kwargs)
        return {**self._fingerprint, **self._settings}

    def _buffers(self) -> dict[str, Tensor]:
        """What modules remember beside their parameters, such as the moments of a batch normalisation."""
        modules = {"model": self._run.svi.model, "guide": self._run.svi.guide}
        return {
            f"{which}.{name}": buffer
            for which, module in modules.items()
            if isinstance(module, torch.nn.Module)
            for name, buffer in module.named_buffers()
        }


def _describe(objective: Any) -> dict[str, Any]:
    """The settings of an objective that change what is fitted."""
    described: dict[str, Any] = {"kind": type(objective).__name__}
    for name in ("num_particles", "vectorize_particles", "on_failure", "penalty"):
        described[name] = getattr(objective, name, None)
    if isinstance(objective, GeneralizedELBO):
        described["divergence"] = repr(objective.divergence)
        steps = (0, 1, 10, 100, 1000, 10_000) if callable(objective.w) else (0,)
        described["w"] = [objective.weight(step) for step in steps]
    return described


def _optimiser(optim: Any) -> dict[str, Any]:
    """What an optimiser was made with."""
    made = [getattr(optim, name, None) for name in ("pt_optim_constructor", "pt_scheduler_constructor")]
    settings = [getattr(optim, name, None) for name in ("pt_optim_args", "kwargs", "pt_clip_args")]
    return {
        "kind": " ".join(getattr(one, "__name__", "") for one in made if one is not None),
        "settings": _plain(settings),
    }


def _plain(value: Any) -> str:
    """A value as text that is the same in another process."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return getattr(value, "__qualname__", None) or repr(value) if callable(value) else repr(value)
