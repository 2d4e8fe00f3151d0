"""Models and guides run at many draws, in batches, and what they make of each draw."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyrobirds import failures, traces
from pyrobirds._checks import shape_text
from pyrobirds._rng import forked_rng

if TYPE_CHECKING:
    from pyro.poutine.runtime import Message

Fn = Callable[..., Any]
Values = Mapping[str, Tensor]  # by site, (number of draws, *shape in a single run)


class _Unobserved(Messenger):
    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] and not (_is_delta(msg) or site_is_subsample(msg)) and _can_be_drawn(msg):
            msg["is_observed"], msg["done"], msg["value"] = False, False, None


def unobserved(model: Fn) -> Fn:
    """The model with its observed sites drawn instead, factors and losses without an output left as they are."""
    return _Unobserved()(model)


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
    """

    name: str
    kind: Literal["latent", "deterministic", "observed", "factor"]
    shape: torch.Size
    num_plate_dims: int
    plates: tuple[str | None, ...]
    event_dims: tuple[str, ...] | None
    fn: Any
    value: Tensor = field(repr=False)

    @property
    def batch_shape(self) -> torch.Size:
        """Of its log-probability."""
        return self.shape[: self.num_plate_dims]

    @property
    def is_delta(self) -> bool:
        """Whether it is a point mass in the model."""
        return _is_delta({"fn": self.fn})

    @property
    def can_fail(self) -> bool:
        """Whether it is a simulator's: its loss is noisy."""
        return traces.can_fail({"fn": self.fn})

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
    event_dims = (site["infer"] or {}).get("event_dims")
    if event_dims is not None and (isinstance(event_dims, str) or len(event_dims) != len(event_shape)):
        raise ValueError(
            f"infer={{'event_dims': {event_dims!r}}} of site {name!r} must name the {len(event_shape)} dimensions of "
            f"its event, of shape {shape_text(event_shape)}"
        )
    names = None if event_dims is None else tuple(event_dims)
    return Site(name, kind, batch_shape + event_shape, n_batch, plates, names, fn, value)


def _num_plate_dims(shape: torch.Size, frames: Mapping[int, Any]) -> int:
    """How many dimensions of a deterministic value are plates', if the value has their sizes."""
    n = -min(frames, default=0)
    fits = n <= len(shape) and all(shape[n + dim] == frame.size for dim, frame in frames.items())
    return n if fits else 0


class Recorded(NamedTuple):
    """What a model made of draws: by site, (number of draws, *shape)."""

    values: dict[str, Tensor]
    log_probs: dict[str, Tensor]


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
        self._checked: set[tuple[str, str]] = set()  # what of which site was seen to keep draws apart
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

    def named(self, *kinds: str) -> list[str]:
        """The sites of these kinds."""
        return [name for name, site in self.sites.items() if site.kind in kinds]

    @torch.no_grad()
    def run(
        self, n: int, at: Values, *, values: Collection[str] = (), score: Collection[str] = (), observed: bool = True
    ) -> Recorded:
        """Run the model at n draws.

        Args:
            n: how many.
            at: values of latents; the others are drawn.
            values: the sites whose values to record.
            score: those whose log-probability to record, as the model scales it.
            observed: keep the data; else draw what is observed.
        """
        model = self.model if observed else unobserved(self.model)
        if not self.parallel:
            runs = [self._record(model, {name: at[name][i] for name in at}, values, score) for i in range(n)]
            return Recorded(_stack([run.values for run in runs]), _stack([run.log_probs for run in runs]))
        batch = {name: self._in_batch(name, draws) for name, draws in at.items()}
        try:
            found = self._record(traces.particles(n, self.nesting)(model), batch, values, score)
            recorded = Recorded(
                {name: self.by_draw(name, found.values[name], n) for name in values},
                {name: self.by_draw(name, found.log_probs[name], n, of_plates=True) for name in score},
            )
        except Exception as error:
            self._explain(error, at)
            raise
        if observed and at:
            self._check_kept_apart(at, recorded)
        return recorded

    def _record(self, model: Fn, at: Values, values: Collection[str], score: Collection[str]) -> Recorded:
        trace = poutine.trace(_At(at)(model)).get_trace(*self.args, **self.kwargs)
        trace.compute_log_prob(lambda name, _: name in score and not self.sites[name].can_fail)
        for name in score:
            if self.sites[name].can_fail and name in trace.nodes:
                site: Any = trace.nodes[name]
                failures.score(trace, site)
                site["log_prob"] = scale_and_mask(site["unscaled_log_prob"], site["scale"], site["mask"])
        if missing := [name for name in (*values, *score) if name not in trace.nodes]:
            raise ValueError(
                f"the sites {missing} are in some runs of the model and not in others: all draws need the same sites"
            )
        return Recorded(
            {name: torch.as_tensor(trace.nodes[name]["value"]) for name in values},
            {name: trace.nodes[name]["log_prob"] for name in score},
        )

    def _in_batch(self, name: str, draws: Tensor) -> Tensor:
        """(n, *shape) with as many dimensions for plates as there are at most."""
        site = self.sites[name]
        pad = (1,) * (self.nesting - site.num_plate_dims)
        return draws.reshape(draws.shape[:1] + pad + draws.shape[1:])

    def by_draw(self, name: str, found: Tensor, n: int, *, of_plates: bool = False) -> Tensor:
        """(n, *shape), for values of a batch have stray dimensions, and those that depend on no draw have no batch."""
        shape = self.sites[name].batch_shape if of_plates else self.sites[name].shape
        if found.numel() == n * shape.numel():
            return found.detach().reshape(n, *shape)
        if found.numel() == shape.numel():
            return found.detach().reshape(shape).expand(n, *shape)
        raise ValueError(
            f"site {name!r} has shape {shape_text(shape)} in a single run, and {shape_text(found.shape)} in a batch of "
            f"{n} draws"
        )

    def _check_kept_apart(self, at: Values, recorded: Recorded) -> None:
        """Raise if the first or the last draw of a batch is another one when it is run alone; look at a thing once."""
        new = {("value", name) for name in recorded.values if self.sites[name].kind == "deterministic"}
        new |= {("log-probability", name) for name in recorded.log_probs if not self.sites[name].can_fail}
        if not (new := new - self._checked):
            return
        self._checked |= new
        values, score = ([name for what, name in new if what == wanted] for wanted in ("value", "log-probability"))
        for draw in (0, -1):
            fixed = {name: draws[draw] for name, draws in at.items()}
            with forked_rng():
                alone, again = (self._record(self.model, fixed, values, score) for _ in range(2))
            for what, name in new:
                field, shape = ("values", self.sites[name].shape)
                if what == "log-probability":
                    field, shape = ("log_probs", self.sites[name].batch_shape)
                in_batch, single, twice = (getattr(one, field)[name] for one in (recorded, alone, again))
                single = single.expand(shape)
                random = not torch.allclose(single, twice.expand(shape), rtol=0, atol=0, equal_nan=True)
                if not random and not _close(single, in_batch[draw]):
                    raise ValueError(
                        f"the model mixes up draws that are run in one batch: the {what} of site {name!r} is "
                        f"{_text(in_batch[draw])} for a draw in a batch, and {_text(single)} for the same draw alone. "
                        "Declare batch dimensions by pyro.plate and index from the right, as in x[..., 0], or run one "
                        "draw after another by parallel=False"
                    )

    def _explain(self, error: Exception, at: Values) -> None:
        """Say what else is to be tried, if the model can be run at a single draw."""
        try:
            with forked_rng():
                self._record(self.model, {name: draws[0] for name, draws in at.items()}, (), ())
        except Exception:
            return
        raise ValueError(
            f"the model could not be run in a batch of draws ({type(error).__name__}: {str(error).splitlines()[0]}), "
            "but at a single one it can: declare its batch dimensions by pyro.plate, or run one draw after another by "
            "parallel=False"
        ) from error


