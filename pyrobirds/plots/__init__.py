"""Pictures of exported data.

The functions take what ``to_inference_data`` returned, with either generation of ArviZ, and return the matplotlib axes
that they drew on. Without ``ax`` they make a figure; sizes and fonts are those of matplotlib's settings.

Example:
    >>> import numpy as np
    >>> from pyrobirds.arviz_groups import Variable, collect, dataset
    >>> rng = np.random.default_rng(0)
    >>> draws = lambda *shape: Variable(rng.normal(size=(1, 200, *shape)), ("chain", "draw", "time")[: 2 + len(shape)])
    >>> data = collect(
    ...     {
    ...         "prior": dataset({"theta": draws()}),
    ...         "posterior": dataset({"theta": draws()}),
    ...         "sample_stats": dataset({"log_weight": draws()}),
    ...         "observed_data": dataset({"x": Variable(rng.normal(size=50), ("time",))}),
    ...         "posterior_predictive": dataset({"x": draws(50)}),
    ...     }
    ... )
    >>> [ax.get_ylabel() for ax in predictive(data)]
    ['x']
    >>> [ax.get_xlabel() for ax in prior_posterior(data, true_values={"theta": 0.3})]
    ['theta']
    >>> khat(data).get_xlabel()
    'importance weight / mean weight'
    >>> import matplotlib.pyplot as plt
    >>> plt.close("all")
"""

from pyrobirds.plots.draws import predictive, prior_posterior
from pyrobirds.plots.steps import losses
from pyrobirds.plots.trust import coverage, khat, ranks

__all__ = ["coverage", "khat", "losses", "predictive", "prior_posterior", "ranks"]
