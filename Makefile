# `make demo` and `make test` are all that a fresh machine needs: each sets up .venv on the way.
#
#   make demo      verify, a short benchmark and a training that learns; leaves demo/
#   make test      the default tests
#   make interpret every test of the Triton kernels under the strict interpreter; `make test` has a part of them
#   make simulate  every Triton kernel compiled, and its PTX run by the simulator, without a GPU; goes on where it stopped
#   make mutate    mutants of every backend, judged by a part of the tests; goes on where it stopped
#   make matrix    the Triton kernels compiled with every tile for every target, without a GPU; writes its page
#   make lint      ruff, mypy --strict, directions of imports and includes, clang-format, and csrc/ compiled with -Werror
#   make compatibility  run the tests of users' habits and write docs/compatibility.md from what passed
#   make bench     the full benchmark of this machine's CPU
#   make gpu       on a GPU, offline, with the ambient Python (PYTHON=...) and its torch and triton: verify, runtime checks,
#                  benchmarks, a report in RESULTS=..., SECONDS=... a stage; make gpu-verify, gpu-runtime, gpu-forward,
#                  gpu-training: one stage, under 10 minutes each
#   make model     what the Triton kernels should take on GPUs, by a model: writes its page
#   make sanitize  the C++ tests under the address, undefined behaviour and thread sanitizers
#   make arm       the C++ tests cross-compiled for 64-bit ARM and run by qemu-user
#   make wheel     sdist and wheel in dist/
#   make clean     remove what was built here; .venv stays
#
# TORCH=... chooses another torch for a .venv that does not exist yet.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The [build-system] requirements of pyproject.toml: the editable install builds in .venv itself, since an isolated
# build environment would be downloaded, and its CMake cache be stale, every time.
BUILD_REQUIRES = "setuptools>=77" "pybind11>=2.13" ninja "cmake>=3.24"

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')
CMAKE := $(VENV)/bin/cmake
CXX_BUILD = PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(CMAKE) -S . -G Ninja
SAY = @printf '\033[1m==> %s\033[0m\n'

.PHONY: demo test interpret simulate mutate matrix model lint compatibility bench sanitize arm wheel clean setup \
  gpu gpu-verify gpu-runtime gpu-forward gpu-training gpu-ready
.DELETE_ON_ERROR:

demo: setup
	$(SAY) "demo"
	$(PY) -m rmc_kernels demo

# Two processes of about the same time. Whether Triton interprets holds for a process, so its tests are with the second.
test: setup
	$(SAY) "tests, and beside them those of the C++ kernels and of Triton under its interpreter"
	@mkdir -p build
	@(TRITON_INTERPRET=1 $(PY) -m pytest -q -k triton; interpreted=$$?; \
	$(PY) -m pytest -q tests/cpu; exit $$((interpreted | $$?))) >build/beside.log 2>&1 & \
	$(PY) -m pytest -q --ignore=tests/cpu; others=$$?; wait $$!; beside=$$?; \
	cat build/beside.log; exit $$((others | beside))

interpret: setup
	$(SAY) "every test of the Triton kernels under the strict interpreter"
	TRITON_INTERPRET=1 $(PY) -m pytest -q -k triton -m "slow or not slow"

simulate: setup
	$(SAY) "every Triton kernel compiled, and its PTX run by the simulator"
	$(PY) -m tools.simulate

mutate: setup
	$(SAY) "every mutant of every backend, and every barrier"
	for part in reference cpp barriers triton triton_backward; do $(PY) -m tools.mutation $$part || exit 1; done

# What is known of the present sources is not compiled again. The table is measured with both triton versions.
matrix: setup
	$(SAY) "the compile matrix"
	test -d build/triton-3.9.0 || $(PIP) install --no-deps --target build/triton-3.9.0 triton==3.9.0
	TRITON_INTERPRET=1 $(PY) -m tools.compile_matrix.traffic
	$(PY) -m tools.compile_matrix
	PYTHONPATH=build/triton-3.9.0 $(PY) -m tools.compile_matrix

