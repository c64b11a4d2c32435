# Each target sets up a fresh machine by itself: a virtual environment in $(VENV), installed under the constraints, then its job.
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 2
OUT ?= runs/demo
BENCH ?= kernels training decoding
# Processes of the test run, with a thread each; who is done first takes over half of what another has left.
WORKERS ?= 2

BIN := $(VENV)/bin
.PHONY: demo test check bench clean

demo: $(VENV)/.ready
	$(BIN)/exlstm train --out $(OUT) --minutes $(MINUTES)
	$(BIN)/exlstm generate $(OUT) --prompt 'def ' --tokens 300 --temperature 0.8 --seed 0
	$(BIN)/exlstm plot $(OUT)

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_house.py tests/test_cli.py

bench: $(VENV)/.ready
	for name in $(BENCH); do $(BIN)/exlstm bench $$name || exit; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

# torch first and alone: a pinned torch is taken as it is, and nothing after it can pull in another build.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
