PYTHON ?= $(if $(shell python3.11 -V 2>/dev/null),python3.11,python3)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test check docs format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## train, attack and compare on real digits; writes outputs/demo
	@. $(BIN)/activate && python recipes/demo.py

test: $(STAMP) ## run the whole test suite, on up to four cores at once
	@$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(STAMP) ## check format, lint, types and the documentation's links
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory docs

docs: $(STAMP) ## build the documentation site into outputs/site; a broken link is an error
	@$(BIN)/python docs/_site/pages.py
	@$(BIN)/zensical build --strict

format: $(STAMP) ## format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix --exit-zero .
	@$(BIN)/ruff format .

clean: ## remove caches, build files and the demo's output; .venv stays
	rm -rf outputs/demo outputs/site outputs/site_pages build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# Made anew when a dependency changed. The test for pip, which comes last, replaces an environment half made.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@echo "Installing into .venv (minutes the first time) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@
