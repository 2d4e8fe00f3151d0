"""Calibrate an epidemic on a network of agents to the influenza of a boarding school.

In January 1978 influenza went through a boarding school in the north of England with 763 boys (British Medical Journal,
4 March 1978, 1:587, https://doi.org/10.1136/bmj.1.6112.587). The number of boys in bed on each of 14 days is compared
with that of infected agents in `simulators.sir`: each boy has contact with 20 others, catches influenza from each
infected one with probability beta a day, and recovers with probability gamma a day.

`python examples/influenza.py` takes half a minute; the pictures go to examples/output/.
"""

from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import networkx
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.optim import Adam

from pyrobirds import GeneralizedELBO, Simulator, diagnostics, fit, losses, plots, to_inference_data
from pyrobirds.simulators import Graph, sir

OUTPUT = Path(__file__).resolve().parent / "output"
IN_BED = torch.tensor([3.0, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4])  # boys, day by day
NUM_BOYS = 763
NUM_CONTACTS = 20
W = 4  # weight of the divergence, in units of the loss: boys
STYLE = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 150,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
UNITS = {
    "infected": {"units": "boys in bed"},
    "time": {"units": "days since the first"},
    "beta": {"long_name": "infection probability", "units": "per contact and day"},
    "gamma": {"long_name": "recovery probability", "units": "per day"},
    "reproduction": {"long_name": "infections by the first boy"},
}


def main():
    pyro.set_rng_seed(0)
    OUTPUT.mkdir(exist_ok=True)
    school = Graph(networkx.random_regular_graph(NUM_CONTACTS, NUM_BOYS, seed=0))
    # The loss compares the data with the distribution of five runs, day by day: the right spread is rewarded, too.
    epidemic = Simulator(
        sir,
        loss={"infected": losses.CRPS()},
        replicates=5,
        theta_event_dims=1,
        graph=school,
        n_timesteps=len(IN_BED),
    )

    def model(in_bed=None):
        # One to ten boys at first, about one infection a day by an ill boy, and some days in bed; all within a factor.
        initial = pyro.sample("log10_initial_fraction", dist.Normal(-2.4, 0.3))
        log10_beta = pyro.sample("log10_beta", dist.Normal(-1.5, 0.3))
        log10_gamma = pyro.sample("log10_gamma", dist.Normal(-0.5, 0.3))
        beta, gamma = (10**log10_beta).clamp(max=1), (10**log10_gamma).clamp(max=1)
        pyro.deterministic("beta", beta)
        pyro.deterministic("gamma", gamma)
        pyro.deterministic("reproduction", NUM_CONTACTS * beta / (beta + gamma - beta * gamma))
        run = epidemic(torch.stack([initial, log10_beta, log10_gamma], -1))
        return pyro.sample("infected", run["infected"], obs=in_bed, infer={"event_dims": ["time"]})

    guide = AutoMultivariateNormal(model, init_scale=0.1)
    svi = SVI(model, guide, Adam({"lr": 0.02}), loss=GeneralizedELBO(w=W))
    result = fit(svi, IN_BED, num_steps=200)
    first, last = result.window
    print(f"{result.num_steps} steps: {result.stop_reason.value}; averaged over the steps {first} to {last}")

    data = to_inference_data(model, guide, IN_BED, fit=result, attrs=UNITS)
    print(az.summary(data, kind="stats").to_string())
    print(diagnostics.predictive_check(data)[["observed", "mean", "q05", "q95", "p_upper"]].round(2).to_string())
    low, high = data.posterior_predictive["infected"].quantile([0.05, 0.95], ("chain", "draw")).to_numpy()
    inside = ((low <= IN_BED.numpy()) & (IN_BED.numpy() <= high)).sum()
    print(f"The data lie on {inside} of {len(IN_BED)} days inside of the central 90% of epidemics from the posterior.")
    with plt.rc_context(STYLE):
        save(plots.predictive(data)[0], "influenza_predictive.png", "Boys in bed, and epidemics from the posterior")
        names = ["beta", "gamma", "reproduction"]
        save(plots.prior_posterior(data, names)[0], "influenza_posterior.png")
        save(plots.losses(data), "influenza_losses.png", "The objective while fitting")


def save(ax, name, title=None):
    if title:
        ax.set_title(title)
    ax.figure.savefig(OUTPUT / name, bbox_inches="tight")
    plt.close(ax.figure)
    print(f"wrote {(OUTPUT / name).relative_to(OUTPUT.parent.parent)}")


if __name__ == "__main__":
    main()
