"""Calibrate a random walk: to a synthetic one, where the exact answer is known, and to a year of the S&P 500.

`make demo` runs this file; the pictures go to examples/output/.

The walk starts at 0; each step goes up by 1 with probability sigmoid(theta), else down by 1. How badly a theta explains
an observed walk y is measured by the mean squared error between y and a walk simulated with that theta. The prior of
theta is N(0, 1), and the posterior is the Gaussian q that minimises E_q[loss] + w KL(q || prior).
"""

import csv
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch.distributions import Normal, kl_divergence

from pyrobirds import GeneralizedELBO, Simulator, diagnostics, fit, losses, models, plots, to_inference_data
from pyrobirds.simulators import random_walk

EXAMPLES = Path(__file__).resolve().parent
OUTPUT = EXAMPLES / "output"
W = 100  # weight of the divergence, in units of the loss: squared steps
PRIOR = Normal(torch.tensor(0.0), torch.tensor(1.0))
UNITS = {"x": {"units": "steps"}, "time": {"units": "steps"}, "theta": {"units": "log-odds of a step up"}}
STYLE = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 150,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def main():
    pyro.set_rng_seed(0)
    OUTPUT.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        synthetic_walk()
        sp500()


# (a) A synthetic walk: do we find the parameter that it was made with, and how far are we from the exact answer?


def synthetic_walk():
    theta_true = torch.tensor(0.2).logit()
    y = random_walk(theta_true.unsqueeze(0), n_timesteps=100)[0]

    print(f"(a) A synthetic walk of 100 values, theta = logit(0.2) = {theta_true:.3f}, w = {W}")
    guide, result = calibrate(models.random_walk, y, num_particles=10)
    report(guide, result, y)

    data = to_inference_data(models.random_walk, guide, y, fit=result, num_repeats=100, attrs=UNITS)
    print(az.summary(data, kind="stats"))
    save(arviz_predictive(data), "random_walk_arviz.png")

    save(plots.predictive(data)[0], "random_walk_predictive.png", "The data among walks from the posterior")
    posterior = plots.prior_posterior(data, true_values={"theta": theta_true})[0]
    save(posterior, "random_walk_posterior.png", "Prior and posterior")
    curves = plots.losses(data)
    curves.axhline(sum(exact_terms(best_gaussian(y), y)), color="#D55E00", linestyle="--", label="exact optimum")
    curves.legend(frameon=False)
    save(curves, "random_walk_losses.png", "The objective while fitting")

    # How far can it be trusted?
    print(diagnostics.predictive_check(data)[["observed", "mean", "q05", "q95", "p_upper"]].round(2))
    print(diagnostics.psis(data, seed=0))
    save(plots.khat(data), "random_walk_khat.png")


def calibrate(model, y, num_particles):
    """Fit a Gaussian to the generalised posterior of theta given the walk y, by num_particles simulations a step."""
    pyro.clear_param_store()
    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), loss=GeneralizedELBO(w=W, num_particles=num_particles))
    result = fit(svi, y, num_steps=100)
    return guide, result


def arviz_predictive(data):
    """ArviZ's own predictive plot: the distribution of all values of the data and of simulations."""
    if int(az.__version__.split(".")[0]) < 1:
        return az.plot_ppc(data, num_pp_samples=100)
    return az.plot_ppc_dist(data).viz["plot"]["x"].item()


# For this model the objective of a Gaussian is known exactly, so that we can tell how good the fit is.


def exact_terms(q, y):
    """E_q[loss] and w KL(q || prior), by Gauss-Hermite quadrature."""
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(64))
    theta = q.mean.double() + q.stddev.double() * nodes
    return (weights / weights.sum()) @ expected_mse(theta, y.double()), W * kl_divergence(q, PRIOR)


