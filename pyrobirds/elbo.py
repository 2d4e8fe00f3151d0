"""The objective of generalised variational inference as a Pyro loss."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled, zero_grads
from pyro.poutine import Trace
from pyro.util import check_if_enumerated, check_site_shape, warn_if_nan
from torch import Tensor

from pyrobirds import _checks, dependence, failures, scoring, traces
from pyrobirds.dependence import Dependence, Names
from pyrobirds.divergences import KL, Divergence
from pyrobirds.failures import Failed, OnFailure
from pyrobirds.scoring import Cost, Score

Fn = Callable[..., Any]


class Terms(NamedTuple):
    """The terms of one evaluation of the objective: scalars without graph."""

    loss: Tensor
    divergence: Tensor  # already times w
    total: Tensor
    num_failed: Tensor  # how many runs of simulators failed, each element of a plate counted


class _Run(NamedTuple):
    """The sites of a guide's draws and of the model run with them, scored but for the loss."""

    model_sites: dict[str, Any]
    guide_sites: dict[str, Any]
    observed: dict[str, Any]  # the sites of the loss
    closed: dict[str, Names]  # the sites with an expected log-density, and the latents that it depends on
    scores: list[Score]
    scores_at_fixed_draws: list[Score]  # for the loss of simulators if failures are penalised
    known: Dependence
    params: list[Tensor]


