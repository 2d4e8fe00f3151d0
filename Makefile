PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt -e

.PHONY: demo test bench clean

demo: .venv/package.stamp  ## the tutorial's calibration, with pictures in examples/output
	$(BIN)/python examples/random_walk.py

test: .venv/test.stamp  ## lint, types, doctests, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/pytest -n 2

bench: .venv/test.stamp  ## speed, and how near the optimum fits end
	set -e; for script in benchmarks/*.py; do $(BIN)/python $$script; done

clean:
	rm -rf .venv build dist examples/output .hypothesis .pytest_cache .ruff_cache
	find pyrobirds tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/package.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) .
	touch $@

.venv/test.stamp: .venv/package.stamp
	$(INSTALL) ".[test]"
	touch $@