class GuideDraws(NamedTuple):
    """Draws from a guide."""

    values: dict[str, Tensor]  # of the model's latents, (n, *shape)
    log_q: Tensor  # (n,)


def draw_guide(model: Model, guide: Fn, n: int, names: Collection[str], batch_size: int) -> GuideDraws:
    """Draw n times the latents of these names."""
    sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
    parts = [(_draw_batch if model.parallel else _draw_in_turn)(model, guide, size, names) for size in sizes]
    return GuideDraws(
        {name: torch.cat([part.values[name] for part in parts]) for name in names},
        torch.cat([part.log_q for part in parts]),
    )


@torch.no_grad()
def _draw_in_turn(model: Model, guide: Fn, n: int, names: Collection[str]) -> GuideDraws:
    found = [draw_once(model.model, guide, model.args, model.kwargs) for _ in range(n)]
    log_q = [torch.as_tensor(trace.log_prob_sum()) for trace, _ in found]
    return GuideDraws(_stack([{name: values[name] for name in names} for _, values in found]), torch.stack(log_q))


@torch.no_grad()
def _draw_batch(model: Model, guide: Fn, n: int, names: Collection[str]) -> GuideDraws:
    batch = traces.particles(n, model.nesting)
    trace, values = draw_once(batch(model.model), batch(guide), model.args, model.kwargs)
    trace.compute_log_prob()
    log_probs = [site["log_prob"] for site in traces.sample_sites(trace).values()]
    terms = [_lead(log_prob, n, model.nesting).reshape(n, -1).sum(1) for log_prob in log_probs]
    return GuideDraws({name: model.by_draw(name, values[name], n) for name in names}, torch.stack(terms).sum(0))


@torch.no_grad()
def draw_once(model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Trace, dict[str, Tensor]]:
    """A run of the guide, and the values that it gives to sites."""
    if isinstance(poutine.unwrap(guide), GuideMessenger):  # draws while it runs the model
        trace = traces.run(model, guide, args, kwargs)[1]
    else:
        trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    return trace, {name: torch.as_tensor(site["value"]) for name, site in traces.sample_sites(trace).items()}


def _lead(log_prob: Tensor, n: int, nesting: int) -> Tensor:
    """With the draws' dimension in front, also where it is missing."""
    shape = (1,) * (nesting + 1 - log_prob.dim()) + tuple(log_prob.shape)
    return log_prob.reshape(shape).expand(n, *shape[1:])


def _stack(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([torch.as_tensor(run[name]).detach() for run in runs]) for name in (runs[0] if runs else ())
    }


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = max(1.0, float(a[a.isfinite()].abs().max())) if bool(a.isfinite().any()) else 1.0
    return torch.allclose(a, b.to(a), rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def _text(value: Tensor) -> str:
    entries = ", ".join(f"{entry:.4g}" for entry in value.flatten()[:4].tolist())
    return entries if value.dim() == 0 else f"[{entries}{', ...' if value.numel() > 4 else ''}]"
