# make train   train a population on the embedded digits; ARGS="--mixing independent" passes flags on
# make test    run the tests; PYTEST_ARGS="tests/mixing -x" narrows them
# make test-reliability   all hostile situations, the slow ones too, ten storms and 50 full cycles under load
# make test-faults   the long fault test: 20 kills at random moments, and the result of an undisturbed run
# make docs    build the documentation as a site, in site/; a warning is an error
# make quality lint, format and static checks; make style fixes what can be fixed
#
# On a bare machine (Python 3.11 or newer, git, make) each of them first creates $(VENV) and installs into it.

PYTHON ?= python3
VENV ?= .venv
# What pip installs. .ci/run installs without -e, so that a file missing from the package cannot hide.
INSTALL ?= -e ".[dev]"
OUTPUT_DIR ?= outputs/vit
ARGS ?=
PYTEST_ARGS ?=
# Processes that share the tests, a file at a time. JOBS=0 PYTEST_ARGS=--pdb to look into one.
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.hf-wash-installed
CHECKED := hf_wash examples tests mkdocs_hooks.py

.PHONY: help install train test test-faults test-reliability quality style docs clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# One pip call: torch, torchvision and timm have to be resolved together, or timm finds a torchvision that was built
# for another torch.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hf-wash needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(INSTALL)
	@touch $@

# One thread: a model this small gains next to nothing from more, loses much where cores are shared, and comes out the
# same on every machine of a kind. OMP_NUM_THREADS=8 make train ... for a larger one.
train: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python examples/train_vit.py --output_dir $(OUTPUT_DIR) $(ARGS)

# One thread, because results are promised bit for bit at an equal thread count; offline, because nothing in the tests
# may depend on a download.
test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(JOBS) --dist loadfile -m "not (reliability and slow)" \
		--durations=25 --durations-min=1 $(PYTEST_ARGS)

test-reliability: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest tests/reliability
	$(BIN)/python tests/reliability/storm.py
	$(BIN)/python tests/reliability/loaded_cycles.py

test-faults: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_WASH_KILLS=$${HF_WASH_KILLS:-20} $(BIN)/pytest tests/distributed/test_faults.py

quality: $(STAMP)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site outputs .pytest_cache .ruff_cache .mypy_cache .hypothesis
