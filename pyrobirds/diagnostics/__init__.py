"""How far to trust a posterior."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrobirds.diagnostics.calibration import coverage
    from pyrobirds.diagnostics.coverage_result import Coverage
    from pyrobirds.diagnostics.importance import Psis, psis
    from pyrobirds.diagnostics.nuts import compare_with_nuts
    from pyrobirds.diagnostics.predictive import predictive_check

__all__ = ["Coverage", "Psis", "compare_with_nuts", "coverage", "predictive_check", "psis"]

# Lazy like the root: psis and predictive_check read results, for which torch need not be there.
_HOME = {
    "Coverage": "coverage_result",
    "Psis": "importance",
    "compare_with_nuts": "nuts",
    "coverage": "calibration",
    "predictive_check": "predictive",
    "psis": "importance",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"pyrobirds.diagnostics.{_HOME[name]}"), name)
    raise AttributeError(f"module 'pyrobirds.diagnostics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
