# Cairn.  `make up` on a fresh machine; `make help` for the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# an index of CPU builds of torch; asked only when your package index has no torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export TORCH_INDEX PYTHON CXX

# make up MODEL=/path WORKERS=2 PORT=8000;  REDIS_URL=redis://… travels in the environment (it may hold a password)
MODEL ?=
WORKERS ?=
PORT ?=
REDIS_URL ?=
ifneq ($(REDIS_URL),)
export CAIRN_REDIS_URL := $(REDIS_URL)
endif
UP_FLAGS = $(if $(MODEL),--model '$(MODEL)') $(if $(WORKERS),--workers $(WORKERS)) $(if $(PORT),--port $(PORT)) $(UP_ARGS)

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q --hypothesis-profile=fixed
STAMP := .install-stamp
SOURCES := pyproject.toml requirements/cpu.txt requirements/install.sh cacheengine/build.py \
	$(wildcard requirements/stubs/*/pyproject.toml csrc/*)

.PHONY: help install up check test load bench soak compose-test docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

install: $(STAMP) ## .venv with everything for a machine without a GPU (once; instant afterwards)

$(STAMP): $(SOURCES)
	@requirements/install.sh

up: $(STAMP) ## the whole stack on this machine; MODEL=… WORKERS=n PORT=… REDIS_URL=… UP_ARGS='--no-disk'
	@exec $(BIN)/cairn up $(UP_FLAGS)

check: $(STAMP) ## format, lint, types, architecture and unit tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) -n 2 --dist worksteal -m 'not e2e and not engine'

test: check ## check, then the tests with several processes and with a real vLLM
	@$(PYTEST) -n 2 --dist worksteal -m 'e2e and not engine'
	@$(PYTEST) -m engine --durations=8

load: $(STAMP) ## 60 seconds of load on the running stack (PORT=… if not 8000)
	@$(BIN)/locust -f loadtests/locustfile.py --headless --users 6 --spawn-rate 2 --run-time 60s --only-summary \
		--host http://127.0.0.1:$(or $(PORT),8000)

bench: $(STAMP) ## every quick benchmark; the last line of each is JSON
	@$(BIN)/python -m loadtests --quick

soak: $(STAMP) ## random faults under load for MINUTES=20; every answer compared, memory watched
	@$(BIN)/python -m loadtests.soak --minutes $(or $(MINUTES),20)

compose-test: ## the same stack in containers: build, chat, lose a worker, down; exit 77 without Docker
	@$(or $(wildcard $(BIN)/python),python3) compose/test.py $(COMPOSE_TEST_ARGS)

docs: $(STAMP) ## docs/config.md and docs/metrics.md from the code
	@$(BIN)/python -m gateway.docs

clean: ## remove .venv and everything built; keeps models and disk tiers (~/.cache/cairn)
	@rm -rf .venv .install-stamp out build *.egg-info requirements/stubs/*/*.egg-info requirements/stubs/*/build \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis cacheengine/*.so
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