model: setup
	$(SAY) "the model of the Triton kernels on GPUs"
	$(PY) -m tools.gpu_model

compatibility: setup
	$(SAY) "docs/compatibility.md"
	$(PY) -m pytest -q -m feature --compatibility=docs/compatibility.md

bench: setup
	$(SAY) "benchmark"
	$(PY) -m rmc_kernels bench --suite full

lint: setup
	$(SAY) "ruff"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(SAY) "mypy --strict"
	$(VENV)/bin/mypy
	$(SAY) "directions of imports and includes"
	$(VENV)/bin/lint-imports --no-logo --cache-dir build/import-linter
	$(PY) -m tools.includes
	$(SAY) "clang-format"
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)
	$(SAY) "csrc with -Werror"
	$(CXX_BUILD) -B build/werror -DRMC_WERROR=ON -DRMC_TESTS=ON -DPython_EXECUTABLE="$(CURDIR)/$(PY)" \
	  -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" --log-level=WARNING
	$(CMAKE) --build build/werror

# ---- Set-up: each stage leaves a stamp and is repeated when what it was made from changes ---------------------------

setup: $(VENV)/.extension

$(VENV)/.torch:
	$(SAY) "creating $(VENV) with $(TORCH)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	$(SAY) "installing rmc_kernels, editable, with what its development needs"
	$(PIP) install $(BUILD_REQUIRES)
	$(PIP) install --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/.extension: $(VENV)/.installed CMakeLists.txt $(CSRC)
	$(SAY) "building the C++ extension"
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# ---- The GPU machine: nothing is installed there, and nothing fetched ------------------------------------------------

RESULTS ?= benchmarks/results
SECONDS ?= 420

# `python -m` searches this folder first: the package needs no installation.
GPU = $(PYTHON) -m rmc_kernels.bench.gpu --out "$(RESULTS)" --seconds $(SECONDS)

gpu: gpu-ready
	$(GPU)

gpu-verify gpu-runtime gpu-forward gpu-training: gpu-%: gpu-ready
	$(GPU) $*

gpu-ready:
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec; \
	find_spec("torch") or sys.exit("make gpu: $(PYTHON) has no torch; nothing was run"); import torch; \
	torch.cuda.is_available() or sys.exit(f"make gpu: torch {torch.__version__} sees no GPU; nothing was run")'

# ---- Slower checks ---------------------------------------------------------------------------------------------------

SANITIZERS := address,undefined thread

sanitize: setup
	@for sanitizer in $(SANITIZERS); do \
	  printf '\033[1m==> csrc/tests under %s\033[0m\n' $$sanitizer; \
	  build=build/sanitize-$${sanitizer%%,*}; \
	  $(CXX_BUILD) -B $$build -DRMC_SANITIZE=$$sanitizer -DRMC_TESTS=ON -DRMC_BINDINGS=OFF --log-level=WARNING && \
	  $(CMAKE) --build $$build && \
	  $(VENV)/bin/ctest --test-dir $$build --output-on-failure || exit 1; \
	done

ARM := aarch64-linux-gnu
ARM_PACKAGES := g++-$(ARM) qemu-user

# Not the large cells, which test no instruction set and take five minutes there.
arm: setup
	$(SAY) "csrc/tests on 64-bit ARM, emulated"
	@command -v $(ARM)-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	  { echo "make arm: needs $(ARM)-g++ and qemu-aarch64, as by apt-get install $(ARM_PACKAGES)"; exit 1; }
	$(CXX_BUILD) -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(ARM)-g++ -DRMC_BINDINGS=OFF -DRMC_TESTS=ON -DRMC_WERROR=ON --log-level=WARNING
	$(CMAKE) --build build/arm
	qemu-aarch64 -L /usr/$(ARM) build/arm/test_machine
	qemu-aarch64 -L /usr/$(ARM) build/arm/test_cell neon

wheel: setup
	$(SAY) "sdist and wheel"
	rm -rf dist
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m build --no-isolation .

clean:
	rm -rf build dist demo *.egg-info rmc_kernels/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.extension
