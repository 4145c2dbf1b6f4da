PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
NAME ?= circles
CASES ?= 20000
SEED := $(or $(SEED),$(shell date +%s))

# The same Makefile with another environment: one with a CUDA build of PyTorch.
cuda_torch = torch==2.14.1
with_cuda = $(MAKE) VENV=$(VENV)-cuda TORCH=$(cuda_torch)

PY := $(abspath $(VENV))/bin/python
# Python compiles what is imported, and keeps that; pip would compile all of it, which takes a minute.
PIP := $(PY) -m pip install --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=
SANITIZED = $(MAKE) --no-print-directory --output-sync=target -C tests/cpp --jobs=$(shell nproc)
# Two processes: where one is busy in Python, the other has the second core, for which no thread spins.
PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist worksteal
extra = $(shell sed -n 's/^$(1) = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d ,)

# Directories too, so that a removed file counts. An editable install writes dlkernels/_build.py
# and with that makes `make test` install a copy again.
SOURCES := setup.py build_backend.py build_kernels.py pyproject.toml \
  $(shell find csrc dlkernels benchmarks -not -name '*.so' -not -path '*__pycache__*')
CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help train example test test-full sanitize arm .kernels race fuzz cuda cuda-link .cuda-link \
  .cuda-link-if-possible gpu bench bench-quick lint format clean
.NOTPARALLEL:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13
	@echo 'Variables: PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV)'

train: $(VENV)/.dlkernels $(VENV)/.examples  ## set everything up, then train the MLP and the CNN on handwritten digits
	$(PY) examples/train_digits.py --model mlp --kernels both
	$(PY) examples/train_digits.py --model cnn --kernels both

example: $(VENV)/.dlkernels $(VENV)/.examples  ## the same with another script of examples/: make example NAME=circles
	$(PY) examples/$(NAME).py

# From tests/, because Python started in the root would import the source tree.
test: .kernels cuda $(VENV)/.dlkernels $(VENV)/.examples $(VENV)/.test $(VENV)/.vision  ## set everything up, then run every test
	cd tests && $(PY) -c 'import dlkernels; print("testing", dlkernels.__file__)'
	cd tests && $(PYTEST)
	$(MAKE) .cuda-link-if-possible

test-full: export DLKERNELS_TEST_FULL = 1
test-full: test race  ## the same with every sample in every way, and data races

sanitize:  ## test the kernels without torch, those of CUDA on the CPU, under sanitizers
	$(SANITIZED)

cuda:  ## build the CUDA kernels, warnings as errors (skipped where there is no nvcc)
	$(PYTHON) build_kernels.py build/cuda

cuda-link:  ## build and test against a CUDA build of PyTorch, without a GPU (an environment of 5 GB)
	$(with_cuda) .cuda-link

# No fault of ours where there is no compiler, no room, or no such torch for this Python.
.cuda-link-if-possible:
	@if ! $(PYTHON) -c 'import build_kernels, sys; sys.exit(build_kernels.nvcc() is None)'; then \
	  echo 'cuda-link: skipped, there is no nvcc (set CUDA_HOME)'; \
	elif [ ! -e $(VENV)-cuda/.torch ] && df -Pk . | awk 'NR == 2 {exit $$4 >= 10000000}'; then \
	  echo 'cuda-link: skipped, its environment needs 10 GB of free disk'; \
	elif ! $(with_cuda) $(VENV)-cuda/.torch; then \
	  rm -rf $(VENV)-cuda; \
	  echo 'cuda-link: skipped, pip could not install $(cuda_torch): see above'; \
	else \
	  $(with_cuda) .cuda-link; \
	fi

gpu:  ## build, test, sanitize and time the CUDA kernels, with the Python and PyTorch that are there
	DLKERNELS_CUDA=1 $(PYTHON) setup.py build_ext --inplace
	cd tests && PYTHONPATH=$(CURDIR) $(PYTHON) gpu_check.py

# Both at once: what qemu runs takes one core.
.kernels:
	$(SANITIZED) check arm

arm:  ## build the kernels for 64-bit Arm and test them under qemu (g++-aarch64-linux-gnu, qemu-user)
	@$(MAKE) --no-print-directory -C tests/cpp --jobs=$(shell nproc) arm

race:  ## test them for data races under TSan: two minutes
	$(SANITIZED) ../../build/kernels_race
	build/kernels_race 10

# 20,000 cases of each op and 1,000 of each kernel under sanitizers: half an hour on two cores.
fuzz: $(VENV)/.dlkernels $(VENV)/.examples $(VENV)/.test  ## random cases: SEED=... repeats a run, CASES=... of each
	$(SANITIZED) ../../build/kernels_test
	build/kernels_test $$(( $(CASES) / 20 )) $(SEED)
	cd tests && DLKERNELS_FUZZ=$(CASES) DLKERNELS_FUZZ_SEED=$(SEED) $(PYTEST) test_fuzz.py

bench: $(VENV)/.dlkernels $(VENV)/.bench  ## time everything against its peers; rewrites the tables in README.md and docs/benchmarks.md
	cd benchmarks && $(PY) -m dlkernels bench --json ../build/bench.json --write ..

bench-quick: $(VENV)/.dlkernels $(VENV)/.bench  ## the same in three minutes: few cases, shown and not written
	cd benchmarks && $(PY) -m dlkernels bench --quick

lint: $(VENV)/.lint $(VENV)/.torch  ## check style and the rules of the house
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	# Kernels know no torch, intrinsics stand in cpu/simd, conditions in x86 guards.
	! grep -rnE '#include *[<"](torch|ATen|c10)|\b(torch|ATen|at|c10)::' csrc/cpu $(wildcard csrc/cuda)
	! grep -rnE --exclude-dir=simd '\b_mm[0-9]*_' csrc
	# A header includes what it uses.
	for header in $$(find csrc/cpu -name '*.inl.h' -not -name table.inl.h); do \
	  echo "#include \"$$header\"" | $(CXX) -std=c++20 -fsyntax-only -Icsrc -I. -x c++ - || exit 1; done
	! grep -rnE '^ *# *if' csrc | grep -vE '^csrc/(cuda/common\.cuh|cpu/(simd/vec\.h|isa_avx[0-9]+\.cpp|dispatch\.cpp)):'

format: $(VENV)/.lint  ## rewrite the sources in the house's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

.cuda-link: export DLKERNELS_CUDA = 1
.cuda-link: $(VENV)/.dlkernels $(VENV)/.test
	cd tests && $(PYTEST) test_cuda.py test_package.py test_gradients.py::test_nodes \
	  -k 'not any_order and not environment and not isa_files'

clean:  ## remove what was built, but not the environment
	rm -rf build dist *.egg-info .pytest_cache .benchmarks .ruff_cache .hypothesis
	rm -f dlkernels/*.so dlkernels/_build.py $(VENV)/.dlkernels
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(PY)
	$(PIP) '$(TORCH)' 'setuptools>=77' ninja
	touch $@

$(VENV)/.bench $(VENV)/.examples $(VENV)/.test $(VENV)/.lint: $(VENV)/.%: pyproject.toml | $(PY)
	$(PIP) $(call extra,$*)
	touch $@

# Without dependencies: they are there, but for the one torch that it names, which may not be ours.
$(VENV)/.vision: pyproject.toml $(VENV)/.test
	$(PIP) --no-deps $(call extra,vision)
	touch $@

# Not isolated and in place, so that build/ keeps the objects of the last build.
$(VENV)/.dlkernels: $(SOURCES) | $(VENV)/.torch
	rm -rf build/lib*
	$(PIP) --no-build-isolation --no-deps .
	touch $@
