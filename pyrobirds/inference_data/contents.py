"""What the groups of exported data hold, as tensors by site."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrobirds.sampling import Model, Recorded, Values

Contents = dict[str, dict[str, Tensor]]  # by group and name, (number of draws, ...)


class Chain(NamedTuple):
    """Draws from a posterior."""

    values: Values  # of latents, (n, *shape)
    log_q: Tensor | None  # (n,); None for draws that have no density, or come from no guide
    w: float
    has_weights: bool  # whether it aims at the generalised posterior under the Kullback-Leibler divergence
    diverging: Tensor | None = None  # (n,), of NUTS

    @property
    def num_draws(self) -> int:
        return len(next(iter(self.values.values())))


class Runs(NamedTuple):
    """How a model is run for the groups that are wanted."""

    wanted: Collection[str]
    num_repeats: int  # runs that the loss of a draw is averaged over
    batch_size: int
    bar: tqdm

    @property
    def scores(self) -> bool:
        """Whether the loss is wanted, which takes simulations."""
        return not {"sample_stats", "log_likelihood"}.isdisjoint(self.wanted)

    def number(self, num_draws: int) -> int:
        """How many runs of the model a chain takes."""
        return num_draws * (1 + self.num_repeats * self.scores + ("posterior_predictive" in self.wanted))

    def of_chain(self, model: Model, chain: Chain) -> Contents:
        """The groups that have draws of the posterior."""
        latents, deterministic = model.named("latent"), model.named("deterministic")
        # Latents that the guide does not draw come from their prior, so that they weigh as much in q as in the prior.
        weighing = [name for name in latents if name in chain.values] + deterministic
        mapped = [name for name in latents if not model.sites[name].fn.support.is_discrete]
        unconstrain = mapped if "unconstrained_posterior" in self.wanted else []
        posterior, log_prior, unconstrained = self._of_parts(
            model,
            chain.num_draws,
            chain.values,
            values=[*latents, *deterministic],
            score=weighing,
            unconstrain=unconstrain,
        )
        at = {name: posterior[name] for name in latents}
        model.look(at)
        contents: Contents = {
            "posterior": posterior,
            "unconstrained_posterior": unconstrained,
            "log_prior": {name: log_prior[name] for name in weighing if name in at},
        }
        if summed_over(model, chain):  # their draws are the prior's, and so would be the loss
            without = {*model.enumerated, *deterministic}  # which may depend on them
            contents["posterior"] = {name: value for name, value in posterior.items() if name not in without}
        elif self.scores:
            log_probs, stats = self._losses(model, at, chain.num_draws)
            contents["log_likelihood"] = {name: value / chain.w for name, value in log_probs.items()}
            contents["sample_stats"] = _sample_stats(chain, log_prior, stats)
        if "posterior_predictive" in self.wanted:
            drawn = _drawn_sites(model)
            contents["posterior_predictive"] = self._of_parts(
                model, chain.num_draws, at, values=drawn, observed=False
            ).values
        return contents

    def of_prior(self, model: Model, num_samples: int, *, required: bool) -> Contents:
        """The groups of the prior; left out with a warning where it cannot be drawn from, unless they are required."""
        sites, drawn = model.named("latent", "deterministic"), _drawn_sites(model)
        predict = "prior_predictive" in self.wanted
        failed: dict[str, Exception] = {}
        found = Recorded({}, {}, {})
        for names in ([*sites, *drawn], sites) if predict else (sites,):
            try:
                found = self._of_parts(model, num_samples, {}, values=names, observed=names is sites)
                break
            except Exception as error:
                if required:
                    raise
                failed["prior" if names is sites else "prior_predictive"] = error
        if failed:
            error = [*failed.values()][-1]
            warnings.warn(
                f"{' and '.join(failed)} left out, because the model could not be run at draws from its prior "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
                stacklevel=4,
            )
        return {
            "prior": {name: found.values[name] for name in sites if name in found.values},
            "prior_predictive": {name: found.values[name] for name in drawn if name in found.values},
        }

    def _losses(self, model: Model, at: Values, n: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Log-probabilities of the data by site, averaged over the runs that worked, and statistics of the loss."""
        sites = model.named("observed", "factor")
        if model.is_frozen and self.num_repeats > 1:
            raise ValueError(
                "num_repeats must be 1 for a simulator with frozen noise, which has one loss for each draw: leave out "
                "its seed, or average by simulators.repeated(model, num_repeats, seed)"
            )
        means, stats = [], []
        for part in self._parts(n, max(1, self.batch_size // self.num_repeats), self.num_repeats):
            runs = []
            for again in _slices(self.num_repeats, self.batch_size):
                repeated = {name: draws[part].repeat_interleave(_length(again), 0) for name, draws in at.items()}
                # Frozen noise belongs to a place in a batch: one by one, as MCMC scores them, all draws have the same.
                parallel = False if model.is_frozen else None
                found = model.run(_length(part) * _length(again), repeated, score=sites, parallel=parallel).log_probs
                runs.append({name: value.unflatten(0, (_length(part), -1)) for name, value in found.items()})
            log_probs = {name: torch.cat([run[name] for run in runs], 1).double() for name in sites}
            means.append({name: value.nanmean(1) for name, value in log_probs.items()})
            stats.append(_statistics(log_probs, _length(part), self.num_repeats))
        merged = _cat(stats)
        if not any(model.sites[name].can_fail for name in sites):
            del merged["num_failed"]
        return _cat(means), merged

    def _of_parts(self, model: Model, n: int, at: Values, **wanted: Any) -> Recorded:
        """What a model makes of many draws, run in batches."""
        parts = [model.run(_length(part), _at(at, part), **wanted) for part in self._parts(n)]
        return Recorded(*(_cat(part[place] for part in parts) for place in range(3)))

    def _parts(self, n: int, size: int | None = None, runs: int = 1) -> Iterator[slice]:
        """Batches of draws; each takes so many runs of a draw."""
        for part in _slices(n, size or self.batch_size):
            yield part
            self.bar.update(_length(part) * runs)


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _length(part: slice) -> int:
    return part.stop - part.start


def _at(values: Values, part: slice) -> dict[str, Tensor]:
    return {name: draws[part] for name, draws in values.items()}


def _cat(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    parts = [*parts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _drawn_sites(model: Model) -> list[str]:
    return [name for name in model.named("observed") if model.sites[name].can_be_drawn]


def summed_over(model: Model, chain: Chain) -> list[str]:
    """The discrete latents without draws: fits sum over them, and the loss at a draw from their prior is another."""
    return [name for name in model.enumerated if name not in chain.values]


def _statistics(log_probs: Mapping[str, Tensor], num_draws: int, repeats: int) -> dict[str, Tensor]:
    """Of the loss of all data, by draw, from log-probabilities (draws, runs, ...) of each site.

    Each element is averaged over the runs in which it worked, as in the objective. The variance is over the runs in
    which all did.
    """
    zero = torch.zeros(num_draws, repeats, dtype=torch.double)
    losses = sum((-value.reshape(num_draws, repeats, -1).sum(2) for value in log_probs.values()), zero)
    mean = sum((-value.nanmean(1).reshape(num_draws, -1).sum(1) for value in log_probs.values()), zero[:, 0])
    failed = losses.isnan().sum(1)
    found = {"num_failed": failed, "loss": mean}
    if repeats > 1:
        squares = (losses - losses.nanmean(1, keepdim=True)).square()
        found["loss_variance"] = torch.where(
            failed < repeats - 1, squares.nansum(1) / (repeats - failed - 1), torch.nan
        )
    return found


def _sample_stats(chain: Chain, log_prior: Mapping[str, Tensor], stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    zero = torch.zeros((), dtype=torch.double)
    prior = sum((value.reshape(len(value), -1).double().sum(1) for value in log_prior.values()), zero)
    found = {"lp": prior - stats["loss"] / chain.w, **stats}
    if chain.log_q is not None:
        found["log_q"] = chain.log_q
        if chain.has_weights:
            found["log_weight"] = found["lp"] - chain.log_q
    if chain.diverging is not None:
        found["diverging"] = chain.diverging
    return found
