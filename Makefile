# Two commands do everything on a fresh machine: `make fit` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

# Flower pins versions of its own: it has an environment of its own.
FLOWER_VENV ?= .venv-flower

.PHONY: fit test test-slow test-gpu federation test-federation gpu-day lint tables bench bench-peers mutate docs clean

# A stamp for each set of packages: `fit` needs one, `test` another, `lint` the developers' tools.
# Python compiles what is imported when it is; pip would compile three times as many files, in turn.
FIT = $(VENV)/installed-federated
TEST = $(VENV)/installed-test
DEV = $(VENV)/installed-dev

$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[$*]'
	touch $@

fit: $(FIT)  ## the default experiment; ARGS="--config ..." for another
	$(BIN)/python -m fl_lightning.fit $(ARGS)

test: $(TEST)  ## all quick tests
	$(BIN)/python -m pytest -n auto --dist loadscope --timeout 600 -m "not slow and not gpu" $(ARGS)

test-slow: $(TEST)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

# A GPU machine brings its own torch and may have no network: nothing is installed. The environment's
# Python is taken where it can run the tests, else the system's.
GPU_PYTHON ?= $(shell $(BIN)/python -c 'import pytest, torch' 2>/dev/null && echo $(BIN)/python || echo $(PYTHON))

test-gpu:  ## the tests that need a CUDA device, with the packages that are there
	$(GPU_PYTHON) -m pytest -m gpu $(ARGS)

$(FLOWER_VENV)/installed: pyproject.toml constraints.txt
	test -x $(FLOWER_VENV)/bin/python || $(PYTHON) -m venv $(FLOWER_VENV)
	grep -v '^rich=' constraints.txt > $(FLOWER_VENV)/constraints.txt  # Flower wants an older one
	$(FLOWER_VENV)/bin/python -m pip install -c $(FLOWER_VENV)/constraints.txt -e '.[flower]' pytest pytest-timeout
	touch $@

federation: $(FLOWER_VENV)/installed  ## a federation on Flower, all of it on 127.0.0.1; ARGS="--nodes 3 --rounds 5"
	$(FLOWER_VENV)/bin/python -m fl_lightning.deploy.loopback $(ARGS)

test-federation: $(FLOWER_VENV)/installed  ## real processes, keys, TLS and SIGKILL; an hour
	$(FLOWER_VENV)/bin/python -m pytest -m slow tests/deployment $(ARGS)

gpu-day:  ## everything that wants a GPU, nine minutes a call until nothing is left; installs nothing
	$(PYTHON) -m bench.gpu_day $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/installed-docs  ## the documentation as a site, in build/site
	$(BIN)/python -m mkdocs build --strict

tables: $(TEST)  ## write the figures of bench/results into docs/, README.md and configs/
	$(BIN)/python -m bench report

bench: $(VENV)/installed-bench  ## kernels, private steps and rounds against peers, about an hour; ARGS=--quick
	$(BIN)/python -m bench kernels dp_step rounds $(ARGS)

bench-peers:  ## peers that need other versions than ours, each in a .venv of its own
	for name in peers jax opake; do \
	  test -x .venv-$$name/bin/python || $(PYTHON) -m venv .venv-$$name; \
	  .venv-$$name/bin/python -m pip install -r bench/requirements-$$name.txt || exit 1; \
	done

mutate: $(TEST)  ## one mistake at a time, and whether the tests notice; minutes
	$(BIN)/python -m tests.mutation $(ARGS)

clean:
	rm -rf $(VENV) $(FLOWER_VENV) .venv-peers .venv-jax .venv-opake build *.egg-info .pytest_cache .ruff_cache .hypothesis
