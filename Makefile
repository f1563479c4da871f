# make demo    trains a prototypical encoder on real pictures and writes runs/demo/report.html
# make test    the tests;   make lint   ruff and mypy;   make wheel   the wheel, tried in an environment of its own
# make test-avx512   the C++ kernels' tests on an emulated CPU, without VNNI and with it (tests/avx512.py)
# make bench   the benchmarks;   make clean   removes what was built
# Each makes its own virtual environment in .venv first. Needed: Python >= 3.10, make, a C++ compiler.

PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(shell find csrc -type f) setup.py pyproject.toml constraints.txt

EMULATED := OMP_NUM_THREADS=1 PYTHONPATH=tests:build/bochs $(BIN)/python -m pytest -q -p avx512

.PHONY: demo test test-avx512 lint wheel bench clean

demo: .venv/train
	$(BIN)/fastproto train --method pauc --crop contrastive --data digits --out runs/demo --overwrite

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --durations 10

test-avx512: .venv/test build/bochs
	$(EMULATED) --cpu skylake tests/ops/test_assign_kernels.py tests/cluster/test_bounds.py
	$(EMULATED) --cpu icelake tests/ops/test_*_kernels.py tests/ops/test_crop_resize.py tests/cluster/test_bounds.py

build/bochs:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ bochscpu-python==0.4.0

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
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip > /dev/null 2>&1 || \
		$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[$*]"
	@$(BIN)/fastproto info | sed -n '/^compiled/,/^$$/p'
	touch $@

clean:
	rm -rf build dist *.egg-info *.so .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
