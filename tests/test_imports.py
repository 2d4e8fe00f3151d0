"""`import pyrobirds` is lazy and leaves no trace, and the modules of the package import downward only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyrobirds

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyrobirds"

# A module may import the layers below its own.
LAYERS = (
    {"_checks", "_rng", "arviz_groups", "closed_forms", "descent", "interrupts", "trained"},
    {"averaging", "callbacks", "fit_result", "losses.shapes", "simulators.scanning", "traces"}
    | {"losses.averages", "losses.distances", "losses.statistics", "losses.value_object"}
    | {"diagnostics.coverage_result", "diagnostics.importance", "plots.panels", "series"},
    {"checkpoints", "dependence", "divergences", "failures", "tempering"}
    | {"diagnostics.predictive", "plots.draws", "plots.steps", "plots.trust"}
    | {"losses.combined", "losses.debiased", "losses.errors", "losses.moments", "losses.synthetic"}
    | {"losses.crps", "losses.energy", "losses.kernel", "losses.mmd", "losses.wasserstein"}
    | {"simulators.contract", "simulators.parameters", "simulators.relaxations", "simulators.rollout"}
    | {"simulators.floats", "simulators.unbatched"},
    {"losses", "plots", "progress", "scoring", "simulators.forward_mode", "simulators.graphs"},
    {"elbo", "simulators.simulator"},
    {"sampling", "simulators.repeats", "training_run"}
    | {"simulators.brock_hommes", "simulators.normal", "simulators.rama_cont", "simulators.random_walk"}
    | {"simulators.sir"},
    {"inference_data.contents", "saving", "simulators"},
    {"models.construction"},
    {"models.brock_hommes", "models.normal", "models.rama_cont", "models.random_walk"} | {"models.sir"},
    {"models"},
    {"inference_data.origins"},
    {"inference_data.labelling"},
    {"inference_data.exporting"},
    {"inference_data"},
    {"diagnostics.nuts", "diagnostics.simulated_datasets", "fitting"},
    {"diagnostics.coverage_file"},
    {"diagnostics.calibration"},
    {"diagnostics"},
)
ROOT_PACKAGE = ""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_loads_nothing_heavy():
    run(
        "import sys, pyrobirds\n"
        "loaded = {'torch', 'pyro', 'arviz', 'matplotlib', 'numpy', 'tqdm'} & set(sys.modules)\n"
        "assert not loaded, f'import pyrobirds loads {loaded}'"
    )


def test_import_and_first_use_change_no_global_state():
    run(
        "import torch, conftest\n"
        "before, rng = conftest.global_state(), torch.get_rng_state()\n"
        "import pyrobirds\n"
        "for name in pyrobirds.__all__: getattr(pyrobirds, name)\n"
        "assert conftest.global_state() == before\n"
        "assert torch.equal(torch.get_rng_state(), rng)"
    )


def test_every_public_name_resolves_and_is_listed():
    for name in pyrobirds.__all__:
        assert getattr(pyrobirds, name) is not None
    assert set(pyrobirds.__all__) <= set(dir(pyrobirds))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pyrobirds' has no attribute 'nonsense'"):
        pyrobirds.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        from pyrobirds import nonsense  # noqa: F401


def modules(package: Path) -> dict[str, Path]:
    """The modules of the package by dotted name without the package's own: `losses`, `simulators`, `simulators.sir`."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that the module `name` imports, anywhere in its file."""
    is_package = known[name].name == "__init__.py"
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pyrobirds":
                    yield alias.name.removeprefix("pyrobirds").removeprefix(".")
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                here = name.split(".") if name else []
                base = here[: len(here) - node.level + is_package] + base
            elif base[0] == "pyrobirds":
                base = base[1:]
            else:
                continue
            for alias in node.names:
                inside = ".".join([*base, alias.name])
                yield inside if inside in known else ".".join(base)


def violations(package: Path) -> list[str]:
    """Every import of what is not below the importer, or of the root, and every module that has no layer."""
    known = modules(package)
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    found = []
    for name in sorted(known.keys() - {ROOT_PACKAGE}):
        if name not in layer:
            found.append(f"{name} has no layer: give it one in {Path(__file__).name}")
            continue
        for target in sorted(set(imports(name, known))):
            if target == ROOT_PACKAGE:
                found.append(f"{name} imports the root package")
            elif layer.get(target, len(LAYERS)) >= layer[name]:
                found.append(f"{name} imports {target}")
    return found


def test_imports_point_downward():
    assert violations(PACKAGE) == []


def test_every_layer_names_modules_that_exist():
    assert set().union(*LAYERS) <= modules(PACKAGE).keys()


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        ("losses.py", "from pyrobirds import _checks", []),
        ("losses.py", "import torch\nfrom pyro import poutine", []),
        ("models.py", "from pyrobirds.simulators import random_walk", []),
        ("losses.py", "from pyrobirds.elbo import ELBO", ["losses imports elbo"]),
        ("losses.py", "import pyrobirds.elbo", ["losses imports elbo"]),
        ("losses.py", "from . import elbo", ["losses imports elbo"]),
        ("losses.py", "def f():\n    from .elbo import ELBO", ["losses imports elbo"]),
        ("elbo.py", "from .simulators import simulator", ["elbo imports simulators.simulator"]),
        ("simulators/simulator.py", "from .. import elbo", ["simulators.simulator imports elbo"]),
        ("simulators/simulator.py", "from . import relaxations", []),
        ("models.py", "from pyrobirds import fitting", ["models imports fitting"]),
        ("fitting.py", "import pyrobirds", ["fitting imports the root package"]),
        ("fitting.py", "from pyrobirds import fit", ["fitting imports the root package"]),
        ("fitting.py", "from pyrobirds import *", ["fitting imports the root package"]),
        ("utils.py", "", ["utils has no layer: give it one in test_imports.py"]),
    ],
)
def test_the_layering_test_sees(tmp_path, path, code, expected):
    for name in ("__init__", "_checks", "losses", "models", "elbo", "fitting"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "simulators").mkdir()
    for name in ("__init__", "random_walk", "relaxations", "simulator"):
        (tmp_path / "simulators" / f"{name}.py").touch()
    (tmp_path / path).write_text(code)
    assert violations(tmp_path) == expected
