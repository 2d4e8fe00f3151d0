"""Models and guides run at many draws, in batches, and what they make of each draw."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyrobirds import failures, traces
from pyrobirds._checks import shape_text
from pyrobirds._rng import forked_rng

if TYPE_CHECKING:
    from pyro.poutine.runtime import Message

Fn = Callable[..., Any]
Values = Mapping[str, Tensor]  # by site, (number of draws, *shape in a single run)


class _Unobserved(Messenger):
    """Draws observed sites, but for factors and losses without an output; runs of simulators that raise are NaN."""

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] and not (_is_delta(msg) or site_is_subsample(msg)) and _can_be_drawn(msg):
            msg["is_observed"], msg["done"], msg["value"] = False, False, None
            if traces.can_fail(msg):
                traces.innermost(msg["fn"]).run.draws_may_fail = True


class _At(Messenger):
    """Gives latents their values; unlike Pyro's replay it leaves what the model says of a site in place."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True  # type: ignore[index]


@dataclass(frozen=True)
class Site:
    """A site of a model, as a single run shows it.

    Attributes:
        kind: "factor" is an observed site without a value, such as that of ``pyro.factor``.
        shape: of its value, plates first, then the event.
        num_plate_dims: how many of these dimensions are in front of the event.
        plates: the names of the plates along these, None where there is no plate.
        event_dims: the names of the event's dimensions, if the model says them by ``infer={"event_dims": [...]}``.
        fn: its distribution.
        value: what it had in that run: the data of an observed site.
        observed: where its mask says that there are data, of the shape of the value's plates; None: everywhere.
        tempered: the ``w`` by which ``tempered`` divided its log-probability, else 1.
    """

    name: str
    kind: Literal["latent", "deterministic", "observed", "factor"]
    shape: torch.Size
    num_plate_dims: int
    plates: tuple[str | None, ...]
    event_dims: tuple[str, ...] | None
    fn: Any
    value: Tensor = field(repr=False)
    observed: Tensor | None = field(repr=False)
    tempered: float

    @property
    def batch_shape(self) -> torch.Size:
        """Of its log-probability."""
        return self.shape[: self.num_plate_dims]

    @property
    def data(self) -> Tensor:
        """The value of an observed site, NaN where it is masked."""
        value = self.value.expand(self.shape)
        if self.observed is None or bool(self.observed.all()):
            return value
        event = (1,) * (len(self.shape) - self.num_plate_dims)
        observed = self.observed.expand(self.batch_shape).reshape(self.batch_shape + event)
        return torch.where(observed, value.to(torch.promote_types(value.dtype, torch.get_default_dtype())), torch.nan)

    @property
    def is_discrete(self) -> bool:
        """Whether it is a latent or data of whole numbers."""
        return self.kind in ("latent", "observed") and not self.can_fail and self.fn.support.is_discrete

    @property
    def is_delta(self) -> bool:
        """Whether it is a point mass in the model."""
        return _is_delta({"fn": self.fn})

    @property
    def can_fail(self) -> bool:
        """Whether it is a simulator's: its loss is noisy."""
        return traces.can_fail({"fn": self.fn})

    @property
    def is_frozen(self) -> bool:
        """Whether it is a simulator's with noise that stays the same, for each place in a batch."""
        return getattr(traces.innermost(self.fn), "is_frozen", False)

    @property
    def can_be_drawn(self) -> bool:
        return self.kind != "factor" and _can_be_drawn({"fn": self.fn})


def _is_delta(site: Any) -> bool:
    """Whether it has but one value: observed sites of this kind are deterministic."""
    return type(traces.innermost(site["fn"])).__name__ == "Delta"


def _can_be_drawn(site: Any) -> bool:
    fn = traces.innermost(site["fn"])
    return getattr(fn, "can_be_drawn", type(fn).__name__ != "Unit")


