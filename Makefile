# `make demo` runs the main job on built-in data, `make test` checks everything, and `make check`
# what can be checked in a minute or so: no process, no Trainer, no export, some families.
# The constraints file pins torch, so that a machine without a GPU never pulls a CUDA build.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SHARED_DATA := $(abspath ../shared/data)
export VLPRUNE_DATA ?= $(if $(wildcard $(SHARED_DATA)),$(SHARED_DATA))
export HF_HUB_OFFLINE ?= 1

.PHONY: demo lint check test slow docs other clean

demo: .venv/ready
	$(BIN)/vlprune demo -o demo-output

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quick

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

slow: .venv/ready
	$(BIN)/python -m pytest -m slow -n 0

# A site that opens without a network; a broken link or a missing docstring is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "Open site/index.html"

# timm and open_clip need torchvision, which must stay out of .venv (docs/decisions/0005).
other: .venv/ready
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .other \
		timm open_clip_torch 'torchvision<0.29' ftfy wcwidth
	PYTHONPATH=.other OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/test_other_libraries.py

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .other demo-output site
