"""The datasets of a coverage that are finished, and the file that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyrobirds import checkpoints
from pyrobirds.diagnostics.coverage_result import Compared
from pyrobirds.diagnostics.simulated_datasets import (
    Task,
    check_data_are_observed_only,
    drawn_of,
    isolated,
    prepared,
    random_of,
    simulated_of,
)

_FORMAT = "pyrobirds coverage"
_ROUNDING = 0.001  # posterior standard deviations, in which the same fit may differ on another machine


class Finished:
    """The datasets that are finished, which a file holds too if there is one."""

    def __init__(self, path: str | os.PathLike[str] | None, task: Task) -> None:
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

    def check(self, index: int, compared: Compared) -> None:
        """Raise ValueError if a finished dataset would come out otherwise today."""
        saved = self.compared[index]
        lines = [
            f"{what}: {getattr(saved, what)} in the file, {getattr(compared, what)} here"
            for what in ("num_draws", "element")
            if getattr(saved, what) != getattr(compared, what)
        ] or [
            f"{element}: mean {mean:.4g} and sd {sd:.4g} in the file, {new_mean:.4g} and {new_sd:.4g} here"
            for element, mean, sd, new_mean, new_sd in zip(
                saved.element, saved.mean, saved.sd, compared.mean, compared.sd, strict=True
            )
            if not np.allclose([mean, sd], [new_mean, new_sd], rtol=1e-5, atol=_ROUNDING * sd)
        ]
        if lines:
            raise ValueError(
                f"{self.path} is a checkpoint of another calibrate, w or model: the posterior of dataset {index}, "
                "calibrated to again, is another one:\n  " + "\n  ".join(lines) + "\nTake one file for each of them, "
                "or delete the file to start anew. Were they the same, calibrate would not be reproducible: its random "
                "numbers must come from the generators of torch, NumPy or Python"
            )

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
    return json.dumps(content).encode() + b"\n"


def _settings(task: Task) -> dict[str, Any]:
    """What a checkpoint must have in common with a call; raise if the model cannot be simulated."""
    with isolated(task, random_of(task, 0).seed):
        model = prepared(task)
        drawn = drawn_of(model)
        data = simulated_of(model, drawn).data
        if all(value.isfinite().all() for value in drawn.values()):
            check_data_are_observed_only(model, task, drawn)
        description = checkpoints.fingerprint(task.model, _no_guide, task.args, task.kwargs)
    return {
        "pyrobirds": version("pyrobirds"),
        "seed": task.seed,
        "levels": [*task.levels],
        **{what: value for what, value in description.items() if what != "guide"},
        "simulated data": {name: checkpoints.summary(value) for name, value in data.items()},
        "calibrate": _described(task.calibrate),
    }


def _no_guide(*args: Any, **kwargs: Any) -> None:
    pass


def _described(value: Any) -> Any:
    """What a file can hold of a function, with what partial binds, or of an argument."""
    if isinstance(value, partial):
        bound = {**dict(enumerate(value.args)), **value.keywords}
        return {"name": _described(value.func), **{f"argument {name!r}": _described(at) for name, at in bound.items()}}
    if isinstance(value, Tensor):
        return checkpoints.summary(value)
    if isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