def _site(name: str, site: Any) -> Site:
    fn, value = site["fn"], torch.as_tensor(site["value"])
    if not site["is_observed"]:
        kind = "latent"
    elif _is_delta(site):
        kind = "deterministic"
    else:
        kind = "factor" if type(traces.innermost(fn)).__name__ == "Unit" else "observed"
    frames = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    for frame in frames.values():
        if frame.full_size is not None and frame.size != frame.full_size:
            raise ValueError(
                f"site {name!r} is in the plate {frame.name!r}, which is subsampled: {frame.size} of {frame.full_size} "
                "elements. Draws and data belong together only if all elements take part: pass arguments, or a model "
                "and guide, with which nothing is subsampled"
            )
    n_event = min(fn.event_dim, value.dim())
    plain = kind == "deterministic" and n_event == value.dim()  # as pyro.deterministic is if it is not told otherwise
    n_batch = _num_plate_dims(value.shape, frames) if plain else value.dim() - n_event
    event_shape = value.shape[n_batch:]
    batch_shape = value.shape[:n_batch]
    if kind != "deterministic":
        batch_shape = torch.broadcast_shapes(fn.batch_shape, batch_shape)
    n_batch = len(batch_shape)
    plates = tuple(frames[axis - n_batch].name if axis - n_batch in frames else None for axis in range(n_batch))
    infer = site["infer"] or {}
    event_dims = infer.get("event_dims")
    if event_dims is not None and (isinstance(event_dims, str) or len(event_dims) != len(event_shape)):
        raise ValueError(
            f"infer={{'event_dims': {event_dims!r}}} of site {name!r} must name the {len(event_shape)} dimensions of "
            f"its event, of shape {shape_text(event_shape)}"
        )
    names = None if event_dims is None else tuple(event_dims)
    return Site(
        name,
        kind,
        batch_shape + event_shape,
        n_batch,
        plates,
        names,
        fn,
        value,
        _mask(site),
        infer.get("tempered", 1.0),
    )


def _mask(site: Any) -> Tensor | None:
    """The masks of a site, of handlers and of its distribution, together."""
    masks = [site["mask"]]
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        masks.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    masks = [torch.as_tensor(mask) for mask in masks if mask is not None]
    return reduce(torch.logical_and, masks) if masks else None


def _num_plate_dims(shape: torch.Size, frames: Mapping[int, Any]) -> int:
    """How many dimensions of a deterministic value are plates', if the value has their sizes."""
    n = -min(frames, default=0)
    fits = n <= len(shape) and all(shape[n + dim] == frame.size for dim, frame in frames.items())
    return n if fits else 0


class Recorded(NamedTuple):
    """What a model made of draws: by site, (number of draws, *shape)."""

    values: dict[str, Tensor]
    log_probs: dict[str, Tensor]  # as scales of the model have them, tempered or not
    unconstrained: dict[str, Tensor]  # latents mapped to unconstrained space


class Bounds(NamedTuple):
    """Of the elements of a latent; None where there is none, or not the same for all."""

    lower: float | None
    upper: float | None


class _Seen(NamedTuple):
    """What the model made of one batch of draws, or of a single one, before dimensions are sorted out."""

    values: dict[str, Tensor]
    log_probs: dict[str, Tensor]
    unconstrained: dict[str, Tensor]
    thetas: dict[str, list[Tensor]]  # what simulators were called with, flattened
    bounds: dict[str, Bounds]  # of latents


