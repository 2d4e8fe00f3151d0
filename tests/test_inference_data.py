"""What to_inference_data exports, against formulas, quadrature and counts."""

import gc
import math
import pickle
import random
import warnings
from functools import partial
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_walk import TUTORIAL_WALK
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
    init_to_value,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam

from pyrobirds import GeneralizedELBO, Simulator, fit, losses, models, tempered, to_inference_data
from pyrobirds.arviz_groups import attributes, group, group_names
from pyrobirds.simulators import repeated

Y = torch.tensor([0.5, 1.0, 2.0])
WALK = torch.tensor(TUTORIAL_WALK)


def scaled(y):
    """A location and a scale, with a closed form of nothing, but two dimensions that quadrature can do."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def conjugate(y):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def normal_guide(y):
    loc = pyro.param("loc", torch.tensor(0.3))
    pyro.sample("theta", dist.Normal(loc, pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)))


def hierarchical(x, y, *, n_groups=4):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("group", n_groups, dim=-2):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with pyro.plate("item", 5, dim=-1):
        pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"event_dims": ["axis"]})
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", n_groups, dim=-2):
            m = pyro.deterministic("m", a + b * x)
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)
    pyro.deterministic("twice", 2 * mu)
    pyro.deterministic("shares", share.flip(-1), event_dim=1)


def hierarchical_data():
    torch.manual_seed(1)
    x, y = torch.randn(4, 5), torch.randn(4, 5)
    guide = AutoNormal(hierarchical, init_scale=0.5)
    guide(x, y)
    return guide, x, y


class Counting:
    """A simulator that counts its batches: x = theta + noise."""

    def __init__(self):
        self.batches = []

    def __call__(self, theta, scale=1.0):
        self.batches.append(len(theta))
        return theta.unsqueeze(-1) + scale * torch.randn(len(theta), 1)


def noisy_model(simulate, loss=losses.mse, **options):
    simulator = Simulator(simulate, loss, **options)

    def model(y=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("x", simulator(theta), obs=y)

    return model


def torch_of(variable):
    return torch.as_tensor(variable.values, dtype=torch.float)


class TestDensities:
    def test_of_each_draw_are_those_of_the_formulas(self):
        y, w = torch.tensor(2.0), 4.0
        data = to_inference_data(conjugate, normal_guide, y, w=w, num_samples=50)
        theta = torch_of(group(data, "posterior")["theta"])
        stats = group(data, "sample_stats")
        prior, q = dist.Normal(0.0, 1.0).log_prob(theta), dist.Normal(0.3, 0.7).log_prob(theta)
        likelihood = dist.Normal(theta, 1.0).log_prob(y)
        expected = {
            "loss": -likelihood,
            "lp": prior + likelihood / w,
            "log_q": q,
            "log_weight": prior + likelihood / w - q,
        }
        assert set(stats) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(torch_of(stats[name]), value, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(torch_of(group(data, "log_likelihood")["y"]), likelihood / w)
        torch.testing.assert_close(torch_of(group(data, "log_prior")["theta"]), prior)

    @pytest.mark.parametrize("parallel", [True, False])
    @pytest.mark.parametrize(
        "guide_of",
        [
            AutoNormal,
            AutoDiagonalNormal,
            AutoMultivariateNormal,
            partial(AutoLowRankMultivariateNormal, rank=1),
            AutoIAFNormal,
            AutoStructured,
            AutoNormalMessenger,
        ],
        ids=lambda guide: getattr(guide, "__name__", "AutoLowRankMultivariateNormal"),
    )
    def test_weights_of_every_guide_average_to_the_evidence(self, guide_of, parallel):
        """E_q[weight] is the evidence, by quadrature; 5 standard errors fail once in 2 million."""
        w = 2.0
        start = init_to_value(values={"loc": torch.tensor(0.7), "scale": torch.tensor(1.0)})
        options = {} if guide_of is AutoIAFNormal else {"init_loc_fn": start, "init_scale": 0.6}
        guide = guide_of(scaled, **options)
        guide(Y)
        n = 4000 if parallel else 400
        data = to_inference_data(
            scaled, guide, Y, w=w, num_samples=n, groups=["sample_stats"], batch_size=1000, parallel=parallel
        )
        weight = torch_of(group(data, "sample_stats")["log_weight"]).double().exp().flatten()
        loc, log_scale = torch.meshgrid(*[torch.linspace(-6, 6, 601, dtype=torch.float64)] * 2, indexing="ij")
        cell = (12 / 600) ** 2
        log_prior = dist.Normal(0.0, 1.0).log_prob(loc) + dist.Normal(0.0, 0.5).log_prob(log_scale)
        log_likelihood = dist.Normal(loc.unsqueeze(-1), log_scale.exp().unsqueeze(-1)).log_prob(Y.double()).sum(-1)
        evidence = (log_prior + log_likelihood / w).exp().sum() * cell
        error = weight.std() / math.sqrt(n)
        assert error < 0.25 * evidence
        assert (weight.mean() - evidence).abs() < 5 * error

    def test_scales_and_masks_count_as_in_the_objective(self):
        def model(y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3), poutine.scale(scale=0.5), poutine.mask(mask=torch.tensor([True, True, False])):
                pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
            pyro.factor("extra", -(theta**2))

        data = to_inference_data(model, normal_guide, Y, num_samples=20)
        theta = torch_of(group(data, "posterior")["theta"])
        by_element = 0.5 * dist.Normal(theta.unsqueeze(-1), 1.0).log_prob(Y) * torch.tensor([1.0, 1.0, 0.0])
        log_likelihood = group(data, "log_likelihood")
        torch.testing.assert_close(torch_of(log_likelihood["y"]), by_element)
        torch.testing.assert_close(torch_of(log_likelihood["extra"]), -(theta**2))
        torch.testing.assert_close(
            torch_of(group(data, "sample_stats")["loss"]), theta**2 - by_element.sum(-1), rtol=1e-5, atol=1e-5
        )
        assert set(group(data, "posterior_predictive")) == {"y"}

    def test_a_point_mass_has_no_density(self):
        guide = AutoDelta(conjugate)
        guide(torch.tensor(1.0))
        for num_samples in (1, 10):
            data = to_inference_data(conjugate, guide, torch.tensor(1.0), num_samples=num_samples)
            stats = group(data, "sample_stats")
            assert set(stats) == {"lp", "loss"}
            assert "point mass" in stats.attrs["note"]

    def test_other_divergences_have_no_weights(self):
        y = torch.tensor(1.0)
        result = fit(SVI(conjugate, normal_guide, Adam({}), GeneralizedELBO()), y, num_steps=3, progress=False)
        object.__setattr__(result, "divergence", "Renyi")
        stats = group(to_inference_data(conjugate, normal_guide, y, fit=result, num_samples=10), "sample_stats")
        assert set(stats) == {"lp", "loss", "log_q"}
        assert "Kullback-Leibler" in stats.attrs["note"]

    def test_reparameterised_models_keep_their_prior(self):
        """Pyro's LocScaleReparam makes theta deterministic; its prior is that of the site it adds."""

        def model(y):
            theta = pyro.sample("theta", dist.Normal(1.0, 2.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

        moved = poutine.reparam(model, config={"theta": LocScaleReparam(0.0)})
        guide = AutoNormal(moved)
        guide(Y[0])
        data = to_inference_data(moved, guide, Y[0], num_samples=20)
        posterior = group(data, "posterior")
        assert set(posterior) == {"theta", "theta_decentered"}
        torch.testing.assert_close(
            torch_of(posterior["theta"]), 1.0 + 2.0 * torch_of(posterior["theta_decentered"]), rtol=1e-5, atol=1e-5
        )
        lp, loss = (torch_of(group(data, "sample_stats")[name]) for name in ("lp", "loss"))
        prior = dist.Normal(0.0, 1.0).log_prob(torch_of(posterior["theta_decentered"]))
        torch.testing.assert_close(lp, prior - loss, rtol=1e-4, atol=1e-4)


GROUPS = ("posterior", "observed_data", "constant_data")  # that take no simulation


class TestDimensions:
    EXPECTED: ClassVar = {
        "posterior": {
            "mu": (),
            "share": ("share_dim_0",),
            "a": ("group",),
            "v": ("item", "axis"),
            "b": ("item",),
            "m": ("groups", "item"),
            "twice": (),
            "shares": ("shares_dim_0",),
        },
        "posterior_predictive": {"y": ("groups", "item")},
        "prior_predictive": {"y": ("groups", "item")},
        "log_likelihood": {"y": ("groups", "item")},
        "log_prior": {"mu": (), "share": (), "a": ("group",), "v": ("item",), "b": ("item",)},
        "sample_stats": dict.fromkeys(("lp", "loss", "log_q", "log_weight"), ()),
        "unconstrained_posterior": {
            "mu": (),
            "share": ("share_unconstrained_dim_0",),
            "a": ("group",),
            "v": ("item", "axis"),
            "b": ("item",),
        },
    }

    @pytest.mark.parametrize("parallel", [True, False])
    def test_come_from_plates_and_events(self, parallel):
        guide, x, y = hierarchical_data()
        data = to_inference_data(hierarchical, guide, x, y, num_samples=6, unconstrained=True, parallel=parallel)
        for name, variables in {**self.EXPECTED, "prior": self.EXPECTED["posterior"]}.items():
            found = {str(site): variable.dims for site, variable in group(data, name).data_vars.items()}
            assert found == {site: ("chain", "draw", *dims) for site, dims in variables.items()}, name
        assert group(data, "observed_data")["y"].dims == ("groups", "item")
        assert group(data, "constant_data")["x"].dims == ("groups", "item")  # of the data of the same shape
        posterior = group(data, "posterior")
        m = torch_of(posterior["a"]).unsqueeze(-1) + torch_of(posterior["b"]).unsqueeze(-2) * x
        torch.testing.assert_close(torch_of(posterior["m"]), m)
        torch.testing.assert_close(torch_of(posterior["shares"]), torch_of(posterior["share"]).flip(-1))
        log_likelihood = dist.Normal(m, 1.0).log_prob(y)
        torch.testing.assert_close(torch_of(group(data, "log_likelihood")["y"]), log_likelihood)
        stats, log_prior = group(data, "sample_stats"), group(data, "log_prior")
        prior = sum(torch_of(value).reshape(1, 6, -1).sum(-1) for value in log_prior.values())
        torch.testing.assert_close(torch_of(stats["lp"]), prior + log_likelihood.sum((-1, -2)), rtol=1e-4, atol=1e-3)
        unconstrained = torch_of(group(data, "unconstrained_posterior")["b"])
        torch.testing.assert_close(unconstrained, torch_of(posterior["b"]).log(), rtol=1e-4, atol=1e-5)

    def test_and_labels_are_the_users_to_give(self):
        guide, x, y = hierarchical_data()
        data = to_inference_data(
            hierarchical,
            guide,
            x,
            y,
            num_samples=3,
            dims={"share": ["party"], "x": ["groups", "item"], "v": ["item", "direction"]},
            coords={"party": ["a", "b", "c"], "item": [10, 20, 30, 40, 50]},
            attrs={"y": {"units": "people"}, "item": {"long_name": "shop"}},
            model_kwargs={"n_groups": 4},
        )
        posterior = group(data, "posterior")
        assert posterior["share"].sel(party="b").dims == ("chain", "draw")
        assert posterior["v"].dims == ("chain", "draw", "item", "direction")
        assert group(data, "observed_data")["y"].sel(item=20).shape == (4,)
        assert group(data, "constant_data")["x"].dims == ("groups", "item")
        assert int(group(data, "constant_data")["n_groups"]) == 4
        for name in ("observed_data", "posterior_predictive", "prior_predictive"):
            assert group(data, name)["y"].attrs["units"] == "people"
            assert group(data, name)["item"].attrs == {"long_name": "shop"}
        assert "units" not in group(data, "log_likelihood")["y"].attrs
        assert group(data, "observed_data")["y"].attrs["plates"] == ["groups", "item"]
        bounds = {name: {**one.attrs} for name, one in posterior.items() if one.attrs}
        assert bounds == {"share": {"lower": 0.0, "upper": 1.0}, "b": {"lower": 0.0}}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dims": {"nonsense": ["a"]}}, r"dims names \['nonsense'\], the sites are \['mu', 'share', .*'x'"),
            ({"dims": {"y": ["a"]}}, r"dims\['y'\] must name the 0 dimensions of its event, or all 2"),
            ({"dims": {"x": ["a"]}}, r"dims\['x'\] must name its 2 dimensions"),
            ({"dims": {"share": "party"}}, r"dims\['share'\] must name the 1 dimensions .*got 'party'"),
            ({"attrs": {"nonsense": {}}}, r"attrs names \['nonsense'\], the sites are .* the dimensions .*'item'"),
            ({"coords": {"party": [1]}}, r"coords names \['party'\], the dimensions are .*'share_dim_0'"),
            ({"coords": {"item": [1]}}, r"coords\['item'\] must have shape \(5,\)"),
        ],
    )
    def test_mistakes_are_named(self, options, message):
        guide, x, y = hierarchical_data()
        with pytest.raises(ValueError, match=message):
            to_inference_data(hierarchical, guide, x, y, num_samples=3, groups=GROUPS, **options)

    def test_wrong_event_dims_are_an_error_of_the_site(self):
        def model(y):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"event_dims": ["a", "b"]})
            pyro.sample("y", dist.Normal(theta.sum(-1), 1.0), obs=y)

        with pytest.raises(ValueError, match=r"'event_dims': \['a', 'b'\]} of site 'theta' must name the 1 dimensions"):
            to_inference_data(model, AutoNormal(model), Y[0], num_samples=2)


