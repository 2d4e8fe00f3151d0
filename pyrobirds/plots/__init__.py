"""Pictures of exported data.

The functions take what ``to_inference_data`` returned, with either generation of ArviZ; ``coverage`` and ``ranks`` take
what ``diagnostics.coverage`` returned. They return the matplotlib axes that they drew on: ``losses`` and ``khat`` one,
the others an array, with one for each output, parameter or element. Without ``ax`` they make a figure; sizes and fonts
are those of matplotlib's settings, but for a height that panels with long labels need, or several squares.
"""

from pyrobirds.plots.draws import predictive, prior_posterior
from pyrobirds.plots.steps import losses
from pyrobirds.plots.trust import coverage, khat, ranks

__all__ = ["coverage", "khat", "losses", "predictive", "prior_posterior", "ranks"]
