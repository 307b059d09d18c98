# Everything a newcomer types. `make help` lists it.
# A virtual environment in .venv is made on the first use of any target; PYTHON chooses its interpreter.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= runs/tiny
ARGS   ?=
# PyPI serves CUDA builds of torch on Linux (2 GB more). Without a GPU:
#   make install PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart chat serve check test test-all test-rounding docs clean browser peers clients bench-train bench-learn bench-plan bench-encode bench-generate bench-serve bench-score bench-align bench-busy

help:
	@echo "make quickstart   install, fetch data, train the whole road (10 to 20 minutes on 2 cores)"
	@echo "make chat         talk to the result in the terminal      (MODEL=smollm2 for a real assistant)"
	@echo "make serve        talk to it in the browser, and an OpenAI-compatible API on the same port"
	@echo "make install      the package alone, in .venv"
	@echo "make check        ruff, mypy --strict, import-linter, docs up to date"
	@echo "make test         check and all fast tests, as CI does; make test-all: the slow ones as well"
	@echo "make test-rounding  tests of what is learnt, with 5 seeds and as other processors round (hours on 2 cores; ARGS=\"--seeds 1\")"
	@echo "make bench-train  training speed next to transformers and litgpt (15 minutes); bench-learn: how soon it is learnt (an hour)"
	@echo "make bench-serve  a real server, 64 clients, 5 minutes: nothing lost, nothing mixed up, memory flat (exit code 1 otherwise)"
	@echo "make docs         write docs/reference/ anew (cli.md, metrics.md, recipes.md) and the parameters in docs/guide/serving.md"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e ".[serve]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e ".[serve,dev]"
	@touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

quickstart: install
	$(BIN)/chatwright run recipes/tiny.yaml $(ARGS)

chat: install
	$(BIN)/chatwright chat $(MODEL) $(ARGS)

serve: install
	$(BIN)/chatwright serve $(MODEL) $(ARGS)

check: install-dev
	$(BIN)/ruff check chatwright tests scripts examples benchmarks
	$(BIN)/ruff format --check chatwright tests scripts examples benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/write_cli_docs.py --check
	$(BIN)/python scripts/write_metrics_docs.py --check
	$(BIN)/python scripts/write_api_docs.py --check
	$(BIN)/python scripts/write_recipes_docs.py --check

# llama.cpp, which runs exported GGUF files in the tests: pip compiles it, once. Where that fails, those tests skip and say so.
$(VENV)/.installed-peers: $(VENV)/.installed-dev
	@if sh scripts/install_peers.sh $(BIN)/python -c constraints.txt $(PIP_ARGS); then touch $@; fi

peers: $(VENV)/.installed-peers

# Clients that come with many packages of their own (scripts/clients.txt), in an environment of their own: some of them hold packages
# down that the others here want newer. 1.1 GB, two minutes; without them their tests (tests/serve/test_other_clients.py) skip and say so.
clients:
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install -q -r scripts/clients.txt

# Chromium for the browser tests. Without apt-get (or without the rights) those tests skip and say so.
browser:
	@sh scripts/install_browser.sh

# Two workers with one thread each; at the end the slowest twenty tests, and the total with the machine that it was measured on.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 --durations-min=5

test: check browser peers
	$(PYTEST) $(ARGS)

# With the tests marked `slow`: longer forms of what `make test` covers in short.
test-all: check browser peers
	$(PYTEST) -m "" $(ARGS)

# Tests of what training achieves, with other seeds and other rounding; a table of what each found (CONTRIBUTING.md).
test-rounding: install-dev
	$(BIN)/python scripts/test_rounding.py -n 2 --dist loadfile $(ARGS)

docs: install-dev
	$(BIN)/python scripts/write_cli_docs.py
	$(BIN)/python scripts/write_metrics_docs.py
	$(BIN)/python scripts/write_api_docs.py
	$(BIN)/python scripts/write_recipes_docs.py

# Benchmarks want a quiet machine. benchmarks/README.md has the figures and says how they are made.
$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e ".[bench]"
	@touch $@

bench-train: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/train.py $(ARGS)
	$(BIN)/python benchmarks/train.py --head

bench-learn: install-dev
	$(BIN)/chatwright run tiny --until tokenizer
	$(BIN)/python benchmarks/learn.py $(ARGS)

bench-plan: install-dev
	$(BIN)/python benchmarks/plan.py $(ARGS)

bench-encode: install-dev
	$(BIN)/chatwright run tiny --until tokenizer
	$(BIN)/python benchmarks/encode.py $(ARGS)

# llama.cpp as it comes: the tests' own build of it (peers) is made for short compilation, not for speed.
$(VENV)/.installed-llama: $(VENV)/.installed-bench
	CMAKE_ARGS= $(BIN)/python -m pip install $(PIP_ARGS) --no-cache-dir --force-reinstall --no-deps --no-binary llama-cpp-python -c constraints.txt llama-cpp-python
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e ".[peers]"
	@touch $@ $(VENV)/.installed-peers

bench-generate: $(VENV)/.installed-llama
	$(BIN)/chatwright run tiny --until data
	$(BIN)/python benchmarks/generate.py $(ARGS)

# Next to TRL, on the recipe's data.
bench-align: $(VENV)/.installed-bench
	$(BIN)/chatwright run tiny --until sft
	$(BIN)/python benchmarks/align.py $(ARGS)

bench-serve: install-dev
	$(BIN)/python benchmarks/serve.py $(ARGS)

bench-score: install-dev
	$(BIN)/python benchmarks/score.py $(ARGS)

bench-busy: install-dev
	$(BIN)/python benchmarks/busy.py --spin now old $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