class TestSimulators:
    def test_are_run_in_batches_as_often_as_asked(self):
        simulate = Counting()
        model = noisy_model(simulate)
        guide = AutoNormal(model)
        y = torch.zeros(1)
        guide(y)
        assert simulate.batches == []
        data = to_inference_data(model, guide, y, num_samples=100, groups=[*GROUPS, "prior", "log_prior"])
        assert simulate.batches == []
        assert set(group_names(data)) == {"posterior", "observed_data", "prior", "log_prior"}
        to_inference_data(model, guide, y, num_samples=100, num_repeats=7, batch_size=16)
        assert sum(simulate.batches) == 100 * (7 + 1 + 1)
        assert max(simulate.batches) <= 16
        simulate.batches.clear()
        to_inference_data(model, guide, y, num_samples=3, num_repeats=50, batch_size=16, groups=["log_likelihood"])
        assert sum(simulate.batches) == 150
        assert max(simulate.batches) <= 16

    def test_losses_are_means_over_runs_and_their_variance_is_exact(self):
        """Of (theta + noise - y)^2: mean d^2 + 1, variance 2 + 4 d^2; 5 standard errors fail once in 2 million."""
        model, y, n, repeats = noisy_model(Counting()), torch.tensor([0.5]), 300, 40
        guide = AutoNormal(model)
        guide(y)
        data = to_inference_data(model, guide, y, w=10.0, num_samples=n, num_repeats=repeats)
        gap = (torch_of(group(data, "posterior")["theta"]) - y) ** 2
        stats = group(data, "sample_stats")
        exact_variance = 2 + 4 * gap
        error = (exact_variance / repeats).mean().sqrt() / math.sqrt(n)
        assert (torch_of(stats["loss"]) - (gap + 1)).mean().abs() < 5 * error
        ratio = torch_of(stats["loss_variance"]) / exact_variance
        assert (ratio.mean() - 1).abs() < 5 * ratio.std() / math.sqrt(n)
        torch.testing.assert_close(
            torch_of(group(data, "log_likelihood")["x"]), -torch_of(stats["loss"]) / 10, rtol=1e-4, atol=1e-4
        )
        assert (stats.attrs["noisy"], stats.attrs["num_repeats"]) == (1, repeats)

    def test_predictive_draws_follow_their_parameters(self):
        """Each walk's slope against theta: x_T - E[x_T | theta] has mean 0 and variance 4 T p (1 - p)."""
        guide = AutoNormal(models.random_walk, init_scale=0.5)
        guide(WALK)
        data = to_inference_data(models.random_walk, guide, WALK, num_samples=2000)
        for parameters, paths in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
            p = torch_of(group(data, parameters)["theta"]).sigmoid()
            x = group(data, paths)["x"]
            assert x.dims == ("chain", "draw", "time")
            for t in (1, 50, 99):
                z = (torch_of(x)[..., t] - t * (2 * p - 1)) / (4 * t * p * (1 - p)).sqrt()
                assert z.mean().abs() < 5 / math.sqrt(2000)
                assert (z.square().mean() - 1).abs() < 5 * z.square().std() / math.sqrt(2000)

    def test_scales_and_masks_count(self):
        simulator = Simulator(lambda theta: theta.unsqueeze(-1), losses.mse)

        def model(y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("series", 2), poutine.scale(scale=5.0), poutine.mask(mask=torch.tensor([True, False])):
                pyro.sample("x", simulator(theta), obs=y)

        data = to_inference_data(model, normal_guide, torch.zeros(2, 1), num_samples=9)
        theta = torch_of(group(data, "posterior")["theta"])
        by_series = torch.stack([-5 * theta**2, torch.zeros_like(theta)], -1)
        torch.testing.assert_close(torch_of(group(data, "log_likelihood")["x"]), by_series)
        torch.testing.assert_close(torch_of(group(data, "sample_stats")["loss"]), 5 * theta**2)
        np.testing.assert_array_equal(group(data, "observed_data")["x"], [[0.0], [np.nan]])

    def test_elements_of_a_plate_are_averaged_over_their_own_runs(self):
        """One in two runs of the second series fails; the loss stays the sum over series."""

        def fragile(theta):
            x = theta.unsqueeze(-1) + 0.5 * torch.randn(len(theta), 1)
            second = torch.arange(len(theta)) % 2 == 1
            return torch.where((second & (torch.rand(len(theta)) < 0.5)).unsqueeze(-1), torch.nan, x)

        simulator = Simulator(fragile, losses.mse)

        def model(y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("series", 2):
                pyro.sample("x", simulator(theta), obs=y)

        n, repeats = 200, 30
        with pytest.warns(UserWarning, match=r"\d+ runs failed .* NaN for the 0 draws"):
            data = to_inference_data(model, normal_guide, torch.zeros(2, 1), num_samples=n, num_repeats=repeats)
        stats, theta = group(data, "sample_stats"), torch_of(group(data, "posterior")["theta"])
        total = -torch_of(group(data, "log_likelihood")["x"]).sum(-1)
        torch.testing.assert_close(total, torch_of(stats["loss"]))
        of_one = 2 * 0.5**4 + 4 * 0.25 * theta**2  # variance of (theta + noise)^2
        z = (total - 2 * (theta**2 + 0.25)).mean() / ((of_one * (1 + 2) / repeats).mean() / n).sqrt()
        assert z.abs() < 5  # fails once in 2 million; the second series has half of the runs
        ratio = torch_of(stats["loss_variance"]) / (2 * of_one)
        assert (ratio.mean() - 1).abs() < 5 * ratio.std() / math.sqrt(n)

    def test_several_outputs_are_variables_of_one_run(self):
        def fn(theta):
            level = theta.unsqueeze(-1) + torch.randn(len(theta), 4)
            return {"level": level, "negative": -level}

        moods = Simulator(fn, {"level": losses.mse, "negative": losses.mse})

        def model(level=None, negative=None):
            run = moods(pyro.sample("theta", dist.Normal(0.0, 1.0)))
            pyro.sample("level", run["level"], obs=level, infer={"event_dims": ["time"]})
            pyro.sample("negative", run["negative"], obs=negative, infer={"event_dims": ["time"]})

        data = to_inference_data(model, AutoNormal(model), torch.zeros(4), torch.zeros(4), num_samples=9)
        x = group(data, "posterior_predictive")
        assert x["level"].dims == ("chain", "draw", "time")
        np.testing.assert_array_equal(x["level"], -x["negative"])

    def test_runs_that_fail_are_counted_and_nothing_is_dropped(self):
        def fragile(theta):
            x = theta.unsqueeze(-1) + torch.zeros(len(theta), 2)
            return torch.where((torch.rand(len(theta), 1) < 0.3) | (theta.unsqueeze(-1) < -1), torch.nan, x)

        model = noisy_model(fragile)
        guide = AutoNormal(model, init_scale=1.0)
        guide(torch.zeros(2))
        with pytest.warns(UserWarning, match=r"\d+ runs failed .* NaN for the \d+ draws of which none did"):
            data = to_inference_data(model, guide, torch.zeros(2), num_samples=200, num_repeats=10)
        stats, theta = group(data, "sample_stats"), group(data, "posterior")["theta"].values
        assert stats["loss"].shape == (1, 200)
        lost = np.isnan(stats["loss"].values)
        np.testing.assert_array_equal(stats["num_failed"].values == 10, lost)
        assert lost[theta < -1].all()
        np.testing.assert_allclose(stats["loss"].values[~lost], theta[~lost] ** 2, rtol=1e-4)
        share = stats["num_failed"].values[theta >= -1].mean() / 10
        assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / (10 * (theta >= -1).sum()))

    def test_losses_without_output_have_no_predictive_draws(self):
        simulator = Simulator.from_loss(lambda theta, y: (theta + torch.randn_like(theta) - y[:, 0]) ** 2)

        def model(y):
            pyro.sample("x", simulator(pyro.sample("theta", dist.Normal(0.0, 1.0))), obs=y)

        data = to_inference_data(model, AutoNormal(model), torch.zeros(1), num_samples=5)
        assert not {"posterior_predictive", "prior_predictive"} & set(group_names(data))
        assert {"posterior", "prior", "log_likelihood", "observed_data"} <= set(group_names(data))
        with pytest.raises(ValueError, match="'posterior_predictive' cannot be made: no observed site"):
            to_inference_data(model, AutoNormal(model), torch.zeros(1), num_samples=5, groups=["posterior_predictive"])

    def test_missing_data_stay_missing(self):
        y = torch.tensor([0.0, torch.nan, 1.0])
        model = noisy_model(lambda theta: theta.unsqueeze(-1).expand(-1, 3))
        guide = AutoNormal(model)
        guide(y)
        data = to_inference_data(model, guide, y, num_samples=5)
        np.testing.assert_array_equal(group(data, "observed_data")["x"], y)
        theta = torch_of(group(data, "posterior")["theta"])
        expected = (theta**2 + (theta - 1) ** 2) / 2
        torch.testing.assert_close(torch_of(group(data, "sample_stats")["loss"]), expected)
        assert "constant_data" not in group_names(data)

    def test_without_data_are_an_error(self):
        model = noisy_model(Counting())
        guide = AutoNormal(model)
        guide(torch.zeros(1))
        with pytest.raises(ValueError, match=r"site 'x' is a simulator without data: pass the arguments that svi.step"):
            to_inference_data(model, guide)


class TestWeight:
    y = torch.tensor(1.0)

    def w_of(self, *args, **kwargs):
        return attributes(to_inference_data(*args, num_samples=2, **kwargs))["w"]

    def test_is_that_given_or_of_the_fit_or_of_the_tempered_model_or_one(self):
        elbo = GeneralizedELBO(w=lambda step: 10.0 + step)
        result = fit(SVI(conjugate, normal_guide, Adam({}), elbo), self.y, num_steps=5, progress=False)
        assert self.w_of(conjugate, normal_guide, self.y) == 1
        assert self.w_of(conjugate, normal_guide, self.y, fit=result) == 14
        assert self.w_of(conjugate, normal_guide, self.y, fit=result, w=3) == 3
        assert self.w_of(tempered(conjugate, 7.0), normal_guide, self.y) == 7

    @pytest.mark.parametrize(
        ("elbo", "has_weights"),
        [(Trace_ELBO, True), (TraceMeanField_ELBO, True), (RenyiELBO, False)],
    )
    def test_of_draws_belongs_to_the_kullback_leibler_divergence(self, elbo, has_weights):
        result = fit(SVI(conjugate, normal_guide, Adam({}), elbo()), self.y, num_steps=3, progress=False)
        data = to_inference_data(conjugate, normal_guide, self.y, fit=result, num_samples=5)
        assert ("log_weight" in group(data, "sample_stats")) == has_weights

    def test_of_another_elbo_is_one(self):
        result = fit(SVI(conjugate, normal_guide, Adam({}), Trace_ELBO()), self.y, num_steps=5, progress=False)
        data = to_inference_data(conjugate, normal_guide, self.y, fit=result, num_samples=2)
        assert attributes(data)["w"] == 1
        assert attributes(data)["divergence"] == "KL"
        assert set(group(data, "history")) == {"total", "smoothed", "grad_norm"}

    def test_of_a_tempered_model_is_taken_out_of_its_loss(self):
        plain, inside = (
            to_inference_data(model, normal_guide, self.y, seed=0, num_samples=5, **options)
            for model, options in ((conjugate, {"w": 7.0}), (tempered(conjugate, 7.0), {}))
        )
        for name in ("loss", "lp", "log_weight"):
            np.testing.assert_allclose(group(plain, "sample_stats")[name], group(inside, "sample_stats")[name])

    @pytest.mark.parametrize(
        "wrapped",
        [
            lambda: poutine.scale(tempered(conjugate, 7.0), scale=1.0),
            lambda: partial(tempered(conjugate, 7.0)),
            lambda: tempered(tempered(conjugate, 3.5), 2.0),
        ],
    )
    def test_of_a_tempered_model_is_found_inside_of_other_handlers(self, wrapped):
        data = to_inference_data(wrapped(), normal_guide, self.y, num_samples=5)
        assert attributes(data)["w"] == 7
        theta, loss = torch_of(group(data, "posterior")["theta"]), torch_of(group(data, "sample_stats")["loss"])
        torch.testing.assert_close(loss, -dist.Normal(theta, 1.0).log_prob(self.y))

    def test_counts_once(self):
        with pytest.raises(ValueError, match=r"the model is tempered by w=7, and w is 3: w would count twice"):
            to_inference_data(tempered(conjugate, 7.0), normal_guide, self.y, w=3)

    def test_of_zero_has_no_posterior(self):
        result = fit(SVI(conjugate, normal_guide, Adam({}), GeneralizedELBO(w=0)), self.y, num_steps=2, progress=False)
        with pytest.raises(ValueError, match="the fit has w=0, under which there is no posterior: pass w"):
            to_inference_data(conjugate, normal_guide, self.y, fit=result)
        with pytest.raises(ValueError, match="w must be a finite number above 0"):
            to_inference_data(conjugate, normal_guide, self.y, w=0)


class TestFits:
    y = torch.tensor(3.0)

    def fit(self, guide, seed, num_steps=20):
        pyro.clear_param_store()
        svi = SVI(conjugate, guide, Adam({"lr": 0.1}), GeneralizedELBO(w=2.0))
        return fit(svi, self.y, num_steps=num_steps, seed=seed, progress=False)

    def means(self, data):
        """Those of the draws, and what 5 of their standard errors are."""
        theta = group(data, "posterior")["theta"]
        return theta.mean("draw").values, 5 * theta.std("draw").values / math.sqrt(theta.sizes["draw"])

    def test_are_chains_of_one_guide_function(self):
        results = [self.fit(normal_guide, seed, num_steps=10 * (seed + 1)) for seed in range(3)]
        pyro.clear_param_store()
        data = to_inference_data(conjugate, normal_guide, self.y, fit=results)
        mean, error = self.means(data)
        assert (np.abs(mean - [float(result.states["averaged"]["loc"]) for result in results]) < error).all()
        assert len({round(float(m), 2) for m in mean}) == 3
        assert len(pyro.get_param_store()) == 0
        history = group(data, "history")
        assert history["total"].dims == ("chain", "step")
        np.testing.assert_array_equal(history["step"], np.arange(1, 31))
        np.testing.assert_array_equal(history["total"].isnull().sum("step"), [20, 10, 0])
        np.testing.assert_array_equal(history["total"][2], results[2].history["total"])
        assert history.attrs["window_last"] == [10, 20, 30]
        assert attributes(data)["seed"] == [0, 1, 2]
        assert attributes(data)["num_steps"] == [10, 20, 30]
        assert group(data, "prior").sizes["chain"] == 1

    @pytest.mark.parametrize("with_fits", [True, False])
    def test_are_chains_of_several_guides_whose_parameters_have_the_same_names(self, with_fits):
        guides = [AutoNormal(conjugate) for _ in range(3)]
        results = [self.fit(guide, seed, num_steps=20 * (seed + 1)) for seed, guide in enumerate(guides)]
        locs = [guide.locs.theta for guide in guides]
        before = [loc.item() for loc in locs]
        stored = dict(pyro.get_param_store().named_parameters())
        data = to_inference_data(conjugate, guides, self.y, fit=results if with_fits else None)
        mean, error = self.means(data)
        assert (np.abs(mean - before) < error).all()
        assert [guide.locs.theta.item() for guide in guides] == before
        assert all(guide.locs.theta is loc for guide, loc in zip(guides, locs, strict=True))
        assert all(now is stored[name] for name, now in pyro.get_param_store().named_parameters())
        results[0].load("last")
        assert guides[0].locs.theta.item() == float(results[0].states["last"]["AutoNormal.locs.theta"])

    @pytest.mark.parametrize("state", ["averaged", "last"])
    def test_say_what_the_parameters_are(self, state):
        guide = AutoNormal(conjugate)
        result = self.fit(guide, 0)
        result.states["last"]["AutoNormal.locs.theta"].add_(3.0)  # far from the average
        result.load(state)
        value = guide.locs.theta.item()
        with torch.no_grad():
            guide.locs.theta.fill_(100.0)
        mean, error = self.means(to_inference_data(conjugate, guide, self.y, fit=result))
        assert abs(mean - value) < error
        assert guide.locs.theta.item() == 100
        mean, error = self.means(to_inference_data(conjugate, guide, self.y))
        assert abs(mean - 100) < error

    def test_can_come_from_a_file_and_a_new_guide(self):
        result = self.fit(AutoNormal(conjugate), 0)
        value = float(result.states["averaged"]["AutoNormal.locs.theta"])
        pyro.clear_param_store()
        loaded = pickle.loads(pickle.dumps(result))
        data = to_inference_data(conjugate, AutoNormal(conjugate), self.y, fit=loaded)
        mean, error = self.means(data)
        assert abs(mean - value) < error
        assert attributes(data) | {"created_at": "", "inference_library_version": "", "torch_version": ""} == {
            "created_at": "",
            "inference_library": "pyrobirds",
            "inference_library_version": "",
            "pyro_version": pyro.__version__,
            "torch_version": "",
            "w": 2,
            "divergence": "KL",
            "guide": "AutoNormal",
            "seed": 0,
            "num_steps": 20,
            "stop_reason": "all steps taken",
            "state": "averaged",
            "num_repeats": 1,
        }

    def test_of_others_are_refused(self):
        result = self.fit(AutoNormal(conjugate), 0)
        with pytest.raises(ValueError, match=r"fit is of other parameters, AutoNormal.locs.theta \(\).*have, loc \(\)"):
            to_inference_data(conjugate, normal_guide, self.y, fit=result)
        with pytest.raises(ValueError, match="fit must be one result for each of the 2 guides, got 3"):
            to_inference_data(conjugate, [normal_guide] * 2, self.y, fit=[result] * 3)
        with pytest.raises(TypeError, match=r"fit must be what pyrobirds.fit returned, or a list of that, got 3"):
            to_inference_data(conjugate, normal_guide, self.y, fit=3)
        with pytest.raises(ValueError, match=r"parameter store, where there is room for one fit: pass the results"):
            to_inference_data(conjugate, [normal_guide] * 2, self.y)

    def test_of_models_with_parameters_need_their_results(self):
        def model(y):
            scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
            pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(0.0, 1.0)), scale), obs=y)

        guides = [AutoNormal(model) for _ in range(2)]
        with pytest.raises(ValueError, match=r"the model has parameters of its own, \['scale'\].* pass the results"):
            to_inference_data(model, guides, self.y)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_leave_the_store_alone_after_an_error_that_is_kept(self, error):
        """The traceback of an error keeps what was running alive, such as the store that it ran with."""

        def model(y, fail=False):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            if fail and theta.dim():
                raise error("no")
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

        guide = AutoNormal(model)
        svi = SVI(model, guide, Adam({"lr": 0.1}), GeneralizedELBO(w=2.0))
        result = fit(svi, self.y, num_steps=20, progress=False)
        store = dict(pyro.get_param_store().named_parameters())
        with pytest.raises((error, ValueError)) as kept:
            to_inference_data(model, guide, self.y, fit=result, model_kwargs={"fail": True})
        assert {name: id(one) for name, one in pyro.get_param_store().named_parameters()} == {
            name: id(one) for name, one in store.items()
        }
        with torch.no_grad():
            guide.locs.theta.fill_(7.0)
        del kept
        gc.collect()
        assert guide.locs.theta.item() == 7.0

    def test_of_a_laplace_approximation_keep_their_history(self):
        guide = AutoLaplaceApproximation(conjugate)
        result = fit(SVI(conjugate, guide, Adam({"lr": 0.1}), Trace_ELBO()), self.y, num_steps=200, progress=False)
        data = to_inference_data(conjugate, guide.laplace_approximation(self.y), self.y, fit=result)
        mean, error = self.means(data)
        assert abs(mean - 1.5) < error + 0.1
        assert group(data, "history").sizes["step"] == 200
        assert "log_weight" in group(data, "sample_stats")


