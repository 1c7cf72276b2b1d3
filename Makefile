# Everything a developer runs. `make demo` and `make test` need nothing but Python 3.11 to 3.13 and a package registry:
# the first one that runs makes .venv from the lock files, the later ones find it there.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
PYTEST := $(VENV_PYTHON) -m pytest
IN_PARALLEL := -n 2
# Engine tests that share what their engines have answered stay in one process (tests/engine/conftest.py).
GROUPS_IN_PARALLEL := $(IN_PARALLEL) --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo soak test unit contract engine gpu matrix latest bundle release container lint types format lock environment clean

help: ## Show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: ## Stock vLLM against vLLM with the overlay, in real servers: are the tokens the same, what was patched
	@python="$$($(PYTHON) devtools/environment.py --demo)" && exec "$$python" -m devtools.demo $(DEMO_OPTIONS)

soak: ## Mixed load on stock and overlay servers for some minutes: errors, tokens, memory
	@python="$$($(PYTHON) devtools/environment.py --demo)" && exec "$$python" -m devtools.soak $(SOAK_OPTIONS)

test: lint types unit contract engine ## Everything: style, types, unit, contract and engine tests
	$(PYTEST) tests/gpu $(TEST_OPTIONS)

unit: environment ## The quick tests
	$(PYTEST) tests/unit $(IN_PARALLEL) $(TEST_OPTIONS)

contract: environment ## The verdicts against the sources of released vLLM versions
	$(PYTEST) tests/contract $(IN_PARALLEL) $(TEST_OPTIONS)

engine: environment ## The overlay in a real vLLM engine on the CPU
	$(PYTEST) tests/engine $(GROUPS_IN_PARALLEL) $(TEST_OPTIONS)

gpu: ## The tests that need an NVIDIA GPU, in the Python that has its vLLM
	$(PYTHON) -m pytest tests/gpu $(TEST_OPTIONS)

matrix: environment ## Judge every release of vLLM and write docs/COMPATIBILITY.md
	$(VENV_PYTHON) -m overlay matrix --write --cache .cache/releases

latest: environment ## What drifted in the newest release of vLLM, in one line
	$(VENV_PYTHON) -m overlay matrix --latest --cache .cache/releases

bundle: ## The folder for PYTHONPATH and a .tar.gz of it, in dist/; any Python from 3.10 on does
	@$(PYTHON) -m devtools.bundle $(BUNDLE_OPTIONS)

release: environment ## Wheel, sdist, bundle and checksums in dist/, each tried in a fresh environment; wants the tag v<version>
	@$(VENV_PYTHON) -m devtools.release $(RELEASE_OPTIONS)

container: environment ## The Dockerfile built and run for real with podman, as root, on the CPU (six minutes, 12 GB of disk)
	@$(VENV_PYTHON) -m devtools.container $(CONTAINER_OPTIONS)

lint: environment ## Style
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

types: environment ## Types, strictly
	$(VENV_PYTHON) -m mypy

format: environment ## Put the source files into the project's style
	$(VENV_PYTHON) -m ruff format .
	$(VENV_PYTHON) -m ruff check --fix .

lock: ## Resolve pyproject.toml anew and write the lock files
	$(PYTHON) devtools/environment.py --lock

environment:
	@$(PYTHON) devtools/environment.py > /dev/null

clean: ## Remove .venv, .cache and every other thing that was made here
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