class _Evaluation(NamedTuple):
    """The share of one run in the objective, already divided by the number of particles."""

    loss: Tensor
    divergence: Tensor
    surrogate: Tensor  # its gradient is the estimate of the objective's
    params: list[Tensor]


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
        on_failure: what a failed run of a simulator (NaN in its log-probability) counts as, each element of a plate by
            itself. ``"drop"``: the loss is averaged over the runs that did not fail. That pulls q neither towards nor
            away from where runs fail, and minimises no stated objective. ``"penalize"``: a failed run has the loss
            ``penalty``, and what is minimised is the objective with this loss. The probability of failure has no
            pathwise gradient, so that the loss of simulators gets the score function, with the mean of the other
            particles as a baseline. ``"raise"``: an error.
        penalty: the loss of a failed run, in units of the loss; for ``"penalize"``.
        max_failed: the share of a site's runs that may fail; above it ten times in a row is an error.
        vectorize_particles: draw all particles in one batch. Needs a model and a guide that declare their batch
            dimensions by ``pyro.plate``.
        max_plate_nesting: how deep plates nest, particles not counted; guessed by one extra run if not given.
        **options: further keywords of :class:`pyro.infer.ELBO`.

    Attributes:
        terms: :class:`Terms` ``(loss, divergence, total, num_failed)`` of the last evaluation, or None before the
            first.
        step: how many gradients were evaluated, which is what a callable ``w`` is called with.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        RuntimeError: at an evaluation, if runs fail: one with ``"raise"``, all of a site with ``"drop"``, or more than
            ``max_failed`` ten times in a row.

    Example:
        >>> import pyro, pyro.distributions as dist
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
        on_failure: OnFailure = "drop",
        penalty: float | None = None,
        max_failed: float = 0.9,
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
        if on_failure not in failures.POLICIES:
            raise ValueError(f"on_failure must be one of {failures.POLICIES}, got {on_failure!r}")
        if (on_failure == "penalize") != (penalty is not None):
            raise ValueError(
                f"penalty, the loss of a failed run, goes with on_failure='penalize', got penalty={penalty!r} and "
                f"on_failure={on_failure!r}"
            )
        self.on_failure: OnFailure = on_failure
        self.penalty = None if penalty is None else _checks.finite("penalty", penalty)
        self.max_failed = _checks.share("max_failed", max_failed)
        self.terms: Terms | None = None
        self.step = 0
        self._with_loss = True
        self._rerun_checked = False
        self._watch = failures.Watch(on_failure, self.max_failed)
        self._analysed_pair: tuple[Fn, Fn] | None = None
        self._analysed: dict[Any, Dependence] = {}  # by the kinds of the arguments
        self._not_analysed = ""

    def loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Estimate the objective."""
        evaluations, failed = self._evaluate(model, guide, args, kwargs)
        return self._look(self._record(evaluations, failed), failed)

    def loss_and_grads(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Estimate the objective, and add its gradient to the ``grad`` of every parameter."""
        evaluations, failed = self._evaluate(model, guide, args, kwargs)
        for evaluation in evaluations:
            if evaluation.params and evaluation.surrogate.requires_grad:
                evaluation.surrogate.backward(retain_graph=self.retain_graph)
        self.step += 1
        failed += failures.in_backward(failed)
        try:
            return self._look(self._record(evaluations, failed), failed)
        except RuntimeError:
            zero_grads([parameter for evaluation in evaluations for parameter in evaluation.params])
            raise

    def differentiable_loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the objective by a scalar whose gradient estimates the objective's gradient.

        With Pyro's validation off it waits for nothing, so that nothing is said of failed runs but their number in
        ``terms.num_failed``; where all runs of a site failed and there is no penalty, the value is NaN and the loss has
        no gradient. Runs whose gradient is not finite are not known of yet, and not counted.
        """
        evaluations, failed = self._evaluate(model, guide, args, kwargs)
        self.step += torch.is_grad_enabled()
        terms = self._record(evaluations, failed)
        surrogate = _total([evaluation.surrogate for evaluation in evaluations])
        if is_validation_enabled():
            if failed:
                self._watch.look(failed, any_failed=terms.num_failed.item() > 0)
            warn_if_nan(surrogate, "loss")
        return terms.total + (surrogate - surrogate.detach())

    def divergence_only(self) -> GeneralizedELBO:
        """A loss that is the divergence alone, with weight 1, and runs no simulation: to start a guide at the prior."""
        alone = copy.copy(self)
        alone.w, alone._with_loss = 1.0, False
        alone.step, alone.terms = 0, None
        return alone

    def __getstate__(self) -> dict[str, Any]:
        # Model and guide are not the ELBO's to store.
        return {**self.__dict__, "_analysed_pair": None, "_analysed": {}}

    def weight(self, step: int) -> float:
        """The weight of the divergence at a step."""
        return _checks.non_negative(f"w at step {step}", self.w(step)) if callable(self.w) else self.w

    def _record(self, evaluations: list[_Evaluation], failed: list[Failed]) -> Terms:
        loss = _total([evaluation.loss.detach() for evaluation in evaluations])
        divergence = _total([evaluation.divergence.detach() for evaluation in evaluations])
        counts = [one.runs.sum() for one in failed]
        for one, count in zip(failed, counts, strict=True):
            if self.penalty is None and not one.in_backward:
                nothing_to_average = (count == one.num_asked()) & (count > 0)
                loss = loss.masked_fill(nothing_to_average, math.nan)
        num_failed = _total(counts) if counts else torch.zeros((), dtype=torch.long)
        self.terms = Terms(loss, divergence, loss + divergence, num_failed)
        return self.terms

    def _look(self, terms: Terms, failed: list[Failed]) -> float:
        """The one place where a step waits for its result."""
        total = terms.total.item()
        if failed:
            self._watch.look(failed, any_failed=terms.num_failed.item() > 0)
        warn_if_nan(total, "loss")  # type: ignore[arg-type]
        return total

    def _evaluate(
        self, model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[_Evaluation], list[Failed]]:
        """Shares that add up to the objective, and which runs failed.

        After a first evaluation, which finds out about the model, no value of a tensor is looked at unless Pyro
        validates, and nothing but the traces is written to.
        """
        w = self.weight(self.step)
        if self.vectorize_particles and self.max_plate_nesting == float("inf"):
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        evaluations, failed = [], []
        for used_for in self._passes(w):
            n = used_for.num_particles
            batches = [n] if self.vectorize_particles else [1] * n
            runs = [self._run(used_for, batch, model, guide, args, kwargs) for batch in batches]
            failed += self._fill_failures(runs)
            evaluations += [self._combine(used_for, w, run) for run in runs]
        if self._not_analysed:  # said only now, for scoring raises what is wrong with the model itself
            warnings.warn(
                "the divergence is estimated by Monte Carlo alone, because how the latents depend on each other could "
                f"not be found out ({self._not_analysed})",
                stacklevel=3,
            )
            self._not_analysed = ""
        return evaluations, failed

    def _passes(self, w: float) -> list[_Pass]:
        extra = self.divergence.num_particles
        if not self._with_loss:
            return [_Pass(extra or self.num_particles, loss=False, divergence=True)]
        if w == 0:  # leaves an infinite divergence out, too
            return [_Pass(self.num_particles, loss=True, divergence=False)]
        if extra is None:
            return [_Pass(self.num_particles, loss=True, divergence=True)]
        return [_Pass(self.num_particles, loss=True, divergence=False), _Pass(extra, loss=False, divergence=True)]

    def _guess_max_plate_nesting(self, model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        particles = int(self.vectorize_particles and self.num_particles > 1)
        self.max_plate_nesting = traces.plate_nesting(model, guide, args, kwargs) + particles + self._extra_nesting

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

    def _run(
        self, used_for: _Pass, batch: int, model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Run:
        """Draw and score, but for the simulators' failures, which are for all particles of a pass together."""
        pair, rerun, known = (model, guide), None, Dependence()
        if batch > 1:
            particles = traces.particles(batch, int(self.max_plate_nesting) - 1)
            pair = (particles(model), particles(guide))
        if self.divergence.analytic:  # before drawing, for transforms may remember their last draw alone
            known = self._dependence(model, guide, args, kwargs)
        if self.on_failure == "penalize" and used_for.loss and torch.is_grad_enabled():
            (model_trace, guide_trace), rerun = traces.run_and_rerun(
                *pair, args, kwargs, max_plate_nesting=self.max_plate_nesting
            )
        else:
            model_trace, guide_trace = self._get_trace(*pair, args, kwargs)
        if self._check_shapes and batch > 1 and is_validation_enabled():
            traces.check_shapes(model, guide, args, kwargs)
            self._check_shapes = False
        if not (self.divergence.analytic or traces.is_reparameterised(guide_trace)):
            known = self._dependence(model, guide, args, kwargs)
        model_sites, guide_sites = traces.sample_sites(model_trace), traces.sample_sites(guide_trace)
        closed: dict[str, Names] = {}
        if used_for.divergence and self.divergence.analytic:
            closed = scoring.in_closed_form(model_sites, guide_sites, known)
        of_loss = {name for name, site in model_sites.items() if traces.is_loss(site)}
        observed = {name: model_sites[name] for name in model_sites if name in of_loss and used_for.loss}
        if rerun is not None:
            simulated = traces.sample_sites(rerun[0])
            observed.update({name: simulated[name] for name in observed if traces.can_fail(simulated[name])})
        can_fail = {name for name, site in observed.items() if traces.can_fail(site)}
        model_trace.compute_log_prob(
            lambda name, _: name not in can_fail and (used_for.loss if name in of_loss else used_for.divergence)
        )
        for name in can_fail:
            failures.score(model_trace if rerun is None else rerun[0], observed[name])
        guide_trace.compute_score_parts()
        if is_validation_enabled():
            check_if_enumerated(guide_trace)
        fixed = [] if rerun is None else scoring.scores_at_fixed_draws(rerun[1])
        if fixed and not self._rerun_checked:
            scoring.check_same_density(fixed, guide_sites)
            self._rerun_checked = True
        params = traces.params(guide_trace) + traces.params(model_trace)
        return _Run(model_sites, guide_sites, observed, closed, scoring.scores(guide_sites), fixed, known, params)

    def _fill_failures(self, runs: list[_Run]) -> list[Failed]:
        found = []
        num_plates = self.max_plate_nesting - 1 if self.vectorize_particles and self.num_particles > 1 else math.inf
        names = {name: None for run in runs for name, site in run.observed.items() if traces.can_fail(site)}
        for name in names:
            having = [run for run in runs if name in run.observed]
            sites = [run.observed[name] for run in having]
            as_cost = any(run.scores or run.scores_at_fixed_draws for run in having)
            failed, asked = failures.fill(sites, self.penalty, num_plates=num_plates, as_cost=as_cost)
            found.append(Failed(name, failed, asked, sites, [run.model_sites for run in having], num_plates))
        return found

    def _combine(self, used_for: _Pass, w: float, run: _Run) -> _Evaluation:
        observed = run.observed
        latent = [site for site in run.model_sites.values() if used_for.divergence and not traces.is_loss(site)]
        drawn = [*run.guide_sites.values()] if used_for.divergence else []
        if is_validation_enabled():
            for site in (*{**run.model_sites, **observed}.values(), *run.guide_sites.values()):
                if "log_prob" in site:
                    check_site_shape(site, self.max_plate_nesting)

        share = 1 / used_for.num_particles
        loss = _total([site["log_prob_sum"] for site in observed.values()]) * -share
        # The Kullback-Leibler divergence adds over sites, so that sums over particles are all it needs.
        log_q = _total([scoring.pathwise(site) for site in drawn])
        log_p = _total([site["log_prob_sum"] for site in latent])
        divergence = (log_q - log_p) * (w * share)
        surrogate = loss + divergence
        penalised = {name for name in observed if run.scores_at_fixed_draws and traces.can_fail(observed[name])}
        if run.scores:
            costs = [
                Cost(site["cond_indep_stack"], _cost(site), None)
                for name, site in observed.items()
                if name not in penalised
            ]
            costs += [
                Cost(site["cond_indep_stack"], -w * site["log_prob"], run.closed.get(site["name"])) for site in latent
            ]
            for site in drawn:
                name = site["name"]
                depends_on = run.closed.get(name)
                if name not in run.closed and name not in run.model_sites and name in run.known.guide:
                    depends_on = run.known.guide[name] | {name}  # an auxiliary site
                costs.append(Cost(site["cond_indep_stack"], w * site["log_prob"], depends_on))
            surrogate = surrogate + share * scoring.score_function_term(costs, run.scores)
        if penalised:
            costs = [
                Cost(observed[name]["cond_indep_stack"], observed[name]["cost"] - observed[name]["baseline"], None)
                for name in penalised
            ]
            surrogate = surrogate + share * scoring.score_function_term(costs, run.scores_at_fixed_draws)
        return _Evaluation(loss=loss, divergence=divergence, surrogate=surrogate, params=run.params)


def _cost(site: Any) -> Tensor:
    return site["cost"] if "cost" in site else -site["log_prob"]


def _kinds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What of a model's arguments may change its structure: flags, numbers of things, names; else their types."""
    values = (*args, *kwargs.values())
    return (*kwargs, *(value if isinstance(value, bool | int | str) else type(value) for value in values))


def _total(terms: list[Tensor]) -> Tensor:
    return sum(terms[1:], terms[0]) if terms else torch.zeros(())
