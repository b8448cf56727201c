# `make demo` and `make test` set up what they need. PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
# LLM Foundry's environment wants 3.11 to 3.13.
FOUNDRY_PYTHON ?= $(PYTHON)
BIN := $(VENV)/bin
# Processes that run tests side by side; a test starts up to four trainers of one thread each.
TEST_WORKERS ?= 2
DRILLS ?= tests
# What `make gpu` measures: such as `--only 1b --seconds 240`.
GPU_ARGUMENTS ?=
# Tests start some hundred interpreters: each compiles what it imports where the environment forbids to keep bytecode.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

.PHONY: demo test drills gpu ui setup foundry lint audit clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   run the whole pipeline on the embedded corpus (minutes on two CPU cores)"
	@echo "make test   run all tests"
	@echo "make drills run the long tests: kills of every process, PostgreSQL, Slurm, a store as home"
	@echo "make gpu    measure speed, MFU and memory of the shipped recipes on a GPU (10 minutes)"
	@echo "make ui     open the Dagster UI on http://127.0.0.1:3000"
	@echo "make foundry  build LLM Foundry's own environment in .foundry, for --backend foundry"
	@echo "make lint   ruff and the import-direction check"
	@echo "make audit  look for known vulnerabilities of the pinned packages; needs the internet"

# The mark is made last, so that a broken install is done again. Shown of pip's output are downloads of a megabyte and
# more, and why it fails. Where Linux' /proc, which .env names, is missing, activating the environment sets DAGSTER_HOME.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing the packages of constraints.txt; pip's whole output goes to $(VENV)/install.log"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]' 2>&1 \
	  | tee $(VENV)/install.log | { done=1; while IFS= read -r line; do case "$$line" in \
	    *Downloading*MB\)|*"Using cached"*MB\)) echo "$$line";; "Installing collected"*) echo "  unpacking, a minute or two";; \
	    ERROR:*) echo "pip failed: $${line#ERROR: }" >&2;; "Successfully installed"*) done=0;; esac; done; exit $$done; }
	@[ -e /proc/self/cwd ] || echo 'export DAGSTER_HOME="$${DAGSTER_HOME:-$(CURDIR)/.dagster}"' >>$(BIN)/activate
	@touch $@

setup: $(VENV)/.ready

demo: setup
	@$(BIN)/openlm demo

test: setup
	@$(PYTEST)

# LLM Foundry's requirements do not go together with ours, and its own metadata asks for CUDA: its packages come without
# their dependencies, over the versions that work with them.
FOUNDRY := .foundry
FOUNDRY_REQUIREMENTS := $(wildcard openlm_pipeline/evaluation/foundry/requirements*.txt)
$(FOUNDRY)/.ready: $(FOUNDRY_REQUIREMENTS)
	$(FOUNDRY_PYTHON) -m venv $(FOUNDRY)
	$(FOUNDRY)/bin/python -m pip install --quiet --disable-pip-version-check -r openlm_pipeline/evaluation/foundry/requirements.txt
	$(FOUNDRY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r openlm_pipeline/evaluation/foundry/requirements-no-deps.txt
	@touch $@

foundry: $(FOUNDRY)/.ready

drills: setup
	@$(PYTEST) -m drill $(DRILLS)

gpu: setup
	@$(BIN)/python benchmarks/gpu.py $(GPU_ARGUMENTS)

ui: setup
	@DAGSTER_HOME="$(CURDIR)/.dagster" $(BIN)/dagster dev --host 127.0.0.1 --port $${PORT:-3000}

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

audit:
	@$(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	@.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf $(VENV) .venv-audit $(FOUNDRY) .transformers build *.egg-info
