"""Checkpoints outlive kills, are refused if they are not their own, and let generators and optimisers go on bitwise."""

import enum
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalMessenger, init_to_value
from pyro.nn import PyroModule
from pyro.optim import PyroLRScheduler, PyroOptim, pytorch_optimizers
from torch.distributions import constraints

from pyrobirds import Simulator, checkpoints, losses, tempered
from pyrobirds.checkpoints import (
    CheckpointFile,
    check_same,
    fingerprint,
    load_optimiser_state,
    optimiser_state,
    rng_state,
    set_rng_state,
)


def run_in_new_process(code: str, *args: object) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same(a: object, b: object) -> bool:
    """Whether two nested states are bitwise equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


# The file


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        "tensors": [torch.rand(3), torch.arange(4).reshape(2, 2), torch.tensor([True])],
        "numbers": (1, -2.5, float("inf"), 2**100, True),
        "nested": {"none": None, "text": "ä", 0: {}},
        "parameter": torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)),
    }
    file = CheckpointFile(tmp_path / "fit.pt")
    assert not file.exists()
    file.write(state)
    assert file.exists()
    assert same(CheckpointFile(str(tmp_path / "fit.pt")).read(), state)
    assert [path.name for path in tmp_path.iterdir()] == ["fit.pt"]


def test_the_path_is_the_one_of_construction(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "elsewhere" / "fit.pt")
    file = CheckpointFile("link.pt")
    monkeypatch.chdir("/")
    file.write({"step": 1})
    assert (tmp_path / "link.pt").is_symlink()
    assert CheckpointFile(tmp_path / "elsewhere" / "fit.pt").read() == {"step": 1}


def test_only_readable_states_replace_a_file(tmp_path):
    file = CheckpointFile(tmp_path / "fit.pt")
    file.write({"step": 1})
    for bad in (np.random.RandomState(), Path(), lambda: None, [object()]):
        with pytest.raises(
            TypeError,
            match=r"^a checkpoint can store tensors, numbers, strings and None, also in dicts, lists and tuples; there "
            r"is something else in its entry 'worse', 'bad'$",
        ):
            file.write({"step": 2, "worse": {"a": bad}, "bad": bad})
    assert file.read() == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["fit.pt"]


def test_a_failed_write_leaves_the_file_and_no_litter(tmp_path, monkeypatch):
    file = CheckpointFile(tmp_path / "fit.pt")
    file.write({"step": 1})

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        file.write({"step": 2})
    assert file.read() == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["fit.pt"]


def test_data_are_on_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    calls = []

    def record(name: str) -> None:
        real = getattr(os, name)

        def recorded(*args: object) -> object:
            is_folder = name == "fsync" and Path(f"/proc/self/fd/{args[0]}").resolve() == tmp_path.resolve()
            calls.append("fsync of the folder" if is_folder else name)
            return real(*args)

        monkeypatch.setattr(os, name, recorded)

    record("fsync")
    record("replace")
    CheckpointFile(tmp_path / "fit.pt").write({"step": 1})
    assert calls[:2] == ["fsync", "replace"]
    assert len(calls) == 3
    if sys.platform == "linux":
        assert calls[2] == "fsync of the folder"


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise PermissionError("folders cannot be opened here")

    file = CheckpointFile(tmp_path / "fit.pt")
    monkeypatch.setattr(os, "open", refuse)
    file.write({"step": 1})
    assert file.read() == {"step": 1}


def test_where_no_file_can_be_is_an_error_at_once(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"^checkpoint must be the path of a file, got 3$"):
        CheckpointFile(3)  # type: ignore[arg-type]
    with pytest.raises(
        IsADirectoryError, match=f"^checkpoint must be the path of a file, but {tmp_path} is a folder: add a name$"
    ):
        CheckpointFile(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"^checkpoint must lie in a folder that exists, but {tmp_path}/none does not$"
    ):
        CheckpointFile(tmp_path / "none" / "fit.pt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(
        PermissionError,
        match=f"^checkpoint must lie in a folder that can be written to, but {tmp_path} cannot$",
    ):
        CheckpointFile(tmp_path / "fit.pt")


def refusal(path: Path, found: str) -> str:
    return (
        f"^expected a checkpoint of format version 1 in {path}, found {found}: delete the file to start anew, or take "
        "another path$"
    )


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "fit.pt"
    file = CheckpointFile(path)
    with pytest.raises(FileNotFoundError, match=str(path)):
        file.read()
    file.write({"values": torch.rand(1000)})
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=refusal(path, "one that is damaged or of another kind")):
            file.read()
    for text in (b"step,loss\n1,2\n", b"\x80\x04", b"PK\x03\x04"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=refusal(path, "one that is damaged or of another kind")):
            file.read()
    for other in (torch.rand(3), {"step": 3}, AutoNormal(lambda: None).state_dict()):
        torch.save(other, path)
        with pytest.raises(ValueError, match=refusal(path, "one of another kind")):
            file.read()
    torch.save(torch.nn.Linear(2, 2), path)  # loading it would run code
    with pytest.raises(ValueError, match=refusal(path, "one that is damaged or of another kind")):
        file.read()


def test_another_version_is_refused(tmp_path, monkeypatch):
    file = CheckpointFile(tmp_path / "fit.pt")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_VERSION", 2)
        file.write({"step": 1})
    with pytest.raises(ValueError, match=refusal(tmp_path / "fit.pt", "one of version 2")):
        file.read()


KILLS = """
import os, random, signal, sys, time
import torch
from pyrobirds.checkpoints import CheckpointFile

