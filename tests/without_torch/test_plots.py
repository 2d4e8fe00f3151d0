"""Pictures: what they show against the numbers in the data, and how they look against stored ones."""

import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from synthetic import GENERATIONS, draws, exported, history, observed, predicted, use_generation, weighted

from pyrobirds import arviz_groups, plots
from pyrobirds.arviz_groups import SAMPLE_DIMS, Variable
from pyrobirds.diagnostics.coverage_result import collect, compare

SMALL = {"savefig_kwargs": {"dpi": 50}}
SLIDE = {"figure.figsize": (12, 6.75), "font.size": 18, "lines.linewidth": 2.5}
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
    data = exported(
        {"divergence": "KL"},
        prior=(draws(theta=rng.normal(size=(1, 500)), rate=rng.exponential(size=(1, 500, 2))),),
        posterior=(draws(theta=rng.normal(-1, 0.3, (num_fits, 500)), rate=rng.exponential(0.03, (num_fits, 500, 2))),),
        history=history(steps, windows, total=loss + divergence, loss=loss, divergence=divergence),
    )
    data["posterior"]["rate"].attrs["lower"] = 0.0
    return data


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


DATES = np.datetime64("2020-02-20") + np.arange(60)
COUNTRIES = ["Austria", "Belgium", "Bulgaria", "Bosnia and Herzegovina", "Croatia", "Cyprus", "Czechia", "Denmark"]


def countries(rng, num_fits=1):
    """A number for each of some exchangeable countries."""
    data = predicted(
        {"cases": rng.normal(100, 30, len(COUNTRIES))},
        {"cases": rng.normal(100 + 15 * np.arange(num_fits)[:, None, None], 30, (num_fits, 200, len(COUNTRIES)))},
        time=COUNTRIES,
    )
    data["observed_data"]["cases"].attrs["plates"] = "time"
    return data


def long_names(rng):
    """Draws of five elements of one parameter with a long name."""
    coords = {"time": [f"ward {number} of the infirmary" for number in range(5)]}
    prior, posterior = (draws(rate=rng.normal(size=(1, 200, 5))) for _ in range(2))
    data = exported(prior=(prior, coords), posterior=(posterior, coords))
    data["posterior"]["rate"].attrs.update(long_name="probability of infection per contact", units="log-odds a day")
    return data


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
    return plots.coverage(calibrated(rng, 0.5))[0].figure


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_ranks(rng):
    return plots.ranks(calibrated(rng, 0.5))[0].figure


@pytest.mark.mpl_image_compare(**SMALL, tolerance=6)  # generations of ArviZ cut off the tail one draw apart
def test_picture_of_khat(rng):
    return plots.khat(narrow(rng)).figure


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_losses_on_a_slide(rng):
    with plt.rc_context(SLIDE):
        return plots.losses(fitted(rng)).figure


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_long_names_on_a_slide(rng):
    with plt.rc_context(SLIDE):
        return plots.prior_posterior(long_names(rng))[0].figure


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_dates(rng):
    y, x = walks(rng, np.array([0.0])), walks(rng, np.zeros((1, 50, 1)))
    return plots.predictive(predicted(y, x, region=["north"], time=DATES))[0].figure


@pytest.mark.mpl_image_compare(**SMALL)
def test_picture_of_a_plate_and_of_fits(rng):
    data = countries(rng, 2)
    return plots.predictive(data)[0].figure


@pytest.mark.mpl_image_compare(**SMALL, tolerance=6)  # generations of ArviZ cut off the tail one draw apart
def test_picture_of_khat_of_fits(rng):
    return plots.khat(narrow(rng, 3)).figure


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


def test_any_dimension_can_be_the_axis(rng):
    """Of (time, output) sites the last dimension is not time."""
    y, x = walks(rng, np.zeros(2)).T, np.moveaxis(walks(rng, np.zeros((1, 9, 2))), 2, 3)
    data = exported(
        observed_data=({"x": Variable(y, ("day", "compartment"))}, {"compartment": ["S", "I"]}),
        posterior_predictive=({"x": Variable(x, (*SAMPLE_DIMS, "day", "compartment"))}, {"compartment": ["S", "I"]}),
    )
    with pytest.raises(ValueError, match=r"60 panels .* dimension along x by dim"):
        plots.predictive(data)
    with pytest.raises(ValueError, match=r"dim must be a dimension of 'x', .* \['day', 'compartment'\], got 't'"):
        plots.predictive(data, dim="t")
    assert plt.get_fignums() == []
    axes = plots.predictive(data, dim="day")
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == [("day", "x[S]"), ("day", "x[I]")]
    np.testing.assert_array_equal(line(axes[1], "data").get_ydata(), y[:, 1])


