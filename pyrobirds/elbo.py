"""The objective of generalised variational inference as a Pyro loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import check_if_enumerated, check_site_shape, warn_if_nan
from torch import Tensor

from pyrobirds import _checks, dependence, scoring, traces
from pyrobirds.dependence import Dependence, Names
from pyrobirds.divergences import KL, Divergence
from pyrobirds.scoring import Cost

Fn = Callable[..., Any]


class Terms(NamedTuple):
    """The terms of one evaluation of the objective: scalars without graph."""

    loss: Tensor
    divergence: Tensor  # already times w
    total: Tensor


class _Evaluation(NamedTuple):
    """The share of one pair of traces in the objective, already divided by the number of particles."""

    loss: Tensor
    divergence: Tensor
    surrogate: Tensor  # its gradient is the estimate of the objective's
    has_params: bool


class _Pass(NamedTuple):
    """Which particles are drawn, and what they are used for."""

    num_particles: int
    loss: bool
    divergence: bool


class GeneralizedELBO(ELBO):
    r"""The objective of generalised variational inference.

    .. math:: E_q\Bigl[\sum_i \ell(\theta, y_i)\Bigr] + w \, D(q \| \pi)

    to be minimised over the guide :math:`q`. An observed site contributes :math:`\ell = -\log p(y_i | \theta)`, be it a
    Simulator, an ordinary likelihood or a ``pyro.factor``; latent sites make up the divergence from the prior
    :math:`\pi`. With ``w=1`` the objective is that of :class:`pyro.infer.Trace_ELBO`. Under the Kullback-Leibler
    divergence the optimum over all q is proportional to :math:`\pi(\theta) \exp(-E[\ell(\theta, y)] / w)`; in the words
    of the generalised-Bayes literature the learning rate is :math:`1/w`.

    It is used like Pyro's own ELBOs, in :class:`pyro.infer.SVI` or as a torch module ``elbo(model, guide)``.
    Reparameterised latents get pathwise gradients, others the score function with Pyro's plate-wise
    Rao-Blackwellisation.

    Source: Knoblauch, Jewson and Damoulas, "Generalized Variational Inference", https://arxiv.org/abs/1904.02063, their
    "Rule of Three" P(l, D, Q).

    Args:
        w: weight of the divergence, in units of the loss: a number of at least 0, or a callable that takes the number
            of gradient evaluations so far and returns one.
        divergence: how far q is from the prior; so far :class:`~pyrobirds.divergences.KL` alone.
        num_particles: how many draws of the guide estimate the objective.
        vectorize_particles: draw all particles in one batch. Needs a model and a guide that declare their batch
            dimensions by ``pyro.plate``.
        max_plate_nesting: how deep plates nest, particles not counted; guessed by one extra run if not given.
        **options: further keywords of :class:`pyro.infer.ELBO`.

    Attributes:
        terms: :class:`Terms` ``(loss, divergence, total)`` of the last evaluation, or None before the first.
        step: how many gradients were evaluated, which is what a callable ``w`` is called with.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro.optim import Adam
        >>> def model(y):
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> elbo = GeneralizedELBO(w=2.0)
        >>> svi = SVI(model, AutoNormal(model), Adam({"lr": 0.05}), loss=elbo)
        >>> total = svi.step(torch.tensor(1.0))
        >>> bool(elbo.terms.total == elbo.terms.loss + elbo.terms.divergence)
        True
    """

    def __init__(
        self,
        w: float | Callable[[int], float] = 1.0,
        *,
        divergence: Divergence = KL(),
        num_particles: int = 10,
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
        **options: Any,
    ) -> None:
        self.w = w if callable(w) else _checks.non_negative("w", w)
        if type(divergence) is not KL:  # whose sums over sites are built in below
            raise TypeError(f"divergence must be a pyrobirds.divergences.KL, got {divergence!r}")
        _checks.boolean("vectorize_particles", vectorize_particles)
        if max_plate_nesting != float("inf"):
            max_plate_nesting = _checks.non_negative_int("max_plate_nesting", max_plate_nesting)
        self.divergence = divergence
        num_particles = _checks.positive_int("num_particles", num_particles)
        # Pyro reserves a dimension for the particles of the loss if there are several; the divergence's need one too.
        divergence_alone = num_particles == 1 and (divergence.num_particles or 1) > 1
        self._extra_nesting = int(vectorize_particles and divergence_alone)
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting + self._extra_nesting,
            **options,
        )
        self._check_shapes = max_plate_nesting != float("inf")  # Pyro checks them itself where it guesses the nesting
        self.terms: Terms | None = None
        self.step = 0
        self._analysed_pair: tuple[Fn, Fn] | None = None
        self._analysed: dict[Any, Dependence] = {}  # by the kinds of the arguments
        self._not_analysed = ""

    def loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Estimate the objective."""
        parts = self._evaluate(self._weight(), model, guide, args, kwargs)
        return _as_float(self._record([_values(part) for part in parts]).total)

    def loss_and_grads(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Estimate the objective, and add its gradient to the ``grad`` of every parameter."""
        values = []
        for part in self._evaluate(self._weight(), model, guide, args, kwargs):
            if part.has_params and part.surrogate.requires_grad:
                part.surrogate.backward(retain_graph=self.retain_graph)
            values.append(_values(part))
        self.step += 1
        return _as_float(self._record(values).total)

    def differentiable_loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the objective by a scalar whose gradient estimates the objective's gradient."""
        parts = list(self._evaluate(self._weight(), model, guide, args, kwargs))
        self.step += torch.is_grad_enabled()
        terms = self._record([_values(part) for part in parts])
        surrogate = _total([part.surrogate for part in parts])
        if is_validation_enabled():
            warn_if_nan(surrogate, "loss")
        return terms.total + (surrogate - surrogate.detach())

    def __getstate__(self) -> dict[str, Any]:
        # Model and guide are not the ELBO's to store.
        return {**self.__dict__, "_analysed_pair": None, "_analysed": {}}

    def _weight(self) -> float:
        return _checks.non_negative(f"w at step {self.step}", self.w(self.step)) if callable(self.w) else self.w

    def _record(self, values: list[tuple[Tensor, Tensor]]) -> Terms:
        loss, divergence = (_total(list(term)) for term in zip(*values, strict=True))
        self.terms = Terms(loss, divergence, loss + divergence)
        return self.terms

    def _evaluate(
        self, w: float, model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[_Evaluation]:
        """Yield shares that add up to the objective.

        After a first evaluation, which finds out about the model, no value of a tensor is looked at unless Pyro
        validates, and nothing but the traces is written to.
        """
        if self.vectorize_particles and self.max_plate_nesting == float("inf"):
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        for used_for in self._passes(w):
            n = used_for.num_particles
            for batch in [n] if self.vectorize_particles else [1] * n:
                particles = _particles(batch, self.max_plate_nesting)
                model_trace, guide_trace = self._get_trace(particles(model), particles(guide), args, kwargs)
                if self._check_shapes and batch > 1 and is_validation_enabled():
                    traces.check_shapes(model, guide, args, kwargs)
                    self._check_shapes = False
                known = Dependence()
                if self.divergence.analytic or not traces.is_reparameterised(guide_trace):
                    known = self._dependence(model, guide, args, kwargs)
                evaluation = self._score(used_for, w, model_trace, guide_trace, known)
                if self._not_analysed:  # said only now, for scoring raises what is wrong with the model itself
                    warnings.warn(
                        "the divergence is estimated by Monte Carlo alone, because how the latents depend on each "
                        f"other could not be found out ({self._not_analysed})",
                        stacklevel=2,
                    )
                    self._not_analysed = ""
                yield evaluation

    def _passes(self, w: float) -> list[_Pass]:
        extra = self.divergence.num_particles
        if w == 0:  # leaves an infinite divergence out, too
            return [_Pass(self.num_particles, loss=True, divergence=False)]
        if extra is None:
            return [_Pass(self.num_particles, loss=True, divergence=True)]
        return [_Pass(self.num_particles, loss=True, divergence=False), _Pass(extra, loss=False, divergence=True)]

    def _guess_max_plate_nesting(self, model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._guess_max_plate_nesting(model, guide, args, kwargs)
        self.max_plate_nesting += self._extra_nesting

    def _get_trace(self, model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Trace, Trace]:
        return traces.run(model, guide, args, kwargs, max_plate_nesting=self.max_plate_nesting)

    def _dependence(self, model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dependence:
        if self._analysed_pair != (model, guide) or len(self._analysed) > 100:
            self._analysed_pair, self._analysed = (model, guide), {}
        kinds = _kinds(args, kwargs)
        if kinds not in self._analysed:
            try:
                self._analysed[kinds] = dependence.analyse(model, guide, args, kwargs)
            except Exception as error:  # whatever a user's code raises there: Monte Carlo needs to know nothing
                self._analysed[kinds] = Dependence()
                self._not_analysed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return self._analysed[kinds]

    def _score(
        self, used_for: _Pass, w: float, model_trace: Trace, guide_trace: Trace, known: Dependence
    ) -> _Evaluation:
        model_sites, guide_sites = traces.sample_sites(model_trace), traces.sample_sites(guide_trace)
        closed: dict[str, Names] = {}
        if used_for.divergence and self.divergence.analytic:
            closed = scoring.in_closed_form(model_sites, guide_sites, known)
        of_loss = {name for name, site in model_sites.items() if traces.is_loss(site)}
        model_trace.compute_log_prob(lambda name, _: used_for.loss if name in of_loss else used_for.divergence)
        guide_trace.compute_score_parts()
        if is_validation_enabled():
            for site in (*model_sites.values(), *guide_sites.values()):
                if "log_prob" in site:
                    check_site_shape(site, self.max_plate_nesting)
            check_if_enumerated(guide_trace)
        observed = [site for name, site in model_sites.items() if used_for.loss and name in of_loss]
        latent = [site for name, site in model_sites.items() if used_for.divergence and name not in of_loss]
        drawn = [*guide_sites.values()] if used_for.divergence else []

        share = 1 / used_for.num_particles
        loss = _total([site["log_prob_sum"] for site in observed]) * -share
        # The Kullback-Leibler divergence adds over sites, so that sums over particles are all it needs.
        log_q = _total([scoring.pathwise(site) for site in drawn])
        log_p = _total([site["log_prob_sum"] for site in latent])
        divergence = (log_q - log_p) * (w * share)
        surrogate = loss + divergence
        scored = [site for site in guide_sites.values() if not is_identically_zero(site["score_parts"].score_function)]
        if scored:
            costs = [Cost(site["cond_indep_stack"], -site["log_prob"], None) for site in observed]
            costs += [
                Cost(site["cond_indep_stack"], -w * site["log_prob"], closed.get(site["name"])) for site in latent
            ]
            for site in drawn:
                name = site["name"]
                depends_on = closed.get(name)
                if name not in closed and name not in model_sites and name in known.guide:
                    depends_on = known.guide[name] | {name}  # an auxiliary site
                costs.append(Cost(site["cond_indep_stack"], w * site["log_prob"], depends_on))
            surrogate = surrogate + share * scoring.score_function_term(costs, scored)
        return _Evaluation(
            loss=loss,
            divergence=divergence,
            surrogate=surrogate,
            has_params=traces.has_params(guide_trace) or traces.has_params(model_trace),
        )


def _particles(batch: int, max_plate_nesting: float) -> Callable[[Fn], Fn]:
    """Wraps a function so that it draws a whole batch of particles at once."""
    if batch == 1:
        return lambda fn: fn
    return pyro.plate("num_particles_vectorized", batch, dim=-int(max_plate_nesting))


def _kinds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What of a model's arguments may change its structure: flags, numbers of things, names; else their types."""
    values = (*args, *kwargs.values())
    return (*kwargs, *(value if isinstance(value, bool | int | str) else type(value) for value in values))


def _values(evaluation: _Evaluation) -> tuple[Tensor, Tensor]:
    return evaluation.loss.detach(), evaluation.divergence.detach()


def _as_float(total: Tensor) -> float:
    """The one place where a step waits for its result."""
    value = total.item()
    warn_if_nan(value, "loss")  # type: ignore[arg-type]
    return value


def _total(terms: list[Tensor]) -> Tensor:
    return sum(terms[1:], terms[0]) if terms else torch.zeros(())