torch.set_num_threads(1)
file = CheckpointFile(sys.argv[1])
temporary = file.path.with_name(file.path.name + ".tmp")
file.write({"step": 0, "values": torch.zeros(100_000, dtype=torch.int64)})
random.seed(0)
last = kills = midway = 0
while kills < 50 or midway < 5 or last < 10:
    kills += 1
    child = os.fork()
    if child == 0:
        step = last
        while True:
            step += 1
            file.write({"step": step, "values": torch.full((100_000,), step)})
    time.sleep(random.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    midway += temporary.exists()
    temporary.unlink(missing_ok=True)
    state = file.read()
    assert bool((state["values"] == state["step"]).all()), "a mixture of two states"
    assert state["step"] >= last, "an older state than before"
    last = state["step"]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to kill many processes in little time")
def test_a_killed_process_leaves_a_whole_state(tmp_path):
    # It goes on until kills have come in the middle of a write, and states have been written between them.
    run_in_new_process(KILLS, tmp_path / "fit.pt")


# Generators

DRAW = """
import random
import numpy as np
import torch

def draw():
    tensors = [torch.rand(3), torch.randn(5), torch.tensor([random.random(), random.gauss(0, 1), random.gauss(0, 1)])]
    return [*tensors, torch.from_numpy(np.concatenate([np.random.normal(size=3), np.random.random(3)]))]
"""

GO_ON = (
    DRAW
    + """
import sys
from pyrobirds.checkpoints import CheckpointFile, set_rng_state

set_rng_state(CheckpointFile(sys.argv[1]).read()["rng"])
torch.save(draw(), sys.argv[2])
"""
)


def test_generators_go_on_in_a_new_process(tmp_path):
    draw = {}
    exec(DRAW, draw)
    draw["draw"]()  # an odd number of normals: each generator keeps one for later
    assert random.getstate()[2] is None
    random.gauss(0, 1)
    assert random.getstate()[2] is not None
    assert np.random.get_state()[3] == 1  # noqa: NPY002
    CheckpointFile(tmp_path / "fit.pt").write({"rng": rng_state()})
    expected = draw["draw"]()
    run_in_new_process(GO_ON, tmp_path / "fit.pt", tmp_path / "draws.pt")
    assert same(torch.load(tmp_path / "draws.pt"), expected)


def test_reading_the_generators_does_not_move_them():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    state = rng_state()
    set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_generators_of_cuda_are_kept_for_the_devices_there_are(monkeypatch):
    states, restored = [torch.tensor([1]), torch.tensor([2])], {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    saved = rng_state()
    assert saved["cuda"] == states
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.update({device: state}))
    set_rng_state(saved)
    assert restored == {0: states[0]}


# Optimisers

EXPOSED = {*pytorch_optimizers.__all__, "AdagradRMSProp", "ClippedAdam", "DCTAdam"}
SCHEDULERS = {name for name in EXPOSED if hasattr(torch.optim.lr_scheduler, name)}

OPTIMISERS = {
    "Adadelta": [{}],
    "Adafactor": [{"lr": 0.1}],
    "Adagrad": [{"lr": 0.1, "lr_decay": 0.1}],
    "AdagradRMSProp": [{}],
    "Adam": [{"lr": 0.1}, {"lr": 0.1, "amsgrad": True}, {"lr": torch.tensor(0.1)}],
    "AdamW": [{"lr": 0.1}],
    "Adamax": [{"lr": 0.1}],
    "ASGD": [{"lr": 0.1, "t0": 2}],
    "ClippedAdam": [{"lr": 0.1, "lrd": 0.9}, {"lr": 0.1, "centered_variance": True}],
    "DCTAdam": [{"lr": 0.1, "lrd": 0.9}],
    "Muon": [{"lr": 0.1}],
    "NAdam": [{"lr": 0.1}],
    "RAdam": [{"lr": 0.1}],
    "RMSprop": [{"lr": 0.1}, {"lr": 0.1, "centered": True, "momentum": 0.9}],
    "Rprop": [{"lr": 0.1}],
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True}],
    "SparseAdam": [{"lr": 0.1}],
}
SCHEDULES = {
    "ConstantLR": [{"total_iters": 7}],
    "CosineAnnealingLR": [{"T_max": 7}],
    "CosineAnnealingWarmRestarts": [{"T_0": 3, "T_mult": 2}],
    "CyclicLR": [
        {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4, "mode": mode} for mode in ("triangular2", "exp_range")
    ]
    + [{"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4, "scale_fn": lambda cycle: 0.5**cycle}],
    "ExponentialLR": [{"gamma": 0.9}],
    "LambdaLR": [{"lr_lambda": lambda epoch: 0.9**epoch}],
    "LinearLR": [{"total_iters": 7}],
    "MultiplicativeLR": [{"lr_lambda": lambda epoch: 0.9}],
    "MultiStepLR": [{"milestones": [2, 4, 7, 7]}],
    "OneCycleLR": [{"max_lr": 0.1, "total_steps": 12}, {"max_lr": 0.1, "total_steps": 12, "three_phase": True}],
    "PolynomialLR": [{"total_iters": 8, "power": 2.0}],
    "ReduceLROnPlateau": [{"patience": 1}, {"patience": 1, "cooldown": 2}],
    "StepLR": [{"step_size": 3}],
}
# Pyro exposes them, but they cannot take a step: the first two are bases, the others need schedulers of one optimiser
# each, where Pyro makes an optimiser for each parameter.
UNUSABLE = {
    "LRScheduler": ({}, NotImplementedError, None),
    "_LRScheduler": ({}, NotImplementedError, None),
    "ChainedScheduler": ({}, TypeError, r"object of type 'SGD' has no len\(\)"),
    "SequentialLR": ({"schedulers": [], "milestones": []}, ValueError, "expects at least one scheduler"),
}


def test_the_tables_hold_all_that_pyro_exposes():
    assert OPTIMISERS.keys() == EXPOSED - SCHEDULERS
    assert SCHEDULES.keys() | UNUSABLE.keys() == SCHEDULERS


def start(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """New parameters, as a new process has them."""
    pyro.clear_param_store()
    values = {"a": torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=dtype), "b": torch.full((1, 3), 0.3, dtype=dtype)}
    return {name: pyro.param(name, value).unconstrained() for name, value in values.items()}


def train(optim: PyroOptim, params: dict[str, torch.Tensor], first: int, stop: int) -> None:
    for step in range(first, stop):
        for i, param in enumerate(params.values()):
            noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + i), dtype=param.dtype)
            param.grad = param.detach() + noise
            if optim.pt_optim_constructor is torch.optim.SparseAdam:
                param.grad = param.grad.to_sparse()
        optim(params.values())
        if isinstance(optim, PyroLRScheduler):
            needs_metric = optim.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau
            optim.step(*([1.0] if needs_metric else []))


