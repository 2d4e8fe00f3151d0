"""Simulators whose loss is averaged over several runs to a draw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyro.poutine.messenger import Messenger

from pyrobirds import _checks, traces
from pyrobirds.simulators.simulator import SimulatorSite

if TYPE_CHECKING:
    from pyro.poutine.runtime import Message


class _RepeatMessenger(Messenger):
    def __init__(self, num_repeats: int, seed: int | None) -> None:
        super().__init__()
        self.num_repeats = num_repeats
        self.seed = seed

    def _pyro_sample(self, msg: Message) -> None:
        site = traces.innermost(msg["fn"])
        if isinstance(site, SimulatorSite):
            run = site.run.repeated(self.num_repeats, self.seed, site.output, str(msg["name"]))
            msg["fn"] = _with_innermost(msg["fn"], SimulatorSite(run, site.output, site.batch_shape))


def _with_innermost(fn: Any, innermost: Any) -> Any:
    """A distribution with another one below all that wrap it, such as a mask."""
    if not hasattr(fn, "base_dist"):
        return innermost
    wrapper = copy.copy(fn)
    wrapper.base_dist = _with_innermost(fn.base_dist, innermost)
    return wrapper


def repeated(model: Callable[..., Any], num_repeats: int, seed: int | None = None) -> Callable[..., Any]:
    r"""The model with the loss of its simulators averaged over several runs to a draw.

    .. math:: \log p(y | \theta) = -\frac{1}{R} \sum_{r=1}^{R} \ell(x_r, y), \qquad x_r \sim \mathrm{simulator}(\theta)

    All runs are one batch: the simulator gets R times as many parameters, and takes R times the memory. The expectation
    is that of one run, :math:`E[\ell | \theta]`, and the variance is 1/R of it; so it is for the gradient. Whatever is
    not linear in the loss, such as the density that NUTS or importance sampling takes, is off by less: one run a draw
    has the posterior :math:`\pi(\theta) E[\exp(-\ell / w)]` in place of :math:`\pi(\theta) \exp(-E[\ell] / w)`.

    With a ``seed`` the runs have noise that stays the same, as NUTS needs it: the log-probability is deterministic for
    a fixed batch shape. It is then the expected loss but for an error of sd :math:`\mathrm{sd}(\ell | \theta) /
    \sqrt{R}`, which other seeds show. Different outputs of one call share their runs; any other two
    sites have noise of their own.

    A draw's loss is the mean over those of its runs that did not fail, an estimate of :math:`E[\ell | \theta,
    \mathrm{worked}]`, and NaN if all of them failed. How many did, the site says: ``fn.num_failed`` of a scored trace's
    site. For :class:`~pyrobirds.GeneralizedELBO` a draw failed if all of its runs did: with ``on_failure="penalize"``
    or ``"raise"`` it does not see the others, so leave the model as it is there.

    Drawing is as it was, one run a draw. Sites that are not simulators are left alone.

    Args:
        model: a Pyro model, or anything else that is made of ``pyro.sample``.
        num_repeats: R, how many runs there are to a draw, at least 1.
        seed: freezes the noise, in place of the Simulator's own seed.

    Raises:
        TypeError, ValueError: ``num_repeats`` is not a whole number of at least 1, or ``seed`` not one of at least 0.

    Example:
        >>> import pyro, torch
        >>> from pyrobirds import models
        >>> y = torch.zeros(100)
        >>> model = pyro.condition(models.random_walk, {"theta": torch.tensor(0.5)})
        >>> def score(model):
        ...     return pyro.poutine.trace(model).get_trace(y).log_prob_sum().item()
        >>> frozen = repeated(model, 50, seed=1)
        >>> score(frozen) == score(frozen), score(frozen) == score(repeated(model, 50))
        (True, False)
    """
    num_repeats = _checks.positive_int("num_repeats", num_repeats)
    return _RepeatMessenger(num_repeats, None if seed is None else _checks.seed("seed", seed))(model)
