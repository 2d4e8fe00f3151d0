"""Runs of a simulator that failed: what they count as, and what the user is told of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyrobirds.traces import innermost

OnFailure = Literal["drop", "penalize", "raise"]
POLICIES: tuple[OnFailure, ...] = ("drop", "penalize", "raise")

_IN_A_ROW = 10  # evaluations; fewer may be bad luck


class Failed(NamedTuple):
    """The failures of one observed site in one evaluation."""

    name: str
    runs: Tensor  # bool, (particles, *plates): which of them failed
    sites: Sequence[Any]  # the site in each trace
    models: Sequence[dict[str, Any]]  # the model's sites in each trace
    num_plates: float  # how many dimensions of a batch are not of the particles, at most
    in_backward: bool = False  # the loss was finite, its gradient was not


def in_backward(failed: Sequence[Failed]) -> list[Failed]:
    """The runs whose gradient was not finite although their loss was, which simulators note in the backward pass."""
    found = []
    for one in failed:
        noted = [(site, getattr(innermost(site["fn"]), "gradient_failed", None)) for site in one.sites]
        rows = [
            _asked_for(site["mask"], gradient).reshape(-1, *one.runs.shape[1:])
            for site, gradient in noted
            if gradient is not None
        ]
        if rows:
            found.append(one._replace(runs=torch.cat(rows), in_backward=True))
    return found


def score(trace: Trace, site: Any) -> None:
    """Score a site that can fail; Pyro's own way would warn of every failure."""
    try:
        site["unscaled_log_prob"] = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except ValueError as error:
        shapes = trace.format_shapes(last_site=site["name"])
        raise ValueError(f"Error while computing log_prob at site '{site['name']}':\n{error}\n{shapes}") from error


def fill(sites: Sequence[Any], penalty: float | None, *, num_plates: float, as_cost: bool) -> Tensor:
    r"""Score an observed site, with values for the elements of its log-probability that failed (NaN).

    Without a penalty, those that failed are left out, and each element averages over its own survivors: their
    log-probability is scaled up by the share that survived. As a cost that a score function multiplies, a failed
    element counts as its survivors' mean, so that failing is neither sought nor shunned. An element without survivors
    is left out of the sum. With a penalty, failed elements have this loss.

    Args:
        sites: the site in each trace, with its ``unscaled_log_prob``; there are several where particles are drawn one
            after another.
        penalty: the loss of a failed run, or None.
        num_plates: how many dimensions an element has, at most, that are not of the particles.
        as_cost: whether to add ``cost``, which has no gradient, and ``baseline``, the mean cost of the other particles.

    Returns:
        Which runs failed, ``(particles, *plates)``, all traces together.
    """
    log_probs = [site["unscaled_log_prob"] for site in sites]
    by_particle = [own if own.dim() > num_plates else own.unsqueeze(0) for own in log_probs]
    failed = [_asked_for(site["mask"], own.isnan()) for site, own in zip(sites, by_particle, strict=True)]
    together = torch.cat(failed) if len(failed) > 1 else failed[0]
    num_alive = len(together) - together.sum(0)
    if penalty is None:
        factor = len(together) / num_alive.clamp(min=1)
        values = [own.nan_to_num(0.0) * factor for own in by_particle]
    else:
        values = [torch.where(bad, -penalty, own) for bad, own in zip(failed, by_particle, strict=True)]
    for site, value, own in zip(sites, values, log_probs, strict=True):
        site["log_prob"] = scale_and_mask(value.reshape(own.shape), site["scale"], site["mask"])
        site["log_prob_sum"] = site["log_prob"].sum()
    if as_cost:
        alive = torch.where(together, 0.0, torch.cat(by_particle).detach())
        filling = alive.sum(0) / num_alive.clamp(min=1) if penalty is None else -penalty
        cost = -torch.where(together, filling, alive)
        baseline = (cost.sum(0) - cost) / (len(cost) - 1) if len(cost) > 1 else torch.zeros_like(cost)
        sizes = [len(own) for own in by_particle]
        for name, all_values in (("cost", cost), ("baseline", baseline)):
            for site, value, own in zip(sites, all_values.split(sizes), log_probs, strict=True):
                site[name] = scale_and_mask(value.reshape(own.shape), site["scale"], site["mask"])
    return together


def _asked_for(mask: Any, failed: Tensor) -> Tensor:
    """The failures without those that are masked out."""
    return failed if mask is None else failed & mask


