# make train | make test | make lint: each sets up all that it needs, then does it.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
# Two workers; on a machine with one GPU, one, since NCCL gives each worker a GPU of its own.
WORKERS ?= $(shell $(BIN)/python -c "import torch; print(1 if torch.cuda.device_count() == 1 else 2)" 2>/dev/null || echo 2)
ARGS ?=

.PHONY: train test lint setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

train: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(WORKERS) -m rowwise.launch.train $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/rowwise
	for room in conf kernels launch optim parallel trainer; do ln -sfn ../../../$$room build/types/rowwise/$$room; done
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
