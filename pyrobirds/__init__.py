"""pyrobirds: calibrates simulators to data by generalised variational inference, in Pyro.

A :class:`~pyrobirds.simulators.Simulator` called with parameters is a Pyro distribution: drawing from it runs the
user's simulator, and its log-probability of the observed data is minus the user's loss.
:class:`~pyrobirds.GeneralizedELBO` is a Pyro loss that fits any guide to such a model by minimising the expected loss
plus ``w`` times the divergence of the guide from the prior.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrobirds import callbacks, diagnostics, divergences, losses, models, plots, simulators
    from pyrobirds.elbo import GeneralizedELBO
    from pyrobirds.fit_result import FitResult, StopReason
    from pyrobirds.fitting import fit
    from pyrobirds.inference_data import to_inference_data
    from pyrobirds.simulators.simulator import Simulator
    from pyrobirds.tempering import tempered

__version__ = "0.1.0.dev0"

__all__ = [
    "FitResult",
    "GeneralizedELBO",
    "Simulator",
    "StopReason",
    "callbacks",
    "diagnostics",
    "divergences",
    "fit",
    "losses",
    "models",
    "plots",
    "simulators",
    "tempered",
    "to_inference_data",
]

# Names load their modules when first used: torch and Pyro take seconds to import, and who reads results needs neither.
_HOME = {
    "FitResult": "pyrobirds.fit_result",
    "GeneralizedELBO": "pyrobirds.elbo",
    "Simulator": "pyrobirds.simulators.simulator",
    "StopReason": "pyrobirds.fit_result",
    "fit": "pyrobirds.fitting",
    "tempered": "pyrobirds.tempering",
    "to_inference_data": "pyrobirds.inference_data",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in __all__:
        return import_module(f"pyrobirds.{name}")
    raise AttributeError(f"module 'pyrobirds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
