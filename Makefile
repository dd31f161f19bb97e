# Everything is done by two commands, set-up included: `make demo` and `make test`.
# VENV may point elsewhere; PYTHON is the interpreter it is made from.

# Real guests are served by an ordinary user, who must be able to execute the interpreter: the
# system's, if it is new enough, rather than one in somebody's home.
RECENT := -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell /usr/bin/python3 $(RECENT) 2>/dev/null && echo /usr/bin/python3 || echo python3)
# A plain path, not an import hook, which would cost every start of every process 20 ms.
EDITABLE := --config-settings editable_mode=compat --editable
# Python's own bytecode is made here, as pip does for what it installs: an ordinary user may not
# write it, nor a service with PYTHONDONTWRITEBYTECODE, and each start would compile everything.
ROOMS := control dataplane flows shm
VENV ?= .venv
BIN := $(VENV)/bin
ROOT_RUN := $(shell [ "$$(id -u)" = 0 ] || echo sudo env VHOSTMQ_CI=$$VHOSTMQ_CI)

.PHONY: dev demo test packages lint unit interpreted system nightly bench sweep clean help

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make dev          .venv with the vhostmq command and what tests need
dev: $(VENV)/.made
	@$(BIN)/python -m compileall -q $(ROOMS)

$(VENV)/.made: pyproject.toml
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV): is the venv module there (Debian: apt-get install python3-venv)?" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check $(EDITABLE) '.[dev]'
	@touch $@

## make demo         a guest without a VM, four queue pairs, end to end
demo: dev
	$(BIN)/vhostmq warm
	$(BIN)/python -m benchmarks.demo

## make test         everything: lint, unit tests compiled and interpreted, real guests
test: lint packages unit interpreted system

## make packages     what tests need from Debian, and the guests' images (root)
packages: dev
	$(ROOT_RUN) $(BIN)/python -m benchmarks.guest.prepare

## make lint         ruff and mypy
lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## make unit         tests of single modules and of a running back-end, compiled
unit: dev
	$(BIN)/vhostmq warm
	$(BIN)/python -m pytest -q tests --ignore=tests/system

## make interpreted  the same tests without compilation: every memory access is checked
interpreted: dev
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest -q tests --ignore=tests/system

## make system       QEMU, User-Mode Linux and DPDK guests; needs root for namespaces and packages
system: dev
	$(ROOT_RUN) $(BIN)/python -m pytest -q tests/system

## make nightly      interpreted: thousands of simulated days, a death at every place (hours)
nightly: dev
	NUMBA_DISABLE_JIT=1 VHOSTMQ_SIM=0:5000 VHOSTMQ_EVERY=1 $(BIN)/python -m pytest -q tests/sim tests/test_inherit*.py

## make bench        measure, in about an hour (less without PASST=path, the passt to compare with);
##                   README's tables, docs/performance.md and its pictures from that
## make sweep        every load with every number of pairs and workers at every MTU, in about an hour
BENCH := $(ROOT_RUN) $(BIN)/python -m benchmarks $(if $(PASST),--passt $(PASST))
DOCUMENTS := for made in table performance plot; do $(BIN)/python -m benchmarks.$$made || exit; done

bench: dev
	$(BIN)/vhostmq warm
	$(BENCH)
	$(DOCUMENTS)

sweep: dev
	$(BIN)/vhostmq warm
	$(BENCH) --only sweep --seconds 0.5 --out benchmarks/sweep.json
	$(DOCUMENTS)

## make clean        undo `make dev` and all build products
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