class TestMcmc:
    def run(self, model, *args, num_chains=1):
        mcmc = MCMC(NUTS(model), num_samples=30, warmup_steps=30, num_chains=num_chains, disable_progbar=True)
        mcmc.run(*args)
        return mcmc

    def test_has_the_draws_and_the_groups_of_svi(self):
        mcmc = self.run(tempered(scaled, 3.0), Y)
        data = to_inference_data(mcmc)
        samples = mcmc.get_samples(group_by_chain=True)
        posterior = group(data, "posterior")
        for name in ("loc", "scale"):
            np.testing.assert_array_equal(posterior[name], samples[name])
        assert attributes(data)["w"] == 3
        assert attributes(data)["sampler"] == "NUTS"
        loss = -dist.Normal(samples["loc"].unsqueeze(-1), samples["scale"].unsqueeze(-1)).log_prob(Y).sum(-1)
        stats = group(data, "sample_stats")
        torch.testing.assert_close(torch_of(stats["loss"]), loss)
        assert set(stats) == {"lp", "loss", "diverging"}
        svi = to_inference_data(scaled, AutoNormal(scaled), Y, num_samples=5)
        for name in (
            "posterior",
            "posterior_predictive",
            "prior",
            "prior_predictive",
            "log_likelihood",
            "observed_data",
        ):
            a, b = group(data, name), group(svi, name)
            assert {key: value.dims for key, value in a.items()} == {key: value.dims for key, value in b.items()}

    def test_keeps_chains_and_their_divergences_apart(self):
        mcmc = self.run(conjugate, Y[0])
        draws = mcmc._samples["theta"]  # a second chain, as MCMC holds it
        mcmc.num_chains, mcmc._samples = 2, {"theta": torch.cat([draws, draws + 1])}
        mcmc._diagnostics = [{"divergences": [3, 17]}, {"divergences": [5]}]
        data = to_inference_data(mcmc)
        theta = group(data, "posterior")["theta"].values
        np.testing.assert_array_equal(theta, torch.cat([draws, draws + 1]))
        assert theta.shape == (2, 30)
        diverging = group(data, "sample_stats")["diverging"].values
        assert [[*np.flatnonzero(one)] for one in diverging] == [[3, 17], [5]]

    @pytest.mark.parametrize("of", [lambda model: model, lambda model: repeated(model, 5, seed=1)])
    def test_of_frozen_noise_has_the_density_that_was_drawn_from(self, of):
        model = of(noisy_model(Counting(), seed=3))
        mcmc = self.run(model, torch.zeros(1))
        data = to_inference_data(mcmc)
        theta = torch_of(group(data, "posterior")["theta"]).flatten()
        lp = [
            poutine.trace(poutine.condition(model, {"theta": one})).get_trace(torch.zeros(1)).log_prob_sum()
            for one in theta
        ]
        stats = group(data, "sample_stats")
        torch.testing.assert_close(torch_of(stats["lp"]).flatten(), torch.stack(lp))
        assert (stats.attrs["noisy"], stats.attrs["frozen"]) == (0, 1)
        with pytest.raises(ValueError, match="num_repeats must be 1 for a simulator with frozen noise"):
            to_inference_data(mcmc, num_repeats=2)

    def test_mistakes_are_named(self):
        with pytest.raises(ValueError, match=r"the MCMC was not run yet: call mcmc.run"):
            to_inference_data(MCMC(NUTS(conjugate), num_samples=3, disable_progbar=True))
        kernel, start = NUTS(potential_fn=lambda z: z["a"]), {"a": torch.tensor(0.0)}
        of_potential = MCMC(kernel, num_samples=3, initial_params=start, disable_progbar=True)
        with pytest.raises(ValueError, match="runs on a potential function: make its kernel of a Pyro model"):
            to_inference_data(of_potential)
        with pytest.raises(TypeError, match=r"an MCMC brings its own model and arguments"):
            to_inference_data(self.run(conjugate, Y[0]), normal_guide, Y[0])


