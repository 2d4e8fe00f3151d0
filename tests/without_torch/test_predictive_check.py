"""Summaries of the data among replicated ones: by brute force, and for posteriors right, too wide, narrow, shifted."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from synthetic import draws, exported, observed, predicted

from pyrobirds.diagnostics.predictive import predictive_check


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def summaries(x):
    """The default statistics of one series, by brute force."""
    seen = [value for value in x if not math.isnan(value)]
    pairs = [(a, b) for a, b in pairwise(x) if not (math.isnan(a) or math.isnan(b))]
    mean = sum(seen) / len(seen)
    return {
        "mean": mean,
        "variance": sum((value - mean) ** 2 for value in seen) / len(seen),
        "autocorrelation": np.corrcoef(*zip(*pairs, strict=True))[0, 1],
        **{f"quantile {level}": np.quantile(seen, level) for level in (0.05, 0.5, 0.95)},
    }


def brute_force(y, x):
    """The table of one series, draw by draw."""
    masked = [np.where(np.isnan(y), np.nan, draw) for draw in x]
    kept = [draw for draw in masked if (np.isfinite(draw) | np.isnan(y)).all()]
    of_y, of_x = summaries(y), [summaries(draw) for draw in kept]
    rows = {}
    for name, value in of_y.items():
        replicated = np.array([summary[name] for summary in of_x])
        upper = (1 + sum((t > value) + (t == value) / 2 for t in replicated)) / (1 + len(kept))
        lower = (1 + sum((t < value) + (t == value) / 2 for t in replicated)) / (1 + len(kept))
        low, high = np.quantile(replicated, [0.05, 0.95])
        rows[name] = [value, replicated.mean(), replicated.std(), low, high, upper, min(1, 2 * min(upper, lower))]
        rows[name] += [len(kept), len(x) - len(kept)]
    return rows


def test_several_outputs_and_series_with_missing_values_and_failed_runs(rng):
    y = {"cases": rng.poisson(5, size=(2, 30)).astype(float), "deaths": rng.normal(size=30)}
    x = {"cases": rng.poisson(5, size=(2, 40, 2, 30)).astype(float), "deaths": rng.normal(size=(2, 40, 30))}
    y["cases"][0, [0, 3, 4, 5, 29]] = np.nan
    x["cases"][0, 7, 0, 12] = np.nan  # where data are: failed
    x["cases"][1, 9, 0, 4] = np.nan  # where none are: as good as any
    x["deaths"][1, 2] = np.inf
    table = predictive_check(predicted(y, x, region=["north", "south"]))
    series = {
        "cases[north]": (y["cases"][0], x["cases"][:, :, 0].reshape(80, 30)),
        "cases[south]": (y["cases"][1], x["cases"][:, :, 1].reshape(80, 30)),
        "deaths": (y["deaths"], x["deaths"].reshape(80, 30)),
    }
    expected = {(label, name): row for label, (a, b) in series.items() for name, row in brute_force(a, b).items()}
    assert [*table.index] == [*expected]
    assert table.index.names == ["series", "statistic"]
    np.testing.assert_allclose(table.to_numpy(), [*expected.values()], rtol=1e-12)
    assert table["num_failed"].groupby("series").first().to_dict() == {
        "cases[north]": 1,
        "cases[south]": 0,
        "deaths": 1,
    }
    chosen = predictive_check(predicted(y, x, region=["north", "south"]), var_names="deaths")
    assert chosen.equals(table.loc[["deaths"]])


def test_p_values_of_exchangeable_draws_are_uniform():
    """Data of the model itself: each of the six tests fails once in 10,000."""
    rng = np.random.default_rng(1)
    tables = [
        predictive_check(predicted(rng.normal(size=20), rng.normal(size=(1, 99, 20))))["p_upper"] for _ in range(300)
    ]
    for p_values in np.stack(tables).T:
        # p_upper is uniform on 1/100, ..., 1: between two of these.
        assert stats.kstest(p_values - rng.random(300) / 100, "uniform").pvalue > 1e-4


@pytest.mark.parametrize(
    ("shift", "scale", "statistic", "p"),
    [(0.0, 2.0, "variance", 1.0), (0.0, 0.5, "variance", 0.0), (1.0, 1.0, "mean", 1.0)],
    ids=["too wide", "too narrow", "shifted"],
)
def test_a_misfit_shows_in_its_statistic(rng, shift, scale, statistic, p):
    """Over 100 normal data the statistics are five standard deviations apart or more: one in 10,000 fails."""
    x = shift + scale * rng.normal(size=(1, 4000, 100))
    table = predictive_check(predicted(rng.normal(size=100), x)).loc["x"]
    assert table.loc[statistic, "p_upper"] == pytest.approx(p, abs=0.001)
    assert table.loc[statistic, "p_two_sided"] < 0.001


def test_the_right_posterior_shows_none(rng):
    """Six p-values below 0.001: a false alarm comes at most six times in 1,000."""
    table = predictive_check(predicted(rng.normal(size=100), rng.normal(size=(1, 4000, 100))))
    assert (table["p_two_sided"] > 0.001).all()


def test_it_is_conservative_with_draws_from_the_posterior():
    """Known variance, flat prior: T = mean of the data has p of 1/2 whatever they are, to the error of 4,000 draws.

    At four standard errors it fails once in 16,000.
    """
    rng = np.random.default_rng(2)
    for shift in (0.0, 3.0):
        y = shift + rng.normal(size=50)
        theta = y.mean() + rng.normal(size=(1, 4000, 1)) / 50**0.5
        table = predictive_check(predicted(y, theta + rng.normal(size=(1, 4000, 50))))
        assert table.loc[("x", "mean"), "p_upper"] == pytest.approx(0.5, abs=4 * (0.25 / 4000) ** 0.5)


def test_ties_count_half_and_p_is_never_zero():
    y = np.array([0.0, 1.0, 0.0, 1.0])
    same = np.broadcast_to(y, (1, 9, 4))
    table = predictive_check(predicted(y, same)).loc["x"]
    assert table["p_upper"].tolist() == [(1 + 4.5) / 10] * 6
    assert (table["p_two_sided"] == 1).all()
    table = predictive_check(predicted(y, same - 5)).loc["x"]
    assert table.loc["mean", "p_upper"] == 0.1
    assert table.loc["mean", "p_two_sided"] == 0.2


def test_constants_have_no_autocorrelation(rng):
    y, x = np.full(10, 0.1), rng.normal(size=(1, 8, 10))
    x[0, 3] = 0.1
    row = predictive_check(predicted(y, x)).loc[("x", "autocorrelation")]
    assert row[["observed", "p_upper", "p_two_sided"]].isna().all()
    assert (row["num_draws"], row["num_failed"]) == (7, 0)
    row = predictive_check(predicted(x[0, 0], np.full((1, 8, 10), 0.1))).loc[("x", "autocorrelation")]
    assert row["num_draws"] == 0
    assert math.isnan(row["p_upper"])


def test_nothing_observed_or_nothing_drawn_is_a_row_of_nan(rng):
    nothing = predictive_check(predicted(np.full(5, np.nan), rng.normal(size=(1, 8, 5))))
    assert nothing[["observed", "mean", "p_upper"]].isna().all(axis=None)
    failed = predictive_check(predicted(rng.normal(size=5), np.full((1, 8, 5), np.nan)))
    assert failed["p_upper"].isna().all()
    assert failed["num_failed"].tolist() == [8] * 6


def test_data_that_are_not_finite_are_missing(rng):
    y, x = rng.normal(size=30), rng.normal(size=(1, 50, 30))
    y[[3, 9]] = np.nan
    of_nan = predictive_check(predicted(y, x))
    y[[3, 9]] = np.inf, -np.inf
    assert predictive_check(predicted(y, x)).equals(of_nan)


def test_a_statistic_that_cannot_do_without_missing_data_is_warned_of(rng):
    y, x = {"a": rng.normal(size=9), "b": rng.normal(size=9)}, {"a": rng.normal(size=(1, 8, 9))}
    x["b"] = x["a"]
    y["b"][2] = np.nan
    own = {"middle": np.median, "maximum": np.nanmax}
    message = r"statistics\['middle'\] of 'b' is NaN, and b has missing .* as numpy.nanmean does"
    with pytest.warns(UserWarning, match=message) as warned:
        table = predictive_check(predicted(y, x), statistics=own)
    assert warned[0].filename == __file__
    assert [*table.index[table["observed"].isna()]] == [("b", "middle")]


def test_a_single_number_is_its_own_summary():
    x = np.array([[1.0, 2.0, 3.0, np.nan]])
    table = predictive_check(
        exported(observed_data=(observed(peak=2.5),), posterior_predictive=(draws(peak=x),)),
        statistics={"maximum": np.nanmax},
    )
    assert [*table.index] == [("peak", "value")]
    row = table.loc[("peak", "value")]
    assert row[["observed", "mean", "p_upper", "num_draws", "num_failed"]].tolist() == [2.5, 2, (1 + 1) / 4, 3, 1]


def test_own_statistics_dimension_and_group(rng):
    y, x = rng.normal(size=(3, 4)), rng.normal(size=(1, 50, 3, 4))
    y[0, 2] = np.nan

    def largest_jump(values, axis):
        return np.nanmax(np.abs(np.diff(values, axis=axis)), axis=axis)

    data = exported(observed_data=(observed(x=y),), prior_predictive=(draws(x=x),))
    own = {"maximum": np.nanmax, "largest jump": largest_jump}
    table = predictive_check(data, statistics=own, group="prior_predictive", dim="region")
    assert [label for label, _ in table.index[::2]] == ["x[0]", "x[1]", "x[2]", "x[3]"]
    assert table.loc[("x[2]", "maximum"), "observed"] == np.nanmax(y[:, 2])
    assert table.loc[("x[2]", "maximum"), "mean"] == x[0, :, [1, 2], 2].max(0).mean()
    assert table.loc[("x[1]", "largest jump"), "observed"] == abs(np.diff(y[:, 1])).max()


def test_errors(rng):
    y, x = rng.normal(size=4), rng.normal(size=(1, 5, 4))
    data = predicted(y, x)
    with pytest.raises(ValueError, match=r"var_names must be .* observed_data and posterior_predictive, \['x'\], got"):
        predictive_check(data, var_names=["x", "z"])
    with pytest.raises(ValueError, match=r"var_names must be among .*, \[\], got none"):
        predictive_check(predicted({"a": y}, {"b": x}))
    with pytest.raises(ValueError, match=r"dim must be a dimension of 'x', which has \['time'\], got 'space'"):
        predictive_check(data, dim="space")
    with pytest.raises(ValueError, match="no group 'prior_predictive'"):
        predictive_check(data, group="prior_predictive")
    with pytest.raises(
        ValueError, match=r"statistics\['median'\] must reduce the last dimension .* \(5, 4\) into \(5,\)"
    ):
        predictive_check(data, statistics={"median": lambda x, axis: np.median(x)})
    with pytest.raises(TypeError, match="axis"):
        predictive_check(data, statistics={"maximum": max})
