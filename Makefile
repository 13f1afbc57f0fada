# Every target sets up what it needs: .venv is made on first use and again when settings.ini changes.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
PYTHON ?= $(or $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done),python3)
RUN := PATH="$(BIN):$$PATH"
unexport PYTHONPATH PYTHONHOME
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup quickstart test lessons check lint lab docs readme environment export clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## the virtual environment .venv with everything in it (the other targets do this themselves)
$(READY): settings.ini setup.py pyproject.toml tools/install.py
	@$(PYTHON) tools/install.py --venv $(VENV)

quickstart: $(READY) ## train, calibrate, compress and report, on procedural faces or ARGS="--data DIR"
	@$(RUN) fer quickstart $(ARGS)

test: $(READY) ## generated code in step, every lesson cell, then tests/
	@$(RUN) python tools/export_check.py
	@$(RUN) python tools/lessons.py
	@$(RUN) python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests $(ARGS)

lessons: $(READY) ## the lesson cells alone (ARGS="nbs/labels.ipynb --flags slow")
	@$(RUN) python tools/lessons.py $(ARGS)

check: $(READY) lint ## generated files in step, notebooks clean and in time, layers, lint, file sizes
	@$(RUN) python tools/export_check.py
	@$(RUN) python tools/environment.py --check
	@$(RUN) python tools/readme.py --check
	@$(RUN) python tools/check_notebooks.py
	@$(RUN) python tools/check_layers.py
	@$(RUN) python tools/check_sizes.py
	@$(RUN) python tools/lessons.py --recorded --limit 60

lint: $(READY) ## ruff, for real errors only
	@$(RUN) ruff check --quiet --output-format concise $(wildcard fer_core demo tests tools benchmarks setup.py) && echo 'ruff: no complaints'

lab: $(READY) ## JupyterLab on the project's kernel
	@$(RUN) jupyter lab --notebook-dir=. --MultiKernelManager.default_kernel_name=fer_core $(ARGS)

docs: $(READY) ## the documentation site in _docs/: lessons, reference, search (no Quarto needed)
	@$(RUN) python tools/docs.py

readme: $(READY) ## README.md from nbs/index.ipynb
	@$(RUN) python tools/readme.py

environment: $(READY) ## environment.yml from settings.ini
	@$(RUN) python tools/environment.py

export: $(READY) ## fer_core/ from the notebooks
	@$(RUN) nbdev_export

clean: ## caches and built pages; keeps .venv, runs and reports
	rm -rf _docs _proc build dist .pytest_cache .ruff_cache .hypothesis .work/lessons.json *.egg-info
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
