# `make demo` and `make test` do all their own set-up. On a machine without a GPU, PIP_EXTRA_INDEX_URL may name PyTorch's CPU index
# to spare a download of CUDA libraries.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
# Processes of the tests. Each needs 2 to 4 GB, and uses one thread.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadscope

.PHONY: install install-test demo test slow lint docs clean

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "wadi needs Python 3.10 or newer: set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# A multi-step teacher becomes a one-step student, in minutes on two cores.
demo: install
	$(VENV)/bin/wadi distill --preset demo --out $(RUN)

test: install-test
	$(VENV)/bin/python -m pytest $(PARALLEL)

slow: install-test
	$(VENV)/bin/python -m pytest $(PARALLEL) -m slow

lint: install-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# The docs site, in build/site. A broken link or anchor is an error.
docs: $(VENV)/.installed-docs
	$(VENV)/bin/python docs/_site/prepare.py build/docs
	$(VENV)/bin/zensical build --strict

clean:
	rm -rf $(VENV) build .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
