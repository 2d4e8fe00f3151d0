"""Pictures: what they show against the numbers in the data, and how they look against stored ones."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from synthetic import GENERATIONS, draws, exported, history, observed, predicted, use_generation, weighted

from pyrobirds import plots
from pyrobirds.diagnostics.coverage_result import collect, compare

SMALL = {"savefig_kwargs": {"dpi": 50}}
LEVELS = [i / 20 for i in range(1, 20)]


@pytest.fixture(params=GENERATIONS)
def generation(request, monkeypatch):
    use_generation(monkeypatch, request.param)


@pytest.fixture(autouse=True)
def figures():
    yield
    plt.close("all")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def walks(rng, theta):
    """(..., 60) walks of steps up with probability sigmoid(theta)."""
    up = rng.random((*np.shape(theta), 60)) < 1 / (1 + np.exp(-np.asarray(theta)))[..., None]
    return np.where(up, 1.0, -1.0).cumsum(-1)


def outputs(rng):
    """Two series of walks, one with gaps, and a single number."""
    y = {"x": walks(rng, np.array([-1.0, 0.5])), "peak": np.array(310.0)}
    y["x"][0, [*range(10, 20), 21]] = np.nan
    theta = rng.normal([-1.0, 0.5], 0.3, size=(1, 200, 2))
    return predicted(y, {"x": walks(rng, theta), "peak": rng.normal(300, 20, (1, 200))}, region=["north", "south"])


def fitted(rng, num_fits=1):
    """Prior, posterior and history of fits."""
    steps = np.arange(1, 101)
    loss = 100 + 400 * np.exp(-steps / 10) + 20 * rng.normal(size=(num_fits, 100)) ** 2
    divergence = np.broadcast_to(125 * (1 - np.exp(-steps / 15)), loss.shape)
    windows = [(51 + 10 * chain, 100) for chain in range(num_fits)]
    return exported(
        {"divergence": "KL"},
        prior=(draws(theta=rng.normal(size=(1, 500)), rate=rng.exponential(size=(1, 500, 2))),),
        posterior=(draws(theta=rng.normal(-1, 0.3, (num_fits, 500)), rate=rng.exponential(0.03, (num_fits, 500, 2))),),
        history=history(steps, windows, total=loss + divergence, loss=loss, divergence=divergence),
    )


def calibrated(rng, scale=1.0, shape=(2,)):
    """Coverage over 60 datasets y = theta + N(0, 1), of posteriors as wide as is right times scale."""
    compared = []
    for theta in rng.normal(size=(60, *shape)):
        y = theta + rng.normal(size=shape)
        posterior = y / 2 + scale * rng.normal(size=(1, 99, *shape)) / 2**0.5
        coords = {"region": ["a", "b"][: shape[0]]}
        dataset = xr.Dataset({"theta": (("chain", "draw", "region"), posterior)}, coords)
        compared.append(compare(dataset, {"theta": theta}, LEVELS, rng))
    return collect(compared, LEVELS, seed=0)


def narrow(rng, num_fits=1):
    theta = 0.3 * rng.normal(size=(num_fits, 1000))
    return weighted(theta, -(theta**2) / 2 + (theta / 0.3) ** 2 / 2)


# How they look.


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_predictive(rng):
    return plots.predictive(outputs(rng))[0].figure


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_prior_posterior(rng):
    return plots.prior_posterior(fitted(rng), true_values={"theta": -1.2})[0].figure


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_losses(rng):
    return plots.losses(fitted(rng, 2)).figure


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_coverage(rng):
    return plots.coverage(calibrated(rng, 0.5, (1,))).figure


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_ranks(rng):
    return plots.ranks(calibrated(rng, 0.5))[0].figure


@pytest.mark.mpl_image_compare(**SMALL, tolerance=6)  # generations of ArviZ cut off the tail one draw apart
def test_picture_of_khat(rng):
    return plots.khat(narrow(rng)).figure


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_losses_on_a_slide(rng):
    with plt.rc_context({"figure.figsize": (12, 6.75), "font.size": 18, "lines.linewidth": 2.5}):
        return plots.losses(fitted(rng)).figure


# What they show.


def line(ax, label):
    return next(line for line in ax.lines if line.get_label() == label)


def test_the_fan_is_of_quantiles_and_gaps_stay_gaps(rng):
    data = outputs(rng)
    axes = plots.predictive(data, "x")
    assert [ax.get_ylabel() for ax in axes] == ["x[north]", "x[south]"]
    x = data["posterior_predictive"]["x"].values[0]
    for region, ax in enumerate(axes):
        for band, level in zip(ax.collections, (0.9, 0.5), strict=True):
            low, high = np.quantile(x[:, region], [(1 - level) / 2, (1 + level) / 2], axis=0)
            corners = {(at, edge) for at, *edges in zip(range(60), low, high, strict=True) for edge in edges}
            assert corners <= {*map(tuple, band.get_paths()[0].vertices.tolist())}
            assert band.get_label() == f"{level:.0%} of draws"
        np.testing.assert_array_equal(line(ax, "median of 200 draws").get_ydata(), np.median(x[:, region], axis=0))
        np.testing.assert_array_equal(line(ax, "data").get_ydata(), data["observed_data"]["x"].values[region])
    assert axes[0].lines[-1].get_xdata().tolist() == [20]  # alone between two gaps


def test_labels_have_long_names_and_units(rng):
    data = predicted(walks(rng, np.array(0.0)), walks(rng, np.zeros((1, 9))))
    for group in ("observed_data", "posterior_predictive"):
        data[group]["time"].attrs.update(long_name="trading day", units="days")
        data[group]["x"].attrs["units"] = "points"
    ax = plots.predictive(data)[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("trading day (days)", "x (points)")


def test_failed_draws_are_left_out_of_the_fan_and_counted(rng):
    y, x = walks(rng, np.array(0.0)), walks(rng, np.zeros((1, 9)))
    x[0, :3] = np.nan
    ax = plots.predictive(predicted(y, x))[0]
    np.testing.assert_array_equal(line(ax, "median of 6 draws, 3 failed").get_ydata(), np.median(x[0, 3:], axis=0))
    with pytest.raises(ValueError, match="all 9 draws of x in posterior_predictive failed"):
        plots.predictive(predicted(y, np.full(x.shape, np.nan)))


def test_a_single_number_is_a_histogram(rng):
    ax = plots.predictive(outputs(rng), ["peak"])[0]
    assert sum(bar.get_height() for bar in ax.patches) == 200
    assert line(ax, "data").get_xdata() == [310, 310]


def area(line):
    return np.trapezoid(line.get_ydata(), line.get_xdata())


def test_densities_are_right_at_bounds_and_where_the_prior_is_cut_off(rng, generation):
    """The exponential density starts at its rate: an estimate that is not reflected there would start at half of it.

    Of the density at 0 from 20,000 draws the estimate's standard error is below 3%; areas miss half a bin at each end.
    """
    prior, posterior = rng.exponential(1, size=(1, 20_000)), rng.exponential(0.03, size=(1, 20_000))
    ax = plots.prior_posterior(exported(prior=(draws(rate=prior),), posterior=(draws(rate=posterior),)))[0]
    low, high = ax.get_xlim()
    share = np.mean(prior < high)
    assert 0.1 < share < 0.5
    assert ax.get_xlabel() == f"rate\n{share:.0%} of the prior in view"
    assert -0.05 < low < 0
    assert line(ax, "posterior").get_ydata()[0] == pytest.approx(1 / 0.03, rel=0.12)
    assert line(ax, "prior").get_ydata()[0] == pytest.approx(1, rel=0.12)
    assert area(line(ax, "prior")) == pytest.approx(share, rel=0.02)
    assert area(line(ax, "posterior")) == pytest.approx(1, rel=0.02)


def test_a_prior_of_ordinary_width_is_shown_whole(rng, generation):
    ax = plots.prior_posterior(fitted(rng), "theta", true_values={"theta": 6.0})[0]
    assert ax.get_xlabel() == "theta"
    assert line(ax, "true value").get_xdata() == [6, 6]
    assert ax.get_xlim()[1] > 6
    assert area(line(ax, "prior")) == pytest.approx(1, rel=0.03)


def test_several_fits_have_a_line_each_and_a_point_mass_is_a_line(rng):
    ax = plots.prior_posterior(fitted(rng, 3), "theta")[0]
    assert [one.get_label() for one in ax.lines][:2] == ["prior", "posterior, 3 fits"]
    assert len(ax.lines) == 4
    point = exported(prior=(draws(a=rng.normal(size=(1, 50))),), posterior=(draws(a=np.full((1, 50), 0.3)),))
    assert line(plots.prior_posterior(point)[0], "posterior").get_xdata() == [0.3, 0.3]


def test_losses_are_logarithmic_when_it_helps_and_mark_the_window(rng):
    ax = plots.losses(fitted(rng))
    assert ax.get_yscale() == "log"
    assert [one.get_label() for one in ax.lines] == ["total", "loss", "w KL(q || prior)"]
    assert (ax.patches[0].get_x(), ax.patches[0].get_width()) == (51, 49)
    steps = np.arange(1, 5)
    for total in ([[5.0, 4.0, 3.0, 2.0]], [[500.0, 4.0, -3.0, 2.0]]):
        ax = plots.losses(exported(history=history(steps, [(3, 4)], total=total)))
        assert ax.get_yscale() == "linear"


def test_the_coverage_curve_is_the_table(rng):
    result = calibrated(rng)
    ax = plots.coverage(result, "theta")
    table = result.table()
    for number, element in enumerate(("theta[a]", "theta[b]")):
        rows = table[table["element"] == element]
        np.testing.assert_array_equal(ax.lines[1 + number].get_ydata(), rows["central"])
        np.testing.assert_array_equal(ax.lines[3 + number].get_ydata(), rows["hdi"])
    vertices = ax.collections[0].get_paths()[0].vertices
    assert vertices[:, 1].max() == table["upper"].max()


def test_the_histogram_of_ranks_counts_datasets(rng):
    axes = plots.ranks(calibrated(rng))
    assert [ax.get_xlabel() for ax in axes] == ["rank of the true theta[a]", "rank of the true theta[b]"]
    # The last patch is the band.
    assert [sum(bar.get_height() for bar in ax.patches[:-1]) for ax in axes] == [60, 60]


def test_the_tail_is_the_fit_of_psis(rng, generation):
    from pyrobirds.diagnostics.importance import log_weights, psis, tail_length

    data = narrow(rng, 2)
    result, raw = psis(data), log_weights(data).values
    ax = plots.khat(data)
    assert ax.get_title() == f"k-hat {result.khat:.2f}, not below 0.67:\nthe weights cannot be trusted"
    for chain in range(2):
        dots = line(ax, f"fit {chain + 1}: k-hat {float(result.chains['khat'][chain]):.2f}")
        weights = np.sort(np.exp(raw[chain]) / np.exp(raw[chain]).mean())[::-1]
        np.testing.assert_allclose(dots.get_xdata(), weights[:500])
        np.testing.assert_allclose(dots.get_ydata(), (np.arange(500) + 0.5) / 1000)
        fit = ax.lines[2 * chain + 1]
        smoothed = np.sort(np.exp(result.log_weights.values[chain]))[::-1]
        expected = smoothed / smoothed[-1] * weights[-1]
        expected = expected[: tail_length(1000)]
        np.testing.assert_allclose(fit.get_xdata(), expected[expected < weights[0] * (1 - 1e-12)])
    fine = plots.khat(weighted(np.zeros((1, 500)), np.zeros((1, 500))))
    assert "-inf, below 0.63:\nthe weights can be trusted" in fine.get_title()


def test_pictures_are_drawn_on_the_axes_that_are_given(rng):
    figure, axes = plt.subplots(2, 2)
    data = outputs(rng)
    assert [*plots.predictive(data, ax=axes.ravel()[:3])] == [*axes.ravel()[:3]]
    assert [*plots.predictive(data, "peak", ax=axes[1, 1])] == [axes[1, 1]]
    assert plots.losses(fitted(rng), ax=axes[0, 0]) is axes[0, 0]
    assert plt.get_fignums() == [figure.number]


def test_errors(rng):
    data, fits = outputs(rng), fitted(rng)
    _, axes = plt.subplots(1, 2)
    with pytest.raises(ValueError, match=r"ax must be 3 matplotlib Axes, for x\[north\], x\[south\], peak, got 2"):
        plots.predictive(data, ax=axes)
    with pytest.raises(TypeError, match="ax must be one matplotlib Axes, got ndarray"):
        plots.losses(fits, ax=axes)
    with pytest.raises(ValueError, match=r"var_names must be among the variables of prior and posterior, .* \['z'\]"):
        plots.prior_posterior(fits, "z")
    with pytest.raises(ValueError, match=r"true_values must be of sites that are shown, \['theta'\], got 'rate'"):
        plots.prior_posterior(fits, "theta", true_values={"rate": 1.0})
    with pytest.raises(ValueError, match=r"true_values\['rate'\] must have the shape \(2,\) of the site, got \(\)"):
        plots.prior_posterior(fits, true_values={"rate": 1.0})
    many = predicted(np.zeros((25, 4)), np.zeros((1, 5, 25, 4)))
    with pytest.raises(ValueError, match=r"25 panels \(x\[0\], x\[1\], x\[2\], ...\) .* var_names, or select elements"):
        plots.predictive(many)
    with pytest.raises(ValueError, match="no group 'history'"):
        plots.losses(data)
    with pytest.raises(ValueError, match=r"var_names must be among the variables of the coverage, \['theta'\]"):
        plots.coverage(calibrated(rng), "phi")
    with pytest.raises(TypeError, match=r"what pyrobirds.diagnostics.coverage returned, got Dataset: .*load_dataset"):
        plots.ranks(calibrated(rng).data)


def test_what_is_observed_need_not_be_all(rng):
    """An output without draws is not shown, and one that is chosen is said to be missing."""
    data = exported(
        observed_data=(observed(x=np.zeros(3), z=np.zeros(3)),), posterior_predictive=(draws(x=np.zeros((1, 5, 3))),)
    )
    assert [ax.get_ylabel() for ax in plots.predictive(data)] == ["x"]
    with pytest.raises(ValueError, match=r"\['x'\], got \['z'\]"):
        plots.predictive(data, "z")
