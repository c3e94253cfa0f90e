# Everything here sets itself up: Python >= 3.11 and make are all that must be there before.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-reliability test-oracles bench constraints clean

help:  ## What there is to make
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(STAMP)  ## Train the default model by recipes/quickstart.yaml; ends with the path of a report
	$(BIN)/posttrain run recipes/quickstart.yaml --out runs/quickstart

test: $(STAMP)  ## Check style and types, run the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2

test-reliability: $(STAMP)  ## Kills, damage and full disks in the numbers of docs/reliability.md (minutes)
	POSTTRAIN_RELIABILITY=full OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 \
	  tests/test_reliability.py tests/test_training_checkpoint.py tests/test_training_shards.py

test-oracles: $(STAMP)  ## Every loss that TRL has too, value and gradient, against TRL itself (makes .venv-peers once)
	PYTHONPATH=src $$($(BIN)/python benchmarks/peers.py) tests/oracles/trl_losses.py

bench: $(STAMP)  ## Measure against TRL, generate and the machine itself (45 minutes; leave the machine alone)
	$(BIN)/python benchmarks/run.py; code=$$?; $(BIN)/python docs/render.py; exit $$code

# The stamp goes first and comes back last. Where it is missing an installation was cut short, and pip cannot tell
# a half-written package from a whole one: start over (its cache makes that quick).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "posttrain needs Python >= 3.11, and '$(PYTHON)' is not one: try make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -e $@ || rm -rf .venv
	@rm -f $@
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "installing into .venv; minutes the first time, nothing after that"
	@$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[tasks,cluster,dev]' || { \
	  echo "the installation failed, see above; the same command starts it again." >&2; \
	  echo "(One dependency, pycosat, is built from C: that needs a compiler and Python's headers.)" >&2; exit 1; }
	@touch $@

constraints: $(STAMP)  ## Write constraints.txt anew from what is installed
	{ head -n 1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt
	@touch $(STAMP)

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf .venv .venv-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis
