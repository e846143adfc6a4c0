# Everything runs in a virtual environment of its own; PYTHON chooses the interpreter (≥ 3.11).
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
CONFIG ?= configs/smollm2_135m.py
BIN := $(VENV)/bin
PROMPT ?= Write a Python function that reverses a list.

.PHONY: demo test test-processes lint clean

# A real language model with three exits: tuned, calibrated, measured, shown. Runs that were
# finished or interrupted go on where they were; remove $(RUN) to start afresh.
demo: $(VENV)/.demo
	@echo "== Tuning exits behind the frozen model (5 to 8 minutes on 2 cores, once) =="
	@$(BIN)/python -m launch.tune --config=$(CONFIG) --workdir=$(RUN)
	@echo "== Calibrating when to leave, on text the exits have not seen =="
	@$(BIN)/python -m launch.calibrate --workdir=$(RUN)
	@echo "== $(PROMPT) =="
	@$(BIN)/python -m launch.generate --workdir=$(RUN) --prompt="$(PROMPT)"
	@echo "== Measuring: full model and dynamic depth in turns =="
	@$(BIN)/python -m launch.evaluate --workdir=$(RUN)
	@$(BIN)/python -m launch.report --workdir=$(RUN)

test: $(VENV)/.test
	@$(BIN)/python -m pytest -q -n auto --dist worksteal --durations=15 -m "not processes and not slurm"

# One run on several processes, and jobs on a Slurm of its own where slurm-wlm and munge are there.
test-processes: $(VENV)/.test
	@$(BIN)/python -m pytest -q --durations=5 -m "processes or slurm"

lint: $(VENV)/.test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)

$(VENV)/.demo: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one with PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@