def expected_mse(theta, y):
    """E[mse | theta], by the mean and variance of the walk: t (2p - 1) and 4 t p (1 - p)."""
    t = torch.arange(len(y))
    p = theta.sigmoid().unsqueeze(-1)
    return ((t * (2 * p - 1) - y).square() + 4 * t * p * (1 - p)).mean(-1)


def best_gaussian(y):
    """The Gaussian with the smallest exact objective."""
    at = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # mean and log standard deviation
    optimizer = torch.optim.LBFGS([at], max_iter=100, line_search_fn="strong_wolfe")

    def evaluate():
        optimizer.zero_grad()
        total = sum(exact_terms(Normal(at[0], at[1].exp()), y))
        total.backward()
        return total

    optimizer.step(evaluate)
    return Normal(at[0].detach(), at[1].exp().detach())


def report(guide, result, y):
    """Print the terms of the objective: exactly, next to the exact optimum."""
    posterior = Normal(guide.locs.theta.detach(), guide.scales.theta.detach())
    best = best_gaussian(y)
    first, last = result.window
    print(f"    {result.num_steps} steps: {result.stop_reason.value}")
    print(f"    posterior: parameters averaged over the steps {first} to {last}")
    print("                                  mean      sd    loss  w * KL   total")
    print_row("the posterior, exactly", posterior, *exact_terms(posterior, y))
    print_row("best Gaussian, exactly", best, *exact_terms(best, y))
    gap = sum(exact_terms(posterior, y)) / sum(exact_terms(best, y)) - 1
    print(f"    The fitted posterior's objective is {gap:.2%} above the optimum.")


def print_row(name, q, loss, divergence):
    print(f"    {name:<27} {q.mean:7.3f} {q.stddev:7.3f} {loss:7.2f} {divergence:7.2f} {loss + divergence:7.2f}")


# (b) The S&P 500: an up day is a step up, a down day a step down. How probable is an up day?


def sp500():
    y = sp500_walk()
    ups = int((y.diff() > 0).sum())
    days = len(y) - 1
    walk = Simulator(random_walk, loss=losses.mse, n_timesteps=len(y))

    def model(y=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.deterministic("p", theta.sigmoid())
        return pyro.sample("x", walk(theta), obs=y, infer={"event_dims": ["time"]})

    print(f"(b) The S&P 500 in 2013: {ups} of {days} days up, w = {W}")
    # The longer walk makes a noisier loss; ten times the simulations cost little, since a step runs them as one batch.
    guide, result = calibrate(model, y, num_particles=100)
    report(guide, result, y)

    names = {
        "p": {"long_name": "probability of an up day"},
        "time": {"units": "trading days"},
        "x": {"long_name": "up days minus down days"},
    }
    data = to_inference_data(model, guide, y, fit=result, attrs=names)
    print(az.summary(data, kind="stats"))
    save(arviz_predictive(data), "random_walk_sp500_arviz.png")
    _, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), width_ratios=(3, 2), layout="constrained")
    left.set_title("S&P 500 in 2013")
    plots.predictive(data, ax=left)
    plots.prior_posterior(data, "p", ax=right)
    right.axvline(ups / days, color="#D55E00", linestyle="--", label="share of up days")
    right.legend(frameon=False)
    save(right, "random_walk_sp500.png", "Prior and posterior")


def sp500_walk():
    """Up days minus down days since the first trading day of 2013, from the closes of each day."""
    with open(EXAMPLES / "data" / "sp500_2013.csv", newline="") as file:
        closes = torch.tensor([float(row["close"]) for row in csv.DictReader(file)])
    return torch.cat([torch.zeros(1), closes.diff().sign().cumsum(0)])


def save(ax, name, title=None):
    if title:
        ax.set_title(title)
    ax.figure.savefig(OUTPUT / name, bbox_inches="tight")
    plt.close(ax.figure)
    print(f"    wrote {(OUTPUT / name).relative_to(EXAMPLES.parent)}")


if __name__ == "__main__":
    main()
