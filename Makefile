# `make demo` and `make test` each do all their own set-up in .venv; the second run starts at once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench notebooks recipes setup clean

demo: $(READY)
	$(BIN)/python -m recipes.relation_head

test: lint
	$(BIN)/python -m pytest -q -n auto

# on one core and, at the end, two; results/bench/*.json. GPU rows: benchmarks/gpu.sh
BENCHMARKS := imports forward generation caching synopsis sweep scaling
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

setup: $(READY)

# torch first and by its exact version: a looser requirement resolves to a build with gigabytes of CUDA libraries
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
