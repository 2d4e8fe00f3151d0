"""A user's simulator as a Pyro distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._rng import forked_rng
from pyrobirds.simulators import contract
from pyrobirds.simulators.parameters import EventDims, Parameters, Theta
from pyrobirds.simulators.unbatched import Unbatched

Loss = Callable[[Tensor, Tensor], Tensor]

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
        seed: freezes the noise of the runs that are scored: the log-probability is then deterministic for a fixed batch
            shape (each place in the batch has its own noise). Draws stay random.
        **settings: further arguments of ``fn``, the same at every call. For a name that clashes with one above take
            :func:`functools.partial`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or ``fn`` does not take a setting. The first run checks
            the contract: batch in front, finite, of the data's shape, depending differentiably on the parameters.

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
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        losses: dict[str | None, Any] = {**loss} if isinstance(loss, Mapping) else {None: loss}
        if not losses or not all(callable(one) or one is _INSIDE for one in losses.values()):
            raise TypeError(f"loss must be a callable (x, y) -> (B,), or a dict of them by output, got {loss!r}")
        self.name = _name(fn)
        self.losses = losses
        self.scores_inside = loss is _INSIDE
        self.event_dims = _event_dims(event_dim, tuple(losses))
        self.event_shapes: dict[str | None, torch.Size] = {}  # as of the last run
        self.seed = None if seed is None else _checks.seed("seed", seed)
        self._batched = _checks.boolean("batched", batched)
        self._parameters = Parameters(self.name, fn, settings, theta_event_dims, takes_data=self.scores_inside)
        with_settings = partial(fn, **settings)
        self._fn = with_settings if batched else Unbatched(with_settings, self.name)
        self._checked: set[Any] = set()  # the checks that passed

    @classmethod
    def from_loss(
        cls,
        loss: Callable[..., Tensor],
        *,
        batched: bool = True,
        theta_event_dims: EventDims = 0,
        event_dim: int = 1,
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
            seed=seed,
            **settings,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Bind parameters: a distribution, or a dict of them that share one run if there are several outputs."""
        run = Run(self, self._parameters.bind(args, kwargs))
        return run.site(None) if None in self.losses else run

    def __repr__(self) -> str:
        return f"Simulator({self.name})"

    def simulate(self, theta: Theta, batch_shape: torch.Size, *, scored: bool) -> Simulated:
        """Run the function once for a whole batch."""
        if self.scores_inside:
            raise ValueError(
                f"a site of Simulator.from_loss({self.name}) can be scored but not drawn, for it has no output: pass "
                "the data, or make it of a simulator and a loss, Simulator(fn, loss)"
            )
        flat = theta.flat(batch_shape)
        args, kwargs = theta.arguments(flat)
        with self._noise(scored):
            result = self._fn(*args, **kwargs)
        outputs = {}
        for output, x in self._by_output(result).items():
            what = f"what {self.name} returned" if output is None else f"output {output!r} of {self.name}"
            outputs[output] = contract.check_shape(what, x, batch_shape.numel(), self.event_dims[output], self._batched)
            self.event_shapes[output] = x.shape[1:]
            self._once(("finite", output), lambda what=what, x=x: contract.check_finite(what, x))
        inputs = theta.differentiable(flat)
        if scored and inputs:
            what = f"what {self.name} returns"
            self._once("gradient", lambda: contract.check_gradient(what, [*outputs.values()], inputs))
        return Simulated(outputs, inputs)

    def score(self, run: Run, output: str | None, batch_shape: torch.Size, y: Tensor) -> Tensor:
        """The loss of a fresh run, ``(B,)``."""
        site = f"a site of {self!r}" if output is None else f"the site of output {output!r} of {self!r}"
        if self.scores_inside:
            what, remedy = f"the loss {self.name!r}", "a loss of ONE draw needs batched=False"
            y = contract.expand_data(site, y, contract.event_shape_of(site, y, self.event_dims[output]), batch_shape)
            flat = run.theta.flat(batch_shape)
            args, kwargs = self._parameters.with_data(*run.theta.arguments(flat), y)
            with self._noise(scored=True):
                value = self._fn(*args, **kwargs)
            inputs = run.theta.differentiable(flat)
        else:
            loss = self.losses[output]
            what, remedy = f"the loss {_name(loss)!r} of {site}", "reduce over the event only, e.g. by .mean(-1)"
            x, inputs = run.take(output, batch_shape, scored=True)
            value = loss(x, contract.expand_data(site, y, x.shape[1:], batch_shape))
        value = contract.check_loss(what, value, batch_shape.numel(), remedy)
        self._once(("finite loss", output), lambda: contract.check_finite(what, value))
        if inputs:
            if self.scores_inside:
                self._once("gradient", lambda: contract.check_gradient(what, [value], inputs))
            several = len(value) > 1
            self._once(("draws", output, several), lambda: contract.check_loss_gradient(what, value, inputs))
        return value

    def _once(self, name: Any, check: Callable[[], None]) -> None:
        """Make a check until it has passed once; a check waits for the device, and is not made at every step."""
        if name not in self._checked:
            check()
            self._checked.add(name)

    def _noise(self, scored: bool) -> AbstractContextManager[None]:
        return forked_rng(self.seed) if scored and self.seed is not None else nullcontext()

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


