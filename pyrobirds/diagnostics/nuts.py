"""A guide against NUTS, which draws from the generalised posterior itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pandas as pd
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from pyrobirds import _checks, arviz_groups, traces
from pyrobirds._rng import forked_rng
from pyrobirds.fit_result import FitResult
from pyrobirds.inference_data import to_inference_data
from pyrobirds.inference_data.origins import of_guides, parameters_of, weight
from pyrobirds.sampling import Model
from pyrobirds.simulators.repeats import repeated
from pyrobirds.tempering import tempered

Fn = Callable[..., Any]

_NUM_PROBES = 100  # draws of the guide at which the frozen runs are looked at before NUTS
# Standard deviations by which frozen runs move a mean: so many leave nothing to compare, so few a comparison.
_LARGE, _SMALL = 0.5, 0.2


def compare_with_nuts(
    model: Fn,
    guide: Fn,
    *args: Any,
    w: float | None = None,
    fit: FitResult | None = None,
    num_samples: int = 1000,
    warmup_steps: int = 300,
    num_chains: int = 1,
    num_repeats: int = 100,
    seed: int = 0,
    parallel: bool = True,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    r"""Compare means and scales of a guide with those of the posterior that it approximates, drawn by NUTS.

    Under the Kullback-Leibler divergence the optimum over all guides is :math:`q^*(\theta) \propto \pi(\theta)
    \exp(-E[\ell(\theta, y)] / w)`. NUTS draws from it with the expectation replaced by the mean over R =
    ``num_repeats`` frozen runs of each simulator, the posterior of ``tempered(repeated(model, R, seed), w)``. It
    evaluates the model several times a draw, with R runs each, one after another.

    How far the frozen runs are off the expectation, :math:`\epsilon(\theta) = \frac{1}{R} \sum_r \epsilon_r(\theta)`
    of sd :math:`\mathrm{sd}(\ell | \theta) / \sqrt{R}`, moves the posterior, to first order its mean by
    :math:`\mathrm{Cov}(\theta, \epsilon(\theta)) / w`: at most by :math:`\mathrm{sd}(\ell) / (w \sqrt{R})` of its own
    standard deviations. How much it does, is estimated from how the covariance varies over the runs (the Bayesian
    infinitesimal jackknife: https://rgiordan.github.io/bayes/2020/08/09/bayes_ij.html), part of each standard error;
    ``frozen_error`` is that part for the mean. If it is not small, the comparison says little: take more repeats.

    Straight-through gradients are not those of the frozen loss, which may even have steps. NUTS draws from the right
    distribution nevertheless, because it weighs its states by the density itself: a wrong gradient costs acceptance.

    NUTS itself: Hoffman and Gelman 2014, https://jmlr.org/papers/v15/hoffman14a.html.

    Args:
        model: the Pyro model that the guide was fitted to, not repeated for it.
        guide: the guide, a single one.
        *args: what the model takes, its data included.
        w: the weight of the divergence in the fit; else that of ``fit``, else that of ``tempered(model, w)``, else 1.
        fit: what :func:`pyrobirds.fit` returned. Parameters are those of the state that it is in (``fit.state``),
            whatever became of them since.
        num_samples: how many draws of the guide, and of each chain of NUTS.
        warmup_steps: steps of NUTS before its draws, in which it adapts.
        num_chains: how many chains, one after another. Each starts at a draw of the guide.
        num_repeats: R, at least 2. It matters for simulators only.
        seed: of all draws and of the frozen runs. Generators are left as they were.
        parallel: draw from the guide in one batch, as :func:`~pyrobirds.to_inference_data` does.
        progress: whether to show the bar of Pyro's MCMC.
        model_kwargs: what the model takes by keyword.

    Returns:
        A row for each element of each latent: ``guide_mean``, ``guide_sd``, ``nuts_mean``, ``nuts_sd``, in the units of
        the latent; ``mean_difference``, guide less NUTS, in standard deviations of NUTS's draws, and ``mean_z`` in its
        standard errors; ``sd_ratio``, guide by NUTS, and ``sd_z``, its logarithm in standard errors; ``nuts_ess``, the
        effective sample size; ``r_hat``, between halves of chains; ``frozen_error`` in standard deviations. With a
        guide that is right the z are standard normal, but for the errors of their own standard errors: beyond 4 a
        difference is one of the guide. With a few hundred draws of a skewed posterior, ``sd_z`` leans upwards, by up to
        a half. A guide that is a point mass has an ``sd_z`` of minus infinity.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; the model is tempered and there is a ``w`` besides; the
            fit has another divergence, under which the optimum is another one; a latent is discrete; the loss does not
            depend differentiably on the latents; the density is random or, at a draw of the guide, not finite; the
            frozen runs move the mean by more than half of the posterior's standard deviation, going by draws of the
            guide with importance weights, in which case the error says how many are needed.

    Warns:
        RuntimeWarning: trajectories of NUTS diverged, or frozen runs failed and were left out.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> guide = AutoNormal(model, init_scale=0.5 ** 0.5)
        >>> y = torch.tensor(0.0)
        >>> table = compare_with_nuts(model, guide, y, num_samples=200, warmup_steps=50, progress=False)
        >>> bool(table.loc["theta", "mean_z"] < 4)
        True
    """
    num_samples = _checks.positive_int("num_samples", num_samples)
    warmup_steps = _checks.non_negative_int("warmup_steps", warmup_steps)
    num_chains = _checks.positive_int("num_chains", num_chains)
    num_repeats = _checks.positive_int("num_repeats", num_repeats)
    if num_samples < 4 or num_repeats < 2:
        raise ValueError(f"num_samples must be at least 4 and num_repeats 2, got {num_samples} and {num_repeats}")
    if not callable(guide) or isinstance(fit, list | tuple):
        raise TypeError(
            f"guide must be one Pyro guide and fit its result, got a {type(guide).__name__} and a "
            f"{type(fit).__name__}: compare several one after another"
        )
    origin = of_guides(model, guide, args, model_kwargs, w, fit)
    if fit is not None and not origin.has_weights:
        raise ValueError(
            f"the fit was made with the divergence {fit.divergence}, and NUTS draws from the optimum under the "
            "Kullback-Leibler divergence: fit the guide with divergences.KL() to compare it"
        )
    kwargs, seed = origin.kwargs, _checks.seed("seed", seed)
    with (
        forked_rng(seed),
        pyro.validation_enabled(False),  # else a run that fails is warned of at each evaluation
        parameters_of(fit, model, guide, args, kwargs),
    ):
        exported = to_inference_data(
            model,
            guide,
            *args,
            groups=["posterior"],
            num_samples=num_samples,
            parallel=parallel,
            seed=seed,
            progress=False,
            model_kwargs=kwargs,
        )
        probes = [_draw(model, guide, args, kwargs) for _ in range(max(num_chains, _NUM_PROBES))]
        starts = [probe.values for probe in probes[:num_chains]]
        of_model = Model(model, args, kwargs, starts[0], 0, parallel).tempered
        temper = partial(tempered, w=weight(w, fit, of_model) / of_model)
        frozen = partial(temper(repeated(model, num_repeats, seed)), *args, **kwargs)
        for start in starts:
            _check_start(frozen, start)
        nesting = traces.plate_nesting(model, guide, args, kwargs)
        # Frozen noise hangs on the number of runs in a batch alone: these are, one by one, those that are averaged.
        each_run = partial(traces.particles(num_repeats, nesting)(temper(repeated(model, 1, seed))), *args, **kwargs)
        _check_repeats(each_run, num_repeats, _as_of_posterior(frozen, probes))
        chains = []
        for start in starts:
            kernel = NUTS(frozen, init_strategy=init_to_value(values=start), max_plate_nesting=nesting)
            chains.append(MCMC(kernel, num_samples, warmup_steps, disable_progbar=not progress))
            chains[-1].run()
        _warn_of_divergences(chains)
        found = [mcmc.get_samples() for mcmc in chains]
        samples = {name: torch.stack([one[name] for one in found]) for name in starts[0]}
        deviations = _deviations(each_run, {name: draws.flatten(0, 1) for name, draws in samples.items()})
        _warn_of_failures(deviations)
    posterior = arviz_groups.group(exported, "posterior")
    return pd.concat([_rows(posterior[name], samples[name], deviations) for name in samples])


class _Probe(NamedTuple):
    """A draw of the guide: what the model's latents are, and the log-density that they were drawn with."""

    values: dict[str, Tensor]
    log_q: Tensor


def _draw(model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Probe:
    with torch.no_grad():
        model_trace, guide_trace = traces.run(model, guide, args, kwargs)
        latents = {name: site for name, site in traces.sample_sites(model_trace).items() if not site["is_observed"]}
        for name, site in latents.items():
            if site["fn"].support.is_discrete:
                raise ValueError(
                    f"latent site {name!r} is discrete ({type(site['fn']).__name__}), and NUTS needs the gradient by "
                    "every latent: compare a model without discrete latents, for example with them summed out"
                )
        of_prior = model_trace.log_prob_sum(lambda name, _: name in latents and name not in guide_trace)
        log_q = torch.as_tensor(guide_trace.log_prob_sum() + of_prior)
    return _Probe({name: site["value"].detach() for name, site in latents.items()}, log_q)


def _as_of_posterior(model: Fn, probes: list[_Probe]) -> dict[str, Tensor]:
    """Draws of the guide, resampled by their importance weights, and stacked.

    Where the posterior has few of them, they come out closer together than its own draws.
    """
    log_weights = []
    with torch.no_grad():
        for probe in probes:
            trace = poutine.trace(poutine.condition(model, probe.values)).get_trace()
            log_weights.append(torch.as_tensor(trace.log_prob_sum()).double() - probe.log_q)
    lowest = torch.finfo(torch.double).min
    weights = torch.stack(log_weights).nan_to_num(nan=lowest, posinf=lowest).softmax(0)
    chosen = [probes[i].values for i in weights.multinomial(len(probes), replacement=True).tolist()]
    return {name: torch.stack([values[name] for values in chosen]) for name in chosen[0]}


def _check_start(model: Fn, start: Mapping[str, Tensor]) -> None:
    """Raise unless NUTS can start there: the density is finite and the same twice, and the loss has a gradient."""
    at = {name: value.clone().requires_grad_() for name, value in start.items()}
    densities, loss = [], torch.zeros(())
    for _ in range(2):
        trace = poutine.trace(poutine.condition(model, at)).get_trace()
        densities.append(torch.as_tensor(trace.log_prob_sum()).item())
        loss = torch.as_tensor(trace.log_prob_sum(lambda name, _: name not in at))
    if not math.isfinite(densities[0]):
        raise ValueError(
            f"the density is {densities[0]} at a draw of the guide, where NUTS would start: the guide has draws that "
            "the model excludes, or at which all runs of a simulator fail"
        )
    if densities[0] != densities[1]:
        raise ValueError(
            f"the density is random, {densities[0]:.7g} and {densities[1]:.7g} at one draw, and NUTS needs a fixed "
            "one: take plates that are not subsampled, and let a Simulator do what the model draws by itself"
        )
    slopes = torch.autograd.grad(loss, [*at.values()], allow_unused=True) if loss.requires_grad else [None]
    if all(slope is None for slope in slopes):
        raise ValueError(
            f"the loss does not depend differentiably on the latents {[*at]}, and NUTS needs its gradient: compute it "
            "by torch operations that keep the graph (no .item(), .detach() or NumPy)"
        )


def _check_repeats(each_run: Fn, num_repeats: int, draws: Mapping[str, Tensor]) -> None:
    """Raise if the frozen runs move the posterior on the scale of its width, going by draws like its own.

    NUTS would take very long, for the density has steps on the scale of the posterior, and the result say nothing.
    """
    deviations = _deviations(each_run, draws)
    elements = [x.double().reshape(len(x), -1) for x in draws.values()]
    errors = [_frozen_errors(x, deviations)[0] / x.std(0) for x in elements]
    error = float(torch.cat(errors).nan_to_num().max())
    if error > _LARGE:
        enough = math.ceil(num_repeats * (error / _SMALL) ** 2)
        raise ValueError(
            f"with num_repeats={num_repeats} the frozen runs move the posterior mean by about {error:.2g} of its "
            f"standard deviations, so that NUTS has nothing to say about the guide: about {enough:,} would move it by "
            f"{_SMALL}"
        )


def _warn_of_divergences(chains: list[MCMC]) -> None:
    num_diverged = sum(len(mcmc.diagnostics()["divergences"]["chain 0"]) for mcmc in chains)
    if num_diverged:
        warnings.warn(
            f"{num_diverged} of {len(chains) * chains[0].num_samples} trajectories of NUTS diverged, so that it may "
            "have missed a part of the posterior: reparameterise the model, or take more warmup_steps",
            RuntimeWarning,
            stacklevel=3,
        )


def _deviations(each_run: Fn, draws: Mapping[str, Tensor]) -> Tensor | None:
    """How far the log-densities of the frozen runs are off their mean.

    Returns:
        By draw and run, ``(draws, R)``, NaN for runs that failed; None if the model has no simulator.
    """
    rows = []
    with torch.no_grad():
        for i in range(len(next(iter(draws.values())))):
            at = {name: x[i] for name, x in draws.items()}
            trace = poutine.trace(poutine.condition(each_run, at)).get_trace()
            trace.compute_log_prob(lambda name, site: traces.can_fail(site))
            scored = [site["log_prob"] for site in traces.sample_sites(trace).values() if traces.can_fail(site)]
            if not scored:
                return None
            rows.append(torch.stack([log_prob.reshape(len(log_prob), -1).sum(1) for log_prob in scored]).sum(0))
    log_probs = torch.stack(rows).double()
    return log_probs - log_probs.nanmean(1, keepdim=True)


def _warn_of_failures(deviations: Tensor | None) -> None:
    num_failed = 0 if deviations is None else int(deviations.isnan().sum())
    if deviations is not None and num_failed:
        warnings.warn(
            f"{num_failed} of {deviations.numel()} frozen runs failed at the draws of NUTS. They were left out: its "
            "posterior is that of the mean loss of the runs that worked",
            RuntimeWarning,
            stacklevel=3,
        )


class _Moments(NamedTuple):
    """Mean and sd of draws by element, and the standard errors of the mean and of the sd's logarithm."""

    mean: Tensor
    sd: Tensor
    mean_error: Tensor
    log_sd_error: Tensor


def _moments(x: Tensor, ess: Tensor | float, ess_of_squares: Tensor | float) -> _Moments:
    """Of draws ``(draws, elements)``, of which so many are effective."""
    mean, variance = x.mean(0), x.var(0)
    squares = (x - mean).square()
    # By the delta method the relative error of an sd is half of its square's.
    log_sd_error = (squares.var(0) / ess_of_squares).sqrt() / (2 * variance)
    log_sd_error = torch.where(variance > 0, log_sd_error, 0)  # a point mass is known to be one
    return _Moments(mean, variance.sqrt(), (variance / ess).sqrt(), log_sd_error)


def _frozen_errors(x: Tensor, deviations: Tensor | None) -> tuple[Tensor, Tensor]:
    """The standard errors that the frozen runs leave in the mean and in the logarithm of the sd, by element."""
    if deviations is None:
        return torch.zeros_like(x[0]), torch.zeros_like(x[0])
    num_draws, num_runs = deviations.shape
    per_run = deviations.nan_to_num(0.0)
    per_run = (per_run - per_run.mean(0)) / (num_draws * math.sqrt(num_runs * (num_runs - 1)))
    centred = x - x.mean(0)
    by_mean = (centred.T @ per_run).norm(dim=1)
    by_variance = (centred.square().T @ per_run).norm(dim=1)
    return by_mean, by_variance / (2 * x.var(0))


def _rows(guide_draws: xr.DataArray, nuts_draws: Tensor, deviations: Tensor | None) -> pd.DataFrame:
    """The rows of one latent, whose draws of NUTS are ``(chains, draws, *shape)``."""
    own = torch.as_tensor(guide_draws.values).double()
    own = own.reshape(own.shape[0] * own.shape[1], -1)
    chains = nuts_draws.double().reshape(*nuts_draws.shape[:2], -1)
    pooled = chains.flatten(0, 1)
    ess = effective_sample_size(chains)
    guide = _moments(own, len(own), len(own))
    nuts = _moments(pooled, ess, effective_sample_size((chains - pooled.mean(0)).square()))
    frozen_mean_error, frozen_log_sd_error = _frozen_errors(pooled, deviations)
    difference = guide.mean - nuts.mean
    mean_errors = torch.stack([guide.mean_error, nuts.mean_error, frozen_mean_error])
    log_sd_errors = torch.stack([guide.log_sd_error, nuts.log_sd_error, frozen_log_sd_error])
    columns = {
        "guide_mean": guide.mean,
        "guide_sd": guide.sd,
        "nuts_mean": nuts.mean,
        "nuts_sd": nuts.sd,
        "mean_difference": difference / nuts.sd,
        "mean_z": difference / mean_errors.norm(dim=0),
        "sd_ratio": guide.sd / nuts.sd,
        "sd_z": (guide.sd / nuts.sd).log() / log_sd_errors.norm(dim=0),
        "nuts_ess": ess,
        "r_hat": split_gelman_rubin(chains),
        "frozen_error": frozen_mean_error / nuts.sd,
    }
    return pd.DataFrame({name: column.numpy() for name, column in columns.items()}, index=_labels(guide_draws))


def _labels(draws: xr.DataArray) -> list[str]:
    """A name for each element, as ArviZ's summary has them: ``theta[0, north]``."""
    places = product(*(draws[dim].values for dim in draws.dims[2:]))
    return [f"{draws.name}[{', '.join(map(str, place))}]" if place else str(draws.name) for place in places]
