"""The functions of ArviZ work on exported data, those of the ArviZ that is installed; docs/arviz.md has the table.

The data are of `export_examples`: made here where there is torch, else files in the folder PYROBIRDS_EXPORTS.
"""

import os
import re
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from pyrobirds import arviz_groups
from pyrobirds.arviz_groups import SAMPLE_DIMS, Variable, attributes, collect, dataset, group, group_names

INSTALLED = arviz_groups.arviz_generation()
POOLED = {"__sample__": SAMPLE_DIMS}


@pytest.fixture(scope="session")
def examples():
    """Exported data by name."""
    if folder := os.environ.get("PYROBIRDS_EXPORTS"):
        return {path.stem: az.from_netcdf(path) for path in Path(folder).glob("*.nc")}
    from export_examples import examples

    return examples()


@pytest.fixture(scope="session")
def numbers():
    """A plate of numbers y_j ~ N(mu, 1) with the exact posterior of mu under a flat prior."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=30)
    mu = rng.normal(y.mean(), 30**-0.5, size=(1, 1000))
    log_p = -0.5 * (y - mu[..., None]) ** 2 - 0.5 * np.log(2 * np.pi)
    of_y = {"log_likelihood": log_p, "posterior_predictive": rng.normal(mu[..., None], 1.0, size=log_p.shape)}
    return collect(
        {
            "posterior": dataset({"mu": Variable(mu, SAMPLE_DIMS)}),
            "observed_data": dataset({"y": Variable(y, ("j",))}),
            **{name: dataset({"y": Variable(values, (*SAMPLE_DIMS, "j"))}) for name, values in of_y.items()},
        }
    )


PLOTS_0 = {
    "posterior": lambda e: az.plot_posterior(e["walk"], ref_val=0),
    "density": lambda e: az.plot_density([e["walk"].posterior, e["walk"].prior], data_labels=["posterior", "prior"]),
    "density of SVI and NUTS": lambda e: az.plot_density([e["four_fits"], e["nuts"]], data_labels=["SVI", "NUTS"]),
    "prior and posterior": lambda e: az.plot_dist_comparison(e["walk"]),
    "dist": lambda e: az.plot_dist(e["walk"].posterior["theta"]),
    "ecdf": lambda e: az.plot_ecdf(
        e["walk"].posterior["theta"].values.ravel(), eval_points=np.linspace(-3.0, 1.0, 100)
    ),
    "violin": lambda e: az.plot_violin(e["sloped"]),
    "pair": lambda e: az.plot_pair(e["sloped"], kind=["scatter", "kde"], marginals=True),
    "forest": lambda e: az.plot_forest(e["sloped"], combined=True),
    "forest with r_hat": lambda e: az.plot_forest(e["four_fits"], r_hat=True, ess=True),
    "forest of SVI and NUTS": lambda e: az.plot_forest([e["four_fits"], e["nuts"]], model_names=["SVI", "NUTS"]),
    "ridges": lambda e: az.plot_forest(e["sloped"], kind="ridgeplot"),
    "trace": lambda e: az.plot_trace(e["four_fits"]),
    "trace of one fit": lambda e: az.plot_trace(e["walk"]),
    "rank": lambda e: az.plot_rank(e["four_fits"]),
    "ppc": lambda e: az.plot_ppc(e["walk"], num_pp_samples=50, random_seed=0),
    "ppc of the prior": lambda e: az.plot_ppc(e["walk"], group="prior", num_pp_samples=50, random_seed=0),
    "ppc of series": lambda e: az.plot_ppc(e["sloped"], kind="cumulative", num_pp_samples=50, random_seed=0),
    "p-value": lambda e: az.plot_bpv(e["sloped"], kind="p_value"),
    "time series": lambda e: az.plot_ts(e["walk"], y="x"),
    "Bayes factor": lambda e: az.plot_bf(e["walk"], var_name="theta", ref_val=-0.5),
    "k-hat": lambda e: az.plot_khat(az.loo(e["sloped"], pointwise=True)),
    "compare": lambda e: az.plot_compare(az.compare({"sloped": e["sloped"], "flat": e["flat"]})),
    "elpd": lambda e: az.plot_elpd({"sloped": e["sloped"], "flat": e["flat"]}),
}
PLOTS_1 = {
    "dist": lambda e: az.plot_dist(e["walk"]),
    "dist of SVI and NUTS": lambda e: az.plot_dist({"SVI": e["sloped"], "NUTS": e["nuts"]}),
    "ecdf": lambda e: az.plot_dist(e["walk"], kind="ecdf"),
    "prior and posterior": lambda e: az.plot_prior_posterior(e["walk"]),
    "pair": lambda e: az.plot_pair(e["sloped"]),
    "pair with one": lambda e: az.plot_pair_focus(e["sloped"], focus_var="slope"),
    "forest": lambda e: az.plot_forest(e["four_fits"]),
    "forest of SVI and NUTS": lambda e: az.plot_forest({"SVI": e["sloped"], "NUTS": e["nuts"]}),
    "ridges": lambda e: az.plot_ridge(e["sloped"]),
    "trace": lambda e: az.plot_trace(e["four_fits"]),
    "trace and dist": lambda e: az.plot_trace_dist(e["four_fits"]),
    "trace of one fit": lambda e: az.plot_trace_dist(e["walk"]),
    "rank": lambda e: az.plot_rank(e["four_fits"]),
    "rank and dist": lambda e: az.plot_rank_dist(e["four_fits"]),
    "convergence": lambda e: az.plot_convergence_dist(e["four_fits"]),
    "ppc": lambda e: az.plot_ppc_dist(e["walk"], num_samples=50),
    "ppc of the prior": lambda e: az.plot_ppc_dist(e["walk"], group="prior_predictive", num_samples=50),
    "ppc of series": lambda e: az.plot_ppc_dist(e["sloped"], kind="ecdf", num_samples=50),
    "ppc of a statistic": lambda e: az.plot_ppc_tstat(e["walk"], t_stat="median"),
    "ppc by time": lambda e: az.plot_ppc_interval(e["walk"]),
    "Bayes factor": lambda e: az.plot_bf(e["walk"], var_names="theta", ref_val=-0.5),
    "k-hat": lambda e: az.plot_khat(az.loo(e["sloped"], pointwise=True)),
    "compare": lambda e: az.plot_compare(az.compare({"sloped": e["sloped"], "flat": e["flat"]})),
    "sensitivity": lambda e: az.plot_psense_dist(e["sloped"]),
}
PLOTS = PLOTS_1 if INSTALLED else PLOTS_0


@pytest.mark.parametrize("name", PLOTS)
def test_plots(name, examples):
    try:
        PLOTS[name](examples)
        assert any(axes.has_data() for number in plt.get_fignums() for axes in plt.figure(number).axes)
    finally:
        plt.close("all")


@pytest.mark.parametrize("plot", ["plot_loo_pit", "plot_bpv" if INSTALLED == 0 else "plot_ppc_pit"])
def test_plots_of_a_plate_of_numbers(plot, numbers):
    try:
        getattr(az, plot)(numbers, **({"y": "y"} if INSTALLED == 0 and plot == "plot_loo_pit" else {}))
        assert any(axes.has_data() for axes in plt.gcf().axes)
    finally:
        plt.close("all")


def test_every_function_in_the_table_is_called_here():
    page = Path(__file__).parents[2] / "docs" / "arviz.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    called = set(re.findall(r"\baz\.(\w+)|\"(plot_\w+)\"|azstats\.(\w+)", Path(__file__).read_text()))
    documented = set(re.findall(r"\b(?:az|azstats)\.(\w+)", "\n".join(rows)))
    assert len(documented) > 30
    assert documented <= {name for names in called for name in names}


def draws(data, name):
    return group(data, "posterior")[name].values


def test_summary_is_of_the_draws(examples):
    slope = draws(examples["sloped"], "slope")
    table = az.summary(examples["sloped"], round_to=6)
    assert [*table.index] == ["level[west]", "level[east]", "slope", "factor"]
    np.testing.assert_allclose(
        table.loc["slope", ["mean", "sd"]].astype(float), [slope.mean(), slope.std(ddof=1)], rtol=1e-4
    )


def test_the_interval_is_the_shortest(examples):
    theta = np.sort(draws(examples["walk"], "theta").ravel())
    found = az.hdi(examples["walk"], **{"prob" if INSTALLED else "hdi_prob": 0.9})["theta"].values
    n = int(0.9 * len(theta))
    start = np.argmin(theta[n:] - theta[:-n])
    np.testing.assert_allclose(found, [theta[start], theta[start + n]], atol=0.02)


def test_independent_fits_are_chains(examples):
    four, one = examples["four_fits"], group(examples["four_fits"], "posterior")
    assert one.sizes["chain"] == 4
    assert float(az.rhat(four)["slope"]) < 1.03
    assert 1000 < float(az.ess(four)["slope"]) < 3000  # independent draws: 2,000
    np.testing.assert_allclose(az.mcse(four)["slope"], one["slope"].std() / az.ess(four)["slope"] ** 0.5, rtol=0.1)
    stuck = one["slope"].copy(data=one["slope"] + np.array([0.0, 0.0, 0.0, 1.0])[:, None])
    assert float(az.rhat(stuck.to_dataset())["slope"]) > 1.2


def test_pooled_draws(examples):
    found = az.extract(examples["four_fits"], num_samples=50)
    assert found.sizes["sample"] == 50
    assert np.isin(found["slope"], draws(examples["four_fits"], "slope")).all()


def pointwise(data):
    found = az.loo(data, pointwise=True)
    return found, np.asarray(found.elpd_i if INSTALLED else found.loo_i)


def test_loo_is_that_of_the_draws(examples):
    r"""The raw estimate is 1 / mean(1 / p); smoothing its tail moves it by less than its standard error."""
    found, of_series = pointwise(examples["sloped"])
    ratios = np.exp(-group(examples["sloped"], "log_likelihood")["y"].stack(POOLED).values.astype(float))
    error = ratios.std(1) / ratios.mean(1) / ratios.shape[1] ** 0.5
    assert of_series.shape == (12,)
    assert (np.abs(of_series + np.log(ratios.mean(1))) < error).all()
    assert error.max() < 0.1
    assert float(found.pareto_k.max()) < 0.7


def test_compare_prefers_the_model_of_the_data(examples):
    models = {"flat": examples["flat"], "sloped": examples["sloped"]}
    found = az.compare(models, **({"round_to": "none"} if INSTALLED else {}))
    assert [*found.index] == ["sloped", "flat"]
    totals = {name: pointwise(examples[name])[1].sum() for name in ("flat", "sloped")}
    assert abs(float(found.loc["flat", "elpd_diff"])) == pytest.approx(totals["sloped"] - totals["flat"], rel=1e-3)
    assert totals["sloped"] - totals["flat"] > 10


def log_weights(data):
    return group(data, "sample_stats")["log_weight"].astype(float)


if INSTALLED < 1:

    def test_khat_of_the_weights_of_draws(examples):
        weights, khat = az.psislw(log_weights(examples["sloped"]).stack(POOLED))
        assert float(khat) < 0.7
        assert float(np.exp(weights).sum()) == pytest.approx(1.0)

    def test_waic_and_sensitivity_to_the_prior(examples, numbers):
        assert az.waic(numbers).elpd_waic == pytest.approx(az.loo(numbers).elpd_loo, abs=0.02)
        assert set(az.psens(examples["sloped"], component="prior").data_vars) == {"level", "slope", "factor"}

    def test_statistics_of_the_next_generation_agree(examples, monkeypatch):
        """ArviZ's next generation beside this one, on the same data in its own container."""
        stats = pytest.importorskip("arviz_stats")
        base = pytest.importorskip("arviz_base")
        old = examples["sloped"]
        monkeypatch.setattr(arviz_groups, "version", lambda package: "1.3.0")
        new = collect({name: group(old, name) for name in group_names(old)}, attributes(old))
        assert isinstance(new, xr.DataTree)

        table = stats.summary(new, round_to=6)
        expected = az.summary(old, round_to=6)
        assert [*table.index] == [*expected.index]
        np.testing.assert_allclose(table["mean"].astype(float), expected["mean"], rtol=1e-4)
        np.testing.assert_allclose(
            stats.loo(new, pointwise=True).elpd_i, az.loo(old, pointwise=True).loo_i, rtol=0, atol=1e-3
        )
        weights = log_weights(old)
        _, khat = (-weights).azstats.psislw()
        assert float(khat) == pytest.approx(float(az.psislw(weights.stack(POOLED))[1]), abs=1e-2)
        assert base.extract(new, num_samples=20).sizes["sample"] == 20

