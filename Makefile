# `make demo` and `make test` work from a bare clone with Python 3.10 or newer and make: they build .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Numbers are compared side by side on few cores; idle worker threads that spin would distort them.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test test-slow fuzz lint bench zoo clean
help:
	@echo "make demo   set up and run the main job on a small real data set (one to three minutes on two cores, after the installation)"
	@echo "make test   set up and run linters, type checker, import contracts and tests"
	@echo "make test-slow, make fuzz, make lint, make bench, make zoo, make clean"

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "dsr-tool needs Python 3.10 or newer; run make PYTHON=python3.12, say" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: .venv/installed
	$(BIN)/dsr-tool demo --output demo-out --force

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

fuzz: .venv/installed
	$(BIN)/python -m pytest -m slow tests/fuzz -s

bench: .venv/installed
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/reallocation.py
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python benchmarks/onnx_files.py resnet50
	$(BIN)/python benchmarks/memory.py

# Goes on where it was interrupted; build/zoo.jsonl has what is done.
zoo: .venv/installed
	$(BIN)/python benchmarks/zoo.py

clean:
	rm -rf .venv demo-out