class TestBatches:
    def test_that_mix_up_draws_are_found(self):
        def model(y):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(theta.mean(), 1.0), obs=y)

        guide = AutoNormal(model, init_scale=1.0)
        guide(Y[0])
        with pytest.raises(ValueError, match=r"mixes up draws .* the log-probability of site 'y'"):
            to_inference_data(model, guide, Y[0], num_samples=7)
        data = to_inference_data(model, guide, Y[0], num_samples=7, parallel=False)
        theta = torch_of(group(data, "posterior")["theta"])
        torch.testing.assert_close(
            torch_of(group(data, "log_likelihood")["y"]), dist.Normal(theta.mean(-1), 1.0).log_prob(Y[0])
        )

    @pytest.mark.parametrize("index", [0, -1])
    def test_that_take_one_draw_for_all_are_found(self, index):
        def model(y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            one = theta[index] if theta.dim() else theta
            pyro.deterministic("one", one)
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

        guide = AutoNormal(model, init_scale=1.0)
        guide(Y[0])
        with pytest.raises(ValueError, match=r"mixes up draws .*the value of site 'one' for a draw is"):
            to_inference_data(model, guide, Y[0], num_samples=7)

    @pytest.mark.parametrize("groups", [None, ["posterior", "posterior_predictive"]])
    @pytest.mark.parametrize("site", ["simulator", "ordinary"])
    def test_that_mix_up_draws_in_front_of_a_site_are_found(self, site, groups):
        simulate = Simulator(lambda p: p.unsqueeze(-1).expand(-1, 4), losses.mse)

        def model(y):
            with pyro.plate("group", 3):
                share = pyro.sample("theta", dist.Normal(0.0, 1.0)).softmax(0)
                fn = simulate(share) if site == "simulator" else dist.Normal(share.unsqueeze(-1), 1.0).expand([3, 4])
                pyro.sample("x", fn if site == "simulator" else fn.to_event(1), obs=y)

        def guide(y):
            with pyro.plate("group", 3):
                pyro.sample("theta", dist.Normal(0.0, 1.0))

        y = torch.ones(3, 4) / 3
        what = "a parameter" if site == "simulator" else "the log-probability"
        if site == "ordinary":
            with pytest.raises(ValueError, match=r"mixes up draws|could not be run in a batch"):
                to_inference_data(model, guide, y, num_samples=50, groups=groups)
        else:
            with pytest.raises(ValueError, match=f"mixes up draws .* {what} of site 'x'"):
                to_inference_data(model, guide, y, num_samples=50, groups=groups)
        data = to_inference_data(model, guide, y, num_samples=5, groups=groups, parallel=False)
        if site == "simulator":
            total = group(data, "posterior_predictive")["x"].sum("group")
            np.testing.assert_allclose(total, 1.0, rtol=1e-5)

    def test_that_mix_up_draws_a_little_are_found(self):
        """Draws that differ by a thousandth of their size."""

        def model(y):
            with pyro.plate("i", 3):
                theta = pyro.sample("theta", dist.Normal(300.0, 10.0))
                pyro.sample("y", dist.Normal(theta, 0.1), obs=y)
            pyro.deterministic("mean", theta.mean())

        def guide(y):
            with pyro.plate("i", 3):
                pyro.sample("theta", dist.Normal(y, 0.1))

        with pytest.raises(ValueError, match=r"mixes up draws .* the value of site 'mean'"):
            to_inference_data(model, guide, 300 + Y, num_samples=50)

    def test_that_cannot_be_run_say_what_can(self):
        def model(y):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(theta[0], 1.0), obs=y)

        with pytest.raises(ValueError, match=r"could not be run in a batch of draws .* by parallel=False"):
            to_inference_data(model, AutoNormal(model), Y[0], num_samples=7)

    @pytest.mark.parametrize(
        "mix", [lambda a: a.mean(), lambda a: a[0] if a.dim() else a, lambda a: a.flip(0) if a.dim() else a]
    )
    def test_that_mix_up_the_guides_draws_are_found(self, mix):
        def model(y):
            a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

        def guide(y):
            pyro.sample("b", dist.Normal(-mix(pyro.sample("a", dist.Normal(0.0, 1.0))), 0.1))

        with pytest.raises(ValueError, match=r"the guide mixes up draws .* the log-probability of site 'b'"):
            to_inference_data(model, guide, Y[0], num_samples=100)
        data = to_inference_data(model, guide, Y[0], num_samples=20, parallel=False)
        a, b = (group(data, "posterior")[name].values.ravel() for name in "ab")
        assert np.corrcoef(a, b)[0, 1] < -0.95

    def test_of_a_regression_pass_although_sums_are_rounded_otherwise(self):
        x = torch.randn(2000, 50)
        y = x @ torch.full((50,), 30.0) + torch.randn(2000)

        def model(x, y):
            slopes = pyro.sample("slopes", dist.Normal(torch.zeros(50), 300.0).to_event(1))
            mean = x @ slopes if slopes.dim() == 1 else (slopes @ x.T).squeeze(-2)
            with pyro.plate("data", 2000):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

        def guide(x, y):
            pyro.sample("slopes", dist.Normal(torch.full((50,), 30.0), 2000**-0.5).to_event(1))

        for seed in range(5):
            data = to_inference_data(model, guide, x, y, num_samples=3, seed=seed, groups=["posterior"])
            assert group(data, "posterior")["slopes"].shape == (1, 3, 50)

    def test_that_break_a_simulators_contract_say_that(self):
        model = noisy_model(lambda theta: theta)  # (B,) instead of (B, T)
        guide = AutoNormal(model)
        guide(torch.zeros(1))
        with pytest.raises(ValueError, match="event_dim") as caught:
            to_inference_data(model, guide, torch.zeros(1), num_samples=7)
        assert "parallel=False" not in str(caught.value)

    def test_need_plates(self):
        def model(y):
            pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0)), 1.0), obs=y)

        guide = AutoNormal(model)
        with pytest.raises(ValueError, match=r"site 'theta' has batch shape \(3,\), of which no plate says what it is"):
            to_inference_data(model, guide, Y, num_samples=7)
        data = to_inference_data(model, guide, Y, num_samples=7, parallel=False)
        assert group(data, "posterior")["theta"].dims == ("chain", "draw", "theta_dim_0")

    def test_cannot_be_of_a_subsample(self):
        def model(y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3, subsample_size=2) as index:
                pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])

        with pytest.raises(ValueError, match=r"site 'y' is in the plate 'data', which is subsampled: 2 of 3 elements"):
            to_inference_data(model, AutoNormal(model), Y, num_samples=7)


