# Two commands do everything on a fresh machine: `make fit` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: fit test test-slow test-gpu lint tables bench bench-peers mutate clean

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

fit: $(VENV)/installed  ## the default experiment; ARGS="--config ..." for another
	$(BIN)/python -m fl_lightning.fit $(ARGS)

test: $(VENV)/installed  ## all quick tests
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: $(VENV)/installed  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/installed  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

tables: $(VENV)/installed  ## write the figures of bench/results into README.md and configs/
	$(BIN)/python -m bench report

bench: $(VENV)/installed  ## kernels, private steps and rounds against peers, about an hour; ARGS=--quick
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench kernels dp_step rounds $(ARGS)

bench-peers:  ## peers that need other versions than ours, in .venv-peers
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -r bench/requirements-peers.txt

mutate: $(VENV)/installed  ## one mistake at a time, and whether the tests notice; minutes
	$(BIN)/python -m tests.mutation $(ARGS)

clean:
	rm -rf $(VENV) .venv-peers build *.egg-info .pytest_cache .ruff_cache .hypothesis