def test_a_plate_is_points_with_intervals(rng):
    data = countries(rng)
    y, x = data["observed_data"]["cases"].values, data["posterior_predictive"]["cases"].values[0]
    ax = plots.predictive(data)[0]
    points = line(ax, "data")
    assert points.get_linestyle() == "None"
    assert points.get_xdata().tolist() == [*range(8)]
    np.testing.assert_array_equal(points.get_ydata(), y)
    for bars, level in zip(ax.collections, (0.9, 0.5), strict=True):
        assert bars.get_label() == f"{level:.0%} of 200 draws"
        low, high = np.quantile(x, [(1 - level) / 2, (1 + level) / 2], axis=0)
        np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], np.stack([low, high], 1))
    same = predicted(np.zeros(3), rng.normal(size=(2, 9, 3)), time=[1.0, 1.0, 1.0])
    same["observed_data"]["x"].attrs["plates"] = ["time"]
    assert plots.predictive(same)[0].collections[0].get_segments()[0][0, 0] == pytest.approx(0.85)
    ax = plots.predictive(data, dim="time")[0]  # the user wants them joined
    assert line(ax, "data").get_linestyle() == "-"


@pytest.mark.parametrize("plates", ["region", ["region"], np.array(["region"]), [], None])
def test_an_event_is_the_axis_wherever_it_stands(rng, plates):
    data = outputs(rng)
    if plates is not None:
        data["observed_data"]["x"].attrs["plates"] = plates
    data = reversed_dims(data)  # time, region
    if plates is None or len(plates) == 0:
        with pytest.raises(ValueError, match="60 panels"):
            plots.predictive(data, "x")
    else:
        assert [ax.get_ylabel() for ax in plots.predictive(data, "x")] == ["x[north]", "x[south]"]


def test_only_plates_are_panels_and_points(rng):
    data = predicted(rng.normal(size=(2, 5)), rng.normal(size=(1, 9, 2, 5)), region=["north", "south"])
    data["observed_data"]["x"].attrs["plates"] = ["region", "time"]
    axes = plots.predictive(data)
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == [("time", "x[north]"), ("time", "x[south]")]
    assert {line(ax, "data").get_linestyle() for ax in axes} == {"None"}


def test_fits_have_a_fan_each(rng):
    """A pooled fan of fits that disagree would look like one that is uncertain."""
    y, x = walks(rng, np.array(0.0)), walks(rng, np.repeat([[-1.0], [1.0]], 50, axis=1))
    x[1, :3] = np.inf
    ax = plots.predictive(predicted(y, x))[0]
    assert not ax.collections
    medians = [one for one in ax.lines if one.get_linestyle() == "-"][:2]
    assert medians[0].get_label() == "median of 97 draws, 2 fits, 3 failed"
    for median, of_fit in zip(medians, (x[0], x[1, 3:]), strict=True):
        np.testing.assert_array_equal(median.get_ydata(), np.median(of_fit, axis=0))
    ends = [one.get_ydata() for one in ax.lines if one.get_linestyle() == ":"]
    np.testing.assert_allclose(ends[:2], np.quantile(x[0], [0.05, 0.95], axis=0))
    np.testing.assert_allclose(ends[2:], np.quantile(x[1, 3:], [0.05, 0.95], axis=0))
    bars = plots.predictive(countries(rng, 2))[0].collections
    assert [one.get_label() for one in bars[:2]] == ["90% of 400 draws, 2 fits", "50% of 400 draws, 2 fits"]
    left, right = (bars[number].get_segments()[3][0, 0] for number in (0, 2))
    assert 2.5 < left < 3 < right < 3.5
    numbers = predicted(np.array(1.0), rng.normal(size=(2, 50)))
    ax = plots.predictive(numbers)[0]
    assert len(ax.patches) == 2


