# Two commands set everything up: `make demo` and `make test`. Each works alone, in a fresh clone, with Python 3.11.
PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Threads that wait sleep after this many turns: by default they spin on, which beside other programs is slow.
export GOMP_SPINCOUNT ?= 10000

.PHONY: help install demo test soak lint format clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e ".[emoji]"
	touch $@

.venv/tested: .venv/installed
	$(INSTALL) -e ".[test]"
	$(INSTALL) --no-deps dall-e timm
	touch $@

install: .venv/tested ## make .venv with mmvit, its tests and the emoji data, at the versions of constraints.txt

demo: .venv/installed ## train a generator on emoji and draw captions that it has never seen (12 minutes on 2 cores with AMX, 36 without)
	$(BIN)/mmvit demo

test: .venv/tested ## run the tests (6 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: .venv/tested ## do harm to runs, shards and models, and print what was held (40 minutes on 2 cores)
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/python tests/soak/soak.py

lint: .venv/tested ## check style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/tested ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and everything that was made; runs/ and data/ stay
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info build dist
