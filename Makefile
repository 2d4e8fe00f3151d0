PYTHON ?= python3
# ArviZ 1.x needs Python 3.12, for which torch may be missing: its tests have an environment without torch.
PYTHON_ARVIZ1 ?= $(shell for python in python3.14 python3.13 python3.12 $(PYTHON); do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt -e

.PHONY: demo test test-arviz1 bench clean

demo: .venv/package.stamp  ## the tutorial's calibration, with pictures in examples/output
	$(BIN)/python examples/random_walk.py

test: .venv/test.stamp  ## lint, types, doctests, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/pytest -n 2
ifeq ($(PYTHON_ARVIZ1),)
	@echo "ArviZ 1.x was not tested: it needs Python 3.12 or newer; name one by PYTHON_ARVIZ1="
else
	$(MAKE) test-arviz1
endif

test-arviz1: .venv/test.stamp .venv-arviz1/test.stamp  ## what needs no torch, on results of torch, under ArviZ 1.x
	$(BIN)/python tests/export_examples.py build/exports
	MPLBACKEND=Agg PYROBIRDS_EXPORTS=build/exports .venv-arviz1/bin/python -m pytest --noconftest tests/without_torch

bench: .venv-bench/bench.stamp  ## speed, memory, and how near the optimum fits end
	set -e; for script in benchmarks/*.py; do .venv-bench/bin/python $$script; done

bench-%: .venv-bench/bench.stamp  ## one of them, with - for _ in its name: make bench-against-blackbirds
	.venv-bench/bin/python benchmarks/$(subst -,_,$*).py

clean:
	rm -rf .venv .venv-arviz1 .venv-bench build dist examples/output .hypothesis .pytest_cache .ruff_cache
	find pyrobirds tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/package.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) .
	touch $@

.venv/test.stamp: .venv/package.stamp
	$(INSTALL) ".[test]"
	touch $@

# blackbirds pins an old NumPy, and asks for a package that only one of its models needs: it comes without dependencies.
.venv-bench/bench.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt -e ".[test]" torch-geometric
	.venv-bench/bin/python -m pip install --quiet --no-deps blackbirds==1.3
	touch $@

.venv-arviz1/test.stamp: constraints.txt
	$(PYTHON_ARVIZ1) -m venv .venv-arviz1
	.venv-arviz1/bin/python -m pip install --quiet -c constraints.txt "arviz>=1" h5netcdf h5py matplotlib pytest pytest-mpl
	touch $@
