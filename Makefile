# Two commands do all the set-up: `make run` and `make test`. `make help` lists the rest.
PROFILE ?= cpu
RUN_DIR ?= runs/$(PROFILE)
CLASSROOM ?= classroom
TRIES   ?= 1000
MODEL   ?= default

ifeq ($(OS),Windows_NT)
VENV_PYTHON := .venv/Scripts/python.exe
PYTHON  ?= python
else
PYTHON  ?= python3
VENV_PYTHON := .venv/bin/python
endif

.DEFAULT_GOAL := help
.PHONY: help setup setup-book setup-dev run render book lab test test-fast test-versions test-colab test-latest test-offline address fuzz lint format bench lock classroom clean

help:  ## show this list
	@$(PYTHON) -c "import re; [print(f'make {t:10} {d}') for t, d in re.findall(r'^([a-z-]+):.*?## (.*)', open('Makefile').read(), re.M)]"

setup:  ## install the pinned packages into .venv
	@$(PYTHON) grath_utils/workshop/set_up.py

setup-book:
	@$(PYTHON) grath_utils/workshop/set_up.py --book

setup-dev:
	@$(PYTHON) grath_utils/workshop/set_up.py --dev

run: setup  ## the whole course on the default model, on a CPU: PROFILE=cpu RUN_DIR=runs/cpu
	@$(VENV_PYTHON) -m grath_utils run --profile $(PROFILE) --run-dir $(RUN_DIR)

render: setup  ## refresh the outputs that the notebooks are committed with, from RUN_DIR
	@$(VENV_PYTHON) -m grath_utils render --profile $(PROFILE) --run-dir $(RUN_DIR)

book: setup-book  ## the whole course as an HTML book with search, in build/book
	@$(VENV_PYTHON) -m sphinx -q -W --keep-going -c notebooks/book -d build/book_doctrees . build/book
	@echo "Book: build/book/index.html"

lab: setup  ## open the notebooks in JupyterLab
	@$(VENV_PYTHON) -m jupyterlab notebooks

test test-fast test-versions test-colab test-latest test-offline: export OMP_NUM_THREADS = 1

test: setup-dev lint  ## lint and all tests, on two cores
	@$(VENV_PYTHON) -m pytest -n 2 --no-loadscope-reorder

test-fast: setup-dev lint  ## lint and the tests that take seconds: no real model, no notebook
	@$(VENV_PYTHON) -m pytest -n 2 --no-loadscope-reorder -m "not slow and not model and not notebook"

fuzz: setup-dev  ## search for input that ends in a traceback: TRIES=1000 of each kind
	@GRATH_FUZZ=$(TRIES) $(VENV_PYTHON) -m pytest -n 2 --dist load -W ignore tests/cli/test_fuzz.py

test-versions: setup-dev  ## training and evaluation with the oldest and the newest versions allowed
	@$(VENV_PYTHON) tests/versions.py

test-colab: setup-dev  ## notebooks as their badges open them, on what Colab's machines hold (slow)
	@$(VENV_PYTHON) tests/versions.py colab

test-latest: setup-dev  ## the same on the newest versions of everything (slow)
	@$(VENV_PYTHON) tests/versions.py latest

test-offline: setup-dev  ## a classroom folder, installed and used without any network (slow, Linux)
	@$(VENV_PYTHON) tests/workshop/offline.py

address: setup  ## write another address of the repository everywhere: REPO=org/name REF=tag
	@$(VENV_PYTHON) .github/address.py $(REPO) $(REF)

lint: setup-dev
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(dir $(VENV_PYTHON))lint-imports

format: setup-dev  ## format the code
	@$(VENV_PYTHON) -m ruff check --fix --quiet . || true
	@$(VENV_PYTHON) -m ruff format .

lock:  ## pin every package, for every system and Python, with checksums, in requirements.lock
	@$(VENV_PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	  --generate-hashes --no-emit-package torch \
	  --custom-compile-command "make lock" requirements.txt --output-file requirements.lock

classroom: setup  ## the course with a finished run in one folder that needs no network: CLASSROOM=DIR
	@$(VENV_PYTHON) -m grath_utils classroom --to $(CLASSROOM) --profile $(PROFILE) --run-dir $(RUN_DIR)

bench: setup-dev  ## side by side with lm-eval, transformers, llama.cpp and TRL: MODEL=default (slow)
	@$(VENV_PYTHON) tests/benchmarks/bench.py --model $(MODEL)

clean:  ## remove .venv and what tools left (run directories and the model cache stay)
	@$(PYTHON) -c "import shutil, pathlib; [shutil.rmtree(p, ignore_errors=True) for p in map(pathlib.Path, ['.venv', 'build', '.pytest_cache', '.ruff_cache', '.hypothesis', 'grath_tutorial.egg-info'])]"
