"""Calibrate a random walk: to a synthetic one, where the exact answer is known, and to a year of the S&P 500.

`make demo` runs this file; the pictures go to examples/output/.

The walk starts at 0; each step goes up by 1 with probability sigmoid(theta), else down by 1. How badly a theta explains
an observed walk y is measured by the mean squared error between y and a walk simulated with that theta. The prior of
theta is N(0, 1), and the posterior is the Gaussian q that minimises E_q[loss] + w KL(q || prior).
"""

import csv
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch.distributions import Normal, kl_divergence

from pyrobirds import GeneralizedELBO, fit, models
from pyrobirds.simulators import random_walk

EXAMPLES = Path(__file__).resolve().parent
OUTPUT = EXAMPLES / "output"
W = 100  # weight of the divergence, in units of the loss: squared steps
PRIOR = Normal(torch.tensor(0.0), torch.tensor(1.0))

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLACK, GREY, BLUE, ORANGE, VERMILLION = "#000000", "#767676", "#0072B2", "#E69F00", "#D55E00"
STYLE = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.handlelength": 1.5,
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
    posterior = posterior_of(guide)
    report(posterior, result, y)

    plot_data(y)
    plot_losses(result, sum(exact_terms(best_gaussian(y), y)))
    plot_posterior(posterior, theta_true)
    plot_predictive(draw_walks(models.random_walk, guide), y)


def calibrate(model, y, num_particles):
    """Fit a Gaussian to the generalised posterior of theta given the walk y, by num_particles simulations a step."""
    pyro.clear_param_store()
    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), loss=GeneralizedELBO(w=W, num_particles=num_particles))
    result = fit(svi, y, num_steps=100)
    return guide, result


def posterior_of(guide):
    """The guide's Gaussian over theta."""
    return Normal(guide.locs.theta.detach(), guide.scales.theta.detach())


def draw_walks(model, guide):
    """Walks simulated with parameters from the posterior, shape (1000, T)."""
    with torch.no_grad():
        return Predictive(model, guide=guide, num_samples=1000, parallel=True)()["x"]


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


def report(posterior, result, y):
    """Print the terms of the objective: exactly, next to the exact optimum."""
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


def plot_data(y):
    fig, ax = plt.subplots()
    ax.plot(y, color=BLACK)
    ax.set(title="The data: steps up have probability 0.2", xlabel="time (steps)", ylabel="position (steps)")
    save(fig, "random_walk_data.png")


def plot_losses(result, optimum):
    fig, ax = plt.subplots()
    history = result.history
    step = np.arange(1, result.num_steps + 1)
    ax.plot(step, history["total"], color=BLACK, label="total")
    ax.plot(step, history["loss"], color=BLUE, label="loss")
    ax.plot(step, history["divergence"], color=ORANGE, label="w KL(q || prior)")
    ax.axhline(optimum, color=VERMILLION, linestyle="--", label="exact optimum of the total")
    ax.set(title="The objective while fitting", xlabel="optimisation step", ylabel="squared steps", yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend()
    save(fig, "random_walk_losses.png")


def plot_posterior(posterior, theta_true):
    fig, ax = plt.subplots()
    theta = torch.linspace(-3.5, 3.5, 500)
    draw_densities(ax, theta, PRIOR.log_prob(theta).exp(), posterior.log_prob(theta).exp())
    ax.axvline(theta_true, color=VERMILLION, linestyle="--", label="true value")
    ax.set(title="Prior and posterior", xlabel="theta (log-odds of a step up)", ylabel="density", ylim=(0, None))
    ax.legend()
    save(fig, "random_walk_posterior.png")


def draw_densities(ax, at, prior, posterior):
    for density, colour, name in ((prior, GREY, "prior"), (posterior, BLUE, "posterior")):
        ax.plot(at, density, color=colour, label=name)
        ax.fill_between(at, density, color=colour, alpha=0.2, linewidth=0)


def plot_predictive(walks, y):
    fig, ax = plt.subplots()
    draw_predictive(ax, walks, y)
    ax.set(title="The data among walks from the posterior", xlabel="time (steps)", ylabel="position (steps)")
    save(fig, "random_walk_predictive.png")


def draw_predictive(ax, walks, y):
    """The data over a few of the walks and the band that holds 90% of them at each time."""
    t = np.arange(0, len(y), 2)  # a walk is even at even times and odd at odd ones: all steps would give a jagged band
    low, high = np.quantile(walks[:, t], [0.05, 0.95], axis=0)
    ax.fill_between(t, low, high, color=BLUE, alpha=0.2, linewidth=0, label="band of 90% of the walks")
    ax.plot(walks[0], color=BLUE, alpha=0.3, linewidth=0.8, label="20 walks from the posterior")
    ax.plot(walks[1:20].T, color=BLUE, alpha=0.3, linewidth=0.8)
    ax.plot(y, color=BLACK, linewidth=2, label="data")
    ax.legend()


# (b) The S&P 500: an up day is a step up, a down day a step down. How probable is an up day?


def sp500():
    y = sp500_walk()
    ups = int((y.diff() > 0).sum())
    days = len(y) - 1
    model = partial(models.random_walk, n_timesteps=len(y))

    print(f"(b) The S&P 500 in 2013: {ups} of {days} days up, w = {W}")
    # The longer walk makes a noisier loss; ten times the simulations cost little, since a step runs them as one batch.
    guide, result = calibrate(model, y, num_particles=100)
    posterior = posterior_of(guide)
    report(posterior, result, y)
    low, middle, high = posterior.icdf(torch.tensor([0.05, 0.5, 0.95])).sigmoid()
    print(f"    Probability of an up day: {middle:.3f}, with 90% of the posterior in {low:.3f} to {high:.3f}.")

    plot_sp500(draw_walks(model, guide), y, posterior, ups / days)


def sp500_walk():
    """Up days minus down days since the first trading day of 2013, from the closes of each day."""
    with open(EXAMPLES / "data" / "sp500_2013.csv", newline="") as file:
        closes = torch.tensor([float(row["close"]) for row in csv.DictReader(file)])
    return torch.cat([torch.zeros(1), closes.diff().sign().cumsum(0)])


def plot_sp500(walks, y, posterior, share):
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), width_ratios=(3, 2))

    draw_predictive(left, walks, y)
    left.set(title="S&P 500 in 2013", xlabel="time (trading days)", ylabel="up days minus down days")

    p = torch.linspace(0.001, 0.999, 999)
    slope = 1 / (p * (1 - p))  # of the log-odds: turns their density into that of the probability
    draw_densities(right, p, *(q.log_prob(p.logit()).exp() * slope for q in (PRIOR, posterior)))
    right.axvline(share, color=VERMILLION, linestyle="--", label="share of up days")
    right.set(title="Prior and posterior", xlabel="probability of an up day", ylabel="density", ylim=(0, None))
    right.legend(loc="upper left")
    save(fig, "random_walk_sp500.png")


def save(fig, name):
    fig.savefig(OUTPUT / name)
    plt.close(fig)
    print(f"    wrote {(OUTPUT / name).relative_to(EXAMPLES.parent)}")


if __name__ == "__main__":
    main()