else:

    def test_khat_of_the_weights_of_draws_in_1(examples):
        # The sign is right: this function takes log-likelihoods, and weighs by their inverse.
        weights, khat = (-log_weights(examples["sloped"])).azstats.psislw()
        assert float(khat) < 0.7
        assert np.corrcoef(weights.values.ravel(), log_weights(examples["sloped"]).values.ravel())[0, 1] > 0.99
        assert float(np.exp(weights).sum()) == pytest.approx(1.0)

    def test_sensitivity_to_prior_and_data_in_1(examples):
        table = az.psense_summary(examples["sloped"], round_to=6)
        assert [*table.index] == ["level[west]", "level[east]", "slope", "factor"]
        assert (table["likelihood"] > table["prior"]).all()  # 60 numbers against a prior worth one

    def test_loo_with_weights_of_draws_in_1(examples):
        stats = group(examples["sloped"], "sample_stats")
        found = az.loo_approximate_posterior(
            examples["sloped"], log_p=stats["lp"], log_q=stats["log_q"], pointwise=True
        )
        assert float(found.elpd) == pytest.approx(float(az.loo(examples["sloped"]).elpd), abs=0.5)

    def test_intervals_and_distances_in_1(examples):
        lower, upper = az.eti(examples["walk"], prob=0.5)["theta"].values
        assert np.mean((draws(examples["walk"], "theta") < upper) & (draws(examples["walk"], "theta") > lower)) == 0.5
        assert (
            az.kl_divergence(examples["sloped"], examples["nuts"])
            < 0.2
            < az.kl_divergence(examples["flat"], examples["nuts"])
        )
