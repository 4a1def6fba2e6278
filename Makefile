# `make demo` and `make test` need python3 (3.10 or newer) and nothing else; they install into .venv once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format clean

demo: .venv/.installed
	$(BIN)/hybridlm demo

test: .venv/.installed-test
	$(BIN)/python -m pytest -q

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hybridlm needs Python 3.10 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,metrics]'
	touch .venv/.installed $@

clean:
	rm -rf .venv dist build demo-output