class Simulated(NamedTuple):
    """What a run gave."""

    outputs: dict[str | None, Tensor]  # x by output, (B, *event)
    inputs: dict[str, Tensor]  # the parameters with a gradient, (B, *event)


class Run(Mapping[str, "SimulatorSite"]):
    """Parameters bound to a simulator: its sites by output, which share a simulation."""

    def __init__(self, simulator: Simulator, theta: Theta) -> None:
        self.simulator = simulator
        self.theta = theta
        self._unserved: dict[Any, Simulated] = {}

    def site(self, output: str | None) -> SimulatorSite:
        return SimulatorSite(self, output, self.theta.batch_shape)

    def take(self, output: str | None, batch_shape: torch.Size, *, scored: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """x of one output, and the inputs that it has a gradient in.

        It is that of the last simulation if that has not served it yet, else of a new one.
        """
        # Runs without gradients, and runs with random noise where it is to be frozen, are of no use to the other kind.
        kind = (batch_shape, torch.is_grad_enabled(), scored and self.simulator.seed is not None)
        if kind not in self._unserved or output not in self._unserved[kind].outputs:
            self._unserved[kind] = self.simulator.simulate(self.theta, batch_shape, scored=scored)
        outputs, inputs = self._unserved[kind]
        return outputs.pop(output), inputs

    def __getitem__(self, output: str) -> SimulatorSite:
        if output not in self.simulator.losses:
            raise KeyError(f"{self.simulator.name} has no output {output!r}, only {[*self]}")
        return self.site(output)

    def __iter__(self) -> Iterator[str]:
        return (output for output in self.simulator.losses if output is not None)

    def __len__(self) -> int:
        return len(self.simulator.losses)


class SimulatorSite(TorchDistribution):
    """The distribution of one output of a simulator with bound parameters; its log-probability is minus the loss."""

    arg_constraints = {}  # type: ignore[assignment]  # noqa: RUF012 (torch's way)
    has_rsample = True

    def __init__(self, run: Run, output: str | None, batch_shape: torch.Size) -> None:
        self.run = run
        self.output = output
        self._drawn: Tensor | None = None
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
        return -self.run.simulator.score(self.run, self.output, self.batch_shape, value).reshape(self.batch_shape)

    def __repr__(self) -> str:
        output = "" if self.output is None else f", output={self.output!r}"
        return f"{self.run.simulator!r}(batch_shape={tuple(self.batch_shape)}{output})"


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", None) or getattr(getattr(fn, "func", None), "__name__", None) or type(fn).__name__


def _event_dims(event_dim: int | Mapping[str, int], outputs: tuple[str | None, ...]) -> dict[str | None, int]:
    dims = event_dim if isinstance(event_dim, Mapping) else dict.fromkeys(outputs, event_dim)
    if set(dims) != set(outputs):
        raise ValueError(f"event_dim is given for the outputs {[*dims]}, the losses are for {[*outputs]}")
    return {output: _checks.non_negative_int("event_dim", dim) for output, dim in dims.items()}