def test_draws_that_are_not_finite_where_data_are_missing_leave_the_band_whole(rng):
    y, x = np.array([1.0, np.nan, 2.0, np.nan]), rng.normal(size=(1, 20, 4))
    x[0, :2, 1], x[0, 3, 1], x[0, :, 3] = np.nan, np.inf, np.nan
    ax = plots.predictive(predicted(y, x))[0]
    expected = [*np.median(x[0, :, [0]], 1), np.median(x[0, [2, *range(4, 20)], 1]), np.median(x[0, :, 2]), np.nan]
    np.testing.assert_allclose(line(ax, "median of 20 draws").get_ydata(), expected)


def legend(ax):
    return [text.get_text() for text in (ax.get_legend() or ax.figure.legends[0]).get_texts()]


def test_missing_data_are_not_in_the_legend(rng):
    ax = plots.predictive(predicted(np.array(np.nan), rng.normal(size=(1, 20))))[0]
    assert legend(ax) == ["20 draws"]
    ax = plots.predictive(predicted(np.full(3, np.nan), rng.normal(size=(1, 20, 3))))[0]
    assert legend(ax) == ["90% of draws", "50% of draws", "median of 20 draws"]


def test_dates_are_dates_and_text_is_not_a_black_bar(rng):
    y, x = walks(rng, np.array(0.0)), walks(rng, np.zeros((1, 9)))
    ax = plots.predictive(predicted(y, x, time=DATES))[0]
    ax.figure.canvas.draw()
    assert mdates.num2date(line(ax, "data").get_xdata()[0]).date() == DATES[0].item()
    labels = [text.get_text() for text in ax.get_xticklabels()]
    assert "Mar" in labels
    assert 3 <= len(labels) <= 12
    ax.axvline(DATES[3])
    names = [f"a day with the number {number}" for number in range(60)]
    ax = plots.predictive(predicted(y, x, time=names))[0]
    ax.figure.canvas.draw()
    labels = {int(text.get_position()[0]): text.get_text() for text in ax.get_xticklabels()}
    assert 5 <= len(labels) <= 20
    assert labels[0] == "a day with the numb…"
    few = plots.predictive(predicted(y[:4], x[..., :4], time=["S", "E", "I", "R"]))[0]
    assert [text.get_text() for text in few.get_xticklabels()] == ["S", "E", "I", "R"]
    assert few.get_xticklabels()[0].get_rotation() == 0


def test_long_labels_stay_inside_the_figure(rng):
    for setting in ({}, SLIDE):
        with plt.rc_context(setting):
            axes = plots.prior_posterior(long_names(rng))
            figure = axes[0].figure
            figure.canvas.draw()
            assert tuple(figure.get_size_inches()) == tuple(plt.rcParams["figure.figsize"])
            inside = figure.bbox
            for ax in axes:
                box = ax.xaxis.label.get_window_extent()
                assert inside.x0 <= box.x0 < box.x1 <= inside.x1
                assert inside.y0 <= box.y0 < box.y1 <= inside.y1
            boxes = [ax.xaxis.label.get_window_extent() for ax in axes]
            assert not any(one.overlaps(other) for one in boxes for other in boxes if one is not other)


@pytest.mark.parametrize(("num", "size"), [(1, (12, 6.75)), (5, (12, 6.75)), (12, (12, 6.75)), (24, (12, 13.5))])
def test_slides_keep_their_size_as_long_as_panels_fit(rng, num, size):
    with plt.rc_context(SLIDE):
        variables = draws(**{f"p{number}": rng.normal(size=(1, 9)) for number in range(num)})
        axes = plots.prior_posterior(exported(prior=(variables,), posterior=(variables,)))
    assert tuple(axes[0].figure.get_size_inches()) == size


def test_a_single_number_is_a_histogram(rng):
    ax = plots.predictive(outputs(rng), ["peak"])[0]
    assert sum(bar.get_height() for bar in ax.patches) == 200
    assert line(ax, "data").get_xdata() == [310, 310]


