"""Exported data made of arrays, for tests that know the right answer."""

from importlib.util import find_spec

import numpy as np

from pyrobirds import arviz_groups
from pyrobirds.arviz_groups import SAMPLE_DIMS, STEP_DIMS, Variable, collect, dataset

# The generations of ArviZ whose functions can be called here.
GENERATIONS = [0, *([1] if find_spec("arviz_stats") else [])] if arviz_groups.arviz_generation() == 0 else [1]
TIME = {"long_name": "time", "units": "days"}


def use_generation(monkeypatch, generation):
    monkeypatch.setattr(arviz_groups, "arviz_generation", lambda: generation)


def exported(attrs=None, **groups):
    """Groups of variables ``name=(values, *dims after chain and draw)``, from arrays with a chain and a draw axis."""
    return collect({name: dataset(*group) for name, group in groups.items()}, attrs)


def draws(**variables):
    """(chain, draw, ...) arrays by name, their other dimensions named ``time`` if there is one, else a, b."""
    return {name: Variable(np.asarray(x), (*SAMPLE_DIMS, *_dims(np.ndim(x) - 2))) for name, x in variables.items()}


def observed(**variables):
    return {name: Variable(np.asarray(x), _dims(np.ndim(x))) for name, x in variables.items()}


def weighted(theta, log_weight, *, noisy=False, attrs=None, **stats):
    """Draws of theta with their log weights, both (chain, draw)."""
    return exported(
        {"divergence": "KL", "w": 1.0, "num_repeats": 1, **(attrs or {})},
        posterior=(draws(theta=theta, double=2 * np.asarray(theta)),),
        sample_stats=(draws(log_weight=log_weight, **stats), None, {"noisy": noisy}),
    )


def predicted(y, x, **coords):
    """Data y, which are an array or several by name, and replicated data x with chain and draw axes."""
    y, x = (value if isinstance(value, dict) else {"x": value} for value in (y, x))
    return exported(observed_data=(observed(**y), coords), posterior_predictive=(draws(**x), coords))


def history(steps, windows=((1, 1),), **terms):
    """The steps of fits: (chain, step) arrays by name."""
    first, last = zip(*windows, strict=True)
    return (
        {name: Variable(np.asarray(values), STEP_DIMS) for name, values in terms.items()},
        {"step": steps},
        {"window_first": [*first], "window_last": [*last]},
    )


def _dims(n):
    return ("region", "time")[-n:] if n else ()