class Model:
    """A model with its arguments, to be run at draws of its latents.

    Args:
        model: a Pyro model.
        args: its arguments, the data among them.
        kwargs: its keyword arguments.
        draw: values of latents in a single run.
        nesting: how deep the plates of the guide nest, if deeper than the model's.
        parallel: run a batch of draws at once, instead of one after another.
    """

    def __init__(
        self, model: Fn, args: tuple[Any, ...], kwargs: dict[str, Any], draw: Values, nesting: int, parallel: bool
    ) -> None:
        self.model, self.args, self.kwargs, self.parallel = model, args, kwargs, parallel
        with torch.no_grad():
            trace = poutine.trace(_At(draw)(model)).get_trace(*args, **kwargs)
        self.nesting = max(nesting, traces.depth(trace))
        found = {name: site for name, site in traces.sample_sites(trace).items() if not site_is_subsample(site)}
        self.sites = {name: _site(name, site) for name, site in found.items()}
        self.params = [name for name, site in trace.nodes.items() if site["type"] == "param"]
        self.bounds: dict[str, Bounds] = {}  # of latents, where they are the same at all draws
        self.draws_in_body = False  # random numbers, outside of its sites
        self.random_sites: frozenset[str] = frozenset()  # whose log-probability differs between runs at one draw
        for site in self.sites.values():
            if site.kind == "latent" and site.can_fail:
                raise ValueError(
                    f"site {site.name!r} is a simulator without data: pass the arguments that svi.step gets, the data "
                    "among them"
                )
            undeclared = (plate is None and n > 1 for plate, n in zip(site.plates, site.batch_shape, strict=True))
            if parallel and any(undeclared):
                raise ValueError(
                    f"site {site.name!r} has batch shape {shape_text(site.batch_shape)}, of which no plate says what "
                    "it is: use pyro.plate, or .to_event, or run one draw after another by parallel=False"
                )

    @property
    def tempered(self) -> float:
        """The ``w`` of ``tempered(model, w)``, 1 of any other model."""
        ws = {site.tempered for site in self.sites.values() if site.kind in ("observed", "factor")} or {1.0}
        if len(ws) > 1:
            raise ValueError(
                f"tempered must hold all observed sites of the model, but they are tempered by {sorted(ws)}"
            )
        return ws.pop()

    @property
    def epsilon(self) -> float:
        """Of the numbers that the latents are."""
        kinds = [self.sites[name].value.dtype for name in self.named("latent")]
        return max((torch.finfo(kind).eps for kind in kinds if kind.is_floating_point), default=0.0)

    @property
    def is_noisy(self) -> bool:
        """Whether the loss of a draw is random."""
        sites = [self.sites[name] for name in self.named("observed", "factor")]
        of_simulator = any(site.can_fail and not site.is_frozen for site in sites)
        return of_simulator or self.draws_in_body or any(site.name in self.random_sites for site in sites)

    @property
    def is_frozen(self) -> bool:
        """Whether there are simulators whose noise stays the same, for each place in a batch."""
        return any(site.is_frozen for site in self.sites.values())

    @property
    def enumerated(self) -> list[str]:
        """Discrete latents, which may be summed over instead of drawn."""
        return [name for name in self.named("latent") if self.sites[name].is_discrete]

    def named(self, *kinds: str) -> list[str]:
        """The sites of these kinds."""
        return [name for name, site in self.sites.items() if site.kind in kinds]

    @torch.no_grad()
    def run(
        self,
        n: int,
        at: Values,
        *,
        values: Collection[str] = (),
        score: Collection[str] = (),
        unconstrain: Collection[str] = (),
        observed: bool = True,
        parallel: bool | None = None,
    ) -> Recorded:
        """Run the model at n draws.

        Args:
            n: how many.
            at: values of latents; the others are drawn.
            values: the sites whose values to record.
            score: those whose log-probability to record.
            unconstrain: the latents to map to unconstrained space.
            observed: keep the data; else draw what is observed.
            parallel: whether in one batch; None: as the model is to be run.
        """
        model = self.model if observed else _Unobserved()(self.model)
        wanted = (values, score, unconstrain)
        if not (self.parallel if parallel is None else parallel):
            runs = [self._see(model, {name: at[name][i] for name in at}, *wanted) for i in range(n)]
            return Recorded(*(_stack([run[place] for run in runs]) for place in range(3)))  # type: ignore[misc]
        try:
            seen = self._see_batch(model, n, at, *wanted)
            return Recorded(
                {name: self.by_draw(name, seen.values[name], n, self.sites[name].shape) for name in values},
                {name: self.by_draw(name, seen.log_probs[name], n, self.sites[name].batch_shape) for name in score},
                {name: self._unconstrained_by_draw(name, seen.unconstrained[name], n) for name in unconstrain},
            )
        except Exception as error:
            if observed and at:
                self._explain(error, at, *wanted)
            raise

    def _see_batch(self, model: Fn, n: int, at: Values, *wanted: Collection[str]) -> _Seen:
        batch = {name: self._in_batch(name, draws) for name, draws in at.items()}
        return self._see(traces.particles(n, self.nesting)(model), batch, *wanted)

    def _see(
        self,
        model: Fn,
        at: Values,
        values: Collection[str] = (),
        score: Collection[str] = (),
        unconstrain: Collection[str] = (),
    ) -> _Seen:
        trace = poutine.trace(_At(at)(model)).get_trace(*self.args, **self.kwargs)
        if missing := [name for name in (*values, *score, *unconstrain) if name not in trace.nodes]:
            raise ValueError(
                f"the sites {missing} are in some runs of the model and not in others: all draws need the same sites"
            )
        trace.compute_log_prob(lambda name, _: name in score and not self.sites[name].can_fail)
        nodes: Mapping[str, Any] = {**trace.nodes}  # of which Pyro does not say enough to the type checker
        for name in score:
            if self.sites[name].can_fail:
                failures.score(trace, nodes[name])
                log_prob = scale_and_mask(nodes[name]["unscaled_log_prob"], nodes[name]["scale"], nodes[name]["mask"])
                nodes[name]["log_prob"] = log_prob
        return _Seen(
            {name: torch.as_tensor(nodes[name]["value"]).detach() for name in values},
            {name: nodes[name]["log_prob"] * self.sites[name].tempered for name in score},
            {name: biject_to(nodes[name]["fn"].support).inv(nodes[name]["value"]) for name in unconstrain},
            {name: _theta(nodes[name]) for name, site in self.sites.items() if site.can_fail and name in nodes},
            {name: _bounds(nodes[name]["fn"].support) for name in self.named("latent") if name in nodes},
        )

    def _in_batch(self, name: str, draws: Tensor) -> Tensor:
        """(n, *shape) with as many dimensions for plates as there are at most."""
        site = self.sites[name]
        pad = (1,) * (self.nesting - site.num_plate_dims)
        return draws.reshape(draws.shape[:1] + pad + draws.shape[1:])

    def by_draw(self, name: str, found: Tensor, n: int, shape: torch.Size) -> Tensor:
        """(n, *shape), for values of a batch have stray dimensions, and those that depend on no draw have no batch."""
        if found.numel() == n * shape.numel():
            return found.reshape(n, *shape)
        if found.numel() == shape.numel():
            return found.reshape(shape).expand(n, *shape)
        raise ValueError(
            f"site {name!r} has shape {shape_text(shape)} in a single run, and {shape_text(found.shape)} in a batch of "
            f"{n} draws"
        )

    def _unconstrained_by_draw(self, name: str, found: Tensor, n: int) -> Tensor:
        site = self.sites[name]
        event_dim = biject_to(site.fn.support).domain.event_dim
        return self.by_draw(name, found, n, site.batch_shape + found.shape[found.dim() - event_dim :])

    @torch.no_grad()
    def look(self, at: Values) -> None:
        """Find out what is random, which bounds latents have, and whether a batch keeps draws apart.

        It takes no simulation.

        Args:
            at: draws of all latents.

        Raises:
            ValueError: values, log-probabilities or parameters of simulators are others in a batch than alone.
        """
        values = self.named("deterministic")
        score = [name for name, site in self.sites.items() if site.kind != "deterministic" and not site.can_fail]
        picked = _some(len(next(iter(at.values()))))
        few = {name: draws[picked] for name, draws in at.items()}
        with forked_rng():
            before = torch.get_rng_state()
            alone, again = (
                [self._see(self.model, {name: draws[i] for name, draws in few.items()}, values, score) for i in places]
                for places in [range(len(picked))] * 2
            )
            self.draws_in_body = not torch.equal(before, torch.get_rng_state())
            batch = self._comparable_batch(few, values, score) if self.parallel and len(picked) > 1 else None
        random = set()
        for place, (what, name, shape, of) in enumerate(self._comparable(alone[0])):
            single, twice = (torch.stack([of(one).expand(shape) for one in runs]) for runs in (alone, again))
            if not torch.allclose(single, twice, rtol=0, atol=0, equal_nan=True):
                random.add(name)
            elif batch is not None:
                _check_kept_apart("model", f"{what} of site {name!r}", batch[place], single)
        self.random_sites = frozenset(random)
        first = alone[0].bounds
        self.bounds = {name: first[name] for name in first if all(one.bounds[name] == first[name] for one in alone)}

    def _comparable_batch(self, at: Values, values: Collection[str], score: Collection[str]) -> list[Tensor]:
        """What there is to compare of a batch, in the order of :meth:`_comparable`."""
        n = len(next(iter(at.values())))
        try:
            seen = self._see_batch(self.model, n, at, values, score)
            return [self.by_draw(name, of(seen), n, shape) for _, name, shape, of in self._comparable(seen)]
        except Exception as error:
            self._explain(error, at, values, score)
            raise

    def _comparable(self, seen: _Seen) -> Iterator[tuple[str, str, torch.Size, Callable[[_Seen], Tensor]]]:
        """What can be compared of two runs: in words, the site, its shape in a single run, and how to get it."""
        for name in seen.values:
            yield "the value", name, self.sites[name].shape, lambda one, name=name: one.values[name]
        for name in seen.log_probs:
            yield "the log-probability", name, self.sites[name].batch_shape, lambda one, name=name: one.log_probs[name]
        for name, parameters in seen.thetas.items():
            for i, flat in enumerate(parameters):
                shape = self.sites[name].batch_shape + flat.shape[1:]
                yield (
                    "a parameter",
                    name,
                    shape,
                    lambda one, name=name, i=i, shape=shape: _unflat(one.thetas[name][i], shape),
                )

    def _explain(self, error: Exception, at: Values, *wanted: Collection[str]) -> None:
        """Say what else is to be tried, if the model can be run at a single draw."""
        try:
            with forked_rng():
                self._see(self.model, {name: draws[0] for name, draws in at.items()}, *wanted)
        except Exception:
            return
        raise ValueError(f"the model could not be run in a batch of draws {_remedy(error)}") from error