def test_counts_have_a_bin_for_each_whole_number(rng):
    x = rng.poisson(6, (1, 500))
    bars = plots.predictive(predicted(np.array(7.0), x))[0].patches
    assert {bar.get_x() + 0.5: bar.get_height() for bar in bars if bar.get_height()} == dict(
        zip(*np.unique(x, return_counts=True), strict=True)
    )
    bars = plots.predictive(predicted(np.array(7.0), rng.poisson(1e4, (1, 500))))[0].patches
    assert len(bars) <= 41
    assert {bar.get_width() % 1 for bar in bars} == {0}


@pytest.mark.parametrize("height", [4, 4.8])
def test_what_is_written_around_panels_leaves_room_for_them(rng, height):
    names = {f"probability_of_infection_{number}_{'per_contact_' * 4}": rng.normal(size=(1, 9)) for number in range(9)}
    with plt.rc_context({"figure.figsize": (6.4, height)}):
        axes = plots.prior_posterior(exported(prior=(draws(**names),), posterior=(draws(**names),)))
    axes[0].figure.canvas.draw()
    assert min(ax.get_window_extent().height for ax in axes) > 0.8 * axes[0].figure.dpi


def test_squares_stand_in_a_row(rng):
    axes = plots.coverage(calibrated(rng, shape=(2,)), "theta")
    axes[0].figure.canvas.draw()
    one, other = (ax.get_window_extent() for ax in axes)
    assert one.y0 == pytest.approx(other.y0)
    assert one.width == pytest.approx(one.height)
    assert one.width > 1.8 * axes[0].figure.dpi


def area(line, low=-np.inf, high=np.inf):
    x, y = line.get_xydata().T
    inside = (x > low) & (x < high)
    return np.trapezoid(y[inside], x[inside])


def test_densities_are_right_at_bounds_and_where_the_prior_is_cut_off(rng, generation):
    """The exponential density starts at its rate: an estimate that is not reflected there would start at half of it.

    Of the density at 0 from 20,000 draws the estimate's standard error is below 3%; areas miss half a bin at each end.
    """
    prior, posterior = rng.exponential(1, size=(1, 20_000)), rng.exponential(0.03, size=(1, 20_000))
    data = exported(prior=(draws(rate=prior),), posterior=(draws(rate=posterior),))
    data["posterior"]["rate"].attrs["lower"] = 0.0
    ax = plots.prior_posterior(data)[0]
    low, high = ax.get_xlim()
    share = np.mean(prior < high)
    assert 0.1 < share < 0.5
    assert ax.get_xlabel() == f"rate\n{share:.0%} of the prior in view"
    assert -0.05 < low < 0
    assert line(ax, "posterior").get_ydata()[0] == pytest.approx(1 / 0.03, rel=0.12)
    assert line(ax, "prior").get_ydata()[0] == pytest.approx(1, rel=0.12)
    assert area(line(ax, "prior"), low, high) == pytest.approx(share, rel=0.02)
    assert area(line(ax, "posterior")) == pytest.approx(1, rel=0.02)


def test_densities_are_not_reflected_where_there_is_no_bound(rng, generation):
    """Of N(0, 1) at the largest of 20,000 draws; of U(0, 1) with its bounds at both of its ends.

    The standard error of the uniform density at its ends is about 3%.
    """
    normal, uniform = rng.normal(size=(1, 20_000)), rng.random((1, 20_000))
    variables = draws(theta=normal, p=uniform)
    data = exported(prior=(variables,), posterior=(variables,))
    data["posterior"]["p"].attrs.update(lower=0.0, upper=1.0)
    theta, p = (line(ax, "posterior") for ax in plots.prior_posterior(data))
    assert theta.get_ydata()[[0, -1]].max() < 1e-6
    assert theta.get_xdata()[0] < normal.min()
    assert area(theta) == pytest.approx(1, rel=5e-3)  # ArviZ 0.23 cuts the kernel off
    middle = np.interp(0, theta.get_xdata(), theta.get_ydata())
    assert middle == pytest.approx((2 * np.pi) ** -0.5, rel=0.05)
    assert (p.get_xdata()[0], p.get_xdata()[-1]) == pytest.approx((0, 1), abs=2e-3)
    assert p.get_ydata()[[0, -1]] == pytest.approx(1, rel=0.12)
    assert area(p) == pytest.approx(1, rel=5e-3)


