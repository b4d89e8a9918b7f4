# `make demo` and `make test` set themselves up; nothing need be installed by hand but Python 3.11 or later.
#
#   TORCH_INDEX=https://...   package index to take torch from: the CPU or CUDA build of your choice (see README.md).
#   PYTHON=python3.12         interpreter that makes the environment.

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := 'torch>=2.11,<2.14'
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo federation chaos test-federation test check bench attack-poison attack-privacy privacy-utility real setup clean

setup: $(READY)

# torch goes first: a later package that asks for "torch" would otherwise fetch gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_FROM) $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

RUN ?= runs/quickstart

demo: $(READY)
	@if [ -e $(RUN) ]; then echo "$(RUN) is there already: going on with it (remove it to start anew)"; \
	  $(BIN)/medsegfed simulate quickstart --out $(RUN) --resume; \
	else $(BIN)/medsegfed simulate quickstart --out $(RUN); fi

# A whole federation of real processes on this machine; needs nginx (Debian, Ubuntu: apt-get install nginx-light).
REHEARSAL ?= runs/federation

federation: $(READY)
	@if [ -e $(REHEARSAL) ]; then echo "$(REHEARSAL) is there already: remove it, or name another: make federation REHEARSAL=DIR"; exit 2; fi
	$(BIN)/python -m deploy.rehearsal --out $(REHEARSAL)

# Fast tests side by side, and slow ones of the same file by the same worker; those that start processes of their own, or
# need the GPU, one after the other.
WORKERS ?= 2
FAST := -n $(WORKERS) --dist worksteal -m 'not slow and not e2e and not gpu'
SLOW := -n $(WORKERS) --dist loadfile -m 'slow and not e2e and not gpu'
ALONE := -m 'e2e or gpu'

# In continuous integration, what fails of the latter two is run once more: some of them wait for real processes on a
# machine that others use too. Both runs are printed, and what fails twice has failed.
again = $(if $(CI),|| (echo "FAILED ABOVE; ONCE MORE:"; $(BIN)/python -m pytest -m '$(1)' --last-failed --last-failed-no-failures none))

# CHECKED=1: the fast ones have passed just now, in `make check`.
test: $(READY)
	$(if $(CHECKED),,$(BIN)/python -m pytest $(FAST))
	@failed=0; \
	$(BIN)/python -m pytest $(SLOW) $(call again,slow and not e2e and not gpu) || failed=1; \
	$(BIN)/python -m pytest $(ALONE) $(call again,e2e or gpu) || failed=1; \
	exit $$failed

# Of those, the real federations in networks of their own, attacked and killed: a quarter of an hour on two cores.
test-federation: $(READY)
	$(BIN)/python -m pytest tests/e2e/federation tests/e2e/chaos

# A hundred seeded kills of everything that runs (docs/recovery.md); a failure names its seed.
KILLS ?= 100
SEED ?= 0

chaos: $(READY)
	$(BIN)/python -m tests.e2e.chaos.driver --kills $(KILLS) --seed $(SEED)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(FAST)

# Peers drag in packages that break ours, so they live in an environment of their own.
$(PEERS)/.ready: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet $(TORCH_FROM) $(TORCH)
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/requirements-peers.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps med-seg-diff-pytorch==0.3.3
	touch $@

bench: $(READY) $(PEERS)/.ready
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.aggregation
	$(BIN)/python -m benchmarks.federation
	$(BIN)/python -m benchmarks.privacy_accounting
	$(BIN)/python -m benchmarks.private_step
	@if [ -e $(RUN)/report.json ]; then $(BIN)/python -m benchmarks.overhead $(RUN); fi

# One malicious site of five against every rule (docs/aggregation.md): a quarter of an hour, on from where it was.
ATTACKS ?= runs/attacks

attack-poison: $(READY)
	$(BIN)/python -m benchmarks.attacks --out $(ATTACKS)

# Who was in a training, and what did the scan look like? (docs/privacy.md): from where it was; --quick takes ten minutes.
ATTACK ?= --picture docs/privacy-inversion.png

attack-privacy: $(READY)
	$(BIN)/python -m benchmarks.privacy_attacks $(ATTACK)

# Dice against epsilon, DATA holding msd_hippocampus and lgg_tcga (docs/privacy.md): for a GPU; goes on where it was.
DATA ?= data
JOBS ?= 2

privacy-utility: $(READY)
	$(BIN)/python -m benchmarks.privacy_utility --data $(DATA) --out runs/privacy-utility --jobs $(JOBS)

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info

# Real data beside MONAI's DynUNet (docs/results.md): on a GPU where there is one. PLAN=proof: tiny, on a CPU.
PLAN ?= full
CACHE := .cache/real_$(PLAN).safetensors

real: $(READY)
	@[ -e $(CACHE) ] || $(BIN)/python -m benchmarks.real.pack --plan $(PLAN) --out $(CACHE)
	$(BIN)/python -m benchmarks.real.train --plan $(PLAN) --cache $(CACHE) --out runs/real-$(PLAN) --peer
	$(BIN)/python -m benchmarks.real.table --plan $(PLAN) --run runs/real-$(PLAN)
