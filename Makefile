# From a fresh clone with nothing but Python 3.10+: `make demo` shows the tool at work, `make test` proves it.

PYTHON ?= python3
# One more than cores: some tests wait for signals, heartbeats and disks.
JOBS ?= 3

# What pip takes for PyTorch before all else, such as the path of a CPU wheel; empty for what the index gives.
TORCH ?=

# What is installed of the package's extras.
EXTRAS ?= dev

# The interpreters of `make pythons`.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13

# How many processes burn the processor beside the tests.
LOAD ?= 0

# How long `make fuzz` runs, over all targets, and how many kills and faults `make faults` makes.
SECONDS ?= 600
KILLS ?= 200
FAULTS ?= 100
# How many ranks of a torchrun it kills or stops; RANKS is that of `make bench`.
RANKS_ENDED ?= 50

# What `make bench` measures; kept in build/ for the next time. GOALS=whole,cold: one more round of these alone.
PARAMS ?= 1.5e9
RANKS ?= 8
GOALS ?=
BENCH := build/bench-zero3-$(PARAMS)-$(RANKS)ranks

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# pip reads these also while it builds a package from source, where -c does not reach.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(BIN)/python -m pip

.DEFAULT_GOAL := help
.PHONY: help venv demo quick test clients pythons package fuzz faults lint fix docs pages bench clean distclean

help:
	@echo "make demo       convert the shipped ZeRO-3 checkpoint, load the result, generate from it"
	@echo "make quick      the tests to run before each commit: every part of the package, in 90 seconds on two cores"
	@echo "make test       run the whole test suite (JOBS=$(JOBS) processes; LOAD=2: beside two that burn the processor)"
	@echo "make clients    install vLLM, llama.cpp, transformers 4 and others, and let them load what is written (5 GB)"
	@echo "make pythons    make quick with each of PYTHONS that this machine has, each in build/PYTHON"
	@echo "make package    build the distributions into dist/ and check them with twine"
	@echo "make fuzz       feed hostile bytes to every reader for SECONDS=$(SECONDS); findings go to build/fuzz"
	@echo "make faults     kill KILLS=$(KILLS) conversions, and let system calls fail in FAULTS=$(FAULTS) others,"
	@echo "                and kill or stop RANKS_ENDED=$(RANKS_ENDED) ranks under torchrun"
	@echo "make lint       ruff and mypy"
	@echo "make fix        let ruff repair and format what it can"
	@echo "make docs       build the documentation as a site with search, in build/site"
	@echo "make pages      derive the pages of docs/ anew, and what their commands print"
	@echo "make bench      measure every goal of speed and size beside other tools; writes benchmarks/RESULTS.md"
	@echo "make venv       install the pinned dependencies into $(VENV) (the others do it when needed);"
	@echo "                PYTHON=python3.12 names another interpreter, TORCH=FILE.whl a build of PyTorch"
	@echo "make clean      remove what demo, test, lint and bench left"
	@echo "make distclean  remove $(VENV) too"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("ckpt-tools needs Python 3.10 or newer; " \
		"this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	@echo "Installing pinned dependencies into $(VENV) (a minute or more; PyTorch is the largest) ..."
	@$(PYTHON) -m venv $(VENV)
	@test -z "$(TORCH)" || $(PIP) install -qq --no-deps $(TORCH)
	@$(PIP) install -qq --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@
	@echo "Installed: $$($(BIN)/python --version), $$($(PIP) list --format=freeze | wc -l) packages."

demo: $(STAMP)
	@$(BIN)/python demo/run.py

# These tests wait for nothing, so a third process would only collect them once more.
quick: $(STAMP)
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test: $(STAMP)
	@$(BIN)/python -m tests.support.loaded $(LOAD) \
		$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

clients: $(STAMP)
	@$(BIN)/python clients/run.py

# The environments have no linters, and no DeepSpeed, which is built from source.
pythons:
	@for python in $(PYTHONS); do \
		if $$python -c '' 2>/dev/null; then \
			$(MAKE) --no-print-directory quick VENV=build/$$python PYTHON=$$python \
				EXTRAS=peft,plot,test,zstd || exit 1; \
		else \
			echo "$$python: not on this machine, so not run."; \
		fi; \
	done

package: $(STAMP)
	@$(PIP) install -qq --constraint constraints.txt --editable '.[package]'
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m twine check --strict dist/*
	@! grep -q 'github.com/OWNER/' pyproject.toml || \
		echo "The URLs of the project name OWNER: write the account into pyproject.toml before you publish dist/."

fuzz: $(STAMP)
	@$(PIP) install -qq --constraint constraints.txt --editable '.[fuzz]' || \
		echo "atheris cannot be installed for this Python: coverage does not guide the mutation."
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

faults: $(STAMP)
	@$(BIN)/python -m tests.faults --kills $(KILLS) --faults $(FAULTS) --ranks $(RANKS_ENDED)

lint: $(STAMP)
	@$(BIN)/ruff check --quiet && echo "ruff check: ok"
	@$(BIN)/ruff format --check --quiet && echo "ruff format: ok"
	@$(BIN)/mypy

fix: $(STAMP)
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format

docs: $(STAMP)
	@$(BIN)/zensical build --strict --clean
	@echo "The site is in build/site."

pages: $(STAMP)
	@$(BIN)/python docs/generate.py
	@REWRITE=1 $(BIN)/python -m pytest -q tests/docs/test_blocks.py

bench: $(STAMP)
	@$(MAKE) --no-print-directory $(BENCH)/benchmark.json
	@$(BIN)/python benchmarks/bench.py $(BENCH) $(if $(GOALS),--only $(GOALS))

$(BENCH)/benchmark.json:
	@rm -rf $(BENCH) && mkdir -p build
	@$(BIN)/python benchmarks/make_zero.py $(BENCH) --no-moments --params $(PARAMS) --ranks $(RANKS)

clean:
	@rm -rf demo-output build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)
