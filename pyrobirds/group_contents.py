"""What the groups of exported data hold, as tensors by site."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to
from tqdm.auto import tqdm

from pyrobirds.sampling import Model, Values

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
        parts = [
            model.run(_length(part), _at(chain.values, part), values=[*latents, *deterministic], score=weighing)
            for part in self._parts(chain.num_draws)
        ]
        posterior, log_prior = _cat(part.values for part in parts), _cat(part.log_probs for part in parts)
        at = {name: posterior[name] for name in latents}
        contents: Contents = {
            "posterior": posterior,
            "unconstrained_posterior": _unconstrained(model, at) if "unconstrained_posterior" in self.wanted else {},
            "log_prior": {name: log_prior[name] for name in weighing if name in at},
        }
        if self.scores:
            log_probs, stats = self._losses(model, at, chain.num_draws)
            contents["log_likelihood"] = {name: value / chain.w for name, value in log_probs.items()}
            contents["sample_stats"] = _sample_stats(chain, log_prior, stats)
        if "posterior_predictive" in self.wanted:
            drawn = _drawn_sites(model)
            contents["posterior_predictive"] = _cat(
                model.run(_length(part), _at(at, part), values=drawn, observed=False).values
                for part in self._parts(chain.num_draws)
            )
        return contents

    def of_prior(self, model: Model, num_samples: int, *, required: bool, simulate: bool) -> Contents:
        """The groups of the prior; left out with a warning where it cannot be drawn from, unless they are required."""
        sites, drawn = model.named("latent", "deterministic"), _drawn_sites(model)
        try:
            found = _cat(
                model.run(_length(part), {}, values=[*sites, *drawn * simulate], observed=not simulate).values
                for part in self._parts(num_samples)
            )
        except Exception as error:
            if required:
                raise
            left_out = "prior_predictive" if simulate else "prior"
            warnings.warn(
                f"the group {left_out} is left out, because the model could not be run at draws from its prior "
                f"({type(error).__name__}: {error})",
                stacklevel=3,
            )
            return self.of_prior(model, num_samples, required=False, simulate=False) if simulate else {}
        return {
            "prior": {name: found[name] for name in sites},
            "prior_predictive": {name: found[name] for name in drawn * simulate},
        }

    def _losses(self, model: Model, at: Values, n: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Log-probabilities of the data by site, averaged over runs, and statistics of the loss of all of them."""
        sites = model.named("observed", "factor")
        means, stats = [], []
        for part in self._parts(n, max(1, self.batch_size // self.num_repeats), self.num_repeats):
            runs = []
            for again in _slices(self.num_repeats, self.batch_size):
                repeated = {name: draws[part].repeat_interleave(_length(again), 0) for name, draws in at.items()}
                found = model.run(_length(part) * _length(again), repeated, score=sites).log_probs
                runs.append({name: value.unflatten(0, (_length(part), -1)) for name, value in found.items()})
            log_probs = {name: torch.cat([run[name] for run in runs], 1) for name in sites}
            means.append({name: value.nanmean(1) for name, value in log_probs.items()})
            shape = (_length(part), self.num_repeats)
            losses = sum((-value.reshape(*shape, -1).sum(2) for value in log_probs.values()), torch.zeros(()))
            stats.append(_statistics(torch.as_tensor(losses).expand(shape)))
        merged = _cat(stats)
        if not any(model.sites[name].can_fail for name in sites):
            del merged["num_failed"]
        return _cat(means), merged

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


def _unconstrained(model: Model, at: Values) -> dict[str, Tensor]:
    supports = {name: model.sites[name].fn.support for name in at}
    return {name: biject_to(supports[name]).inv(at[name]) for name in at if not supports[name].is_discrete}


def _statistics(losses: Tensor) -> dict[str, Tensor]:
    """Of losses (draws, runs): of each draw the mean and variance over the runs that worked, and how many did not."""
    mean, failed, repeats = losses.nanmean(1), losses.isnan().sum(1), losses.shape[1]
    found = {"num_failed": failed, "loss": mean}
    if repeats > 1:
        found["loss_variance"] = (losses - mean.unsqueeze(1)).square().nansum(1) / (repeats - failed - 1)
    return found


def _sample_stats(chain: Chain, log_prior: Mapping[str, Tensor], stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prior = sum((value.reshape(len(value), -1).sum(1) for value in log_prior.values()), torch.zeros(()))
    found = {"lp": prior - stats["loss"] / chain.w, **stats}
    if chain.log_q is not None:
        found["log_q"] = chain.log_q
        if chain.has_weights:
            found["log_weight"] = found["lp"] - chain.log_q
    if chain.diverging is not None:
        found["diverging"] = chain.diverging
    return found
