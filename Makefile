# make pretrain   set up, then the quickstart on RANKS ranks
# make test       set up, then all tests but the longest
# make test-long  the longest
# make soak       200 kills at random times, each survived; a quarter of an hour
# make study      a list of comparisons as one plan, stopped and continued by the same command; STUDY=file, PARALLEL=2
# make check      format, lint, types and the links of the texts, as CI runs them
# make docs       the documentation as a site, in build/site
# make kernels-report  what each kernel can reach on an H100, by counting; written into docs/kernels.md
# make gpu-check  on a GPU host, in its own Python: every kernel's correctness and speed beside its peers, as far as
#                 MINUTES reach; results to OUT=folder; DRY=1: tiny, on a CPU; ARGS: options, such as --only attention
# make gpu-session  the same, then training steps, growth, resume and a comparison, in order of worth;
#                 SESSION=folder with the results of an earlier one goes on there
#
# PYTHON      the Python that makes the environment (3.11 or newer)
# TORCH_PIP   extra pip options for torch, such as the index of a CUDA build:  make install TORCH_PIP="--index-url URL"
# ARGS        further options of pretrain.py:  make pretrain ARGS="--stages 2:50,4:50"

PYTHON ?= python3
TORCH_PIP ?=
RANKS ?= 2
ARGS ?=
VENV ?= .venv
STUDY ?= launchers/studies/documentation.json
PARALLEL ?= 2
OUT ?= benchmarks/results/gpu

BIN := $(CURDIR)/$(VENV)/bin
INSTALLED := $(VENV)/.installed
# The environment's bin folder leads PATH: DeepSpeed looks for ninja there.
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export DS_BUILD_OPS := 0

.PHONY: install pretrain test test-long soak study check docs format bench kernels-report gpu-check gpu-session clean

install: $(INSTALLED)

# torch first: DeepSpeed's setup imports it, and an unpinned torch would pull another build. Build isolation is off
# so that both see the installed one.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH_PIP) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

pretrain: $(INSTALLED)
	deepspeed --num_gpus $(RANKS) launchers/pretrain.py --deepspeed_config ds_configs/zero2.json $(ARGS)

# Two workers: what waits for launchers and for SLURM leaves the cores to the others.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

soak: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python tests/soak.py --kills 200

study: $(INSTALLED)
	$(BIN)/python launchers/compare.py --study $(STUDY) --parallel $(PARALLEL) $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_repository.py

# The pages lie in build/pages as in the repository, beside the code that they link to.
docs: $(INSTALLED)
	rm -rf build/pages && mkdir -p build/pages
	ln -s $(wildcard $(CURDIR)/*.md) $(addprefix $(CURDIR)/, docs ds_stacking kernels examples benchmarks) build/pages/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python benchmarks/data.py

kernels-report: $(INSTALLED)
	$(BIN)/python -m ds_stacking.kernels.report docs/kernels.md

# No set-up here: a GPU host has its own PyTorch, often no network (pip install --no-deps --no-build-isolation -e .).
# OUT may come from the environment.
gpu-check: MINUTES ?= 8
gpu-session: MINUTES ?= 28
gpu-check gpu-session: export OUT := $(OUT)
gpu-check gpu-session:
	$(PYTHON) -m benchmarks.gpu_check --minutes $(MINUTES) $(if $(filter gpu-session,$@),--session) $(if $(DRY),--dry) \
		$(if $(SESSION),--resume $(SESSION)) $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