def _bounds(support: Any) -> Bounds:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is constraints.simplex:
        return Bounds(0.0, 1.0)
    ends = (torch.as_tensor(getattr(support, name, torch.nan)) for name in ("lower_bound", "upper_bound"))
    return Bounds(*(float(end.flatten()[0]) if bool((end == end.flatten()[0]).all()) else None for end in ends))


def _theta(site: Any) -> list[Tensor]:
    """What the simulator of a site is called with, (B, *event) each."""
    fn = traces.innermost(site["fn"])
    return fn.run.theta.flat(fn.batch_shape)


def _unflat(flat: Tensor, shape: torch.Size) -> Tensor:
    """A parameter of one run with the shape of its site, or of a batch as it is."""
    return flat.reshape(shape) if flat.numel() == shape.numel() else flat


class GuideDraws(NamedTuple):
    """Draws from a guide."""

    values: dict[str, Tensor]  # of the model's latents, (n, *shape)
    log_q: Tensor  # (n,)


def draw_guide(model: Model, guide: Fn, n: int, names: Collection[str], batch_size: int) -> GuideDraws:
    """Draw n times the latents of these names."""
    if not model.parallel:
        return _draw_in_turn(model, guide, n, names)
    parts: list[GuideDraws] = []
    for start in range(0, n, batch_size):
        try:
            parts.append(_draw_batch(model, guide, min(batch_size, n - start), names, look=not parts))
        except _MixedUp:
            raise
        except Exception as error:  # it was run alone before
            raise ValueError(f"the guide could not be run in a batch of draws {_remedy(error)}") from error
    return GuideDraws(
        {name: torch.cat([part.values[name] for part in parts]) for name in names},
        torch.cat([part.log_q for part in parts]),
    )


