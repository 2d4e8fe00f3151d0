"""A user's simulator as a Pyro distribution."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict
from zlib import crc32

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._rng import forked_rng
from pyrobirds.simulators import contract
from pyrobirds.simulators.forward_mode import ForwardMode, NotForwardDifferentiable
from pyrobirds.simulators.parameters import EventDims, Parameters, Theta
from pyrobirds.simulators.unbatched import Raised, Unbatched

Loss = Callable[[Tensor, Tensor], Tensor]
Differentiation = Literal["reverse", "forward"]

_INSIDE = object()  # in place of a loss: the function is a loss that simulates inside itself


class Simulator:
    r"""A simulator with a loss, which becomes a Pyro distribution when it is called with parameters.

    Drawing from the distribution runs the simulator; its log-probability of data y is :math:`-\ell(x, y)` of a fresh
    run x. Nothing runs before: a guide can be set up, a divergence estimated and parameters drawn without a simulation.

    ``fn`` and ``loss`` always see ONE batch dimension B, whatever the plates: parameters ``(B, *their event)``, x and y
    ``(B, *event)``. Parameters are broadcast to a common batch and flattened; y is expanded to it. Every other mismatch
    of shapes is an error.

    Args:
        fn: the simulator: tensors of parameters in, a tensor out, or a dict of tensors, one for each output.
        loss: ``(x, y) -> (B,)``, see :mod:`pyrobirds.losses`; a dict of them by output if ``fn`` returns a dict.
        batched: whether ``fn`` takes a batch of draws. A function of ONE draw is called through :func:`torch.vmap`, or
            in a loop where vmap cannot take it (a warning says so).
        theta_event_dims: how many rightmost dimensions of a parameter belong to one draw (0 for scalars, 1 for
            vectors): one number for all of them, a sequence in the order of ``fn``'s parameters, or a dict by name.
        event_dim: how many dimensions of the output belong to one draw (1 for a time series), or a dict by output.
        differentiation: how x is differentiated with respect to the parameters. ``"reverse"``: by autograd, whose
            memory grows with the simulator's operations, so with time. ``"forward"``: by forward-mode differentiation,
            whose memory does not; its time grows with the number of parameters. There are no gradients with respect to
            tensors that are not among the parameters then, nor second derivatives.
        replicates: m, how many runs there are to each draw that is scored. With more than one the loss gets x of shape
            ``(B, m, *event)`` and y of shape ``(B, *event)``; a draw fails if one of its runs does. Drawing is one run.
        seed: freezes the noise of the runs that are scored: the log-probability is then deterministic for a fixed batch
            shape (each place in the batch has its own noise). Draws stay random.
        **settings: further arguments of ``fn``, the same at every call. For a name that clashes with one above take
            :func:`functools.partial`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or ``fn`` does not take a setting. The first run checks
            the contract: batch in front, of the data's shape, depending differentiably on the parameters.

    A draw fails if x is not finite where y is observed, if its loss is not finite, or if ``fn`` raises an exception (a
    batched ``fn``: in the whole batch). Its log-probability is NaN then and its gradient zero; the other draws are what
    they would be without it. What ``fn`` raises before it ever returned is raised as it is.

    A dict of outputs makes several sites that share one run. A run serves each output once; a second request simulates
    again::

        run = sir(theta)
        pyro.sample("infected", run["infected"], obs=infected)
        pyro.sample("recovered", run["recovered"], obs=recovered)

    Example:
        >>> from pyrobirds import losses
        >>> from pyrobirds.simulators import random_walk
        >>> walk = Simulator(random_walk, loss=losses.mse, n_timesteps=20)
        >>> site = walk(torch.zeros(4))
        >>> site.batch_shape, site.sample().shape, site.log_prob(torch.zeros(20)).shape
        (torch.Size([4]), torch.Size([4, 20]), torch.Size([4]))
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        loss: Loss | Mapping[str, Loss],
        *,
        batched: bool = True,
        theta_event_dims: EventDims = 0,
        event_dim: int | Mapping[str, int] = 1,
        differentiation: Differentiation = "reverse",
        replicates: int = 1,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        losses: dict[str | None, Any] = {**loss} if isinstance(loss, Mapping) else {None: loss}
        if not losses or not all(callable(one) or one is _INSIDE for one in losses.values()):
            raise TypeError(f"loss must be a callable (x, y) -> (B,), or a dict of them by output, got {loss!r}")
        self.name = _name(fn)
        self.losses = losses
        self.settings = settings
        self.scores_inside = loss is _INSIDE
        self.event_dims = _event_dims(event_dim, tuple(losses))
        self.event_shapes: dict[str | None, torch.Size] = {}  # as of the last run
        self.seed = None if seed is None else _checks.seed("seed", seed)
        if differentiation not in ("reverse", "forward"):
            raise ValueError(f"differentiation must be 'reverse' or 'forward', got {differentiation!r}")
        self.differentiation: Differentiation = differentiation
        self.replicates = _checks.positive_int("replicates", replicates)
        self._batched = _checks.boolean("batched", batched)
        self._parameters = Parameters(self.name, fn, settings, theta_event_dims, takes_data=self.scores_inside)
        with_settings = partial(fn, **settings)
        # What runs a batch of draws: it returns the results, and the draws that raised if that is not the whole batch.
        run = partial(_run_batched, with_settings) if batched else Unbatched(with_settings, self.name)
        self._run = ForwardMode(run, self.name) if differentiation == "forward" else run
        self._checked: set[Any] = set()  # the checks that passed
        self._kinds: dict[str | None, _Kind] = {}  # by output, as of the last run; empty before the first that worked
        self._warned = False  # that a run raised an exception
        self.last_exception = ""  # of the last call, in words

    @classmethod
    def from_loss(
        cls,
        loss: Callable[..., Tensor],
        *,
        batched: bool = True,
        theta_event_dims: EventDims = 0,
        event_dim: int = 1,
        differentiation: Differentiation = "reverse",
        seed: int | None = None,
        **settings: Any,
    ) -> Simulator:
        """Make a simulator of a loss that simulates inside itself.

        Such a site can be scored, not drawn: there is no output to draw.

        Args:
            loss: takes the parameters, and the data in the parameter called ``y`` or else in the last one without a
                default; returns ``(B,)``, or a scalar if ``batched=False``.
            batched: whether ``loss`` takes a batch of draws; a loss of ONE draw gets one y of shape ``event``.
            theta_event_dims: as for :class:`Simulator`.
            event_dim: how many dimensions of y belong to one draw.
            differentiation: as for :class:`Simulator`, of the loss.
            seed: as for :class:`Simulator`.
            **settings: further arguments of ``loss``.

        Example:
            >>> def loss(theta, y):
            ...     x = theta + torch.randn(())
            ...     return torch.nn.functional.mse_loss(x, y)
            >>> site = Simulator.from_loss(loss, batched=False, event_dim=0)(torch.zeros(4))
            >>> site.log_prob(torch.tensor(1.0)).shape
            torch.Size([4])
        """
        return cls(
            loss,
            _INSIDE,  # type: ignore[arg-type]
            batched=batched,
            theta_event_dims=theta_event_dims,
            event_dim=event_dim,
            differentiation=differentiation,
            seed=seed,
            **settings,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Bind parameters: a distribution, or a dict of them that share one run if there are several outputs."""
        run = Run(self, self._parameters.bind(args, kwargs), self.seed)
        return run.site(None) if None in self.losses else run

    def __repr__(self) -> str:
        return f"Simulator({self.name})"

    def simulate(self, run: Run, batch_shape: torch.Size, *, scored: bool) -> Simulated:
        """Run the function once for a whole batch."""
        if self.scores_inside:
            raise ValueError(
                f"a site of Simulator.from_loss({self.name}) can be scored but not drawn, for it has no output: pass "
                "the data, or make it of a simulator and a loss, Simulator(fn, loss)"
            )
        called = self._call(run, batch_shape, scored=scored)
        n, replicates = batch_shape.numel(), self.replicates if scored else 1
        outputs = {}
        for output, x in self._by_output(called.result).items():
            what = f"what {self.name} returned" if output is None else f"output {output!r} of {self.name}"
            x = contract.check_shape(what, x, n * replicates, self.event_dims[output], self._batched)
            self.event_shapes[output] = x.shape[1:]
            outputs[output] = x.reshape(n, replicates, *x.shape[1:]) if replicates > 1 else x
        self._kinds = {output: _kind(x) for output, x in outputs.items()}
        if scored and called.inputs:
            what = f"what {self.name} returns"
            self._once("gradient", lambda: contract.check_gradient(what, [*outputs.values()], called.inputs))
        return Simulated(outputs, called)

    def score(self, run: Run, output: str | None, batch_shape: torch.Size, y: Tensor) -> Score:
        """The loss of a fresh run."""
        site = f"a site of {self!r}" if output is None else f"the site of output {output!r} of {self!r}"
        if self.scores_inside:
            what, remedy = f"the loss {self.name!r}", "a loss of ONE draw needs batched=False"
            y = contract.expand_data(site, y, contract.event_shape_of(site, y, self.event_dims[output]), batch_shape)
            called = self._call(run, batch_shape, y, scored=True)
            value, worked = called.result, called.worked
        else:
            loss = self.losses[output]
            what, remedy = f"the loss {_name(loss)!r} of {site}", "reduce over the event only, e.g. by .mean(-1)"
            x, called = run.take(output, batch_shape, scored=True)
            y = contract.expand_data(site, y, self.event_shapes[output], batch_shape)
            missing = y.isnan()
            worked = contract.all_of_event(
                x.detach().isfinite() | (missing.unsqueeze(1) if self.replicates > 1 else missing)
            )
            if called.worked is not None:
                worked = worked & called.worked.to(x.device)
            value = loss(torch.where(contract.like(worked, x), x, 0), y)  # it need not know what to do with NaN
        value = contract.check_loss(what, value, batch_shape.numel(), remedy)
        finite = value.detach().isfinite()
        simulated = torch.ones_like(finite) if worked is None else worked.to(value.device)
        worked = simulated & finite
        if self.scores_inside:
            self._kinds = {output: _kind(value)}
        if inputs := called.inputs:
            if self.scores_inside:
                self._once("gradient", lambda: contract.check_gradient(what, [value], inputs))
            several = len(value) > 1
            self._once(("draws", output, several), lambda: contract.check_loss_gradient(what, value, worked, inputs))
        return Score(torch.where(worked, value, torch.nan), worked, simulated & ~finite, called.backward)

    def _call(self, run: Run, batch_shape: torch.Size, y: Tensor | None = None, *, scored: bool) -> Called:
        """Call the function once for a whole batch; what it raises is a failure, unless it never worked."""
        theta, backward = run.theta, contract.Backward()
        flat = contract.guard(backward, theta.flat(batch_shape))
        args, kwargs = self._parameters.with_data(*theta.arguments(flat), y)
        n, raised = batch_shape.numel(), None
        replicates = self.replicates if scored else 1
        if replicates > 1:
            args = tuple(_repeat(entry, replicates) for entry in args)
            kwargs = {name: _repeat(entry, replicates) for name, entry in kwargs.items()}
        with forked_rng(run.seed) if scored and run.seed is not None else nullcontext():
            try:
                result, raised = self._run(*args, **kwargs)
            except NotForwardDifferentiable:
                raise
            except Exception as error:
                if not self._batched:  # the exceptions of single draws were caught: this is another one
                    raise
                result, raised = None, Raised([*range(n * replicates)], error)
        worked, self.last_exception = None, ""
        if raised is not None:
            if len(raised.draws) == n * replicates:
                may_fail = self._kinds and (scored or run.draws_may_fail)
                if raised.error is not None and not may_fail:
                    raise raised.error
                result = self._nan(n * replicates)
            raised.draws = sorted({each // replicates for each in raised.draws})
            worked = torch.ones(n, dtype=torch.bool, device=flat[0].device if flat else None)
            worked[raised.draws] = False
            if not self._warned:
                self._warned = True
                self._warn(raised, n, dict(zip(theta.names, flat, strict=True)))
            self.last_exception = f"{type(raised.error).__name__}: {raised.error}"
            raised.error = None  # its traceback refers to this frame: they would keep each other and the run alive
        return Called(result, worked, theta.differentiable(flat), backward)

    def _warn(self, raised: Raised, n: int, theta: dict[str, Tensor]) -> None:
        draws = [" and ".join(f"{name}={_text(theta[name][draw])}" for name in theta) for draw in raised.draws[:3]]
        frames = traceback.extract_tb(raised.error and raised.error.__traceback__)
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        what = "A batch that raises counts as failed in all of its draws" if self._batched else "They count as failed"
        warnings.warn(
            f"{self.name} raised an exception in {len(raised.draws)} of {n} draws, such as {'; '.join(draws)}: "
            f"{type(raised.error).__name__}: {raised.error}{where}. {what}: the log-probability is NaN, the gradient "
            "zero. Later exceptions are not announced",
            RuntimeWarning,
            stacklevel=2,
        )

    def _nan(self, n: int) -> Any:
        """What the function would return for n draws, had it not raised in each of them."""
        results = {
            output: torch.full((n, *self.event_shapes.get(output, ())), torch.nan, **kind)
            for output, kind in self._kinds.items()
        }
        return results.get(None, results)

    def _once(self, name: Any, check: Callable[[], bool]) -> None:
        """Make a check until it has passed once; a check waits for the device, and is not made at every step."""
        if name not in self._checked and check():
            self._checked.add(name)

    def _by_output(self, result: Any) -> dict[str | None, Any]:
        if None in self.losses:
            if isinstance(result, Mapping):
                raise ValueError(
                    f"{self.name} returned a dict of the outputs {sorted(result)}: pass a loss for each of them, "
                    f"loss={{{sorted(result)[0]!r}: ..., }}"
                )
            return {None: result}
        came = f"a dict of {sorted(result)}" if isinstance(result, Mapping) else f"a {type(result).__name__}"
        if not isinstance(result, Mapping) or not set(self.losses) <= set(result):
            raise ValueError(f"{self.name} returned {came}, but its losses are for the outputs {[*self.losses]}")
        return {output: result[output] for output in self.losses}


class Called(NamedTuple):
    """A call of the user's function for a batch of draws."""

    result: Any  # NaN where it raised
    worked: Tensor | None  # (B,), the draws in which it did not raise; None if that is all of them
    inputs: dict[str, Tensor]  # the parameters with a gradient, (B, *event)
    backward: contract.Backward


class Simulated(NamedTuple):
    """What a run gave."""

    outputs: dict[str | None, Tensor]  # x by output, (B, *event), or (B, m, *event) with replicates
    called: Called


class Score(NamedTuple):
    """The losses of a run."""

    loss: Tensor  # (B,), NaN where the run failed
    worked: Tensor  # (B,)
    loss_failed: Tensor  # (B,), where the loss is not finite although the run was
    backward: contract.Backward


class Run(Mapping[str, "SimulatorSite"]):
    """Parameters bound to a simulator: its sites by output, which share a simulation.

    Args:
        simulator: the simulator.
        theta: the parameters.
        seed: of the noise of what is scored, if that is frozen.
        repeats: ``(m,)`` if what is scored is the mean of m simulations, else ``()``.
    """

    def __init__(self, simulator: Simulator, theta: Theta, seed: int | None, repeats: Sequence[int] = ()) -> None:
        self.simulator = simulator
        self.theta = theta
        self.seed = seed
        self.repeats = torch.Size(repeats)
        self.draws_may_fail = False  # so that a draw which raises is NaN, once the simulator has worked
        self._unserved: dict[Any, Simulated] = {}
        self._repeated: dict[Any, list[tuple[Run, dict[str | None, str]]]] = {}  # and the sites by output

    def repeated(self, num_repeats: int, seed: int | None, output: str | None, name: str) -> Run:
        """The run with as many times the simulations to a draw: one for all outputs, so that they still share it.

        What is frozen hangs on the name of the site that asks first, else several sites would have the same noise; for
        that a second site of one output gets another run.
        """
        runs = self._repeated.setdefault((num_repeats, seed), [])
        for run, names in runs:
            if names.setdefault(output, name) == name:
                return run
        own = self.seed if seed is None else crc32(f"{seed} {name}".encode())
        run = Run(self.simulator, self.theta, own, [self.repeats.numel() * num_repeats])
        runs.append((run, {output: name}))
        return run

    def site(self, output: str | None) -> SimulatorSite:
        return SimulatorSite(self, output, self.theta.batch_shape)

    def take(self, output: str | None, batch_shape: torch.Size, *, scored: bool) -> tuple[Tensor, Called]:
        """x of one output, and the call that it comes from.

        It is that of the last simulation if that has not served it yet, else of a new one.
        """
        # Runs without gradients, and draws where noise is to be frozen or replicated, are of no use to the other kind.
        kind = (
            batch_shape,
            torch.is_grad_enabled(),
            scored and (self.seed is not None or self.simulator.replicates > 1),
        )
        if kind not in self._unserved or output not in self._unserved[kind].outputs:
            self._unserved[kind] = self.simulator.simulate(self, batch_shape, scored=scored)
        outputs, called = self._unserved[kind]
        return outputs.pop(output), called

    def __getitem__(self, output: str) -> SimulatorSite:
        if output not in self.simulator.losses:
            raise KeyError(f"{self.simulator.name} has no output {output!r}, only {[*self]}")
        return self.site(output)

    def __iter__(self) -> Iterator[str]:
        return (output for output in self.simulator.losses if output is not None)

    def __len__(self) -> int:
        return len(self.simulator.losses)


class SimulatorSite(TorchDistribution):
    """The distribution of one output of a simulator with bound parameters; its log-probability is minus the loss.

    The log-probability of a run that failed is NaN, and its gradient zero. If the site is
    :func:`~pyrobirds.simulators.repeated`, the loss is the mean over those of a draw's runs that did not fail.
    """

    can_fail = True  # NaN in its log-probability is a run that failed
    arg_constraints = {}  # type: ignore[assignment]  # noqa: RUF012 (torch's way)
    has_rsample = True

    def __init__(self, run: Run, output: str | None, batch_shape: torch.Size) -> None:
        self.run = run
        self.output = output
        self._drawn: Tensor | None = None
        self._scored: tuple[Tensor, contract.Backward] | None = None  # which runs worked, (m, *batch)
        self._loss_failed: Tensor | None = None
        super().__init__(batch_shape, validate_args=False)

    @property
    def event_shape(self) -> torch.Size:
        """As of the simulator's last run; before the first its sizes are not known and stand as -1."""
        simulator = self.run.simulator
        return simulator.event_shapes.get(self.output, torch.Size([-1] * simulator.event_dims[self.output]))

    @property
    def support(self) -> Any:
        """Raises: who asks for the support takes the site for a latent."""
        raise ValueError(
            f"{self!r} has no data and is taken for a latent: pass the data when the guide is first called, e.g. "
            "guide(y), and leave outputs without data out of the model"
        )

    @property
    def can_be_drawn(self) -> bool:
        """Whether there is an output to draw."""
        return not self.run.simulator.scores_inside

    @property
    def is_frozen(self) -> bool:
        """Whether the noise of what is scored stays the same, for each place in a batch."""
        return self.run.seed is not None

    @property
    def cause(self) -> str:
        """What made runs of the last call fail, if that is known: an exception, or a loss that is not finite."""
        simulator = self.run.simulator
        if simulator.last_exception or self._loss_failed is None or not bool(self._loss_failed.any()):
            return simulator.last_exception
        name = simulator.name if simulator.scores_inside else _name(simulator.losses[self.output])
        return f"the loss {name} not finite where x is"

    @property
    def made_of(self) -> str:
        """The simulator, its loss and those settings that are numbers or words: what a checkpoint is recognised by."""
        simulator = self.run.simulator
        loss = "" if simulator.scores_inside else f", {_with_settings(simulator.losses[self.output])}"
        settings: dict[str, Any] = {
            name: value for name, value in simulator.settings.items() if isinstance(value, bool | int | float | str)
        }
        settings["seed"] = self.run.seed
        if simulator.differentiation != "reverse":
            settings["differentiation"] = simulator.differentiation
        if simulator.replicates > 1:
            settings["replicates"] = simulator.replicates
        if self.run.repeats:
            settings["num_repeats"] = self.run.repeats.numel()
        words = "".join(f", {name}={value!r}" for name, value in settings.items())
        return f"Simulator({simulator.name}{loss}{words})"

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> SimulatorSite:
        return SimulatorSite(self.run, self.output, torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        batch_shape = torch.Size(sample_shape) + self.batch_shape
        x, _ = self.run.take(self.output, batch_shape, scored=False)
        self._drawn = x.reshape(batch_shape + x.shape[1:])
        return self._drawn

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if value is self._drawn:
            raise ValueError(
                f"{self!r} is scored at its own draw. In a model that means that it has no data: pass them, e.g. "
                "svi.step(y). To score a draw on purpose, score a clone() of it"
            )
        runs = self.run.repeats + self.batch_shape
        score = self.run.simulator.score(self.run, self.output, runs, value)
        worked = score.worked.reshape(self.run.repeats.numel(), *self.batch_shape)
        self._scored = worked, score.backward
        self._loss_failed = score.loss_failed
        loss = score.loss.reshape(runs)
        return -(_mean_of_survivors(loss, worked) if self.run.repeats else loss)

    @property
    def num_failed(self) -> Tensor | None:
        """How many runs of each draw failed in the last ``log_prob``, in its ``batch_shape``; None before it."""
        return None if self._scored is None else (~self._scored[0]).sum(0)

    @property
    def gradient_failed(self) -> Tensor | None:
        """Which draws have a run that had not failed, but whose gradient is not finite and was replaced by zero.

        As of the backward pass through the last ``log_prob``, a bool tensor of ``batch_shape``; None before it.
        """
        if self._scored is None:
            return None
        worked, backward = self._scored
        if backward.failed is None:
            return None
        return (backward.failed.to(worked.device).reshape(worked.shape) & worked).any(0)

    def __repr__(self) -> str:
        output = "" if self.output is None else f", output={self.output!r}"
        return f"{self.run.simulator!r}(batch_shape={tuple(self.batch_shape)}{output})"


def _run_batched(fn: Callable[..., Any], *args: Tensor, **kwargs: Tensor) -> tuple[Any, Raised | None]:
    return fn(*args, **kwargs), None


def _repeat(entry: Any, times: int) -> Any:
    """Each draw's own as often as it has replicates, ``(B * times, *event)``."""
    return entry.repeat_interleave(times, 0) if isinstance(entry, Tensor) else entry


def _mean_of_survivors(loss: Tensor, worked: Tensor) -> Tensor:
    """Over the first dimension; NaN where no run worked."""
    mean = torch.where(worked, loss, 0).sum(0) / worked.sum(0).clamp(min=1)
    return torch.where(worked.any(0), mean, torch.nan)


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", None) or getattr(getattr(fn, "func", None), "__name__", None) or type(fn).__name__


def _with_settings(loss: Any) -> str:
    """A loss with its settings, if it can say them; not where its ``repr`` would be an address."""
    tells = not hasattr(loss, "__name__") and type(loss).__repr__ not in (object.__repr__, partial.__repr__)
    return repr(loss) if tells else _name(loss)


def _text(value: Tensor) -> str:
    """The value of one parameter, cut short."""
    entries = [f"{entry:.4g}" for entry in value.flatten()[:4].tolist()]
    if value.dim() == 0:
        return entries[0]
    return f"[{', '.join(entries)}{', ...' if value.numel() > len(entries) else ''}]"


class _Kind(TypedDict):
    dtype: torch.dtype
    device: torch.device


def _kind(x: Tensor) -> _Kind:
    """Of tensors that hold NaN in place of ``x``."""
    return {"dtype": x.dtype if x.is_floating_point() else torch.get_default_dtype(), "device": x.device}


def _event_dims(event_dim: int | Mapping[str, int], outputs: tuple[str | None, ...]) -> dict[str | None, int]:
    dims = event_dim if isinstance(event_dim, Mapping) else dict.fromkeys(outputs, event_dim)
    if set(dims) != set(outputs):
        raise ValueError(f"event_dim is given for the outputs {[*dims]}, the losses are for {[*outputs]}")
    return {output: _checks.non_negative_int("event_dim", dim) for output, dim in dims.items()}
