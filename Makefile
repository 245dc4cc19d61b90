# make demo   install, then train on real images with two workers and a service, and show what came of it
# make test   install, then run the whole test suite
# make check  formatting, lint, strict types, stub freshness
# make bench  every benchmark beside its peers      make soak   the long fault rounds
# make kernels   install Triton (a gigabyte), then test its kernel through the interpreter; no GPU needed
# make fuzz   a minute of coverage-guided fuzzing for each reader of foreign bytes
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NEARKIN := -e ./protos -e ./client -e './service[cpu,mixed]' -e ./trainer
MANIFESTS := constraints.txt $(wildcard */pyproject.toml)

.PHONY: setup demo test kernels check format stubs bench fuzz soak constraints clean

setup: $(VENV)/.installed

$(VENV)/.installed: $(MANIFESTS)
	@echo "installing into $(VENV) (the first time takes a minute or two)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nearkin needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "no venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) $(NEARKIN)
	@touch $@

$(VENV)/.developing: $(VENV)/.installed requirements-dev.txt
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/.measuring: $(VENV)/.developing requirements-bench.txt
	@$(PIP) -r requirements-bench.txt
	@touch $@

$(VENV)/.fuzzing: $(VENV)/.developing requirements-fuzz.txt
	@$(PIP) -r requirements-fuzz.txt
	@touch $@

$(VENV)/.demonstrating: $(VENV)/.installed requirements-demo.txt
	@$(PIP) -r requirements-demo.txt
	@touch $@

demo: $(VENV)/.demonstrating
	@$(BIN)/python -m examples.demo

# Services are started hundreds of times, so they find bytecode; and tests wait for them half of the time.
test: $(VENV)/.developing
	@$(BIN)/python -m compileall -q protos client service trainer
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

kernels: $(VENV)/.developing
	@$(PIP) -e './trainer[triton]'
	$(BIN)/python -m pytest tests/trainer/matching --numprocesses 2

check: $(VENV)/.developing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHON=$(CURDIR)/$(BIN)/python protos/check_fresh.sh

format: $(VENV)/.developing
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

stubs: $(VENV)/.developing
	PATH=$(CURDIR)/$(BIN):$$PATH protos/generate.sh

bench: $(VENV)/.measuring
	$(BIN)/python -m tests.bench

fuzz: $(VENV)/.fuzzing
	$(BIN)/python -m tests.fuzz

soak: $(VENV)/.developing
	$(BIN)/python -m pytest -m soak --timeout 7200

constraints:
	@{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
