# `make demo` and `make test` each make their own environment from nothing; `make help` lists the rest.
# An environment is made again when pyproject.toml, setup.cfg or constraints.txt changes.

PYTHON   ?= python3
DEMO_ENV ?= .venv
TEST_ENV ?= .venv-test
ORACLE_ENV ?= .venv-oracles
CONTRACT_ENV ?= .venv-contract
RAY_ENV ?= .venv-ray
DOCS_ENV ?= .venv-docs
WITH_RAY := .[dev,ray]

# Appended to the commands: make demo DEMO_ARGS="--json", make test PYTEST_ARGS="-k pages -x".
DEMO_ARGS   ?=
PYTEST_ARGS ?=

SETTINGS := pyproject.toml setup.cfg constraints.txt
KERNELS  := $(wildcard hf_llmopt/kernels/cpu/*.c hf_llmopt/kernels/cpu/*.h)

# The tests' kernels are compiled with warnings as errors. A build that failed is found by the tests: the extension is
# optional, so that setuptools only warns.
TEST_CFLAGS ?= -Werror
# Read and write only what was allocated, and do nothing that the language leaves undefined.
SANITIZE    := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g

.DEFAULT_GOAL := help
.PHONY: help demo test test-all models test-ray sanitize oracles contract figures docs lint format types dist clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(DEMO_ENV)/.made  ## run the demonstration: stock beside llmopt, the same tokens
	$(DEMO_ENV)/bin/hf-llmopt demo $(DEMO_ARGS)

test: $(TEST_ENV)/.built  ## run the tests, one process, under 20 minutes
	$(TEST_ENV)/bin/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(TEST_ENV)/.notebooks $(TEST_ENV)/.built  ## run the tests with the slow ones
	$(TEST_ENV)/bin/python -m pytest $(PYTEST_ARGS)

models: $(TEST_ENV)/.built  ## try every architecture of transformers, and write docs/results/models.json and its tables
	$(TEST_ENV)/bin/python tests/sweep.py
	$(TEST_ENV)/bin/hf-llmopt bench figures docs/models.md

sanitize: build/sanitize/.built  ## run the kernels' tests under the address and undefined-behaviour sanitizers
	cd build/sanitize && LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 HF_HUB_OFFLINE=1 \
		$(abspath $(TEST_ENV))/bin/python -m pytest -p no:cacheprovider $(wildcard $(CURDIR)/tests/test_cpu_*.py) $(PYTEST_ARGS)

# Warnings of Ray's own are no errors here.
test-ray: $(RAY_ENV)/.made  ## run the tests of replicas and clusters, with Ray
	$(RAY_ENV)/bin/python -m pytest -W default $(wildcard tests/test_ray*.py) $(PYTEST_ARGS)

# Slow to install: packages are built from source. Not part of the tests, which read the files that this leaves.
oracles: $(ORACLE_ENV)/.made  ## compare the file formats with the packages that wrote them first; renews tests/data/quantized
	cd tests/oracles && for script in run.py models.py ours.py; do \
		PYTHONPATH=$(CURDIR) GPTQMODEL_CPU_WORKERS=2 HF_HUB_OFFLINE=1 \
		$(abspath $(ORACLE_ENV))/bin/python -W ignore $$script || exit 1; done

# A client only, which shares nothing with the server but the socket: its packages stay out of the tests' environment.
contract: $(TEST_ENV)/.built $(CONTRACT_ENV)/.made  ## try the server against its own OpenAPI description
	LLMOPT_TEST_SCHEMATHESIS=$(abspath $(CONTRACT_ENV))/bin/schemathesis \
		$(TEST_ENV)/bin/python -m pytest tests/test_serving_description.py $(PYTEST_ARGS)

figures: $(TEST_ENV)/.made  ## write the figures of all pages again, from docs/results
	$(TEST_ENV)/bin/hf-llmopt bench figures README.md docs

# Reads the package's sources, and needs neither it nor torch.
docs: $(DOCS_ENV)/.made  ## build the site of docs/ into build/site; a warning fails it
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build --strict --quiet
	@echo "the site begins at build/site/index.html"

lint: $(TEST_ENV)/.made  ## check style and format
	$(TEST_ENV)/bin/ruff check .
	$(TEST_ENV)/bin/ruff format --check .

format: $(TEST_ENV)/.made  ## repair style and format
	$(TEST_ENV)/bin/ruff check --fix .
	$(TEST_ENV)/bin/ruff format .

types: $(TEST_ENV)/.made  ## check the types of the package
	$(TEST_ENV)/bin/mypy --strict

dist: $(TEST_ENV)/.made  ## build the source archive and the wheel into dist/
	$(TEST_ENV)/bin/python -m build

clean:  ## remove the environments and everything that was built
	rm -rf .venv .venv-test .venv-oracles .venv-contract .venv-ray .venv-docs build dist hf_llmopt.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find hf_llmopt tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# $(1): the environment's folder, $(2): what to install, $(3): variables of the build.
define make-environment
	@echo "making $(1): this takes a few minutes the first time"
	$(PYTHON) -m venv --clear $(1)
	$(3) $(1)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e "$(2)"
	@touch $@
endef

# $(1): variables of the build, $(2): arguments of setuptools.
build-kernels = $(1) $(TEST_ENV)/bin/python setup.py -q $(2)

$(DEMO_ENV)/.made: $(SETTINGS)
	$(call make-environment,$(DEMO_ENV),.)

# Without kernels: they are compiled once, below.
$(TEST_ENV)/.made: $(SETTINGS)
	$(call make-environment,$(TEST_ENV),.[dev],CC=false)

$(RAY_ENV)/.made: $(SETTINGS)
	$(call make-environment,$(RAY_ENV),$(WITH_RAY),CFLAGS="$(TEST_CFLAGS)")

# auto-gptq and autoawq ask for packages of their time; what is used of them runs without.
$(ORACLE_ENV)/.made: tests/oracles/constraints.txt
	@echo "making $(ORACLE_ENV): this takes a few minutes the first time"
	$(PYTHON) -m venv --clear $(ORACLE_ENV)
	$(ORACLE_ENV)/bin/python -m pip install --quiet -c $< torch transformers numpy setuptools wheel
	$(ORACLE_ENV)/bin/python -m pip install --quiet -c $< gptqmodel compressed-tensors
	$(ORACLE_ENV)/bin/python -m pip install --quiet -c $< --no-deps auto-gptq autoawq
	@touch $@

$(CONTRACT_ENV)/.made: Makefile
	@echo "making $(CONTRACT_ENV): this takes a minute the first time"
	$(PYTHON) -m venv --clear $(CONTRACT_ENV)
	$(CONTRACT_ENV)/bin/python -m pip install --disable-pip-version-check --quiet schemathesis==4.32.5
	@touch $@

$(DOCS_ENV)/.made: $(SETTINGS)
	@echo "making $(DOCS_ENV): this takes a minute the first time"
	$(PYTHON) -m venv --clear $(DOCS_ENV)
	$(DOCS_ENV)/bin/python -m pip install --disable-pip-version-check --quiet "pip>=25.1"
	$(DOCS_ENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt --group docs
	@touch $@

# What runs notebooks: only the slow tests do.
$(TEST_ENV)/.notebooks: $(TEST_ENV)/.made
	$(TEST_ENV)/bin/python -m pip install --disable-pip-version-check --quiet "pip>=25.1"
	$(TEST_ENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt --group notebooks
	@touch $@

# The package is installed from its sources and the kernels lie among them: they are built again if a file of theirs is
# newer.
$(TEST_ENV)/.built: $(TEST_ENV)/.made setup.py $(KERNELS)
	$(call build-kernels,CFLAGS="$(TEST_CFLAGS)",build_ext --inplace)
	@touch $@

# A copy of the package with its own kernels, which only `make sanitize` imports.
build/sanitize/.built: $(TEST_ENV)/.made $(KERNELS) $(wildcard hf_llmopt/kernels/*.py hf_llmopt/kernels/cpu/*.py)
	rm -rf build/sanitize
	$(call build-kernels,CC="$(CC)" CFLAGS="$(SANITIZE) $(TEST_CFLAGS)",build --build-base build/sanitize/objects --build-lib build/sanitize)
	@touch $@
