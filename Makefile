# Everything runs in a virtual environment of its own; PYTHON chooses the interpreter (≥ 3.11).
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
CONFIG ?= configs/smollm2_135m.py
# Of tuning at most: on a slower machine, fewer steps.
MINUTES ?= 5
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
# Tests that have a target of their own.
ELSEWHERE := processes or slurm or studies or parity or tpu_compile or lm_eval or corpus or storage
# The same packages, and servers of buckets and the TPU's compiler; or those of all comparisons.
SERVERS ?= .venv-servers
EXTRAS ?= .venv-extras
SITE := 'import site; print(site.getsitepackages()[0])'
PROMPT ?= Write a Python function that reverses a list.

.PHONY: demo test test-quick test-long fuzz test-studies test-processes test-storage test-tpu \
    test-extras lint site clean

# A real language model answers as it is, and then with three exits: tuned, calibrated, measured,
# shown. Runs that were finished or interrupted go on where they were; remove $(RUN) to start afresh.
demo: $(VENV)/.demo
	@echo "== The model as it is: earlier text proposes tokens, the full model checks them =="
	@$(BIN)/python -m launch.generate --config=$(CONFIG) --mode=verified --prompt="$(PROMPT)"
	@echo "== Tuning exits behind the frozen model, once: at most $(MINUTES) minutes of steps =="
	@$(BIN)/python -m launch.tune --config=$(CONFIG) --config.tune.minutes=$(MINUTES) --workdir=$(RUN)
	@echo "== Calibrating when to leave, on text the exits have not seen =="
	@$(BIN)/python -m launch.calibrate --workdir=$(RUN)
	@echo "== $(PROMPT) =="
	@$(BIN)/python -m launch.generate --workdir=$(RUN) --prompt="$(PROMPT)"
	@echo "== Measuring: full model and dynamic depth in turns =="
	@$(BIN)/python -m launch.evaluate --workdir=$(RUN)
	@$(BIN)/python -m launch.report --workdir=$(RUN)

# Every test that takes seconds, and then those that read what XLA optimised.
test: $(VENV)/.test
	@$(PYTEST) -n auto --dist worksteal --durations=15 -m "not (long or production or $(ELSEWHERE))"
	@$(PYTEST) -n auto --dist worksteal -m production

# All combinations of what decodes, heads, runs and commands.
test-long: $(VENV)/.test
	@$(PYTEST) -n auto --dist worksteal --durations=15 -m "long and not ($(ELSEWHERE))"

# One of everything.
test-quick: $(VENV)/.test
	@$(PYTEST) -n auto --dist worksteal -m quick

# What hypothesis draws is the same in every run of the tests; here it looks for what is wrong.
fuzz: $(VENV)/.test
	@$(PYTEST) -n auto --dist worksteal -m hypothesis --hypothesis-profile=fuzz

# Studies, the pages' commands and the notebooks, whole, on small models; and the site.
test-studies: $(VENV)/.docs
	@$(PYTEST) -n auto --dist loadfile --durations=15 -m "studies and not tpu_compile"

# One run on several processes, and jobs on a Slurm of its own where slurm-wlm and munge are there.
test-processes: $(VENV)/.test
	@$(PYTEST) --durations=5 -m "processes or slurm"

# Buckets, of servers that are started for it: on the wire, faults included.
test-storage: $(SERVERS)/.done
	@$(SERVERS)/bin/python -m pytest -q --durations=5 -m storage

# What the TPU's own compiler makes of programs; no TPU is needed. Whole pods are in test-extras.
test-tpu: $(SERVERS)/.done
	@$(SERVERS)/bin/python -m pytest -q --durations=5 -m "tpu_compile and not studies"

# Beside transformers on torch, with the TPU's compiler, lm-evaluation-harness, datasets, Beam, and buckets.
test-extras: $(EXTRAS)/.done
	@$(EXTRAS)/bin/python -m pytest -q --durations=5 -m "parity or tpu_compile or lm_eval or corpus or storage"

lint: $(VENV)/.test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The pages, in build/site.
site: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

clean:
	rm -rf $(VENV) $(SERVERS) $(EXTRAS) build

$(VENV)/.demo: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one with PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .[gguf,report]
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

# A folder of packages is named in a .pth file: what is there already is not installed again.
$(SERVERS)/.done: WITH := storage,tpu-compile
$(EXTRAS)/.done: WITH := parity,tpu-compile,lm-eval,corpus,beam,storage
$(SERVERS)/.done $(EXTRAS)/.done: $(VENV)/.test
	@$(PYTHON) -m venv $(@D)
	@$(BIN)/python -c $(SITE) > "$$($(@D)/bin/python -c $(SITE))/lean.pth"
	@echo "Installing into $(@D) …"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(WITH)]'
	@touch $@
