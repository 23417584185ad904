# make train | make test | make test-full | make test-slow | make test-slurm | make test-long | make test-walk |
# make test-compat | make lint: each sets up all that it needs, then does it.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
# Two workers; on a machine with one GPU, one, since NCCL gives each worker a GPU of its own.
WORKERS ?= $(shell $(BIN)/python -c "import torch; print(1 if torch.cuda.device_count() == 1 else 2)" 2>/dev/null || echo 2)
ARGS ?=
# Optimizers that tests hold ours against: their classes are plain Python, and what else they ask for is not needed.
AUTHORS := galore-torch apollo-torch fira ista-daslab-optimizers

# What Python makes of modules is kept, also where the environment asks for none: every process that a test starts reads it.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train test test-full test-slow test-slurm test-long test-walk test-compat lint setup chromium slurm clean

setup: $(READY)

# Modules are compiled on all cores, where pip would take one; as pip does, it passes over files that this Python cannot compile.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,host,trackers]'
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-deps $(AUTHORS)
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $(READY)

train: $(READY)
	@$(BIN)/rowwise train nproc=$(WORKERS) $(ARGS)

# Debian's packages that tests start for real: reports are looked at in a browser.
INSTALL := apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

chromium:
	@command -v chromium > /dev/null || { $(INSTALL) chromium; }

slurm:
	@[ "$$(id -u)" = 0 ] || { echo "this needs root: it starts Slurm's daemons and makes network namespaces" >&2; exit 1; }
	@command -v slurmctld > /dev/null && command -v ip > /dev/null || { $(INSTALL) slurm-wlm munge iproute2; }

# Side by side, each taking the next file that no other has: while one waits, another computes. One alone where they see GPUs.
PROCESSES ?= $(if $(findstring --nccl,$(ARGS)),0,2)
SIDE_BY_SIDE := -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
test: $(READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

# Those, and every case for which another stands there: whole products, and all of tests/cases.txt. Hours.
test-full: $(READY)
	$(BIN)/python -m pytest --full $(SIDE_BY_SIDE) $(ARGS)

# A browser lays reports out, kills come again and again, commands, DeepSpeed, and Slurm: most of the time it waits. As root only.
# Only files that have some are read, for all of the others' cases would be made first.
COMMANDS = $(shell grep -l 'mark\.slow' tests/test_*.py)
SLOW ?= $(COMMANDS) tests/cluster/*.py
test-slow: $(READY) chromium slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --slow -m slow $(SLOW) $(ARGS)

# Of it, a Slurm of its own and hosts with a network between them, on this machine.
test-slurm: $(READY) slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --slow tests/cluster/*.py $(ARGS)

# Every preset trains the tiny model (twenty minutes on one core), and what strangers, kills and disks do to runs (tests/attack).
test-long: $(READY) slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --long --slow -m long tests tests/cluster/*.py $(ARGS)

# docs/first-hour.md, typed from a fresh clone; about ten minutes.
test-walk: $(READY)
	$(BIN)/python -m pytest tests/walk/*.py $(ARGS)

# The laws that lean on private parts of torch, with the oldest torch that is admitted: GPU machines have it. It comes as
# the build for GPUs alone (6 GB with all), which computes on a CPU too; in an environment of its own.
COMPAT := .venv-compat
COMPAT_TORCH := 2.11.0
COMPAT_TESTS := tests/test_kernels_attention.py tests/test_launch_rendezvous_backend.py tests/test_optim_adamw.py tests/test_parallel_lanes.py \
	tests/test_parallel_state_bytes.py tests/test_trainer_metadata.py tests/test_trainer_staging.py \
	tests/test_launch_export_forms.py tests/test_trainer_pipeline.py tests/test_parallel_away.py tests/test_parallel_gather.py tests/test_parallel_reduce.py
COMPAT_NAMES := not launch_export_forms and not trainer_pipeline or semi_structured or 16_bit

$(COMPAT)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(COMPAT)
	sed -E '/^(torch|triton)==/d' constraints.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/python -m pip install --quiet --constraint $(COMPAT)/constraints.txt --editable '.[dev,host]' torch==$(COMPAT_TORCH)
	touch $(COMPAT)/.ready

test-compat: $(COMPAT)/.ready
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python -m pytest $(COMPAT_TESTS) -k '$(COMPAT_NAMES)' $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(COMPAT) build src/*.egg-info
