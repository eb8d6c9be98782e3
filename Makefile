.PHONY: demo test lint bench docs install clean

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

demo: $(INSTALLED)
	$(BIN)/relfisher reproduce mlp --quick --jobs 2 --out runs/demo

test: $(INSTALLED)
	$(BIN)/pytest -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/matvec.py
	$(BIN)/relfisher bench step --out runs/bench-step

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict --site-dir build/docs

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[experiments,clients,dev]"
	touch $@

clean:
	rm -rf .venv runs