@torch.no_grad()
def _draw_in_turn(model: Model, guide: Fn, n: int, names: Collection[str]) -> GuideDraws:
    found = [draw_once(model.model, guide, model.args, model.kwargs) for _ in range(n)]
    log_q = [torch.as_tensor(trace.log_prob_sum()).double() for trace, _ in found]
    return GuideDraws(_stack([{name: values[name] for name in names} for _, values in found]), torch.stack(log_q))


@torch.no_grad()
def _draw_batch(model: Model, guide: Fn, n: int, names: Collection[str], *, look: bool) -> GuideDraws:
    batch = traces.particles(n, model.nesting)
    trace, found = draw_once(batch(model.model), batch(guide), model.args, model.kwargs)
    trace.compute_log_prob()
    sites = traces.sample_sites(trace)
    terms = [_lead(site["log_prob"], n, model.nesting).reshape(n, -1).double().sum(1) for site in sites.values()]
    values = {name: model.by_draw(name, found[name].detach(), n, model.sites[name].shape) for name in names}
    if look and n > 1 and not isinstance(poutine.unwrap(guide), GuideMessenger):
        _look_at_guide(model, guide, n, sites)
    return GuideDraws(values, torch.stack(terms).sum(0))


def _look_at_guide(model: Model, guide: Fn, n: int, sites: Mapping[str, Any]) -> None:
    """Raise if a site of the guide has another density in a batch than alone, where the others have the same draws."""
    drawn = [name for name, site in sites.items() if not (site["is_observed"] or _is_delta(site))]
    try:
        with forked_rng():
            single = draw_once(model.model, guide, model.args, model.kwargs)[1]
            at = {name: model.by_draw(name, sites[name]["value"].detach(), n, single[name].shape) for name in drawn}
            alone, again = (
                [_see_guide(model, guide, {name: draws[i] for name, draws in at.items()}) for i in _some(n)]
                for _ in range(2)
            )
    except Exception:  # a flow without an inverse has no density at given draws
        return
    for name, site in sites.items():
        one, two = (torch.stack([seen[name] for seen in runs]) for runs in (alone, again))
        if not torch.equal(one, two):
            continue  # the guide draws it at random outside of its sites
        in_batch = model.by_draw(name, _of_guide(site).detach(), n, one.shape[1:])[_some(n)]
        what = "value" if _is_delta(site) else "log-probability"
        _check_kept_apart("guide", f"the {what} of site {name!r}", in_batch, one)


