# The few commands of a day's work, in .venv. CONTRIBUTING.md says the rest.
.PHONY: setup test fast lint types docs bench-speed gpu wheel
BIN := .venv/bin

setup: ## an environment with everything, and the hooks of pre-commit
	python3 -m venv .venv
	$(BIN)/pip install --editable '.[dev]'
	$(BIN)/pre-commit install

test:
	$(BIN)/pytest

fast: ## the core alone
	$(BIN)/pytest tests/core tests/test_packaging.py

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/pyright --pythonpath $(BIN)/python

docs:
	$(BIN)/mkdocs build --strict

bench-speed:
	$(BIN)/python -m benchmarks.speed

gpu:
	$(BIN)/pytest -m gpu

wheel: ## sdist and wheel in dist/, tried in a clean environment
	rm -rf dist
	$(BIN)/python .ci/smoke.py --dist dist
