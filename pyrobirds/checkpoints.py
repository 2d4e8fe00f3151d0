"""Files that a fit can resume from: written whole or not at all, read without running code, refused if not its own."""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.optim import PyroOptim
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent

from pyrobirds._rng import Generators, forked_rng, generators, set_generators
from pyrobirds.traces import can_fail

Fn = Callable[..., Any]

_FORMAT, _VERSION = "pyrobirds checkpoint", 1
_WRAPPERS = (Independent, ExpandedDistribution, MaskedDistribution)


class CheckpointFile:
    """A file that holds the last state that was written to it, whenever the process is killed.

    A state is written to a file beside it, ``<name>.tmp``, which then takes its place. One process at a time may write.

    Args:
        path: where the file is or will be, in a folder that exists.

    Raises:
        TypeError: ``path`` is no path.
        OSError: the file could not be written: the path is that of a folder, its folder does not exist, or nothing may
            be created in it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = CheckpointFile(Path(folder) / "fit.pt")
        ...     file.write({"step": 3, "mean": torch.zeros(2)})
        ...     file.read()
        {'step': 3, 'mean': tensor([0., 0.])}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"checkpoint must be the path of a file, got {path!r}")
        self.path = Path(path).resolve()  # a process may change its folder, and a link stays a link
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        folder = self.path.parent
        if self.path.is_dir():
            raise IsADirectoryError(f"checkpoint must be the path of a file, but {self.path} is a folder: add a name")
        if not folder.is_dir():
            raise FileNotFoundError(f"checkpoint must lie in a folder that exists, but {folder} does not")
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"checkpoint must lie in a folder that can be written to, but {folder} cannot")

    def exists(self) -> bool:
        """Whether there is something to resume from."""
        return self.path.exists()

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace what the file holds.

        Args:
            state: tensors, numbers, strings and None, also in dicts, lists and tuples.

        Raises:
            TypeError: an entry holds something else.
        """
        try:
            data = _pack({**state})
            _unpack(data)  # of what cannot be read, nothing may take the place of what can
        except Exception as error:
            entries = [repr(name) for name, value in state.items() if not _can_be_stored(value)]
            if not entries:
                raise
            raise TypeError(
                f"a checkpoint can store tensors, numbers, strings and None, also in dicts, lists and tuples; there is "
                f"something else in its entry {', '.join(entries)}"
            ) from error
        try:
            with open(self._temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)
        _sync_folder(self.path.parent)

    def read(self) -> dict[str, Any]:
        """The state that was written last, its tensors on the CPU.

        Raises:
            OSError: the file cannot be opened.
            ValueError: the file is no checkpoint, is damaged, or has another format version.
        """
        data = self.path.read_bytes()
        try:
            content = _unpack(data)
        except Exception as error:  # torch raises many kinds
            raise ValueError(self._refusal("one that is damaged or of another kind")) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(self._refusal("one of another kind"))
        if content["version"] != _VERSION:
            raise ValueError(self._refusal(f"one of version {content['version']}"))
        return content["state"]

    def _refusal(self, found: str) -> str:
        return (
            f"expected a checkpoint of format version {_VERSION} in {self.path}, found {found}: delete the file to "
            "start anew, or take another path"
        )


def _pack(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, "state": state}, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _can_be_stored(value: Any) -> bool:
    try:
        _unpack(_pack(value))
    except Exception:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Let the new name of a file outlive a power cut."""
    with suppress(OSError):  # Windows opens no folders, and some network file systems do not sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rng_state() -> dict[str, Any]:
    """The states of the global generators of torch, NumPy and Python, in tensors and numbers.

    Those of CUDA devices are among them once CUDA is in use.

    Example:
        >>> state = rng_state()
        >>> first = torch.rand(())
        >>> set_rng_state(state)
        >>> bool(torch.rand(()) == first)
        True
    """
    host, cuda = generators()
    version, numbers, gauss = host["random"]
    name, keys, *position = host["numpy"]
    return {
        "torch": host["torch"],
        "cuda": cuda,
        "python": (version, torch.tensor(numbers), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *position),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the global generators back into states that :func:`rng_state` gave, of as many CUDA devices as there are."""
    version, numbers, gauss = state["python"]
    name, keys, *position = state["numpy"]
    python, numpy = (version, tuple(numbers.tolist()), gauss), (name, keys.numpy().astype(np.uint32), *position)
    set_generators(Generators({"torch": state["torch"], "random": python, "numpy": numpy}, state["cuda"]))


