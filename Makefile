# make train, make test: everything, set-up included. VENV=none uses the Python found as $(PYTHON)
# as it is: nothing is downloaded or installed, only the extension module is built in place.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
RUNS ?= runs

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

ifeq ($(VENV),none)
  RUN := $(PYTHON)
  READY := build/.extension
else
  RUN := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif

.PHONY: setup train real test lint types gates gpu bench docs harden clean
.DEFAULT_GOAL := setup

setup: $(READY)

# torch first and alone, so that the build sees the one that will run.
$(VENV)/.ready: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) -c "import torch" 2>/dev/null || $(RUN) -m pip install "$(TORCH)" numpy
	$(RUN) -m pip install "setuptools>=77" wheel ninja pybind11
	$(RUN) -m pip install --no-build-isolation -e ".[train,test,dev]"
	touch $@

build/.extension: $(SOURCES)
	$(RUN) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

# Scenes, stage 1, stage 2, evaluation on source and target; pictures and checkpoints in runs/.
train: $(READY)
	$(RUN) -m spectralx.quickstart --out $(RUNS)/quickstart

# Both stages on a folder of real tiles, and a report: make real DATA=/path/to/enmap_potsdam [SEEDS="1 2 3"]
SEEDS ?= 0
real: $(READY)
	for seed in $(SEEDS); do $(RUN) -m spectralx.train both --config enmap.yaml --data.root $(DATA) \
	    --seed $$seed --out $(RUNS)/enmap/seed$$seed || exit 1; done
	$(RUN) -m spectralx.evaluate --checkpoint $(RUNS)/enmap --root $(DATA) --out $(RUNS)/enmap-report

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest $$($(RUN) -c "import xdist; print('-n $(WORKERS) --dist worksteal')" 2>/dev/null) tests

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)
	$(RUN) -m mypy

# GPU kernels compile without a GPU, without warnings or spills: CUDA C++ for sm_80 and sm_90a, Triton
# for sm_80, sm_90 and sm_100; skips aloud without nvcc or triton. QUICK=1: each Triton kernel at one size.
gates: $(READY)
	$(RUN) -m tests.compile_gates.nvcc
	$(RUN) -m tests.compile_gates.triton_gate $(if $(QUICK),--quick)

# Build for a GPU, tests marked gpu, benchmarks, compute-sanitizer: under nine minutes, no network.
# make gpu PART=tests for one, of tests bench steps sanitize tune numerics unproven, which so runs
# more; PART=tune PLAN="float32:8 float16:8" in these dtypes and batches. Uses $(PYTHON) as it is.
gpu:
	$(PYTHON) -m tests.gpu.run $(if $(PART),--part $(PART)) $(if $(PLAN),--plan $(PLAN))

# Drawn, hostile and damaged input, and the page of what came of it. make harden PART=routing for one.
harden: $(READY)
	$(RUN) -m tests.harden $(or $(PART),all)
	$(RUN) -m tests.harden page

# Pages of everything public, from its docstrings: build/docs/index.html.
docs: $(READY)
	$(RUN) -m pdoc -d numpy -o build/docs spectralx_kernels spectralx

bench: $(READY)
	$(RUN) -m pytest benchmarks --benchmark-json=out.json
	$(RUN) -m benchmarks.report out.json

clean:
	rm -rf build dist *.egg-info spectralx_kernels/_C*.so
