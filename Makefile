# make quickstart     set-up, training, samples, score, export: minutes on two cores
# make test           everything that takes seconds
# make test-faults    the fault matrix: kills, full disks, flipped bits; twenty to thirty-five minutes on two cores
# make lint           style, format and types
#
# All of it works in .venv, which the first command makes and later ones reuse.
# PYTHON=python3.12 make ...   chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN ?= runs/quickstart

# One thread for each of the two processes, and no network.
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: setup quickstart test test-slow test-faults lint format clean

setup: $(READY)

# A set-up that was cut short leaves no stamp, so the next command completes it. pip would compile
# with one core, which takes longer than the rest; a few files are for newer interpreters.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "daybreak needs Python 3.11 or newer: PYTHON=python3.12 make ...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

quickstart: $(READY)
	$(BIN)/daybreak train recipes/quickstart.toml --out $(RUN)
	$(BIN)/daybreak sample "a red circle above a blue square" --run $(RUN)
	$(BIN)/daybreak evaluate $(RUN) --suite scenes
	$(BIN)/daybreak export $(RUN)

test: $(READY)
	$(TEST) $(ARGS)

test-slow: $(READY)
	$(TEST) -m 'slow and not gpu' $(ARGS)

# One row after the other: most are two processes, and some have to be in time.
test-faults: $(READY)
	$(TEST) -n 0 -m '' tests/faults $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find daybreak tests -name __pycache__ -type d -prune -exec rm -rf {} +
