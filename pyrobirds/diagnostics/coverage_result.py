"""How often intervals of posteriors hold the parameters that made the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

BAND = 0.95  # of the counts at one level, if calibrated
FALSE_ALARMS = 0.05  # over all parameters and tests together
_LONG_NAMES = {
    "theta": "parameter that the data were simulated with",
    "rank": "number of posterior draws below it, ties broken at random",
    "pit": "share of the posterior below it, its gap between two draws split at random",
    "mean": "posterior mean",
    "sd": "posterior standard deviation",
    "central": "whether the central interval holds it",
    "hdi": "whether the highest-density interval holds it",
}


class Compared(NamedTuple):
    """The true parameters of one dataset against its posterior: lists with an entry for each element of each site."""

    num_draws: int
    site: list[str]
    element: list[str]
    theta: list[float]
    rank: list[int]
    pit: list[float]
    mean: list[float]
    sd: list[float]
    hdi: list[list[int]]  # 0 or 1 for each level


def compare(
    posterior: xr.Dataset, theta: Mapping[str, np.ndarray], levels: Sequence[float], rng: np.random.Generator
) -> Compared:
    """Where the true parameters lie among the draws of a posterior.

    Args:
        posterior: of exported data: draws ``(chain, draw, *shape)`` by site.
        theta: the true parameters, ``(*shape)`` by site.
        levels: of the intervals.
        rng: for ties, and the gaps that the ends of intervals lie in.

    Raises:
        ValueError: the posterior lacks a site, has it in another shape, or has draws that are not finite.
    """
    columns = {name: _column(posterior, name, truth) for name, truth in theta.items()}
    draws = np.concatenate([column.values for column in columns.values()], axis=1)
    truth = np.concatenate([one.ravel() for one in theta.values()]).astype(float)
    num_draws = len(draws)
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    place = below + rng.random(len(truth)) * (ties + 1)
    rank = np.floor(place).astype(int)
    pooled = np.sort(np.concatenate([draws, truth[None]]), axis=0)
    return Compared(
        num_draws=num_draws,
        site=[column.name for column in columns.values() for _ in column.labels],
        element=[label for column in columns.values() for label in column.labels],
        theta=truth.tolist(),
        rank=rank.tolist(),
        pit=(place / (num_draws + 1)).tolist(),
        mean=draws.mean(0).tolist(),
        sd=draws.std(0, ddof=1).tolist(),
        hdi=[
            [_in_shortest(points, at, level * (num_draws + 1) + gap) for level in levels]
            for points, at, gap in zip(pooled.T, rank, place - rank, strict=True)
        ],
    )


class _Column(NamedTuple):
    name: str
    values: np.ndarray  # (draws of all chains, elements)
    labels: list[str]


def _column(posterior: xr.Dataset, site: str, truth: np.ndarray) -> _Column:
    name = site.replace("/", ".")  # as it is exported
    if name not in posterior:
        raise ValueError(
            f"the posterior that calibrate returned has no variable {name!r}, only "
            f"{', '.join(map(str, posterior)) or 'none'}: every latent site of the model must be there"
        )
    draws = posterior[name]
    if draws.dims[:2] != ("chain", "draw") or draws.shape[2:] != truth.shape:
        raise ValueError(
            f"the posterior that calibrate returned must have {name!r} as (chain, draw) and then the site's own shape "
            f"{truth.shape}, got dimensions {draws.dims} of shape {draws.shape}"
        )
    values = draws.values.astype(float).reshape(-1, truth.size)
    if len(values) < 2:
        raise ValueError(
            f"the posterior that calibrate returned must have at least 2 draws, {name!r} has {len(values)}"
        )
    if num_bad := int((~np.isfinite(values)).any(1).sum()):
        raise ValueError(
            f"{num_bad} of {len(values)} posterior draws of {name!r} that calibrate returned are not finite: see what "
            "its fit came to, and let it return finite draws or raise"
        )
    if not np.isfinite(truth.astype(float)).all():
        raise ValueError(f"the prior draw of {site!r} is not finite: {truth}. Give the site a proper prior")
    labels = product(*(draws[dim].values for dim in draws.dims[2:]))
    return _Column(name, values, [f"{name}[{', '.join(map(str, at))}]" if at else name for at in labels])


def _in_shortest(points: np.ndarray, at: int, held: float) -> int:
    """Whether the shortest interval that holds so many of the sorted points holds the one at this position."""
    num = int(held)
    if num == 0:
        return 0
    start = int((points[num - 1 :] - points[: len(points) - num + 1]).argmin())
    return int(start <= at < start + num)


@dataclass(frozen=True, repr=False, eq=False)
class Coverage:
    r"""How often intervals of posteriors hold the parameters that made the data, from :func:`coverage`.

    What is kept of a dataset depends on its parameters only through their place among the draws. Under an exactly
    calibrated posterior with independent draws the parameter is exchangeable with them, so that

    - ``rank`` is uniform on 0, ..., ``num_draws``, and ``pit`` on (0, 1) (Talts et al. 2018,
      https://arxiv.org/abs/1804.06788);
    - the central interval of level p, ``|2 pit - 1| <= p``, holds it with probability p. Its ends lie in gaps between
      draws, which are split at random, so that this is exact for any number of draws;
    - so does the highest-density interval: the shortest that holds a share p of draws and parameter together. The
      parameter is pooled with the draws because the shortest interval of draws alone holds too little: 0.49 instead of
      0.5 of a Gaussian with 1,000 draws, 0.44 with 100. It means something for continuous parameters.

    Attributes:
        data: by ``dataset`` (from 0) and ``element`` (``theta``, ``rate[north]``; the coordinate ``site`` has the
            site's name): ``theta``, ``rank``, ``pit``, the posterior's ``mean`` and ``sd``; by ``level`` too
            ``central`` and ``hdi``, whether these intervals hold theta. Attributes: ``num_datasets``, ``num_draws``,
            ``seed``. It goes to a netCDF file and back: ``Coverage(xarray.load_dataset(path))``.
    """

    data: xr.Dataset

    def table(self) -> pd.DataFrame:
        """The coverage curve: a row for each element of each site and each level.

        Returns:
            ``element``; ``expected``, the level; ``central`` and ``hdi``, the shares of datasets whose interval holds
            theta; ``lower`` and ``upper``, between which each of these shares lies with a probability of at least 0.95
            if the posterior is calibrated: binomial quantiles, for one level at a time.
        """
        shares = self.data[["central", "hdi"]].mean("dataset").to_dataframe().reset_index()
        lower, upper = _band(shares["level"].to_numpy(), self.data.sizes["dataset"])
        return (
            shares.rename(columns={"level": "expected"})
            .assign(lower=lower, upper=upper)
            .reindex(columns=["element", "expected", "central", "hdi", "lower", "upper"])
        )

    def tests(self) -> pd.DataFrame:
        r"""Whether the ranks are uniform: a row for each element of each site.

        The normal scores :math:`z = \Phi^{-1}(\mathrm{pit})` of a calibrated posterior are independent and standard
        normal. Their mean and standard deviation say how far, in posterior standard deviations, and how much wider than
        posteriors say, the parameters scatter around them (after Cook, Gelman and Rubin 2006,
        https://doi.org/10.1198/106186006X136976). Any other departure shows in the empirical distribution of ``pit``
        against its simultaneous confidence band (Säilynoja, Bürkner and Vehtari 2022,
        https://doi.org/10.1007/s11222-022-10090-6).

        Returns:
            ``shift``, the mean of z, above 0 if posteriors are too low, and ``width``, its standard deviation, above 1
            if they are too narrow; ``p_shift`` (Student's t), ``p_width`` (chi-square) and ``p_shape`` (the band),
            exact p-values; ``verdict``: what departs, in words, or "". A verdict comes up for calibrated posteriors
            with a probability of at most 0.05, over all elements and tests together (Bonferroni).
        """
        return pd.DataFrame(self._tests, index=self.data.indexes["element"])

    @cached_property
    def _tests(self) -> list[_Test]:
        least, tails = FALSE_ALARMS / (3 * self.data.sizes["element"]), _tails(self.data.sizes["dataset"])
        return [_test(pit, least, tails) for pit in self.data["pit"].transpose("element", "dataset").values]

    def __str__(self) -> str:
        n, names, tests = self.data.sizes["dataset"], self.data["element"].values, self._tests
        lines = [
            f"Coverage over {n:,} simulated datasets, each with {self.data.attrs['num_draws']:,} posterior draws.",
            *(self._departure(place, test) for place, test in enumerate(tests) if test.verdict),
        ]
        if right := [name for name, test in zip(names, tests, strict=True) if not test.verdict]:
            others = f" and {len(right) - 8} others" if len(right) > 8 else ""
            lines.append(f"No departure was found, as far as {n:,} datasets tell, in {', '.join(right[:8])}{others}.")
        lines += [
            f"Were all posteriors calibrated, a departure would be found with a probability of at most {FALSE_ALARMS}.",
            "A generalised posterior is not promised to cover as often as its levels say. This curve is what w should "
            "be chosen by: posteriors that are too narrow ask for a larger w, too wide ones for a smaller w.",
        ]
        return "\n".join(lines)

    def _departure(self, place: int, test: _Test) -> str:
        held = self.data[["central", "hdi"]].isel(element=place).mean("dataset")
        lower, upper = _band(held["level"].values, self.data.sizes["dataset"])
        outside = np.any([(held[name] < lower) | (held[name] > upper) for name in ("central", "hdi")], axis=0)
        middle = held.sel(level=0.5, method="nearest")
        level, central, hdi = (float(middle[name]) for name in ("level", "central", "hdi"))
        return (
            f"{held['element'].item()}: posteriors are {test.verdict}. The true values lie {test.shift:+.2f} posterior "
            f"standard deviations away on average and scatter {test.width:.2f} times as wide as posteriors say. "
            f"Central intervals of level {level:.2g} hold {central:.2f} of them, highest-density ones {hdi:.2f}; the "
            f"curve leaves its pointwise band at {outside.sum()} of {len(outside)} levels."
        )

    __repr__ = __str__


class _Test(NamedTuple):
    """A row of :meth:`Coverage.tests`."""

    shift: float
    width: float
    p_shift: float
    p_width: float
    p_shape: float
    verdict: str


def collect(compared: Iterable[Compared], levels: Sequence[float], seed: int) -> Coverage:
    """The result of all datasets, in their order, which have the same elements and number of draws."""
    compared = [*compared]
    first = compared[0]
    stacked = {name: np.array([getattr(one, name) for one in compared]) for name in _LONG_NAMES if name != "central"}
    stacked["hdi"] = stacked["hdi"].astype(bool)
    stacked["central"] = np.abs(2 * stacked["pit"] - 1)[..., None] <= np.array(levels)
    dims = ("dataset", "element", "level")
    return Coverage(
        xr.Dataset(
            {
                name: (dims[: stacked[name].ndim], stacked[name], {"long_name": long_name})
                for name, long_name in _LONG_NAMES.items()
            },
            {
                "dataset": np.arange(len(compared)),
                "element": first.element,
                "level": [*levels],
                "site": ("element", first.site),
            },
            {"num_datasets": len(compared), "num_draws": first.num_draws, "seed": seed},
        )
    )


def _band(levels: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The shares of n datasets between which that of a level lies with a probability of ``BAND``, if calibrated."""
    held = stats.binom(n, levels)
    return held.ppf((1 - BAND) / 2) / n, held.ppf((1 + BAND) / 2) / n


def _test(pit: np.ndarray, least: float, tails: np.ndarray) -> _Test:
    n, z = len(pit), stats.norm.ppf(pit)
    shift, width = z.mean(), z.std(ddof=1)
    squares = (n - 1) * width**2
    p_shift = 2 * stats.t.sf(abs(shift) * n**0.5 / width, n - 1)
    p_width = 2 * min(stats.chi2.cdf(squares, n - 1), stats.chi2.sf(squares, n - 1))
    p_shape = _shape_p_value(pit, tails)
    found = []
    if p_width < least:
        found.append("too narrow" if width > 1 else "too wide")
    if p_shift < least:
        found.append("too low" if shift > 0 else "too high")
    if p_shape < least and not found:
        found.append("of another shape")
    return _Test(float(shift), float(width), float(p_shift), float(p_width), p_shape, " and ".join(found))


def _tails(n: int) -> np.ndarray:
    """The smaller of the two tails of how many of n uniform numbers lie below z = 1/n, ..., (n - 1)/n: (z, count)."""
    z, counts = np.arange(1, n)[:, None] / n, np.arange(n + 1)
    return np.minimum(stats.binom.cdf(counts, n, z), stats.binom.sf(counts - 1, n, z))


def _shape_p_value(pit: np.ndarray, tails: np.ndarray) -> float:
    """The probability that n uniform numbers leave at least as narrow a band around their distribution as these.

    How many of them lie below z = 1/n, ..., (n - 1)/n is binomial; the band holds the counts whose tail, of the two the
    smaller, is above the smallest that was seen. The counts of uniform numbers are those of a Poisson process given its
    total, so the probability to stay in the band is a chain of convolutions.
    """
    n = len(pit)
    seen = np.searchsorted(np.sort(pit), np.arange(1, n) / n, side="right")
    inside = tails > tails[np.arange(n - 1), seen].min() * (1 + 1e-9)  # the same tail seen from the other side is a tie
    steps = stats.poisson.pmf(np.arange(min(n, 40) + 1), 1)  # beyond 40 less than 1e-49
    reached = np.eye(1, n + 1)[0]
    for row in inside:
        reached = np.convolve(reached, steps)[: n + 1] * row
    return max(0.0, float(1 - np.convolve(reached, steps)[n] / stats.poisson.pmf(n, n)))
