# make demo    the spiral and the photograph: numbers here, pictures in demo/
# make test    the whole test suite, with real KeOps formulas compiled and run
# make check   formatter, linter, type checker
# make gallery every gallery script, pictures in demo/
# make gpu     the suite's GPU checks (needs a CUDA device)
# make bench   against the KeOps tutorial's formula, scikit-learn, and tgmm where it is installed (~15 minutes)
#
# Each target makes .venv and installs into it first, and again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo gallery test check gpu bench clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gallery,bench,test]"
	@touch $@

demo: $(READY)
	$(BIN)/python gallery/run.py demo gallery/plot_spiral.py gallery/plot_photograph.py

gallery: $(READY)
	$(BIN)/python gallery/run.py demo gallery/plot_*.py

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

bench: $(READY)
	$(BIN)/python bench/tutorial.py
	$(BIN)/python bench/em.py
	$(BIN)/python bench/em.py --fit --repeats 1

clean:
	rm -rf .venv demo build dist *.egg-info
