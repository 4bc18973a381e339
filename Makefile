# Each target does all its own set-up, in .venv; the second run starts at once. In environments of their own:
# `make test PYTHON=python3.13` (.venv-3.13), and `make test NEWEST=1` (.venv-newest), with the newest diffusers and transformers
# that pyproject.toml allows in place of those in constraints.txt.
PYTHON ?= python3
NEWEST ?=
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))$(if $(NEWEST),-newest)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TYPES ?=
FAILED ?=
comma := ,
PYTEST := $(BIN)/python -m pytest -q $(if $(FAILED),--last-failed,-n logical --dist worksteal) $(if $(TYPES),--jaxtyping-packages=dit_lens$(comma)hooked_models$(comma)beartype.beartype)

.PHONY: demo test test-slow test-all test-core lint bench notebooks recipes docs setup clean

demo: $(READY)
	$(BIN)/python -m recipes.relation_head

# the default suite: everything that takes no more than seconds; TYPES=1 checks the types and shapes of every call, too;
# FAILED=1, here and below, only what failed last time, one test after the other
test: lint
	$(PYTEST)

# the rest, but for tests that need a GPU or the internet; SHARD=2/6 for the second of six parts
SHARD ?= 1/1
test-slow: $(READY)
	$(PYTEST) -m 'slow and not gpu and not network' --shard $(SHARD)

test-all: test test-slow

# the library alone, without recipes and notebooks: for a second Python
test-core: $(READY)
	$(PYTEST) tests/hooked_models tests/dit_lens tests/conformance tests/test_readme.py

# on one core and, at the end, two; results/bench/*.json. GPU rows: benchmarks/gpu.sh
BENCHMARKS := imports forward generation caching disk synopsis sweep search_race attribution wide heat_maps scaling
bench: $(READY)
	for name in $(BENCHMARKS); do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training --out results/bench/training.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

recipes: $(READY)
	$(BIN)/python -m recipes.run_all

notebooks: export TQDM_DISABLE = 1
notebooks: export HF_HUB_DISABLE_PROGRESS_BARS = 1
notebooks: export DIFFUSERS_VERBOSITY = error
notebooks: export PYTHONWARNINGS = ignore
notebooks: $(READY)
	$(BIN)/jupytext --to ipynb --execute notebooks/*.py

# the site: docs/_build/html/index.html; warnings are errors
docs: $(READY)
	$(BIN)/python -m sphinx -q -b html -W --keep-going docs docs/_build/html

setup: $(READY)

# torch first and by its exact version: a looser requirement resolves to a build with gigabytes of CUDA libraries
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep -vE '^($(if $(NEWEST),diffusers|transformers|huggingface_hub,nothing))==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-*
