"""Arrays become groups that ArviZ of either generation, and netCDF files, give back unchanged."""

import json

import numpy as np
import pytest
import xarray as xr

from pyrobirds import arviz_groups
from pyrobirds.arviz_groups import SAMPLE_DIMS, STEP_DIMS, Variable, attributes, collect, dataset, group, group_names

INSTALLED = arviz_groups.arviz_generation()


@pytest.fixture(params=[0, 1] if INSTALLED == 0 else [1])
def generation(request, monkeypatch):
    """Make the containers of this generation of ArviZ; those of 1.x need no more than xarray."""
    monkeypatch.setattr(arviz_groups, "version", lambda package: {0: "0.23.4", 1: "1.3.0"}[request.param])
    return request.param


def read_tree(path):
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        return tree.load()


def read_inference_data(path):
    import arviz

    with arviz.rc_context({"data.load": "eager"}):
        return arviz.from_netcdf(path)


READERS = [read_tree, *([read_inference_data] if INSTALLED == 0 else [])]

DRAWS = np.random.default_rng(0).normal(size=(2, 5, 3))
COORDS = {
    "region": ["north", "south", "sea"],
    "day": np.array(["2026-11-20", "2026-11-21"], dtype="datetime64[ns]"),
    "unused": [1, 2],
}


def groups():
    return {
        "posterior": dataset(
            {
                "rate": Variable(DRAWS, (*SAMPLE_DIMS, "region"), {"long_name": "rate", "units": "1/day"}),
                "net/0.weight": Variable(DRAWS[..., 0], SAMPLE_DIMS),
                "count": Variable(np.arange(10).reshape(2, 5), SAMPLE_DIMS),
            },
            COORDS,
        ),
        "observed_data": dataset(
            {
                "x": Variable(np.array([[1.0, np.nan, 3.0], [4.0, 5.0, 6.0]]), ("day", "region")),
                "total": Variable(np.array(2.5), ()),
            },
            COORDS,
        ),
        "sample_stats": dataset({"diverging": Variable(DRAWS[..., 0] > 0, SAMPLE_DIMS)}, attrs={"noisy": True}),
        "history": dataset(
            {"total": Variable(DRAWS[..., 0], STEP_DIMS)}, {"step": range(1, 6)}, {"window_first": [2, 3]}
        ),
        "prior": dataset({}),
    }


ATTRIBUTES = {
    "inference_library": "pyrobirds",
    "inference_library_version": "1.2",
    "created_at": "2026-11-22T10:00:00+00:00",
    "w": [1.0, 100.0],
    "seed": None,
    "num_steps": np.int64(300),
    "settings": {"lr": 0.05},
}


def test_each_generation_has_its_container(generation):
    data = collect(groups(), ATTRIBUTES)
    assert type(data).__name__ == ("InferenceData", "DataTree")[generation]
    assert isinstance(data, xr.DataTree) == (generation == 1)
    assert set(group_names(data)) == {"posterior", "observed_data", "sample_stats", "history"}


@pytest.mark.parametrize("read", READERS)
def test_files_of_either_generation_read_back_in_both(generation, read, tmp_path):
    written = collect(groups(), ATTRIBUTES)
    written.to_netcdf(tmp_path / "data.nc", engine="h5netcdf")
    found = read(tmp_path / "data.nc")
    assert set(group_names(found)) == set(group_names(written))
    for name in group_names(written):
        xr.testing.assert_identical(group(found, name), group(written, name))
        assert {key: one.dtype for key, one in group(found, name).data_vars.items()} == {
            key: one.dtype for key, one in group(written, name).data_vars.items()
        }
    assert attributes(found).keys() == attributes(written).keys()
    for name, value in attributes(written).items():
        np.testing.assert_array_equal(attributes(found)[name], value)


def test_values_dims_labels_and_attributes(generation):
    posterior = group(collect(groups(), ATTRIBUTES), "posterior")
    assert posterior["rate"].dims == ("chain", "draw", "region")
    np.testing.assert_array_equal(posterior["rate"], DRAWS)
    np.testing.assert_array_equal(posterior["rate"].sel(region="sea", chain=1, draw=4), DRAWS[1, 4, 2])
    assert posterior["rate"].attrs == {"long_name": "rate", "units": "1/day"}
    assert [*posterior["draw"].values] == [0, 1, 2, 3, 4]
    assert set(posterior.coords) == {"chain", "draw", "region"}
    assert set(posterior.data_vars) == {"rate", "net.0.weight", "count"}
    assert posterior.attrs == {
        "inference_library": "pyrobirds",
        "inference_library_version": "1.2",
        "created_at": "2026-11-22T10:00:00+00:00",
        "sample_dims": ["chain", "draw"],
    }


