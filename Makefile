# Two commands on a fresh machine do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests stay together, since they share what is slow to make; a thread each, since workers fill the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

.PHONY: demo test test-slow check lint format wheel clean setup

# The demo starts from nothing each time, so that it always shows a whole run.
demo: setup
	rm -rf outputs/demo
	$(BIN)/python -m pipeline

test: setup
	$(PYTEST) -m "not slow and not gpu"

test-slow: setup
	$(PYTEST) -m "slow and not gpu"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck jobs/*.sbatch jobs/*.sh scripts/*.sh .ci/run

check: lint test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: setup
	$(BIN)/python -m build --wheel

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt tests/oracles.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r tests/oracles.txt
	touch $@

clean:
	rm -rf $(VENV) outputs build dist
