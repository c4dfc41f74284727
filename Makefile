# Two commands, each from a bare clone: `make serve` and `make test`.
#
#   make serve            install, fetch the models, serve on http://127.0.0.1:8000
#   make serve PORT=9000  the same on another port; HOST=0.0.0.0 accepts other machines
#   make check            install, lint, check types, run the quick tests; run this before each commit
#   make test             the same with every test
#   make test-gpu         run the script of a GPU's first minutes at toy sizes, for some minutes
#   make test-newest      run the engine's, kernels' and plan's tests with the newest JAX, on a Python that has it
#   make docs             regenerate docs/reference from the schemas
#   make image            build a Docker image of the server; EXTRAS=cuda12 for NVIDIA GPUs: docs/deploy
#   make hooks            check every commit before it is made, by .pre-commit-config.yaml
#   make screenshots      take the screenshots of docs/images again
#   make test-clients     run the tests of every client, including LangChain, LlamaIndex and LiteLLM
#   make clean            remove the virtual environments

VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000

# Number of processes that run tests in parallel; tests that bound time or memory run alone, afterwards.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Folders whose tests are fast and find most mistakes.
QUICK := tests/api tests/config tests/http tests/prompt tests/run tests/scheduler

BIN := $(VENV)/bin
MODELS := smollm2-135m-instruct all-minilm-l6-v2

# The first Python that runs and is new enough; some shims exist but only print an error.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; \
	done)

.PHONY: serve check test test-gpu test-newest test-clients frameworks lint conflicts types docs screenshots install image hooks clean
.DEFAULT_GOAL := serve

serve: $(VENV)/.installed
	exec $(BIN)/inferneo serve --host $(HOST) --port $(PORT)

check: lint types
	$(BIN)/pytest -m "not alone and not real" $(PARALLEL) $(QUICK)

test: lint types
	$(BIN)/inferneo pull $(MODELS)
	$(BIN)/pytest -m "not alone and not dry_run" $(PARALLEL)
	$(BIN)/pytest -m alone

test-gpu: $(VENV)/.installed-test
	$(BIN)/pytest -m dry_run tests/accelerators

# JAX's newest version needs a newer Python than ours must. Where the Python above is that new, `make test` has it already.
NEWEST_SINCE := (3, 12)
NEWEST := .venv-newest
PYTHON_NEWEST ?= $(shell for p in python3.12 python3.13 python3.14 $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < $(NEWEST_SINCE))' >/dev/null 2>&1 && echo $$p && break; \
	done)
# What a version of JAX may change: numbers, what is compiled and kept, what is read off it. The CPU's kernels are C++ that the
# engine's tests run too, and the others' windows and soft caps are left to `make test`.
NEWEST_TESTS := tests/engine/test_engine.py tests/kernels tests/layers tests/planner \
	tests/runner/test_dispatch.py tests/runner/test_executables.py tests/runner/test_flags.py
NEWEST_NOT := every_variant or dtype_and_variant or test_kernels_cpu

test-newest:
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info < $(NEWEST_SINCE))' 2>/dev/null; then \
		echo "test-newest: skipped, because $(PYTHON) has the newest JAX, and make test runs with it"; \
	elif [ -z "$(PYTHON_NEWEST)" ]; then \
		echo "test-newest: skipped, because no Python 3.12 or newer was found; name one with PYTHON_NEWEST=..."; \
	else \
		$(MAKE) VENV=$(NEWEST) PYTHON=$(PYTHON_NEWEST) $(NEWEST)/.installed-test && \
		$(NEWEST)/bin/pytest -k "not ($(NEWEST_NOT))" $(PARALLEL) $(NEWEST_TESTS); \
	fi

# The frameworks need an environment of their own: tests/clients/frameworks/requirements.txt says why.
FRAMEWORKS := tests/clients/frameworks

test-clients: $(VENV)/.installed-test frameworks
	$(BIN)/inferneo pull $(MODELS)
	REQUIRE_CLIENTS=1 $(BIN)/pytest tests/clients tests/docs/test_docs_examples.py

frameworks: $(FRAMEWORKS)/.venv/.installed

$(FRAMEWORKS)/.venv/.installed: $(FRAMEWORKS)/requirements.txt | $(VENV)/.created
	$(BIN)/python -m venv $(FRAMEWORKS)/.venv
	$(FRAMEWORKS)/.venv/bin/pip install --requirement $<
	@touch $@

lint: conflicts $(VENV)/.installed-test
	$(BIN)/ruff check .
	# jaxtyping's shape strings forbid this check where they are used.
	$(BIN)/ruff check --isolated --select F821 server tests
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

# No tracked file may hold conflict markers. The sources of a release are not a repository, and are not searched.
# git grep exits with 1 if it finds nothing; any other status is a finding or a failed search.
conflicts:
	@! git rev-parse --git-dir >/dev/null 2>&1 || { \
		git grep -nIE '^(<{7}|\|{7}|>{7})( |$$)|^={7}$$'; test $$? -eq 1 || { \
		echo "resolve these conflicts, and remove their markers" >&2; exit 1; }; }

types: $(VENV)/.installed-test
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python -m server.cli.reference docs/reference

screenshots: $(VENV)/.installed-test
	$(BIN)/python -m tests.tools.screenshots docs/images

install: $(VENV)/.installed

# The version is read from its one place, and the revision from git.
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' inferneo_jax/version.py)
DOCKER ?= docker
IMAGE ?= inferneo-jax
EXTRAS ?=
PACKAGES ?=

image:
	$(DOCKER) build --tag $(IMAGE):$(VERSION) --tag $(IMAGE):latest \
		--build-arg EXTRAS="$(EXTRAS)" --build-arg PACKAGES="$(PACKAGES)" \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) .

hooks: $(VENV)/.installed-test
	$(BIN)/pre-commit install

$(VENV)/.installed: pyproject.toml inferneo_jax/version.py | $(VENV)/.created
	$(BIN)/pip install --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml inferneo_jax/version.py | $(VENV)/.created
	$(BIN)/pip install --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.created:
	@test -n "$(PYTHON)" || { \
		echo "Python 3.11 or newer is needed and was not found; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(FRAMEWORKS)/.venv