def check_goes_on(make, tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Ten steps, and five steps, a file, a new optimiser of new parameters and five more, end in the same.

    Returns:
        The optimiser's states after five and after ten steps.
    """
    params, optim = start(dtype), make()
    initial = {name: param.detach().clone() for name, param in params.items()}
    train(optim, params, 0, 10)
    values = {name: param.detach().clone() for name, param in params.items()}
    expected = optimiser_state(optim, params)

    params, optim = start(dtype), make()
    train(optim, params, 0, 5)
    middle = {name: param.detach().clone() for name, param in params.items()}
    file = CheckpointFile(tmp_path / "fit.pt")
    file.write({"params": middle, "optimiser": optimiser_state(optim, params)})
    assert all(not torch.equal(middle[name], initial[name]) for name in params)
    assert all(not torch.equal(middle[name], values[name]) for name in params)

    params, optim, saved = start(dtype), make(), file.read()
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(saved["params"][name])
    load_optimiser_state(optim, params, saved["optimiser"])
    assert all(torch.equal(params[name], middle[name]) for name in params)  # loading moves nothing
    assert same(optimiser_state(optim, params), saved["optimiser"])
    train(optim, params, 5, 10)
    assert all(torch.equal(params[name], values[name]) for name in params)
    assert same(optimiser_state(optim, params), expected)  # the learning rates are in it
    return saved["optimiser"], expected


def cases(table: dict[str, list[dict]]) -> list:
    return [pytest.param(name, args, id=f"{name}{i}") for name in sorted(table) for i, args in enumerate(table[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "args"), cases(OPTIMISERS))
def test_every_optimiser_goes_on(name, args, dtype, tmp_path):
    check_goes_on(lambda: getattr(pyro.optim, name)({**args}), tmp_path, dtype)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(("name", "args"), cases(SCHEDULES))
def test_every_scheduler_goes_on(name, args, optimiser, tmp_path):
    optim_args = {"lr": 0.1, **({"momentum": 0.9} if optimiser is torch.optim.SGD else {})}

    def make() -> PyroOptim:
        return getattr(pyro.optim, name)({"optimizer": optimiser, "optim_args": optim_args, **args})

    states = check_goes_on(make, tmp_path)
    middle, last = (state["a"]["optimiser"]["param_groups"][0]["lr"] for state in states)
    assert middle != last


def in_a_chain(optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    return schedulers.ChainedScheduler([schedulers.ExponentialLR(optimiser, 0.9), schedulers.StepLR(optimiser, 3)])


def in_a_row(optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    parts = [schedulers.LinearLR(optimiser, total_iters=4), schedulers.ExponentialLR(optimiser, 0.9)]
    return schedulers.SequentialLR(optimiser, parts, milestones=[4])


@pytest.mark.parametrize("constructor", [in_a_chain, in_a_row])
def test_schedulers_of_schedulers_go_on(constructor, tmp_path):
    args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}}
    check_goes_on(lambda: PyroLRScheduler(constructor, {**args}), tmp_path)


@pytest.mark.parametrize("name", sorted(UNUSABLE))
def test_unusable_schedulers_fail_in_pyro_already(name):
    args, error, message = UNUSABLE[name]
    optim = getattr(pyro.optim, name)({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, **args})
    with pytest.raises(error, match=message):
        train(optim, start(torch.float32), 0, 1)


def test_arguments_by_parameter_and_clipping_go_on(tmp_path):
    def args(name: str) -> dict[str, float]:
        return {"lr": 0.1 if name == "a" else 0.02}

    check_goes_on(lambda: PyroOptim(torch.optim.Adam, args, {"clip_norm": 0.5}), tmp_path)
    check_goes_on(lambda: PyroOptim(torch.optim.Adam, args, lambda module, name: {"clip_value": 0.5}), tmp_path)


def test_parameters_in_the_frequency_domain_go_on(tmp_path, monkeypatch):
    unmarked = start

    def marked(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        params = unmarked(dtype)
        params["b"]._pyro_dct_dim = -1
        return params

    monkeypatch.setitem(globals(), "start", marked)
    check_goes_on(lambda: pyro.optim.DCTAdam({"lr": 0.1}), tmp_path)


def test_a_scheduler_that_has_not_stepped_yet_goes_on_without_a_warning(tmp_path):
    def make() -> PyroLRScheduler:
        return pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})

    params, optim = start(torch.float32), make()
    for param in params.values():
        param.grad = torch.ones_like(param)
    optim(params.values())
    state = optimiser_state(optim, params)
    params, optim = start(torch.float32), make()
    load_optimiser_state(optim, params, state)
    optim.step()  # warns, which is an error here, where no step of the optimiser seems to have come before
    assert optim.optim_objs[params["a"]].get_last_lr() == [0.05]


def test_loading_uses_no_gradient_that_is_there():
    params = start(torch.float32)
    optim = pyro.optim.SGD({"lr": 0.1})
    train(optim, params, 0, 1)
    state, values = optimiser_state(optim, params), {name: param.detach().clone() for name, param in params.items()}
    grads = {name: param.grad for name, param in params.items()}
    load_optimiser_state(optim, params, state)
    assert all(torch.equal(params[name], values[name]) for name in params)
    assert all(params[name].grad is grads[name] for name in params)


def test_a_state_is_a_copy():
    params = start(torch.float32)
    optim = pyro.optim.Adam({"lr": 0.1})
    train(optim, params, 0, 1)
    state = optimiser_state(optim, params)
    mean = state["a"]["optimiser"]["state"][0]["exp_avg"].clone()
    train(optim, params, 1, 3)
    load_optimiser_state(optim, params, state)
    train(optim, params, 1, 3)
    assert torch.equal(state["a"]["optimiser"]["state"][0]["exp_avg"], mean)


def test_parameters_without_a_step_are_left_out():
    params = start(torch.float32)
    optim = pyro.optim.Adam({"lr": 0.1})
    train(optim, {"a": params["a"]}, 0, 1)
    state = optimiser_state(optim, params)
    assert state.keys() == {"a"}
    resumed = pyro.optim.Adam({"lr": 0.1})
    load_optimiser_state(resumed, params, state)
    assert {*resumed.optim_objs} == {params["a"]}


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (torch.optim.SGD([torch.zeros(2)], lr=0.1), "^the optimiser must be a pyro.optim.PyroOptim, got SGD"),
        (pyro.optim.multi.MixedMultiOptimizer([]), "^the optimiser must be a pyro.optim.PyroOptim, got .*MixedMulti"),
        (
            PyroOptim(torch.optim.LBFGS, {}),
            "^the optimiser must take steps without a closure, as SVI asks for them; LBFGS does not$",
        ),
    ],
)
def test_what_cannot_be_an_optimiser_of_svi_is_refused(optim, message):
    with pytest.raises(TypeError, match=message):
        optimiser_state(optim, {})
    with pytest.raises(TypeError, match=message):
        load_optimiser_state(optim, {}, {})


def test_states_of_other_optimisers_and_parameters_are_refused():
    params = start(torch.float32)
    optim = pyro.optim.Adam({"lr": 0.1})
    train(optim, params, 0, 1)
    state = optimiser_state(optim, params)
    other = pyro.optim.StepLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "step_size": 3})
    with pytest.raises(
        ValueError, match=r"^the saved optimiser of parameter 'a' is Adam, the one here is SGD with StepLR$"
    ):
        load_optimiser_state(other, params, state)
    with pytest.raises(
        ValueError, match=r"^the saved optimiser has the parameters \['b'\], which are not among \['a'\]$"
    ):
        load_optimiser_state(pyro.optim.Adam({"lr": 0.1}), {"a": params["a"]}, state)


# Descriptions


def random_walk(theta: torch.Tensor) -> torch.Tensor:
    random_walk.calls += 1
    return theta.unsqueeze(-1) + torch.randn(*theta.shape, 20).cumsum(-1)


random_walk.calls = 0
walk = Simulator(random_walk, loss=losses.mse)


def model(y, prior=dist.Normal(0.0, 1.0), num_series=3):  # noqa: B008
    mean = pyro.sample("mean", prior)
    with pyro.plate("series", num_series):
        theta = pyro.sample("theta", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).mask(True))
        pyro.sample("x", walk(mean + theta.sum(-1)), obs=y)


def changes(saved: dict, current: dict) -> str:
    """What the user reads of two descriptions, without the frame."""
    with pytest.raises(ValueError, match=r"^fit\.pt is a checkpoint of another run:\n") as caught:
        check_same("fit.pt", saved, current)
    _, *lines, last = str(caught.value).split("\n")
    assert last == "To start anew delete the file, or take another path."
    return "\n".join(line.removeprefix("  ") for line in lines)


@pytest.fixture
def y() -> torch.Tensor:
    return torch.linspace(-1.0, 2.0, 60).reshape(3, 20)


def described(fn, y, *, guide_class=AutoNormal, **kwargs):
    pyro.clear_param_store()
    guide = guide_class(fn)
    guide(y, **kwargs)
    return fingerprint(fn, guide, (y,), kwargs)


def test_a_description_is_what_a_file_can_hold(y, tmp_path):
    description = described(model, y)
    file = CheckpointFile(tmp_path / "fit.pt")
    file.write({"fingerprint": description})
    check_same("fit.pt", file.read()["fingerprint"], description)
    assert {name: value for name, value in description.items() if isinstance(value, str)} == {
        "model": "model",
        "guide": "AutoNormal",
        "site 'mean'": "Normal of shape ()",
        "site 'theta'": "MultivariateNormal of shape (3,) and event shape (2,)",
        "site 'x'": "Simulator(random_walk, mse, seed=None) of shape (3,) and event shape (20,), observed",
        "parameter 'AutoNormal.locs.mean'": "of shape ()",
        "parameter 'AutoNormal.locs.theta'": "of shape (3, 2)",
        "parameter 'AutoNormal.scales.mean'": "of shape ()",
        "parameter 'AutoNormal.scales.theta'": "of shape (3, 2)",
    }
    assert description["data of site 'x'"] == {
        "shape": "(3, 20)",
        "number of NaN": 0,
        "mean and root mean square": pytest.approx([0.5, (0.25 + 9 / 12 * 61 / 59) ** 0.5], rel=1e-6),
        "mean weighted by position": description["argument 0"]["mean weighted by position"],
    }
    assert {"prior of site 'mean'", "prior of site 'theta'"} < description.keys()


def test_a_description_simulates_nothing_and_moves_no_generator(y):
    guide = AutoNormal(model)
    guide(y)
    random_walk.calls = 0
    before = rng_state()
    with poutine.trace() as outside:
        fingerprint(model, guide, (y,), {})
    assert same(rng_state(), before)
    assert random_walk.calls == 0
    assert not outside.trace.nodes


def test_it_is_the_same_after_training_and_after_simulations(y):
    """Whether latents or parameters moved, or a simulator has run meanwhile, makes no other fit."""

    def improper(y):
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        theta = pyro.sample("theta", dist.Normal(z, scale))
        pyro.deterministic("doubled", 2 * theta)
        pyro.sample("shifted", dist.Normal(0.0, 1.0), obs=y.mean() - theta)
        pyro.sample("x", walk(theta + 0.0 * torch.rand(())), obs=y[0])

    def learnt(y):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        theta = pyro.sample("theta", dist.Normal(0.0, scale))
        coin = pyro.sample("coin", dist.Bernoulli(logits=20.0 * (scale - 1.0) - 1.0))
        pyro.deterministic("heads", coin.bool())
        pyro.sample("scaled", dist.Normal(theta, 1.0).expand([60]).to_event(1), obs=y.flatten() / scale)

    for fn in (model, improper, learnt):
        pyro.clear_param_store()
        walk.event_shapes.clear()  # as if it had not run
        continuous = AutoNormal(
            poutine.block(fn, hide=["coin"]), init_loc_fn=init_to_value(values={"z": torch.zeros(())})
        )

        def guide(y, fn=fn, continuous=continuous):
            continuous(y)
            if fn is learnt:
                pyro.sample(
                    "coin", dist.Bernoulli(pyro.param("prob", torch.tensor(0.5), constraint=constraints.unit_interval))
                )

        guide(y)
        generators = rng_state()
        before = fingerprint(fn, guide, (y,), {})
        assert same(rng_state(), generators)
        svi = SVI(fn, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(3):
            svi.step(y)
        assert walk.event_shapes or fn is learnt
        check_same("fit.pt", before, fingerprint(fn, guide, (y,), {}))


def test_another_model_or_guide_is_named(y):
    def other(y):
        model(y)

    here = described(model, y)
    assert "model: model in the file, test_another_model_or_guide_is_named.<locals>.other here" in changes(
        here, described(other, y)
    )
    text = changes(here, described(model, y, guide_class=AutoMultivariateNormal))
    assert "guide: AutoNormal in the file, AutoMultivariateNormal here" in text
    assert "parameter 'AutoNormal.locs.mean': only in the file" in text
    assert "parameter 'AutoMultivariateNormal.loc': only here" in text
    assert "site" not in text


def test_changed_sites_are_named(y):
    here = described(model, y)
    text = changes(here, described(model, y, prior=dist.Gamma(2.0, 1.0)))
    assert "site 'mean': Normal of shape () in the file, Gamma of shape () here" in text
    text = changes(here, described(model, y[:2], num_series=2))
    assert (
        "site 'x': Simulator(random_walk, mse, seed=None) of shape (3,) and event shape (20,), observed in the file, "
        "Simulator(random_walk, mse, seed=None) of shape (2,) and event shape (20,), observed here" in text
    )
    assert "data of site 'x', shape: (3, 20) in the file, (2, 20) here" in text
    assert "parameter 'AutoNormal.locs.theta': of shape (3, 2) in the file, of shape (2, 2) here" in text
    text = changes(here, described(poutine.block(model, hide=["mean"]), y))
    assert "site 'mean': only in the file\nprior of site 'mean': only in the file" in text
    text = changes(here, described(poutine.condition(model, data={"mean": torch.tensor(0.5)}), y))
    assert "site 'mean': Normal of shape () in the file, Normal of shape (), observed here" in text
    assert "data of site 'mean': only here" in text


def test_a_changed_prior_is_named(y):
    text = changes(described(model, y), described(model, y, prior=dist.Normal(0.0, 2.0)))
    draw = torch.Generator().manual_seed(0)
    draw = torch.randn((), generator=draw).item()
    assert text.startswith(
        f"prior of site 'mean', mean and root mean square: [{draw:.7g}, {abs(draw):.7g}] in the file, "
        f"[{2 * draw:.7g}, {2 * abs(draw):.7g}] here"
    )


def test_changed_data_are_named(y):
    here = described(model, y)
    text = changes(here, described(model, y + 1e-3))
    rms = [each.double().square().mean().sqrt().item() for each in (y, y + 1e-3)]
    assert (
        f"data of site 'x', mean and root mean square: [0.5, {rms[0]:.7g}] in the file, [0.501, {rms[1]:.7g}] here"
        in text
    )
    assert "argument 0, mean and root mean square: " in text
    reordered = changes(here, described(model, y.flip(-1)))
    assert "data of site 'x', mean weighted by position: " in reordered
    assert "mean and root mean square" not in reordered
    with_gap = y.clone()
    with_gap[0, 0] = float("nan")
    assert "data of site 'x', number of NaN: 0 in the file, 1 here" in changes(here, described(model, with_gap))
    check_same("fit.pt", here, described(model, y * (1 + 1e-7)))


def test_other_likelihoods_and_covariates_are_named():
    def regression(scale):
        def model(x, y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta * x, scale).to_event(1), obs=y)

        return model

    def of(scale, x):
        made = regression(scale)
        pyro.clear_param_store()
        guide = AutoNormal(made)
        guide(x, torch.ones(3))
        return fingerprint(made, guide, (x, torch.ones(3)), {})

    text = changes(of(1.0, torch.ones(3)), of(30.0, torch.ones(3)))
    assert text.startswith("likelihood at site 'y', mean and root mean square: ")
    text = changes(of(1.0, torch.ones(3)), of(1.0, torch.arange(3.0)))
    assert "argument 0, mean and root mean square: [1, 1] in the file" in text


def test_arguments_are_named_and_need_not_be_plain():
    class Kind(enum.IntEnum):
        A = 1

    def with_arguments(y, scale=1.0, optimiser=2.0, model=0):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta * optimiser, scale).expand([3]).to_event(1), obs=y)

    def of(**kwargs):
        pyro.clear_param_store()
        guide = AutoNormal(with_arguments)
        guide(torch.ones(3), **kwargs)
        return fingerprint(with_arguments, guide, (torch.ones(3),), kwargs)

    here = of(scale=np.float64(2.0), model=Kind.A)
    assert type(here["argument 'scale'"]) is float
    assert type(here["argument 'model'"]) is int
    assert here["model"].endswith("with_arguments")
    assert "argument 'optimiser': 1 in the file, 5 here" in changes(of(optimiser=1.0), of(optimiser=5.0))
    sparse = of(model=torch.eye(3).to_sparse())
    assert "argument 'model'" not in sparse


def test_a_noisy_likelihood_changes_no_generator_and_is_its_own():
    class Noisy(dist.TorchDistribution):
        def __init__(self, theta):
            self.theta = theta
            super().__init__(theta.shape, validate_args=False)

        def log_prob(self, value):
            if self.theta > 100:
                raise RuntimeError("solver failed")
            return -((self.theta + torch.randn(self.theta.shape) - value) ** 2)

    for prior in (0.0, 1000.0):

        def noisy(y, prior=prior):
            pyro.sample("y", Noisy(pyro.sample("theta", dist.Normal(prior, 1.0))), obs=y)

        pyro.clear_param_store()
        guide = AutoNormal(noisy)
        guide(torch.ones(()))
        before = torch.get_rng_state()
        check_same("fit.pt", *(fingerprint(noisy, guide, (torch.ones(()),), {}) for _ in range(2)))
        assert torch.equal(torch.get_rng_state(), before)


def test_rounding_of_data_with_mean_zero_is_no_change():
    def gaussian(y):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0).expand(y.shape).to_event(1), obs=y)

    y = torch.randn(1000)
    y = (y - y.mean()) / y.std()
    saved, current = described(gaussian, y), described(gaussian, y + 1e-7)
    means = [each["data of site 'y'"]["mean and root mean square"][0] for each in (saved, current)]
    assert abs(means[0] - means[1]) > 1e-5 * abs(means[0])
    check_same("fit.pt", saved, current)
    all_missing = described(gaussian, torch.full((3,), float("nan")))
    check_same("fit.pt", all_missing, all_missing)


def test_names_are_those_below_arguments_and_handlers(y):
    wrapped = [
        model,
        partial(model, num_series=3),
        poutine.scale(model, scale=2.0),
        partial(poutine.scale(model, scale=2.0), num_series=3),
        poutine.block(poutine.scale(partial(model, num_series=3), scale=2.0), hide=[]),
        tempered(model, 2.0),
    ]
    descriptions = [described(fn, y) for fn in wrapped]
    assert {each["model"] for each in descriptions} == {"model"}
    for each in descriptions[1:]:
        check_same("fit.pt", descriptions[0], each)


def test_guides_that_are_handlers_are_described(y):
    text = changes(described(model, y), described(model, y, guide_class=AutoNormalMessenger))
    assert "guide: AutoNormal in the file, AutoNormalMessenger here" in text
    assert "only here" in text
    assert "site" not in text.replace("parameter", "")


def test_models_that_are_modules_are_described(y):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](20, 2)

        def forward(self, y):
            mean = self.linear(y).sum()
            theta = pyro.sample("theta", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0).expand(y.shape).to_event(2), obs=y)

    for local in (False, True):
        with pyro.settings.context(module_local_params=local):
            description = described(Model(), y)
        assert description["model"] == "test_models_that_are_modules_are_described.<locals>.Model"
        assert description["parameter 'linear.weight'"] == "of shape (2, 20)"
        assert "prior of site 'theta'" not in description
        assert "data of site 'y'" in description


def test_a_broken_model_raises_its_own_error(y):
    guide = AutoNormal(model)
    guide(y)
    with pytest.raises(ZeroDivisionError):
        fingerprint(lambda y: 1 / 0, guide, (y,), {})


def test_settings_of_any_kind_are_compared():
    saved = {"w": 1.0, "elbo": {"num_particles": 10, "betas": (0.9, 0.999), "clip": None, "nan": float("nan")}}
    check_same("fit.pt", saved, saved)
    check_same("fit.pt", saved, {**saved, "w": 1.0 + 1e-7})
    check_same("fit.pt", {"w": float("inf"), "n": 1}, {"w": float("inf"), "n": 1.0})
    current = {"w": 1.1, "elbo": {"num_particles": 11, "betas": (0.9, 0.99), "clip": 1.0}, "new": {"a": 1}}
    assert changes(saved, current).split("\n") == [
        "w: 1 in the file, 1.1 here",
        "elbo, num_particles: 10 in the file, 11 here",
        "elbo, betas: [0.9, 0.999] in the file, [0.9, 0.99] here",
        "elbo, clip: None in the file, 1 here",
        "elbo, nan: only in the file",
        "new: only here",
    ]
    assert changes({"a": [1.0]}, {"a": [1.0, 2.0]}) == "a: [1] in the file, [1, 2] here"
    assert changes({"a": float("inf")}, {"a": 3.0}) == "a: inf in the file, 3 here"
    assert changes({"n": 10**9}, {"n": 10**9 + 1}) == "n: 1000000000 in the file, 1000000001 here"
