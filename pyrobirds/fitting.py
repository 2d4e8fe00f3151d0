"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyro.infer import SVI
from tqdm.auto import tqdm

from pyrobirds import _checks
from pyrobirds.elbo import GeneralizedELBO


class StopReason(Enum):
    """Why a fit ended."""

    NUM_STEPS = "all steps taken"
    PATIENCE = "no improvement within the patience"


@dataclass(frozen=True)
class FitResult:
    """What a fit did.

    Attributes:
        history: by step, arrays of shape ``(num_steps,)``: ``loss``, ``divergence`` (times w) and ``total`` of a
            :class:`~pyrobirds.GeneralizedELBO`; of any other ELBO ``total`` alone.
        stop_reason: why the fit ended.
    """

    history: dict[str, NDArray[np.float64]]
    stop_reason: StopReason

    @property
    def num_steps(self) -> int:
        """How many steps were taken."""
        return len(self.history["total"])

    @property
    def best(self) -> float:
        """The lowest total of a step, an estimate from one batch of particles."""
        return float(np.nanmin(self.history["total"])) if np.isfinite(self.history["total"]).any() else math.nan

    def __str__(self) -> str:
        last = ", ".join(f"{name} {values[-1]:.2f}" for name, values in self.history.items())
        return f"{self.num_steps} steps, {self.stop_reason.value}; last {last}; best total {self.best:.2f}"


def fit(
    svi: SVI,
    *args: Any,
    num_steps: int,
    patience: int | None = None,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> FitResult:
    """Take steps of an SVI, watch them, and keep their history.

    Args:
        svi: any :class:`pyro.infer.SVI`, with any ELBO.
        *args: the arguments of model and guide, as ``svi.step`` takes them.
        num_steps: how many steps at most.
        patience: stop after so many steps in a row without a new lowest total; None: never.
        progress: show a bar with the terms of the last step, ``best`` (lowest total yet) and ``stall`` (steps since).
        model_kwargs: keyword arguments of model and guide.

    Raises:
        TypeError, ValueError: ``svi`` is no SVI, or ``num_steps`` or ``patience`` not a whole number of at least 1.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro.optim import Adam
        >>> from pyrobirds import GeneralizedELBO, models
        >>> y = models.random_walk()
        >>> svi = SVI(models.random_walk, AutoNormal(models.random_walk), Adam({"lr": 0.05}), GeneralizedELBO(w=100))
        >>> result = fit(svi, y, num_steps=5, progress=False)
        >>> result.history["total"].shape, result.stop_reason.value
        ((5,), 'all steps taken')
    """
    if not isinstance(svi, SVI):
        raise TypeError(f"svi must be a pyro.infer.SVI, got {svi!r}")
    num_steps = _checks.positive_int("num_steps", num_steps)
    patience = num_steps if patience is None else _checks.positive_int("patience", patience)
    if not isinstance(model_kwargs, Mapping | None):
        raise TypeError(f"model_kwargs must be a dict of keyword arguments, got {model_kwargs!r}")
    kwargs = {**(model_kwargs or {})}

    rows: list[dict[str, float]] = []
    best, stall = math.inf, 0
    stop_reason = StopReason.NUM_STEPS
    with tqdm(total=num_steps, disable=not progress) as bar:
        for _ in range(num_steps):
            total = float(svi.step(*args, **kwargs))  # type: ignore[arg-type]
            row = {**_terms(svi), "total": total}
            rows.append(row)
            best, stall = (total, 0) if total < best else (best, stall + 1)
            shown = {"reg" if name == "divergence" else name: f"{value:.2f}" for name, value in row.items()}
            bar.set_postfix({**shown, "best": f"{best:.2f}", "stall": stall}, refresh=False)
            bar.update()
            if stall >= patience and len(rows) < num_steps:
                stop_reason = StopReason.PATIENCE
                break
    history = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return FitResult(history=history, stop_reason=stop_reason)


def _terms(svi: SVI) -> dict[str, float]:
    elbo = getattr(svi.loss_and_grads, "__self__", None)
    if not isinstance(elbo, GeneralizedELBO) or elbo.terms is None:
        return {}
    return {"loss": elbo.terms.loss.item(), "divergence": elbo.terms.divergence.item()}
