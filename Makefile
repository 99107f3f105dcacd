# Two commands on a fresh machine (python3 and g++ are all it needs):
#   make        builds in a new .venv, checks the ops against their references, prints this machine's speed table
#   make test   runs the tests
# Variables:
#   TORCH=..    the torch to build against, as a pip requirement: TORCH=torch==2.11.0
#   PYTHON=..   the interpreter that makes .venv
#   QUAVER_CUDA=0|1  without or with the CUDA kernels (with them when nvcc is found)
PYTHON ?= python3
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV   ?= .venv
PIP    := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
SAMPLE ?= README.md
# A test to a core: where a test sets no number of threads, one.
TESTS  := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal
# The folder kernels/ must never be importable as `kernels`: that is another package's name.
export PYTHONSAFEPATH := 1

all: install
	$(VENV)/bin/quaver info
	$(VENV)/bin/quaver bench --quick
	$(VENV)/bin/python examples/evolve.py $(SAMPLE) --steps 60

# torch first, and on its own: no later requirement may choose another.
$(VENV)/installed-torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)" numpy "setuptools>=77" cmake ninja pybind11
	touch $@

install: $(VENV)/installed-torch
	$(PIP) install --no-build-isolation -e . && $(VENV)/bin/python -c "import quaver"

$(VENV)/installed-test: install
	$(PIP) install "$(TRITON)" pytest pytest-xdist pytest-benchmark hypothesis matplotlib pyyaml tokenizers pyarrow filelock "lightning>=2.6,<2.7" safetensors tensorboard
	touch $@

test: install $(VENV)/installed-test
	$(TESTS) -m "not slow and not gpu"

# transformers probes for a package called kernels: a slow test imports it beside our folder of that name; others compare
# the baseline and GPT-2's tokenizer with it, and read a data set of the Hugging Face library. local-attention is what window
# attention is compared with, peft what spectral_linear is; their requirements are named here, as some of them ask for torch.
$(VENV)/installed-slow: $(VENV)/installed-test
	$(PIP) install transformers datasets
	$(PIP) install --no-deps local-attention einops hyper-connections torch-einops-utils peft accelerate psutil torchao
	touch $@

slow: install $(VENV)/installed-slow
	$(TESTS) -m "slow and not gpu"

bench: install $(VENV)/installed-test
	$(VENV)/bin/python -m pytest benchmarks/bench_*.py --benchmark-enable --benchmark-only

lint: install $(VENV)/installed-test
	$(PIP) install ruff mypy clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

clean:
	rm -rf build kernels/_lib kernels/_native*.so

.PHONY: all install test slow bench lint clean
