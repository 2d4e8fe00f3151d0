"""Runs of a simulator that failed: what they count as, and what the user is told of them."""

from __future__ import annotations

import math
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
    asked: Tensor | None  # the like: which of them count; None if none is masked out
    sites: Sequence[Any]  # the site in each trace
    models: Sequence[dict[str, Any]]  # the model's sites in each trace
    num_plates: float  # how many dimensions of a batch are not of the particles, at most
    in_backward: bool = False  # the loss was finite, its gradient was not

    def num_asked(self) -> Tensor | int:
        """How many runs count."""
        return self.runs.numel() if self.asked is None else self.asked.sum()

    def without_survivors(self) -> Tensor:
        """The elements, ``(*plates)``, of which no run survived."""
        return self.runs.all(0) if self.asked is None else (self.runs | ~self.asked).all(0) & self.asked.any(0)


def in_backward(failed: Sequence[Failed]) -> list[Failed]:
    """The runs whose gradient was not finite although their loss was, which simulators note in the backward pass."""
    found = []
    for one in failed:
        noted = [(site, getattr(innermost(site["fn"]), "gradient_failed", None)) for site in one.sites]
        rows = [
            # A site may reckon several runs to one event.
            gradient.reshape(*site["unscaled_log_prob"].shape, -1).any(-1).reshape(-1, *one.runs.shape[1:])
            for site, gradient in noted
            if gradient is not None
        ]
        if len(rows) == len(noted):
            runs = torch.cat(rows)
            found.append(one._replace(runs=runs if one.asked is None else runs & one.asked, in_backward=True))
    return found


def score(trace: Trace, site: Any) -> None:
    """Score a site that can fail; Pyro's own way would warn of every failure."""
    try:
        site["unscaled_log_prob"] = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except ValueError as error:
        shapes = trace.format_shapes(last_site=site["name"])
        raise ValueError(f"Error while computing log_prob at site '{site['name']}':\n{error}\n{shapes}") from error


def fill(
    sites: Sequence[Any], penalty: float | None, *, num_plates: float, as_cost: bool
) -> tuple[Tensor, Tensor | None]:
    r"""Score an observed site, with values for the elements of its log-probability that failed (NaN).

    Without a penalty, those that failed are left out, and each element averages over its own survivors: their
    log-probability is scaled up by the share that survived. As a cost that a score function multiplies, a failed run
    counts as its element's survivors' mean, so that failing is neither sought nor shunned. An element without survivors
    counts as the mean of all survivors of the site. With a penalty, failed runs have this loss.

    Elements belong together by their place, also where particles that are drawn one after another subsample a plate. If
    the size of a plate hangs on the draw, all elements are averaged over as one.

    Args:
        sites: the site in each trace, with its ``unscaled_log_prob``; there are several where particles are drawn one
            after another.
        penalty: the loss of a failed run, or None.
        num_plates: how many dimensions an element has, at most, that are not of the particles.
        as_cost: whether to add ``cost``, which has no gradient, and ``baseline``, the mean cost of the other particles.

    Returns:
        Which runs failed, and which count (None if none is masked out), ``(particles, *plates)``, all traces together.
    """
    log_probs = [site["unscaled_log_prob"] for site in sites]
    ragged = len({own.shape for own in log_probs}) > 1
    by_particle = [
        own.reshape(-1) if ragged else own if own.dim() > num_plates else own.unsqueeze(0) for own in log_probs
    ]
    own = torch.cat(by_particle).detach() if len(sites) > 1 else by_particle[0].detach()
    nan, asked = own.isnan(), None
    if any(site["mask"] is not None for site in sites):
        masks = [_expanded(site["mask"], own) for site, own in zip(sites, log_probs, strict=True)]
        asked = torch.cat([mask.reshape(one.shape) for mask, one in zip(masks, by_particle, strict=True)])
    failed = nan if asked is None else nan & asked
    num_asked = len(own) if asked is None else asked.sum(0)
    num_alive = num_asked - failed.sum(0)
    if penalty is None:
        alive = own.nan_to_num(0.0, math.inf, -math.inf) if asked is None else torch.where(failed | ~asked, 0.0, own)
        sums = alive.sum(0)
        filling: Any = torch.where(
            num_alive > 0, sums / num_alive.clamp(min=1), sums.sum() / num_alive.sum().clamp(min=1)
        )
        factor = (num_asked / num_alive.clamp(min=1)).to(own.dtype)
        finite = [one.nan_to_num(0.0, math.inf, -math.inf) for one in by_particle]
        values = [torch.where(num_alive > 0, one * factor, filling) for one in finite]
    else:
        filling = -penalty
        values = [torch.where(one.isnan(), -penalty, one) for one in by_particle]
    for site, value in zip(sites, values, strict=True):
        _set(site, "log_prob", value)
        site["log_prob_sum"] = site["log_prob"].sum()
    if as_cost:
        sizes = [len(one) for one in by_particle]
        for site, value in zip(sites, torch.where(nan, filling, own).split(sizes), strict=True):
            _set(site, "cost", -value)
        # Of costs as they count: what is masked out may hang on a particle's own draw, on which its baseline must not.
        cost = torch.cat([site["cost"].reshape(one.shape) for site, one in zip(sites, by_particle, strict=True)])
        several = len(cost) > 1 and not ragged  # in which an element of the same particle would be among the others
        baseline = (cost.sum(0) - cost) / (len(cost) - 1) if several else torch.zeros_like(cost)
        for site, value in zip(sites, baseline.split(sizes), strict=True):
            site["baseline"] = value.reshape(site["cost"].shape)
    return failed, asked


def _set(site: Any, name: str, value: Tensor) -> None:
    """Set a value of a site in the shape of its log-probability, scaled and masked."""
    site[name] = scale_and_mask(value.reshape(site["unscaled_log_prob"].shape), site["scale"], site["mask"])


def _expanded(mask: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(True if mask is None else mask, device=like.device).expand(like.shape)


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
        # By name of a site and whether the failure is one in backward:
        self._above_limit: dict[tuple[str, bool], int] = {}  # for how many evaluations in a row
        self._extinct: dict[tuple[str, bool], Tensor] = {}  # (*plates): for how many in a row no run survived

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
            for key in streaks.keys() - {(one.name, one.in_backward) for one in failing}:
                del streaks[key]
        for one in failing:
            num_asked = int(one.num_asked())
            share = int(one.runs.sum()) / num_asked
            text = _what_failed(one, int(one.runs.sum()), num_asked)
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
        key = one.name, one.in_backward
        times = self._above_limit[key] = self._above_limit.get(key, 0) + 1 if share > self.limit else 0
        if times >= _IN_A_ROW:
            raise RuntimeError(
                f"{text}, and the share was above max_failed={self.limit:.0%} in {times} evaluations in a row. Start "
                "the guide where the simulator can run, take a narrower prior, mend the simulator, or raise max_failed"
            )
        extinct = one.without_survivors().long()
        before = self._extinct.get(key)
        if before is not None and before.shape == extinct.shape:
            extinct = (before + 1) * extinct
        self._extinct[key] = extinct
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


def _what_failed(failed: Failed, num_failed: int, num_asked: int) -> str:
    share = f"{num_failed} of {num_asked} runs at site {failed.name!r}"
    what = f"the gradient of {share} is not finite" if failed.in_backward else f"{share} failed"
    return f"{what} ({num_failed / num_asked:.0%}), {_examples(failed)}{_cause(failed)}"


def _cause(failed: Failed) -> str:
    cause = getattr(innermost(failed.sites[-1]["fn"]), "cause", "")
    return f", with {cause!r}" if cause and not failed.in_backward else ""


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
