# make demo    the spiral and the photograph: numbers here, pictures in demo/
# make test    the whole test suite in two processes, with real KeOps formulas compiled and run
# make test-slow  samplers over hundreds of simulated data sets, truncation in 200 000 random scenes (~2 hours)
# make sanitize  the native engine with the address and undefined-behavior sanitizers of the compiler (g++ on Linux)
# make check   formatter, linter, type checker
# make gallery every gallery script and all pages of the documentation, in build/site (open index.html), and their checks
# make gpu     what works on this device, the suite's checks of every reduction on it, and then bench-gpu (needs CUDA)
# make bench   every case by every peer that is installed (~10 minutes with scikit-learn alone), tables and plots
# make bench-gpu  the same on CUDA, and which engine is faster in which dimension
#
# Each target makes .venv and installs into it first, and again only when pyproject.toml, constraints.txt or the sources
# of the native engine change. GMMKEOPS_REQUIRE_NATIVE=1 makes a failed compilation an error.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo gallery test test-slow sanitize check gpu bench bench-gpu clean
.DEFAULT_GOAL := test

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all
NATIVE := $(wildcard setup.py gmmkeops/reductions/native/source/*)

$(READY): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gallery,bench,test]"
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

sanitize: $(READY)
	CXXFLAGS="$(SANITIZERS) -O1 -g -w" $(BIN)/python setup.py -q build --build-base build/objects --build-lib build/sanitized
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	PYTHONPATH=build/sanitized $(BIN)/python -P -m pytest -p no:cacheprovider -k "not installation and not memory" \
	tests/test_native.py tests/test_em_steps.py tests/test_reduction.py tests/test_tree.py tests/test_truncation_passes.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu: $(READY)
	-$(BIN)/gmmkeops doctor
	$(BIN)/python -m pytest -m gpu
	$(MAKE) bench-gpu

bench: $(READY)
	$(BIN)/python bench/run.py
	$(BIN)/python bench/engines.py
	$(BIN)/python bench/choose.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/starts.py
	$(BIN)/python bench/report.py

bench-gpu: $(READY)
	$(BIN)/python bench/run.py --device cuda
	$(BIN)/python bench/crossover.py --device cuda --json bench/results/crossover.json
	$(BIN)/python bench/report.py

clean:
	rm -rf .venv demo build dist *.egg-info gallery/auto gallery/generated