def test_only_groups_of_draws_have_sample_dims(generation):
    data = collect(groups())
    assert "sample_dims" not in group(data, "observed_data").attrs
    assert group(data, "history").attrs == {"window_first": [2, 3]}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (True, 1),
        (np.float32(0.5), 0.5),
        (np.array(3), 3),
        ("KL", "KL"),
        ([0.5], 0.5),
        ((1, 2), [1, 2]),
        (np.array([1.0, 2.0]), [1.0, 2.0]),
        (["a", "b"], ["a", "b"]),
        ({"lr": 0.05, "betas": [0.9, 0.99]}, json.dumps({"lr": 0.05, "betas": [0.9, 0.99]})),
    ],
)
def test_attributes_become_what_a_file_gives_back(value, plain):
    found = dataset({}, attrs={"one": value, "none": None}).attrs
    assert found == {"one": plain}
    assert type(found["one"]) is type(plain)


@pytest.mark.parametrize("value", [np.zeros((2, 2)), object(), [1, None], 1j])
def test_attributes_that_no_file_takes_are_refused(value):
    with pytest.raises(ValueError, match="'one' must be a number, text, a list of them or a mapping, got "):
        dataset({}, attrs={"one": value})


ONE = np.zeros((1, 4))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"a/b": Variable(ONE, SAMPLE_DIMS), "a.b": Variable(ONE, SAMPLE_DIMS)},
            "the sites 'a/b' and 'a.b' would both be written as 'a.b': rename one",
        ),
        (
            {"x": Variable(ONE, ("a/b", "a.b"))},
            "the dimensions 'a/b' and 'a.b' would both be written as 'a.b': rename one",
        ),
        (
            {"x": Variable(ONE, ("chain",))},
            r"'x' has shape \(1, 4\), but 1 dimensions are named: \('chain',\)",
        ),
        (
            {"x": Variable(ONE[0], ("draw",))},
            r"ArviZ keeps \['draw'\] for the draws: give the plate or dimension another name",
        ),
        (
            {"x": Variable(ONE[None], (*SAMPLE_DIMS, "chain"))},
            r"'x' has the dimensions \('chain', 'draw', 'chain'\), but ArviZ keeps \['chain'\] for the draws",
        ),
        (
            {"x": Variable(ONE, ("i", "i"))},
            r"'x' has a dimension twice: \('i', 'i'\). Name each once, with dims=",
        ),
        (
            {"x": Variable(ONE[0], ("i",)), "i": Variable(ONE[0, 0], ())},
            "'i' is both a site and a dimension of 'x': rename the site, or the plate or dimension",
        ),
        (
            {"draw": Variable(ONE, SAMPLE_DIMS)},
            "'draw' is both a site and a dimension of 'draw': rename the site, or the plate or dimension",
        ),
        (
            {"x": Variable(ONE[0], ("i",)), "y": Variable(np.zeros(3), ("i",))},
            "the dimension 'i' has length 4 in 'x' and 3 in 'y': name them differently, with dims=",
        ),
    ],
)
def test_names_that_clash_and_lengths_that_disagree_are_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        dataset(variables)


@pytest.mark.parametrize(("labels", "shape"), [(["a", "b"], r"\(2,\)"), ([["a"], ["b"], ["c"], ["d"]], r"\(4, 1\)")])
def test_labels_of_another_length_are_refused(labels, shape):
    with pytest.raises(ValueError, match=r"coords\['i'\] must have shape \(4,\), as the data do, got " + shape):
        dataset({"x": Variable(ONE[0], ("i",))}, {"i": labels})


def test_labels_follow_a_renamed_dimension():
    renamed = dataset({"x": Variable(ONE[0], ("outer/i",))}, {"outer/i": [*"abcd"]})
    assert [*renamed["outer.i"].values] == [*"abcd"]


def test_a_group_that_is_missing_names_the_others(generation):
    data = collect({"posterior": groups()["posterior"]})
    message = r"no group 'prior', only posterior: export it with to_inference_data\(..., groups=\['prior', ...\]\)"
    with pytest.raises(ValueError, match=message):
        group(data, "prior")
    with pytest.raises(ValueError, match="no group 'prior', only none"):
        group(collect({}), "prior")


@pytest.mark.parametrize("data", ["file.nc", {"posterior": 1}, xr.Dataset()])
def test_what_is_no_exported_data_is_refused(data):
    with pytest.raises(TypeError, match=r"data must be an arviz.InferenceData or .* got " + type(data).__name__):
        group(data, "posterior")