class Watch:
    """Tells the user about failures, outside of the step, where looking at values costs nothing.

    Args:
        policy: what a failed run counts as.
        limit: the share of a site's runs that may fail.
    """

    def __init__(self, policy: OnFailure, limit: float) -> None:
        self.policy = policy
        self.limit = limit
        self._warned: set[tuple[str, bool]] = set()
        self._above_limit: dict[str, int] = {}  # by site: for how many evaluations in a row
        self._extinct: dict[str, Tensor] = {}  # by site, (*plates): for how many in a row no particle survived

    def look(self, found: Sequence[Failed], any_failed: bool) -> None:
        """Warn of the failures of an evaluation, or raise.

        Args:
            found: of each site that can fail.
            any_failed: whether there are any, known from their sum.

        Raises:
            RuntimeError: the policy is "raise" and a run failed; all runs of a site failed and there is no penalty;
                the share that failed was above the limit ten times in a row, or that often a series had no survivor.
        """
        failing = [one for one in found if any_failed and bool(one.runs.any())]
        for streaks in (self._above_limit, self._extinct):
            for name in streaks.keys() - {one.name for one in failing}:
                del streaks[name]
        for one in failing:
            share = float(one.runs.double().mean())
            text = (
                f"{'the gradient of ' if one.in_backward else ''}{int(one.runs.sum())} of {one.runs.numel()} runs at "
                f"site {one.name!r} {'is not finite' if one.in_backward else 'failed'} ({share:.0%}), {_examples(one)}"
            )
            if self.policy == "raise":
                raise RuntimeError(f"{text}. To go on without failed runs, pass on_failure='drop' or 'penalize'")
            if share == 1 and self.policy == "drop":
                raise RuntimeError(
                    f"{text}: there is nothing to average over. Start the guide where the simulator can run, take a "
                    "narrower prior or more particles, or mend the simulator"
                )
            self._count(one, share, text)
            if (one.name, one.in_backward) not in self._warned:
                self._warned.add((one.name, one.in_backward))
                warnings.warn(f"{text}. {self._consequence(one)} This is said once", stacklevel=_users_level())

    def _count(self, one: Failed, share: float, text: str) -> None:
        times = self._above_limit[one.name] = self._above_limit.get(one.name, 0) + 1 if share > self.limit else 0
        if times >= _IN_A_ROW:
            raise RuntimeError(
                f"{text}, and the share was above max_failed={self.limit:.0%} in {times} evaluations in a row. Start "
                "the guide where the simulator can run, take a narrower prior, mend the simulator, or raise max_failed"
            )
        extinct = one.runs.all(0).long()
        before = self._extinct.get(one.name)
        if before is not None and before.shape == extinct.shape:
            extinct = (before + 1) * extinct
        self._extinct[one.name] = extinct
        if self.policy == "drop" and bool((extinct >= _IN_A_ROW).any()):
            where = tuple(int(i) for i in (extinct >= _IN_A_ROW).nonzero()[0])
            raise RuntimeError(
                f"{text}; all runs of the element {where} of its plates failed in {_IN_A_ROW} evaluations in a row, so "
                "that it has no part in the fit. Mend the simulator for it, leave it out, or take more particles"
            )

    def _consequence(self, one: Failed) -> str:
        if one.in_backward:
            return "Such gradients count as zero."
        if self.policy == "penalize":
            return "They have the loss `penalty`."
        return "They are dropped: the loss is averaged over the others."


def _users_level() -> int:
    """How far up the stack the user's code is, outside of this package, Pyro and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("pyrobirds", "pyro", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _examples(failed: Failed) -> str:
    """Latents of up to three particles of which a run failed."""
    rows = failed.runs.reshape(len(failed.runs), -1).any(1).nonzero()[:3, 0].tolist()
    shown = []
    for name, site in failed.models[0].items():
        if site["is_observed"] or not isinstance(site["value"], Tensor):
            continue
        values = [model[name]["value"].detach() for model in failed.models if name in model]
        if len(values) == 1 and values[0].dim() - site["fn"].event_dim > failed.num_plates:
            values = list(values[0])  # particles in front
        if len(values) == len(failed.runs):
            shown.append(f"{name} = {', '.join(_shown(values[row]) for row in rows)}")
    return f"for example at {'; '.join(shown[:10])}" if shown else "whatever the latents"


def _shown(value: Tensor) -> str:
    numbers = [f"{number:.4g}" for number in value.flatten()[:4].tolist()]
    return numbers[0] if value.numel() == 1 else f"({', '.join(numbers)}{', ...' if value.numel() > 4 else ''})"
