# make demo    the spiral and the photograph: numbers here, pictures in demo/
# make test    the whole test suite in two processes, with real KeOps formulas compiled and run
# make test-slow  samplers over hundreds of simulated data sets, truncation in 200 000 random scenes, machine code of the Triton
#                 kernels for four GPUs (~2 hours)
# make sanitize  the native engine with the address and undefined-behavior sanitizers of the compiler (g++ on Linux)
# make check   formatter, linter, type checker
# make gallery every gallery script and all pages of the documentation, in build/site (open index.html), and their checks
# make gpu     ten minutes on a CUDA device: are all results right, and which engine is faster where; results in bench/results.
#              It uses the Python that it is given (make gpu PYTHON=python3), compiles the native engine in this folder, installs
#              nothing, and names what is missing. The tests for devices follow
# make bench   every case by this package and other libraries (~40 minutes on two cores; THREADS=1 for one thread), tables and plots
# make bench-quick  small variants of some cases, in about three minutes, to check the benchmark; results in build/bench
# make bench-gpu  the same on CUDA
#
# Each target makes .venv (the first two benchmarks .venv-bench, with the other libraries) and installs into it first, and again
# only when pyproject.toml, constraints.txt, bench/requirements.txt or the sources of the native engine change.
# GMMKEOPS_REQUIRE_NATIVE=1 makes a failed compilation an error.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv-bench/bin
PEERS_READY := .venv-bench/.ready
THREADS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")

.PHONY: demo gallery test test-slow sanitize check gpu bench bench-quick bench-gpu clean
.DEFAULT_GOAL := test

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all
NATIVE := $(wildcard setup.py gmmkeops/reductions/native/source/*)

$(READY): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gallery,bench,keops,test]"
	@touch $@

$(PEERS_READY): pyproject.toml constraints.txt bench/requirements.txt $(NATIVE)
	$(PYTHON) -m venv .venv-bench
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r bench/requirements.txt -e ".[bench,keops]"
	@touch $@

demo: $(READY)
	$(BIN)/python gallery/run.py demo gallery/scripts/1_model/plot_spiral.py gallery/scripts/6_practice/plot_photograph.py

gallery: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html gallery build/site
	$(BIN)/python -m pytest -m gallery tests

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# A forked process hangs in the memory allocator of the sanitizer if another thread was using it, so that forks are left out.
sanitize: $(READY)
	CXXFLAGS="$(SANITIZERS) -O1 -g -w" $(BIN)/python setup.py -q build --build-base build/objects --build-lib build/sanitized
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	PYTHONPATH=build/sanitized $(BIN)/python -P -m pytest -p no:cacheprovider -k "not installation and not memory and not forked" \
	tests/test_native.py tests/test_em_steps.py tests/test_first_candidates.py tests/test_reduction.py tests/test_tree.py \
	tests/test_truncation_passes.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu:
	-$(PYTHON) setup.py -q build_ext --inplace
	-$(PYTHON) -m gmmkeops.cli doctor
	$(PYTHON) bench/gpu.py
	-$(PYTHON) bench/report.py
	-$(PYTHON) -m pytest -q -m gpu

bench: $(PEERS_READY)
	$(PEERS)/python bench/run.py --threads $(THREADS)
	OMP_NUM_THREADS=$(THREADS) $(PEERS)/python bench/choose.py
	OMP_NUM_THREADS=1 $(PEERS)/python bench/starts.py
	OMP_NUM_THREADS=1 $(PEERS)/python bench/how_many.py
	$(PEERS)/python bench/report.py

bench-quick: $(PEERS_READY)
	$(PEERS)/python bench/run.py --quick --threads $(THREADS)
	$(PEERS)/python bench/report.py build/bench

bench-gpu: $(READY)
	$(BIN)/python bench/run.py --device cuda
	$(BIN)/python bench/report.py

clean:
	rm -rf .venv .venv-bench demo build dist *.egg-info gallery/auto gallery/generated