def _see_guide(model: Model, guide: Fn, at: Values) -> dict[str, Tensor]:
    trace = prune_subsample_sites(poutine.trace(_At(at)(guide)).get_trace(*model.args, **model.kwargs))
    trace.compute_log_prob()
    return {name: _of_guide(site) for name, site in traces.sample_sites(trace).items()}


def _of_guide(site: Any) -> Tensor:
    """What tells that a site of a guide is the same: its log-probability, or its value where it has but one."""
    return torch.as_tensor(site["value"]) if _is_delta(site) else site["log_prob"]


@torch.no_grad()
def draw_once(model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Trace, dict[str, Tensor]]:
    """A run of the guide, and the values that it gives to sites."""
    if isinstance(poutine.unwrap(guide), GuideMessenger):  # draws while it runs the model
        trace = traces.run(model, guide, args, kwargs)[1]
    else:
        trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    return trace, {name: torch.as_tensor(site["value"]) for name, site in traces.sample_sites(trace).items()}


def has_density(model: Model, trace: Trace, draws: Values) -> bool:
    """Whether the log-probabilities of a guide's sites add up to the density of its draws of latents.

    They do not if the guide draws auxiliary variables that are not the latents themselves in other coordinates, if a
    latent is a point mass, or if its sites are scaled.
    """
    auxiliary, moved = 0, 0  # numbers of unconstrained dimensions
    for name, site in traces.sample_sites(trace).items():
        is_delta, known = _is_delta(site), model.sites.get(name)
        if not torch.all(torch.as_tensor(site["scale"]) == 1):
            return False
        if known is None and not site["is_observed"] and not is_delta:
            auxiliary += torch.as_tensor(site["value"]).numel()
        elif known is not None and is_delta and not known.is_delta and not known.fn.support.is_discrete:
            moved += biject_to(known.fn.support).inverse_shape(known.shape).numel()
            if len(draws[name]) > 1 and bool((draws[name] == draws[name][0]).all()):
                return False
    return auxiliary == moved


def _lead(log_prob: Tensor, n: int, nesting: int) -> Tensor:
    """With the draws' dimension in front, also where it is missing."""
    shape = (1,) * (nesting + 1 - log_prob.dim()) + tuple(log_prob.shape)
    return log_prob.reshape(shape).expand(n, *shape[1:])


def _stack(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([torch.as_tensor(run[name]).detach() for run in runs]) for name in (runs[0] if runs else ())
    }


def _some(n: int) -> list[int]:
    """A few places among n."""
    return sorted({0, n // 2, n - 1})


_REMEDY = (
    "Declare batch dimensions by pyro.plate and index from the right, as in x[..., 0], or run one draw after another "
    "by parallel=False"
)


def _remedy(error: Exception) -> str:
    first_line = str(error).splitlines()[0] if str(error) else ""
    return f"({type(error).__name__}: {first_line}), but at a single one it can. {_REMEDY}"


class _MixedUp(ValueError):
    """Draws of a batch depend on each other."""


def _check_kept_apart(fn: str, what: str, in_batch: Tensor, alone: Tensor) -> None:
    """Raise if draws are others in a batch than alone: by more than rounding, and by as much as draws vary.

    How much rounding there is cannot be told from the values alone, but it is little against the spread of the draws.
    """
    real = [torch.view_as_real(one) if one.is_complex() else one for one in (in_batch, alone)]
    batch, single = (one.to(torch.double) for one in real)
    finite = batch.isfinite() & single.isfinite()
    same = torch.where(finite, batch == single, (batch == single) | (batch.isnan() & single.isnan()))
    difference, level = (torch.where(finite, one, 0) for one in (batch - single, single))
    kind = alone.dtype if alone.is_floating_point() else torch.double
    rounding = 100 * torch.finfo(kind).eps * max(1.0, float(level.abs().max())) if level.numel() else 0.0
    little = difference.norm() < 0.01 * (level - level.mean(0)).norm()
    if bool((same | (finite & ((difference.abs() <= rounding) | little))).all()):
        return
    worst = difference.abs().flatten().argmax()
    raise _MixedUp(
        f"the {fn} mixes up draws that are run in one batch: {what} for a draw is {batch.flatten()[worst]:.6g} in a "
        f"batch, and {single.flatten()[worst]:.6g} alone. {_REMEDY}"
    )
