# Every target uses one environment, .venv/, which is made on first use and kept.
#
#   PYTHON=python3.12    the interpreter the environment is made with
#   TORCH=...            arguments of `pip install` that choose another build of torch than the package index's default,
#                        such as TORCH='torch --index-url <index of the CPU builds>'

PYTHON ?= python3
TORCH ?=

VENV := .venv
RUN := $(VENV)/bin/python
MADE := $(VENV)/.made
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs bench fuzz chaos mutants clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s  %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## make the environment in .venv/
	@echo "$(VENV)/ is ready: \`. $(VENV)/bin/activate\`"

demo: $(INSTALLED) ## five demonstrations of a Meta-World task: the shipped base adapted, and cloning from scratch
	$(RUN) -m eva_rl.finetune -m task=metaworld/stick-pull-v3 demonstrations=5 adapter=bc,eva hydra.sweep.dir=runs/demo
	$(RUN) -m eva_rl.report runs/demo

test: $(INSTALLED) ## run the tests, two at a time
	$(RUN) -m pytest -n 2 --dist worksteal

lint: $(INSTALLED) ## check style, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@mkdir -p build/typings/eva_rl
	@ln -sfn ../../../envs build/typings/eva_rl/envs
	@ln -sfn ../../../eva_rl/__init__.py build/typings/eva_rl/__init__.py
	$(RUN) -m basedpyright --pythonpath $(RUN)

docs: $(INSTALLED) ## build the documentation in build/docs/; a warning is an error
	$(RUN) -m sphinx -q -E -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

bench: $(INSTALLED) ## compare EVA's initialisation with peft's; takes a quarter of an hour
	$(RUN) -m benchmarks.eva_init

fuzz: $(INSTALLED) ## use 10,000 damaged inputs of each kind; takes hours
	$(RUN) -m tools.fuzz

chaos: $(INSTALLED) ## let something go wrong with each command a hundred times; takes hours
	$(RUN) -m tools.chaos

mutants: $(INSTALLED) ## change the code in a hundred places; do the tests notice? takes hours
	$(RUN) -m tools.mutants

clean: ## remove the environment and everything built; runs, checkpoints and datasets stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find eva_rl envs configs docs examples tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(MADE):
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "error: there is no '$(PYTHON)': install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "error: Python 3.11 or newer \
	is needed, but $(PYTHON) is %d.%d: name a newer one with PYTHON=..." % v[:2])'
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

# A torch chosen with TORCH=... stays: its pin is left out of the constraints.
$(INSTALLED): $(MADE) pyproject.toml constraints.txt
	@echo "Installing into $(VENV)/; the first time this takes a few minutes."
	@grep -v $(if $(TORCH),'^torch==','^#') constraints.txt > $(VENV)/constraints.txt
	@$(if $(TORCH),$(RUN) -m pip install -qq --disable-pip-version-check $(TORCH))
	@$(RUN) -m pip install -qq --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[domains,dev,docs]'
	@touch $@
