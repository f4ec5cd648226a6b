# Every target makes what it needs: on a fresh machine `make demo` or `make test` is the only command.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# What the tests need besides the package; add a framework's extra here to test against it.
EXTRAS := torch,jax,lightning,transformers,ignite,skorch,optax,alerts,tensorboard,prometheus,remote,serve,demo,dev
TORCH := torch==2.13.0
# What `make test-more` adds: tools that bring many packages of their own, and the tests that need them.
MORE := wandb,mlflow,fastai,flax
# Sets of tools that the overhead is compared with.
PEERS := peers composer cockpit
# Each backend of Keras is tested in processes of its own.
KERAS_BACKENDS ?= tensorflow jax torch
# The build of TensorFlow without a GPU: the tests need no more.
TENSORFLOW := tensorflow-cpu

# The stamp's name carries what the environment was built from, so that a change builds it again and nothing else does.
READY := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt Makefile | cksum | cut -d' ' -f1)
READY_DOCS := $(READY)-docs
READY_MORE := $(READY)-more
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-keras test-more test-cuda coverage notebooks lint format docs bench lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Create the virtual environment in .venv

demo: $(READY) ## Train on MNIST three times (healthy, sick, healed) and write a report; about two minutes
	$(BIN)/gradwatch demo

test: $(READY) test-keras notebooks ## Run the tests (ARGS="-k name" to choose, WORKERS=0 for one process)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-more: $(READY_MORE) ## Run the tests that need Weights & Biases, MLflow, fastai or Flax, which the others leave out
	GRADWATCH_TEST_EXTRAS=$(MORE) $(BIN)/python -m pytest tests/sinks tests/integrations $(ARGS)

test-keras: $(READY) $(KERAS_BACKENDS:%=test-keras-%)

test-keras-%: $(READY)
	KERAS_BACKEND=$* $(BIN)/python -m pytest tests/keras -n $(WORKERS)

test-cuda: $(READY) ## Where there is a GPU: run the tests that need one, then measure the cost on it
	$(BIN)/python -m pytest -m cuda -p no:xdist $(ARGS)
	$(BIN)/python -m benchmarks.gpu

coverage: export COVERAGE_FILE := $(CURDIR)/.coverage
coverage: $(READY) ## Measure which lines and branches the tests run; about half an hour
	$(BIN)/coverage erase
	# Left out is what sets a trace function of its own, as coverage does.
	$(BIN)/coverage run -m pytest -n $(WORKERS) -o timeout=600 --ignore tests/faults --ignore tests/torch/test_cost.py
	$(foreach backend,$(KERAS_BACKENDS),KERAS_BACKEND=$(backend) $(BIN)/coverage run -m pytest tests/keras -n $(WORKERS) -o timeout=600 &&) true
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

notebooks: $(READY) ## Run the notebooks, with fewer steps than for a reader
	GRADWATCH_QUICK=1 $(BIN)/python -m pytest --nbmake notebooks --timeout=600 -n $(WORKERS)

lint: $(READY) ## Check format, lint rules, types, security and sizes
	$(BIN)/ruff format --check --diff .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/bandit --quiet --recursive gradwatch --configfile pyproject.toml
	$(BIN)/python tests/sizes.py

format: $(READY) ## Format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY_DOCS) ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

bench: $(READY) $(PEERS:%=$(VENV)-%/.ready) ## Measure the cost of watching, peers included; prints ratios against the plain loop
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.overhead --footprint --environments $(BIN)/python $(PEERS:%=$(VENV)-%/bin/python)

# Each in an environment of its own, since their pins clash; gradwatch itself is read from the checkout.
$(VENV)-%/.ready: benchmarks/environments/%.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check "setuptools<80" wheel hatchling editables
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		--requirement $< --editable .
	@touch $@

lock: $(READY) ## Pin today's newest versions in constraints.txt
	$(BIN)/python .ci/lock.py

clean: ## Remove the virtual environment, caches and everything built
	rm -rf $(VENV) build dist site runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): | $(BIN)/python
	@echo "Installing gradwatch and its tools into $(VENV) (once)"
	@rm -f $(VENV)/.ready-*
	$(PIP) $(TORCH) $(TENSORFLOW) --editable ".[$(EXTRAS)]"
	@touch $@

$(READY_DOCS): $(READY)
	$(PIP) --editable ".[docs]"
	@touch $@

$(READY_MORE): $(READY)
	$(PIP) --editable ".[$(MORE)]"
	# fastai asks for torchvision, which it needs for pictures only and whose wheels fit no CPU build of this torch.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("gradwatch needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
