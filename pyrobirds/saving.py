"""A training run saved to a file, and resumed from it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrobirds import checkpoints, traces, trained
from pyrobirds._rng import forked_rng
from pyrobirds.elbo import GeneralizedELBO
from pyrobirds.training_run import TrainingRun

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
        # Model and guide make what they are made of from the generators as a fit finds them, here as in the first one.
        with poutine.trace(param_only=True) as capture, self._unchanged_buffers():
            traces.run(run.svi.model, run.svi.guide, run.args, run.kwargs)
        found, parameters = traces.unconstrained(capture.trace), state["parameters"]
        checkpoints.check_same(self._file.path, state["settings"], self._all_settings())
        if missing := sorted(parameters.keys() - found.keys()):
            raise ValueError(
                f"{self._file.path} has the parameters {missing}, which model and guide do not use when they are first "
                "called: a fit with parameters that come later cannot be resumed. To start anew delete the file"
            )
        run.parameters.take({name: found[name] for name in parameters})
        trained.load(run.parameters.tensors, parameters)
        trained.load(self._buffers(), state["buffers"])
        checkpoints.check_same(self._file.path, state["draws"], self._draws())
        checkpoints.load_optimiser_state(run.svi.optim, run.parameters.tensors, state["optimiser"])
        for name, value in state["objective"].items():
            setattr(run.objective, name, value)
        for name, column in state["history"].items():
            run.columns[name].extend(column.tolist())
        self._check_weights()
        run.last = run.parameters.flat()
        run.first, run.best = state["first"].to(run.last), state["best"]
        run.best = None if run.best is None else run.best.to(run.last)
        run.judged, run.judged_from = state["judged"], state["judged_from"]
        run.average.load_state_dict(state["average"])
        run.judge_again()
        run.seconds = state["seconds"]
        checkpoints.set_rng_state(state["rng"])  # the last, for making the parameters drew numbers
        return True

    def write_if_due(self) -> None:
        self._all_settings()  # as of the first step: a run at parameters that have exploded might fail
        if time.monotonic() - self._saved_at >= self._interval:
            self.write()

    def write(self) -> None:
        run = self._run
        self._file.write(
            {
                "settings": self._all_settings(),
                "parameters": {name: tensor.detach() for name, tensor in run.parameters.tensors.items()},
                "buffers": self._buffers(),
                "draws": self._draws(),
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
            with self._unchanged_buffers():
                self._fingerprint = checkpoints.fingerprint(run.svi.model, run.svi.guide, run.args, run.kwargs)
        return {**self._fingerprint, **self._settings}

    def _draws(self) -> dict[str, Any]:
        """What the guide draws from one seed: another guide with parameters like these shows there."""
        run = self._run
        with self._unchanged_buffers(), poutine.block(), forked_rng(0), suppress(ValueError, RuntimeError):
            trace = poutine.trace(run.svi.guide).get_trace(*run.args, **run.kwargs)
            return {
                f"the guide's draw of {name!r} at these parameters": checkpoints.summary(site["value"])
                for name, site in traces.sample_sites(trace).items()
                if site["fn"].has_rsample  # rounding might make a discrete one another
            }
        return {}  # of a fit that diverged

    def _check_weights(self) -> None:
        """Raise if w of the steps taken is not what it was."""
        run = self._run
        if run.elbo is None:
            return
        offset = run.elbo.step - run.num_taken
        for step, saved in enumerate(run.columns["w"]):
            what = f"objective, w of step {step + 1}"
            checkpoints.check_same(self._file.path, {what: saved}, {what: run.elbo.weight(offset + step)})

    @contextmanager
    def _unchanged_buffers(self) -> Iterator[None]:
        before = {name: buffer.clone() for name, buffer in self._buffers().items()}
        try:
            yield
        finally:
            trained.load(self._buffers(), before)

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
    """The settings of an objective; w is compared step by step."""
    plain = {
        name: value
        for name, value in getattr(objective, "__dict__", {}).items()
        if isinstance(value, bool | int | float | str) and not name.startswith("_") and name not in (*_COUNTERS, "w")
    }
    divergence = {"divergence": repr(objective.divergence)} if isinstance(objective, GeneralizedELBO) else {}
    return {"kind": type(objective).__name__, **plain, **divergence}


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
    if isinstance(value, partial):
        return f"partial({', '.join(map(_plain, (value.func, value.args, value.keywords)))})"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
