# `make demo` and `make test` set up all they need below .venv and take seconds the next time.
# make test PYTHON=python3.12: another Python, in a virtual environment of its own.
# make test TEST_EXTRAS=test: without torch and transformers; the tests that compare with them skip themselves.

PYTHON ?= python3
VENV ?= .venv$(patsubst %,-%,$(filter-out python3,$(notdir $(PYTHON))))
TEST_EXTRAS ?= test,oracle
PYTEST_ARGS ?=
BENCH_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
BIN := $(VENV)/bin
SET_UP := $(VENV)/.stamp

.PHONY: demo test lint bench protos clean

demo: $(SET_UP)-demo
	@$(BIN)/python scripts/demo.py

test: $(SET_UP)-$(TEST_EXTRAS)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(SET_UP)-dev,test,oracle,plot
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(SET_UP)-test,oracle
	$(BIN)/python scripts/bench_cpu.py $(BENCH_ARGS)

# Not in $(VENV): the tools want protobuf 6.
protos:
	@test -x .venv-protos/bin/python || $(PYTHON) -m venv .venv-protos
	@.venv-protos/bin/python -m pip install -qq grpcio-tools==1.76.0
	.venv-protos/bin/python scripts/generate_protos.py

clean:
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find moe_jax serving scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(SET_UP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make: found $(PYTHON) older than 3.11 or missing, expected 3.11 or later: make … PYTHON=python3.12' >&2; exit 1; }
	@echo 'Creating $(VENV)'
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# One stamp for each set of extras; "demo" needs none.
$(SET_UP)-%: EXTRAS = $(patsubst %,[%],$(filter-out demo,$*))
$(SET_UP)-%: pyproject.toml constraints.txt | $(SET_UP)
	@echo 'Installing moe-jax$(EXTRAS) into $(VENV): minutes the first time'
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.$(EXTRAS)'
	@touch '$@'