class TestModels:
    def test_of_any_kind_are_taken(self):
        """A PyroModule, with an amortised guide that is one too."""

        class Model(PyroModule):
            def __init__(self):
                super().__init__()
                self.theta = PyroSample(dist.Normal(0.0, 1.0))

            def forward(self, y):
                return pyro.sample("y", dist.Normal(self.theta, 1.0), obs=y)

        class Guide(PyroModule):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Linear(1, 1)

            def forward(self, y):
                return pyro.sample("theta", dist.Normal(self.net(y.reshape(1))[0], 0.1))

        guide = Guide()
        data = to_inference_data(Model(), guide, torch.tensor(5.0))
        theta = group(data, "posterior")["theta"]
        assert abs(float(theta.mean()) - guide.net(torch.tensor([5.0])).item()) < 5 * 0.1 / math.sqrt(1000)
        assert attributes(data)["guide"] == "Guide"

    def test_with_missing_observations_have_them_in_the_posterior(self):
        def model(y, mask):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                pyro.sample("y", dist.Normal(theta, 1.0), obs=y, obs_mask=mask)

        data = to_inference_data(model, AutoNormal(model), Y, torch.tensor([True, True, False]), num_samples=4)
        posterior = group(data, "posterior")
        assert set(posterior) == {"theta", "y_unobserved", "y"}
        np.testing.assert_allclose(posterior["y"][0, :, :2], np.broadcast_to(Y[:2], (4, 2)))
        np.testing.assert_array_equal(posterior["y"][0, :, 2], posterior["y_unobserved"][0, :, 2])

    @pytest.mark.parametrize("masked", ["obs_mask", "handler", "distribution"])
    def test_with_masked_data_have_nan_there(self, masked):
        mask, y = torch.tensor([True, False, True]), torch.tensor([0.5, 0.0, 2.0])

        def model(y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                if masked == "obs_mask":
                    pyro.sample("y", dist.Normal(theta, 1.0), obs=y, obs_mask=mask)
                elif masked == "handler":
                    with poutine.mask(mask=mask):
                        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
                else:
                    pyro.sample("y", dist.Normal(theta, 1.0).mask(mask), obs=y)

        data = to_inference_data(model, AutoNormal(model), y, num_samples=4)
        name = "y_observed" if masked == "obs_mask" else "y"
        np.testing.assert_array_equal(group(data, "observed_data")[name], [0.5, np.nan, 2.0])
        assert not np.isnan(group(data, "posterior_predictive")[name]).any()

    def test_with_noise_in_their_body_are_noisy(self):
        def model(y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.factor("loss", -((theta + noise(theta) - y) ** 2))

        def noise(theta):  # rarely
            return 3.0 * (torch.rand(theta.shape) < 1e-4)

        for parallel in (True, False):
            data = to_inference_data(model, normal_guide, Y[0], num_samples=5, parallel=parallel)
            assert group(data, "sample_stats").attrs["noisy"] == 1
            quiet = to_inference_data(conjugate, normal_guide, Y[0], num_samples=5, parallel=parallel)
            assert group(quiet, "sample_stats").attrs["noisy"] == 0

    def test_whose_supports_depend_on_latents_are_mapped_by_each_draws_own(self):
        def model(y):
            high = pyro.sample("high", dist.Uniform(1.0, 2.0))
            part = pyro.sample("part", dist.Uniform(torch.zeros(()), high))
            pyro.sample("y", dist.Normal(part, 1.0), obs=y)

        def guide(y):
            high = pyro.sample("high", dist.Uniform(1.0, 2.0))
            pyro.sample("part", dist.Uniform(torch.zeros(()), high))

        for parallel in (True, False):
            data = to_inference_data(model, guide, Y[0], num_samples=50, unconstrained=True, parallel=parallel)
            high, part = (torch_of(group(data, "posterior")[name]) for name in ("high", "part"))
            assert group(data, "posterior")["high"].attrs == {"lower": 1.0, "upper": 2.0}
            assert group(data, "posterior")["part"].attrs == {}
            mapped = torch_of(group(data, "unconstrained_posterior")["part"])
            torch.testing.assert_close(mapped, (part / (high - part)).log(), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("by", ["svi", "mcmc"])
    def test_with_latents_that_are_summed_over_have_no_loss_at_their_draws(self, by):
        @config_enumerate
        def model(y):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                pyro.deterministic("sign", 2 * z - 1)
                pyro.sample("y", dist.Normal(loc * (2 * z - 1), 1.0), obs=y)

        y = torch.tensor([-3.0, 3.0, 3.1])
        options = {"num_samples": 5}
        if by == "svi":
            source = (model, AutoNormal(poutine.block(model, hide=["z"])), y)
        else:
            mcmc = MCMC(NUTS(model), num_samples=5, warmup_steps=5, disable_progbar=True)
            mcmc.run(y)
            source = (mcmc,)
        with pytest.warns(UserWarning, match=r"has no draws of the latents \['z'\]"):
            data = to_inference_data(*source, **options)
        assert set(group(data, "posterior")) == {"loc"}
        assert not {"sample_stats", "log_likelihood"} & set(group_names(data))
        assert group(data, "posterior").attrs["note"] == "without ['z', 'sign']"
        warned = pytest.warns(UserWarning, match="has no draws")
        with warned, pytest.raises(ValueError, match="'sample_stats' cannot be made: the model has"):
            to_inference_data(*source, **options, groups=["sample_stats"])

    def test_with_auxiliary_variables_in_the_guide_have_no_density(self):
        def guide(y):
            u = pyro.sample("u", dist.Normal(0.0, 0.5), infer={"is_auxiliary": True})
            pyro.sample("theta", dist.Normal(0.5 + u, 0.5))

        stats = group(to_inference_data(conjugate, guide, Y[0], num_samples=9), "sample_stats")
        assert set(stats) == {"lp", "loss"}

        def balanced(y):  # as many auxiliary variables as point masses
            u = pyro.sample("u", dist.Normal(0.0, 0.5), infer={"is_auxiliary": True})
            pyro.sample("loc", dist.Normal(0.1 * u, 0.7))
            pyro.sample("scale", dist.Delta(torch.tensor(1.0)))

        assert set(group(to_inference_data(scaled, balanced, Y, num_samples=9), "sample_stats")) == {"lp", "loss"}
        scaled_guide = poutine.scale(normal_guide, scale=0.1)
        stats = group(to_inference_data(conjugate, scaled_guide, Y[0], num_samples=9), "sample_stats")
        assert set(stats) == {"lp", "loss"}
        assert "no density" in stats.attrs["note"]

    def test_may_take_arrays_of_any_kind(self):
        def model(y, **covariates):
            conjugate(y)

        def guide(y, **covariates):
            normal_guide(y)

        covariates = {
            "names": np.array(["a", "b"]),
            "days": np.array(["2020-01-01"], dtype="datetime64[D]"),
            "backwards": np.arange(3.0)[::-1],
            "number": np.int64(3),
            "objects": np.array([None, {}], dtype=object),
            "nothing": None,
            "text": "text",
        }
        data = to_inference_data(model, guide, Y[0], num_samples=2, model_kwargs=covariates)
        constants = group(data, "constant_data")
        assert set(constants) == {"names", "days", "backwards", "number"}
        np.testing.assert_array_equal(constants["backwards"], [2, 1, 0])

    def test_of_counts_have_whole_numbers(self):
        def model(y):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            k = pyro.sample("k", dist.Poisson(rate))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Poisson(rate + k), obs=y)

        def guide(y):
            pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("k", dist.Poisson(3.0))

        data = to_inference_data(model, guide, torch.tensor([3.0, 4.0]), num_samples=5)
        for name, site in (("posterior", "k"), ("prior", "k"), ("posterior_predictive", "y"), ("observed_data", "y")):
            assert group(data, name)[site].dtype.kind == "i", name
        assert group(data, "posterior")["rate"].dtype.kind == "f"

    def test_and_guides_that_are_swapped_are_named(self):
        with pytest.raises(TypeError, match="model must be the Pyro model, got the guide AutoNormal: it comes second"):
            to_inference_data(AutoNormal(conjugate), conjugate, Y[0])

    def test_whose_prior_cannot_be_drawn_lose_that_group_alone(self):
        def model(y):
            theta = pyro.sample("theta", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

        with pytest.warns(UserWarning, match="prior_predictive and prior left out, .*NotImplementedError"):
            data = to_inference_data(model, normal_guide, Y[0], num_samples=5)
        assert not {"prior", "prior_predictive"} & set(group_names(data))
        assert "posterior_predictive" in group_names(data)
        with pytest.raises(NotImplementedError, match="ImproperUniform"):
            to_inference_data(model, normal_guide, Y[0], num_samples=5, groups=["prior"])

    def test_whose_prior_cannot_be_simulated_keep_its_parameters(self):
        def model(y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, _positive_below_2(theta)), obs=y)

        def _positive_below_2(theta):
            if (theta > 2).any():
                raise OverflowError("too large")
            return torch.ones(())

        def guide(y):
            pyro.sample("theta", dist.Uniform(-1.0, 1.0))

        with pytest.warns(
            UserWarning, match="^prior_predictive and prior left out, .*OverflowError: too large"
        ) as caught:
            data = to_inference_data(model, guide, Y[0], num_samples=500)
        assert [one.filename for one in caught] == [__file__]
        assert not {"prior", "prior_predictive"} & set(group_names(data))

    @pytest.mark.parametrize("batched", [True, False])
    @pytest.mark.parametrize("parallel", [True, False])
    def test_whose_simulator_raises_have_nan_there(self, batched, parallel):
        """A batch that raises fails as a whole; one draw after another, or unbatched, fails alone."""

        def fn(theta):
            if (theta > 1).any():
                raise OverflowError("too large")
            return theta.unsqueeze(-1)

        model = noisy_model(fn, batched=batched)
        guide = AutoNormal(model, init_scale=1.0)
        guide(torch.zeros(1))
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            data = to_inference_data(
                model, guide, torch.zeros(1), num_samples=60, parallel=parallel, batch_size=10, seed=1
            )
        for parameters, drawn in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
            theta, x = group(data, parameters)["theta"].values, group(data, drawn)["x"].values[..., 0]
            raised = (theta > 1).reshape(-1, 10)
            failed = np.broadcast_to(raised.any(1, keepdims=True), raised.shape) if batched and parallel else raised
            np.testing.assert_array_equal(np.isnan(x).ravel(), failed.ravel())
            np.testing.assert_array_equal(x[~np.isnan(x)], theta[~np.isnan(x)])

    def test_with_latents_that_the_guide_leaves_to_the_prior(self):
        """They come from the prior given the others, and weigh nothing."""

        def model(y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            extra = pyro.sample("extra", dist.Normal(theta, 0.001))
            pyro.sample("y", dist.Normal(100 * extra, 0.1), obs=y)

        with pytest.warns(UserWarning, match=r"has no draws of the latents \['extra'\]: theirs are") as caught:
            data = to_inference_data(model, normal_guide, Y[0], num_samples=50)
        assert [one.filename for one in caught] == [__file__]
        posterior = group(data, "posterior")
        np.testing.assert_allclose(posterior["extra"], posterior["theta"], atol=0.006)
        assert set(group(data, "log_prior")) == {"theta"}
        lp = dist.Normal(0.0, 1.0).log_prob(torch_of(posterior["theta"])) - torch_of(
            group(data, "sample_stats")["loss"]
        )
        torch.testing.assert_close(torch_of(group(data, "sample_stats")["lp"]), lp)

    def test_mixed_guides_lose_their_density_only_if_a_part_is_a_point(self):
        def guide_of(second):
            guide = AutoGuideList(scaled)
            guide.append(AutoNormal(poutine.block(scaled, hide=["scale"])))
            guide.append(second(poutine.block(scaled, hide=["loc"])))
            guide(Y)
            return guide

        names = [
            set(group(to_inference_data(scaled, guide_of(second), Y, num_samples=9), "sample_stats"))
            for second in (AutoNormal, AutoDelta)
        ]
        assert names == [{"lp", "loss", "log_q", "log_weight"}, {"lp", "loss"}]


def test_a_seed_repeats_the_draws_and_leaves_the_generators_alone():
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    guide = AutoNormal(models.random_walk)
    y = torch.zeros(100)
    guide(y)
    torch.set_rng_state(torch_state)
    first, second = (to_inference_data(models.random_walk, guide, y, num_samples=20, seed=3) for _ in range(2))
    for name in group_names(first):
        assert group(first, name).equals(group(second, name)), name
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
    assert attributes(first)["draws_seed"] == 3


def test_files_give_back_what_was_written(tmp_path):
    import arviz

    guide, x, y = hierarchical_data()
    data = to_inference_data(hierarchical, guide, x, y, num_samples=3, unconstrained=True)
    data.to_netcdf(str(tmp_path / "data.nc"))
    read = arviz.from_netcdf(str(tmp_path / "data.nc"))
    assert set(group_names(read)) == set(group_names(data))
    for name in group_names(data):
        assert group(read, name).equals(group(data, name)), name
    assert attributes(read).items() >= {"guide": "AutoNormal", "w": 1.0, "inference_library": "pyrobirds"}.items()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_repeats": 1.5}, TypeError, "num_repeats must be a whole number of at least 1, got 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"groups": "posterior"}, ValueError, r"groups must be some of \['posterior', .*got 'posterior'"),
        ({"groups": ["nonsense"]}, ValueError, r"groups must be some of .*got \['nonsense'\]"),
        ({"parallel": 1}, TypeError, "parallel must be True or False, got 1"),
        ({"unconstrained": None}, TypeError, "unconstrained must be True or False, got None"),
        ({"progress": "no"}, TypeError, "progress must be True or False, got 'no'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"model_kwargs": [1]}, TypeError, r"model_kwargs must be a dict of keyword arguments, got \[1\]"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        to_inference_data(conjugate, normal_guide, Y[0], **options)


def test_wrong_models_and_guides_are_named():
    with pytest.raises(TypeError, match=r"model must be a Pyro model or a pyro.infer.MCMC that was run, got 3"):
        to_inference_data(3, normal_guide)
    with pytest.raises(TypeError, match="guide must be the fitted Pyro guide, or a list of them, got None"):
        to_inference_data(conjugate)
    with pytest.raises(TypeError, match=r"guide must be the fitted Pyro guide, or a list of them, got \[\]"):
        to_inference_data(conjugate, [])