def optimiser_state(optim: PyroOptim, params: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an optimiser, and its scheduler if it has one, remember of each parameter.

    Args:
        optim: any optimiser or scheduler of :mod:`pyro.optim` that SVI takes.
        params: the unconstrained parameters by name; those that never had a step are left out of the state.

    Raises:
        TypeError: ``optim`` is no :class:`pyro.optim.PyroOptim`, or its optimiser is one that SVI cannot use.

    Example:
        >>> import pyro
        >>> theta = pyro.param("theta", torch.zeros(2))
        >>> params = {"theta": theta.unconstrained()}
        >>> optim = pyro.optim.Adam({"lr": 0.1})
        >>> theta.sum().backward()
        >>> optim(params.values())
        >>> resumed = pyro.optim.Adam({"lr": 0.1})
        >>> load_optimiser_state(resumed, params, optimiser_state(optim, params))
        >>> resumed.optim_objs[params["theta"]].state_dict()["state"][0]["step"]
        tensor(1.)
    """
    _check_optim(optim)
    states = {name: _state_of(optim.optim_objs[param]) for name, param in params.items() if param in optim.optim_objs}
    return copy.deepcopy(states)  # the optimiser goes on to change its tensors in place


def load_optimiser_state(optim: PyroOptim, params: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Make an optimiser go on, bitwise, where another one was when its state was taken.

    Args:
        optim: an optimiser that is made as that one was; it need not have seen the parameters.
        params: the unconstrained parameters by name, which must be in Pyro's parameter store.
        state: what :func:`optimiser_state` gave.

    Raises:
        TypeError: ``optim`` is no :class:`pyro.optim.PyroOptim`, or its optimiser is one that SVI cannot use.
        ValueError: the state is that of another kind of optimiser or scheduler, or has a parameter that ``params`` has
            not.
    """
    _check_optim(optim)
    if missing := sorted(state.keys() - params.keys()):
        raise ValueError(f"the saved optimiser has the parameters {missing}, which are not among {sorted(params)}")
    for name, saved in copy.deepcopy({**state}).items():
        param = params[name]
        if param not in optim.optim_objs:  # as PyroOptim does at a parameter's first step
            optim.optim_objs[param] = optim._get_optim(param)
            optim.grad_clip[param] = optim._get_grad_clip(param)  # type: ignore[arg-type]
        made = optim.optim_objs[param]
        if saved["kind"] != _kind(made):
            raise ValueError(
                f"the saved optimiser of parameter {name!r} is {saved['kind']}, the one here is {_kind(made)}"
            )
        optimiser, scheduler = _parts(made)
        grad, param.grad = param.grad, None
        optimiser.step()  # moves nothing without a gradient; a scheduler warns if no step came before its own
        param.grad = grad
        optimiser.load_state_dict(saved["optimiser"])
        for key, value in saved["optimiser"]["state"].get(0, {}).items():
            if isinstance(value, Tensor):  # loading casts to the parameter's dtype what was kept in another one
                optimiser.state[param][key] = value.to(optimiser.state[param][key].device)
        if scheduler is not None:
            scheduler.load_state_dict(saved["scheduler"])


def _check_optim(optim: Any) -> None:
    if not isinstance(optim, PyroOptim):
        raise TypeError(f"the optimiser must be a pyro.optim.PyroOptim, got {optim!r}")
    if optim.pt_optim_constructor is torch.optim.LBFGS:
        raise TypeError("the optimiser must take steps without a closure, as SVI asks for them; LBFGS does not")


def _parts(made: Any) -> tuple[torch.optim.Optimizer, Any]:
    """The optimiser and the scheduler, or None, of one parameter."""
    return (made.optimizer, made) if hasattr(made, "optimizer") else (made, None)


def _kind(made: Any) -> str:
    optimiser, scheduler = _parts(made)
    return type(optimiser).__name__ + (f" with {type(scheduler).__name__}" if scheduler is not None else "")


def _state_of(made: Any) -> dict[str, Any]:
    optimiser, scheduler = _parts(made)
    return {
        "kind": _kind(made),
        "optimiser": optimiser.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
    }


def fingerprint(model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a model and a guide, so that a checkpoint of others is recognised by :func:`check_same`.

    The description has their names, the model's sites, summaries of the data and of a draw from the prior, and the
    names and shapes of the parameters. It takes a run of the guide and a run of the model, in which nothing is scored,
    so that no observed simulator runs. A prior that may change while a fit goes on, because the model has parameters,
    or that cannot be drawn from is not summarised.

    The generators are left as they were. A guide that makes its parameters when it is first called must have been
    called before, or they would start from the numbers drawn here.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: arguments of both.
        kwargs: keyword arguments of both.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("theta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        >>> def guide():
        ...     pyro.sample("theta", dist.Delta(torch.zeros(3), event_dim=1))
        >>> description = fingerprint(model, guide, (), {})
        >>> description["model"], description["guide"], description["site 'theta'"]
        ('model', 'guide', 'Normal of shape () and event shape (3,)')
    """
    model_trace, guide_trace, prior_is_fixed = _run(model, guide, args, kwargs)
    description: dict[str, Any] = {"model": _name(model), "guide": _name(guide)}
    sites: dict[str, Any] = {**prune_subsample_sites(model_trace).nodes}
    for name, site in sites.items():
        if site["type"] == "sample":
            description[f"site {name!r}"] = _describe(site)
            if _is_fixed(site, prior_is_fixed):
                kind = "data" if site["is_observed"] else "prior"
                description[f"{kind} of site {name!r}"] = summary(site["value"])
                if site["is_observed"] and prior_is_fixed and not can_fail(site):
                    with forked_rng(0), suppress(Exception):  # whatever is wrong with it there, scoring will say
                        description[f"likelihood at site {name!r}"] = summary(site["fn"].log_prob(site["value"]))
    for name, value in {**dict(enumerate(args)), **kwargs}.items():
        described = _describe_argument(value)
        if described is not None:
            description[f"argument {name!r}"] = described
    for trace in (model_trace, guide_trace):
        for name in trace.param_nodes:
            value: Any = trace.nodes[name]["value"]
            unconstrained = value.unconstrained() if hasattr(value, "unconstrained") else value
            description[f"parameter {name!r}"] = f"of shape {tuple(unconstrained.shape)}"
    return description


def _run(model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Trace, Trace, bool]:
    """Traces of the model and of the guide, and whether the model's shows the prior as it is throughout a fit."""
    with poutine.block(), torch.enable_grad():  # with gradients, which tell what hangs on the parameters
        with forked_rng(0):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        try:
            with forked_rng(0):
                model_trace = poutine.trace(model).get_trace(*args, **kwargs)
        except Exception:  # such as that of an improper prior; a model that is broken raises below as well
            with forked_rng(0):
                model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
            return model_trace, guide_trace, False
    return model_trace, guide_trace, not model_trace.param_nodes


def _describe(site: Any) -> str:
    fn, value = site["fn"], site["value"]
    # The event shape is the value's: a simulator's own is not known before it has run.
    event_shape = tuple(value.shape[value.dim() - len(fn.event_shape) :])
    return (
        f"{_kind_of_distribution(fn)} of shape {tuple(fn.batch_shape)}"
        + (f" and event shape {event_shape}" if event_shape else "")
        + (", observed" if site["is_observed"] else "")
        + (f", on {value.device.type}" if value.device.type != "cpu" else "")  # which draws other numbers
    )


def _describe_argument(value: Any) -> Any:
    """What a file can hold of an argument; None of what says nothing."""
    if isinstance(value, Tensor):
        return summary(value) if value.layout is torch.strided else None
    for kind in (bool, int, float, str):  # plain ones of what may be NumPy's, or an Enum's
        if isinstance(value, kind):
            return kind(value)
    return None


def _is_fixed(site: Any, prior_is_fixed: bool) -> bool:
    """Whether the value of a site is the same in every run from the same seed, whatever was learnt before."""
    if not site["is_observed"] or _kind_of_distribution(site["fn"]) == "Delta":  # which follows from latents
        return prior_is_fixed
    return not site["value"].requires_grad


def _name(fn: Any) -> str:
    """The name of a function or of an object's class, without the handlers and arguments wrapped around it."""
    while isinstance(fn, partial):
        fn = fn.args[1] if fn.args and isinstance(fn.args[0], Messenger) else fn.func
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


def _kind_of_distribution(fn: Any) -> str:
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return getattr(fn, "made_of", type(fn).__name__)


def summary(value: Tensor) -> dict[str, Any]:
    """What tells a tensor from another, but for rounding."""
    value = value.detach().cpu().double()
    finite = value[value.isfinite()]
    size = finite.square().mean().sqrt().item()
    return {
        "shape": str(tuple(value.shape)),
        "number of NaN": int(value.isnan().sum()),
        # Side by side, for a mean near zero is known only up to the rounding of its terms.
        "mean and root mean square": [finite.mean().item(), size],
        "mean weighted by position": [(finite * torch.arange(len(finite)).cos()).mean().item(), size],
    }


def check_same(path: str | os.PathLike[str], saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise if two descriptions differ.

    Floating-point numbers, and lists of them as a whole, may differ by 1e-5 of the largest, so that another machine's
    rounding passes.

    Args:
        path: the file that ``saved`` comes from, for the message.
        saved: strings, numbers, lists of numbers and None by what they describe, also in dicts.
        current: the like, of what is to go on from the file.

    Raises:
        ValueError: they differ; each difference is named.

    Example:
        >>> check_same("fit.pt", {"guide": "AutoNormal", "elbo": {"w": 1}}, {"guide": "AutoDelta", "elbo": {"w": 2}})
        Traceback (most recent call last):
            ...
        ValueError: fit.pt is a checkpoint of another run:
          guide: AutoNormal in the file, AutoDelta here
          elbo, w: 1 in the file, 2 here
        To start anew delete the file, or take another path.
    """
    if found := [*_differences(saved, current)]:
        lines = "".join(f"\n  {difference}" for difference in found)
        raise ValueError(
            f"{os.fspath(path)} is a checkpoint of another run:{lines}\n"
            "To start anew delete the file, or take another path."
        )


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for name in {**saved, **current}:
        what = f"{within}{name}"
        if name not in saved or name not in current:
            yield f"{what}: only {'in the file' if name in saved else 'here'}"
        elif isinstance(saved[name], Mapping) and isinstance(current[name], Mapping):
            yield from _differences(saved[name], current[name], f"{what}, ")
        elif not _same(saved[name], current[name]):
            yield f"{what}: {_text(saved[name])} in the file, {_text(current[name])} here"


def _same(a: Any, b: Any) -> bool:
    a, b = ([*value] if isinstance(value, list | tuple) else [value] for value in (a, b))
    floats = [abs(x) for x in (*a, *b) if isinstance(x, float) and math.isfinite(x)]
    tolerance = 1e-5 * max(floats, default=0.0)
    return len(a) == len(b) and all(_close(x, y, tolerance) for x, y in zip(a, b, strict=True))


def _close(x: Any, y: Any, tolerance: float) -> bool:
    if not isinstance(x, float) or not isinstance(y, float):
        return x == y
    return x == y or abs(x - y) <= tolerance or (math.isnan(x) and math.isnan(y))


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:.7g}" if isinstance(value, float) else str(value)
