# `make demo` and `make test` work from a bare clone with Python 3.10 or newer and make: they build .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Numbers are compared side by side on few cores; idle worker threads that spin would distort them.
export OMP_WAIT_POLICY ?= PASSIVE
# Where there is a compiler, kernels that do not build are an error.
export DSR_TOOL_REQUIRE_KERNELS ?= $(if $(shell command -v c++ g++ clang++),1,)
KERNELS := $(foreach ending,cpp h def,$(wildcard dsr_tool/runtime/kernels/*.$(ending) dsr_tool/runtime/deploy/*.$(ending) dsr_tool/runtime/deploy/include/*.$(ending)))

.PHONY: help demo pictures test test-slow fuzz lint bench zoo kernels sanitize neon wheels smoke clean
help:
	@echo "make demo   set up and run the main job on a small real data set (one to three minutes on two cores, after the installation)"
	@echo "make test   set up and run linters, type checker, import contracts and tests"
	@echo "make kernels, make sanitize, make neon   build the kernels; test them with sanitizers, and under emulation"
	@echo "make wheels, make smoke   build the wheels and the sdist in dist/ and check what is in them; install and use them"
	@echo "make pictures   make the pictures of commands and of a page in docs/images"
	@echo "make docs   build the site in site/, with warnings as errors"
	@echo "make test-slow, make fuzz, make lint, make bench, make zoo, make clean"

.venv/installed: pyproject.toml hatch_build.py $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "dsr-tool needs Python 3.10 or newer; run make PYTHON=python3.12, say" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: .venv/installed
	$(BIN)/dsr-tool demo --output demo-out --force

# Latencies in the pictures are those of this machine.
pictures: .venv/installed
	$(BIN)/python docs/images/make.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Training has processes of its own: what torch compiles, and the threads that do it, stay until a process ends. A file
# of tests stays in one process, as its fixtures do. More processes need more memory, about 2 GB each.
WORKERS ?= 2
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --ignore=tests/train
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/train

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
	$(BIN)/python benchmarks/support.py

# site/index.html opens from its folder; no page loads anything from the network.
.PHONY: docs
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

kernels: .venv/installed
	$(BIN)/python hatch_build.py

# gcc's AddressSanitizer and UndefinedBehaviorSanitizer; leaks are Python's own business.
sanitize: .venv/installed
	$(BIN)/python hatch_build.py --sanitize --output build/sanitized
	level=$$($(BIN)/python -c 'from dsr_tool.runtime.kernels.cpu import supported_levels as s; print(s()[0])') && \
	library() { $${CXX:-c++} -print-file-name=$$1; } && \
	DSR_TOOL_KERNELS=$(CURDIR)/build/sanitized/_kernels_$$level.so ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$$(library libasan.so) $$(library libstdc++.so.6)" \
	$(BIN)/python -m pytest tests/runtime tests/deploy

# Needs an aarch64 compiler, qemu-user and, the first time, root for apt-get; tests/emulated.sh says more.
neon: .venv/installed
	tests/emulated.sh

# The sdist builds each wheel, in an environment of its own, with Zig's compiler for that platform (hatch_build.py).
wheels: .venv/installed
	rm -rf dist
	$(BIN)/python -m hatchling build --target sdist --directory dist
	for platform in manylinux_2_17_x86_64 manylinux_2_17_aarch64; do \
	  env -u CXX DSR_TOOL_REQUIRE_KERNELS=1 DSR_TOOL_WHEEL_PLATFORM=$$platform \
	  $(BIN)/python -m pip wheel --no-deps --wheel-dir dist dist/*.tar.gz || exit 1; done
	$(BIN)/python -m pytest -m slow tests/wheels

# Needs `make wheels`. tests/wheels/smoke.py says what KINDS there are.
KINDS ?= newest prediction
smoke:
	$(PYTHON) tests/wheels/smoke.py $(KINDS)

clean:
	rm -rf .venv demo-out site
