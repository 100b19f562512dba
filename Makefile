# Everything a maintainer runs. `make smoke` and `make test` set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# One test process per core of a small machine; a file stays in one process.
PARALLEL := --numprocesses 2 --dist loadfile

.PHONY: setup smoke settings lock test test-unit test-all prometheus lint docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $(STAMP)

smoke: $(STAMP)  ## train on the embedded recordings, score unseen sentences, write the report
	$(BIN)/python -m jobs.train --config configs/smoke.yaml

settings: $(STAMP)  ## docs/settings.md and configs/schema.json, from omni/config/settings.py
	$(BIN)/python -m omni.config.reference

# Exact versions and hashes of what production nodes install, for Linux on x86-64 and Python 3.11 or 3.12.
# The index decides which torch: PyPI's brings CUDA 13. Of another: make lock TORCH=cu128 LOCK=mine.txt
LOCK ?= configs/locks/linux-x86_64.txt
TORCH ?=
lock: $(STAMP)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra s3 --extra av --constraint constraints.txt \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate \
	--no-config --default-index https://pypi.org/simple --custom-compile-command "make lock" \
	$(if $(TORCH),--torch-backend $(TORCH)) --quiet --output-file $(LOCK)

lint: $(STAMP)
	$(BIN)/ruff check omni jobs tests docs/hooks.py
	$(BIN)/ruff format --check omni jobs tests docs/hooks.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: $(STAMP)  ## the site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: lint  ## everything that takes seconds to a minute
	$(BIN)/python -m pytest -m unit $(PARALLEL) --durations=25
	$(BIN)/python -m pytest -m "ray and not slow" --durations=25  # one cluster at a time

test-unit: $(STAMP)  ## the tests that start no Ray
	$(BIN)/python -m pytest -m unit $(PARALLEL)

test-all: lint docs prometheus  ## also what takes minutes: about an hour; coverage in build/coverage
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,trackers]'
	$(BIN)/python -m pytest --durations=25 --cov --cov-report=term --cov-report=html
	$(BIN)/python -m tests.fuzz --inputs 1000
	$(BIN)/python -m tests.chaos --faults 30

# For tests of the dashboard and the alerts: Debian's, unpacked and not installed, without root.
# Where that does not work, those tests say what they miss.
prometheus: $(STAMP)
	@command -v prometheus >/dev/null && command -v promtool >/dev/null \
	|| test -x $(VENV)/prometheus/usr/bin/promtool \
	|| { mkdir -p $(VENV)/prometheus && cd $(VENV)/prometheus \
	&& apt-get download prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb; } \
	|| echo "no prometheus: install it and put it and promtool on PATH"

clean:
	rm -rf $(VENV) runs build *.egg-info