def test_a_bound_far_from_the_draws_and_draws_beyond_one_change_nothing(rng, generation):
    x = rng.normal(100, 1, size=(1, 2000))
    curves = []
    for attrs in ({}, {"lower": 0.0}, {"lower": -np.inf, "upper": np.inf}):
        data = exported(prior=(draws(a=x),), posterior=(draws(a=x),))
        data["posterior"]["a"].attrs.update(attrs)
        curves.append(line(plots.prior_posterior(data)[0], "posterior").get_xydata())
    np.testing.assert_array_equal(curves[0], curves[1])
    np.testing.assert_array_equal(curves[0], curves[2])
    data["posterior"]["a"].attrs["upper"] = 100.0  # half of the draws are above
    assert area(line(plots.prior_posterior(data)[0], "posterior")) == pytest.approx(1, rel=0.02)


def test_whole_numbers_are_shown_by_their_shares(rng):
    prior, posterior = rng.integers(0, 5, (1, 100)), np.repeat([[1, 2], [2, 3]], 50, axis=1)
    ax = plots.prior_posterior(exported(prior=(draws(n=prior),), posterior=(draws(n=posterior),)))[0]
    assert not ax.lines
    assert ax.get_ylabel() == "share of draws"
    for bars, x in zip(ax.containers, (prior[0], *posterior), strict=True):
        shares = {round(bar.get_x()): bar.get_height() for bar in bars if bar.get_height()}
        assert shares == {value: pytest.approx(np.mean(x == value)) for value in {*x.tolist()}}
    assert [bars.get_label() for bars in ax.containers][:2] == ["prior", "posterior, 2 fits"]
    left, right = ax.get_xlim()
    assert left < min(bar.get_x() for bar in ax.patches if bar.get_height())
    assert right > max(bar.get_x() + bar.get_width() for bar in ax.patches if bar.get_height())
    floats = exported(prior=(draws(n=prior * 1.0),), posterior=(draws(n=posterior * 1.0),))
    assert plots.prior_posterior(floats)[0].get_ylabel() == "share of draws"
    flags = exported(prior=(draws(on=prior > 2),), posterior=(draws(on=prior > 3),))
    bars = plots.prior_posterior(flags)[0].containers[1]
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    wide = exported(prior=(draws(n=rng.poisson(1000, (1, 500))),), posterior=(draws(n=rng.poisson(1000, (1, 500))),))
    bars = plots.prior_posterior(wide)[0].containers[1]
    assert len(bars) <= 45
    assert sum(bar.get_height() for bar in bars) >= 0.99  # in view


def test_elements_of_a_site_have_one_view_unless_one_would_be_a_spike(rng):
    for scale, same in ((2, True), (1000, False)):
        x = draws(a=rng.normal(size=(1, 99, 2)) * [1, scale])
        one, other = plots.prior_posterior(exported(prior=(x,), posterior=(x,)))
        assert (one.get_xlim() == other.get_xlim()) == same


def test_each_panel_marks_the_true_value_of_its_element(rng):
    axes = plots.prior_posterior(fitted(rng), true_values={"rate": [0.5, np.nan]})
    assert line(axes[1], "true value").get_xdata() == [0.5, 0.5]
    assert "true value" not in [one.get_label() for one in axes[2].lines]
    axes = plots.prior_posterior(fitted(rng), true_values={"rate": np.array([0.5, 0.7])})
    assert [line(ax, "true value").get_xdata()[0] for ax in axes[1:]] == [0.5, 0.7]


class Parameter:
    """Like a tensor that needs a gradient."""

    def __init__(self, value):
        self.value = value

    def __array__(self, *args, **kwargs):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")

    def detach(self):
        return self

    def cpu(self):
        return self.value


def test_a_true_value_may_be_a_tensor_that_needs_a_gradient(rng):
    ax = plots.prior_posterior(fitted(rng), "theta", true_values={"theta": Parameter(np.array(0.3))})[0]
    assert line(ax, "true value").get_xdata() == [0.3, 0.3]


def reversed_dims(data):
    return arviz_groups.collect(
        {
            name: arviz_groups.group(data, name).map(lambda x: x.transpose(*x.dims[::-1]))
            for name in arviz_groups.group_names(data)
        },
        arviz_groups.attributes(data),
    )


