# Everything a maintainer runs. `make smoke` and `make test` set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup smoke test test-all lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

smoke: $(STAMP)  ## train on the embedded recordings, score unseen sentences, write the report
	$(BIN)/python -m jobs.train --config configs/smoke.yaml

lint: $(STAMP)
	$(BIN)/ruff check omni jobs tests
	$(BIN)/ruff format --check omni jobs tests
	$(BIN)/mypy

test: lint  ## everything that takes seconds to a minute
	$(BIN)/python -m pytest -m "not slow"

test-all: lint  ## also what takes minutes: about an hour
	$(BIN)/python -m pytest
	$(BIN)/python -m tests.fuzz --inputs 1000
	$(BIN)/python -m tests.chaos --faults 30

clean:
	rm -rf $(VENV) runs build *.egg-info
