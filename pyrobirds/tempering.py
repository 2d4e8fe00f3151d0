"""The generalised posterior as an ordinary Pyro model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyrobirds import _checks, traces

if TYPE_CHECKING:
    from pyro.poutine.runtime import Message


class _TemperMessenger(Messenger):
    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = w

    def _pyro_sample(self, msg: Message) -> None:
        if traces.is_loss(msg) and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] / self.w
            # Who takes the loss back out of the log-probability wants to know.
            infer: Any = msg["infer"] or {}
            msg["infer"] = {**infer, "tempered": infer.get("tempered", 1.0) * self.w}  # type: ignore[typeddict-item]


def tempered(model: Callable[..., Any], w: float) -> Callable[..., Any]:
    r"""The model with the log-probability of its observed sites divided by ``w``.

    Its posterior is the generalised posterior that :class:`~pyrobirds.GeneralizedELBO` aims at under the
    Kullback-Leibler divergence,

    .. math:: q^*(\theta) \propto \pi(\theta) \exp\bigl(-\tfrac{1}{w} \ell(\theta, y)\bigr),

    in a form that every Pyro algorithm takes: NUTS, importance sampling, :class:`pyro.infer.Trace_ELBO`. In the words
    of the generalised-Bayes literature the learning rate is :math:`1/w` (Bissiri, Holmes and Walker 2016,
    https://doi.org/10.1111/rssb.12158). Do not combine it with ``GeneralizedELBO(w=...)``: ``w`` would count twice.

    A Simulator's loss is noisy: for algorithms that need one fixed density, such as NUTS, freeze the noise with
    ``Simulator(..., seed=...)``.

    Args:
        model: a Pyro model. Condition it first: ``tempered(poutine.condition(model, data), w)``. Sites that become
            observed outside of ``tempered`` are not seen by it.
        w: the weight of the divergence, above 0, in units of the loss.

    Raises:
        TypeError: ``w`` is not a number.
        ValueError: ``w`` is not finite and above 0.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     theta = pyro.sample("theta", dist.Delta(torch.tensor(0.0)))
        ...     pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> y = torch.tensor(1.0)
        >>> plain = pyro.poutine.trace(model).get_trace(y).log_prob_sum()
        >>> cooled = pyro.poutine.trace(tempered(model, w=4)).get_trace(y).log_prob_sum()
        >>> bool(cooled == plain / 4)
        True
    """
    return _TemperMessenger(_checks.positive("w", w))(model)