def drawn(axes):
    return [one.get_xydata() for ax in np.atleast_1d(axes) for one in ax.lines]


def test_dimensions_may_come_in_another_order(rng):
    fits, data = fitted(rng, 2), outputs(rng)
    pictures = [
        (lambda data: plots.prior_posterior(data, true_values={"rate": [0.1, 0.2]}), fits),
        (plots.losses, fits),
        (lambda data: plots.predictive(data, "x", dim="time"), data),
        (plots.khat, narrow(rng, 2)),
    ]
    for picture, data in pictures:
        for one, other in zip(drawn(picture(data)), drawn(picture(reversed_dims(data))), strict=True):
            np.testing.assert_array_equal(one, other)
    result = calibrated(rng)
    for picture in (plots.coverage, plots.ranks):
        for one, other in zip(drawn(picture(result.data)), drawn(picture(result.data.transpose())), strict=True):
            np.testing.assert_array_equal(one, other)


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
    ax.figure.canvas.draw()
    assert "200" in [text.get_text() for text in ax.get_yticklabels(minor=True)]  # less than two decades


def curve(*total):
    return exported(history=history(np.arange(1, len(total) + 1), [(1, 2)], total=[total]))


@pytest.mark.parametrize(
    ("total", "scale"),
    [
        ((5.0, 4.0, 3.0, 2.0), "linear"),
        ((19.0, 4.0, 3.0, 1.0), "linear"),
        ((21.0, 4.0, 3.0, 1.0), "log"),
        ((30.0, -20.0, 20.0, -10.0), "linear"),
        ((1e6, 1e4, -40.0, -50.0, -49.0, -51.0), "symlog"),
        ((0.0, 0.0, 0.0, -1.0), "linear"),
    ],
)
def test_the_scale_of_the_losses(total, scale):
    assert plots.losses(curve(*total)).get_yscale() == scale


def test_a_spike_neither_sets_the_scale_nor_hides_the_curve(rng):
    total = 100 + rng.normal(size=200)
    total[70], total[71], total[150] = 1e12, 1e9, -1e12
    ax = plots.losses(curve(*total))
    assert ax.get_yscale() == "linear"
    assert ax.get_ylim() == pytest.approx((100, 100), abs=6)
    assert ax.get_ylabel() == "objective\n3 values out of view"
    falling = 1e6 * np.exp(-np.arange(200) / 3) + total
    falling[70:72], falling[150] = total[0], total[0]
    ax = plots.losses(curve(*falling))  # a few steps at the start are no spike
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[1] > 1e6
    assert ax.get_ylabel() == "objective"


def test_fits_with_different_divergences_have_a_legend(rng):
    terms = {"total": np.ones((2, 3)), "divergence": np.ones((2, 3))}
    data = exported({"divergence": ["KL", "Renyi"]}, history=history(np.arange(1, 4), [(1, 2), (1, 3)], **terms))
    assert legend(plots.losses(data)) == ["total", "w D(q || prior)", "averaged over"]


def test_the_coverage_curves_are_the_table(rng):
    result = calibrated(rng)
    axes = plots.coverage(result, "theta")
    table = result.table()
    for ax, element in zip(axes, ("theta[a]", "theta[b]"), strict=True):
        assert ax.get_title(loc="left").replace("\n", " ") == f"share that holds the true {element}"
        rows = table[table["element"] == element]
        np.testing.assert_array_equal(line(ax, "central").get_ydata(), rows["central"])
        np.testing.assert_array_equal(line(ax, "highest density").get_ydata(), rows["hdi"])
        vertices = ax.collections[0].get_paths()[0].vertices
        assert vertices[:, 1].max() == rows["upper"].max()


def test_coverage_is_taken_from_a_file(rng, tmp_path):
    result = calibrated(rng)
    result.data.to_netcdf(tmp_path / "coverage.nc", engine="h5netcdf")
    read = xr.load_dataset(tmp_path / "coverage.nc")
    for picture in (plots.coverage, plots.ranks):
        for one, other in zip(drawn(picture(result)), drawn(picture(read, "theta")), strict=True):
            np.testing.assert_array_equal(one, other)


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
        assert fit.get_color() == dots.get_color()
        smoothed = np.sort(np.exp(result.log_weights.values[chain]))[::-1]
        expected = smoothed / smoothed[-1] * weights[-1]
        expected = expected[: tail_length(1000)]
        np.testing.assert_allclose(fit.get_xdata(), expected[expected < weights[0] * (1 - 1e-12)])
    fine = plots.khat(weighted(np.zeros((1, 500)), np.zeros((1, 500))))
    assert "minus infinity, below 0.63:\nthe weights can be trusted" in fine.get_title()


