# make demo    trains a prototypical encoder on real pictures and writes runs/demo/report.html
# make test    the tests;   make lint   ruff and mypy;   make wheel   the wheel, tried in an environment of its own
# make bench   the benchmarks;   make clean   removes what was built
# Each makes its own virtual environment in .venv first. Needed: Python >= 3.10, make, a C++ compiler.

PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(shell find csrc -type f) setup.py pyproject.toml constraints.txt

.PHONY: demo test lint wheel bench clean

demo: .venv/train
	$(BIN)/fastproto train --method pauc --crop contrastive --data digits --out runs/demo --overwrite

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --durations 10

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: .venv/test
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python tests/try_wheel.py dist/*.whl

bench: .venv/bench
	$(BIN)/python -m pytest bench -q --benchmark-only --benchmark-columns min,median,ops

.venv/%: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf build dist *.egg-info *.so .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
