# `make` lists the targets: each has a line of help after its `##`. All need Python 3.11 and make.
# The constraints file pins torch, so that a machine without a GPU never pulls a CUDA build.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SHARED_DATA := $(abspath ../shared/data)
export VLPRUNE_DATA ?= $(if $(wildcard $(SHARED_DATA)),$(SHARED_DATA))
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo lint check test slow docs other clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: .venv/ready ## run everything on generated data, about five minutes with the installation
	$(BIN)/vlprune demo -o demo-output

# ruff keeps a file's verdict although a module it imports has moved: no cache.
lint: .venv/ready ## ruff (lint and format) and mypy
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint ## lint and the quick tests: two to four minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quick

test: lint ## lint and all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

slow: .venv/ready ## the tests that take minutes, and the wheel
	$(BIN)/python -m pytest -m slow -n 0

# A broken link or a missing docstring is an error.
docs: .venv/ready ## build the documentation in site/, which opens without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "Open site/index.html"

# timm and open_clip need torchvision, which must stay out of .venv (docs/decisions/0005).
other: .venv/ready ## test timm and open_clip in a folder of their own
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .other \
		timm open_clip_torch 'torchvision<0.29' ftfy wcwidth
	PYTHONPATH=.other OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/test_other_libraries.py

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

clean: ## remove .venv and all that the other targets built
	rm -rf .venv .other demo-output site