def test_many_fits_can_be_told_apart_and_the_legend_ends(rng):
    ax = plots.khat(narrow(rng, 14))
    styles = [(one.get_color(), one.get_marker()) for one in ax.lines if one.get_linestyle() == "None"]
    assert len({*styles[:14]}) == 14
    assert len(legend(ax)) == 10
    assert legend(ax)[-2:] == ["and 6 others", "generalised Pareto fit"]
    for fit in ax.lines[1:28:2]:  # those that would lie beyond the largest weight are not piled up there
        assert np.diff(np.log(fit.get_xdata())).max() < -1e-10


@pytest.mark.parametrize("log_weight", [np.zeros((1, 500)), np.arange(500)[None] ** 2.0, np.zeros((1, 5))])
def test_the_legend_of_the_tail_does_not_promise_what_is_not_there(log_weight):
    ax = plots.khat(weighted(np.zeros(log_weight.shape), log_weight))
    assert legend(ax) == ["draws"]


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
    with pytest.raises(
        ValueError, match=r"25 panels \(x\[0\], x\[1\], x\[2\], ...\) .*by var_names, .* select elements"
    ):
        plots.predictive(many)
    with pytest.raises(ValueError, match="no group 'history'"):
        plots.losses(data)
    with pytest.raises(ValueError, match=r"var_names must be among the variables of the coverage, \['theta'\]"):
        plots.coverage(calibrated(rng), "phi")
    for wrong in (calibrated(rng).data[["theta"]].drop_vars("site"), calibrated(rng).table()):
        with pytest.raises(TypeError, match=r"what pyrobirds.diagnostics.coverage returned, or its data, got Data"):
            plots.ranks(wrong)
    with pytest.raises(TypeError, match=r"ax must be matplotlib Axes, got Figure: those of a figure are figure.axes"):
        plots.predictive(data, "peak", ax=axes[0].figure)
    with pytest.raises(TypeError, match="true_values must be a dict of values by site, got list"):
        plots.prior_posterior(fits, true_values=[1.0])
    for wrong in ("a", [[1.0], [1.0, 2.0]], [Parameter(1.0)]):
        with pytest.raises(ValueError, match=r"true_values\['theta'\] must be a number or an array of them, got"):
            plots.prior_posterior(fits, true_values={"theta": wrong})


def test_what_cannot_be_drawn_leaves_no_figure_open(rng):
    y, x = walks(rng, np.array(0.0)), np.full((1, 9, 60), np.nan)
    with pytest.raises(ValueError, match="all 9 draws of x in posterior_predictive failed"):
        plots.predictive(predicted(y, x))
    theta = {"prior": rng.normal(size=(1, 9)), "posterior": rng.normal(size=(2, 9))}
    for group in theta:
        broken = {**theta, group: np.full((2, 9), np.nan)}
        data = exported(**{name: (draws(theta=values),) for name, values in broken.items()})
        with pytest.raises(ValueError, match=f"no draw of theta in the {group} is finite"):
            plots.prior_posterior(data)
    assert plt.get_fignums() == []
    theta["posterior"][1] = np.nan  # one fit of two
    ax = plots.prior_posterior(exported(**{name: (draws(theta=x),) for name, x in theta.items()}))[0]
    assert [one.get_xdata().size > 0 for one in ax.lines] == [True, True, False]


def test_what_is_observed_need_not_be_all(rng):
    """An output without draws is not shown, and one that is chosen is said to be missing."""
    data = exported(
        observed_data=(observed(x=np.zeros(3), z=np.zeros(3)),), posterior_predictive=(draws(x=np.zeros((1, 5, 3))),)
    )
    assert [ax.get_ylabel() for ax in plots.predictive(data)] == ["x"]
    with pytest.raises(ValueError, match=r"\['x'\], got \['z'\]"):
        plots.predictive(data, "z")
