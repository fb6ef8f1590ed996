# Each target sets itself up: a fresh clone needs nothing but Python 3.11 or 3.12 on Linux.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-unit test-slow check

PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
TORCH := torch==2.13.0# first and alone, so that pip takes the CPU build where one is offered
QUALIFIES := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
export OMP_NUM_THREADS ?= 1# ranks share the cores; more threads per rank only get in each other's way

help:
	@echo "make venv        build .venv (Python 3.11 or 3.12, Linux, CPU)"
	@echo "make quickstart  train on 4 CPU ranks, evaluate, write runs/quickstart/"
	@echo "make test        fast lane; what CI runs"
	@echo "make test-unit   its units and the rules of the architecture"
	@echo "make test-slow   lists the parts of the slow lane; PART=NAME runs one, PART=all all of them"
	@echo "make check       lint, format, types, architecture"

venv: $(INSTALLED)

$(INSTALLED): setup.py constraints-cpu.txt
	@[ "$$(uname -s)" = Linux ] || { echo "make venv: found $$(uname -s), needs Linux" >&2; exit 1; }
	@set -euo pipefail; \
	for candidate in python3.12 python3.11 python3; do \
	  if "$$candidate" -c '$(QUALIFIES)' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	done; \
	[ -n "$${found:-}" ] || { echo "make venv: needs Python 3.11 or 3.12 with venv and ensurepip" \
	  "(python3.12, python3.11 or python3 on PATH), found $$({ python3 --version 2>/dev/null || echo none; } | head -n 1)" >&2; exit 1; }; \
	if ! $(PYTHON) -c '$(QUALIFIES)' >/dev/null 2>&1; then \
	  echo "building .venv with $$found"; "$$found" -m venv --clear .venv; \
	fi; \
	$(PYTHON) -m pip install --quiet $(TORCH); \
	$(PYTHON) -m pip install --quiet -c constraints-cpu.txt -e '.[kernels,quickstart,test,dev]'; \
	touch $@

quickstart: venv
	$(PYTHON) examples/quickstart/run.py

test: venv
	$(PYTHON) -m tests.fast_lane $(OPTIONS)

test-unit: venv
	$(PYTHON) -m tests.fast_lane unit $(OPTIONS)

test-slow: venv
	@$(PYTHON) -m tests.slow_lane $(PART) $(OPTIONS)

check: venv
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/architecture
