# `make help` lists the targets. `make test` is the whole: it needs make, Python 3.11 or newer, and the network once.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# In front of a command that starts tools of the environment itself.
WITH_TOOLS := PATH="$(BIN):$$PATH"

# Worker processes of the tests ("0": none, in one process), and anything more to hand to pytest.
PYTEST_WORKERS ?= auto
PYTEST_ARGS ?=
# For the proofs, such as "--seed 7".
PROOF_ARGS ?=

PY_SOURCES := $(wildcard server/paceline clients/python/src clients/python/tests tests bench proto/generate.py deploy)
UV ?= uv
LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-package paceline-client --custom-compile-command "make lock"

# $(call need,tools,what): ends the recipe when a tool is missing: with a clear line here, with a failure in CI.
define need
missing=""; for tool in $(1); do command -v $$tool >/dev/null 2>&1 || missing="$$missing $$tool"; done; \
if [ -n "$$missing" ]; then \
	if [ "$$CI" = true ]; then echo "error: $(2) needs$$missing" >&2; exit 1; fi; \
	echo "skipped: $(2) (not installed:$$missing)"; exit 0; \
fi
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# --- environment -----------------------------------------------------------------------------------------------

.PHONY: env
env: $(VENV)/.packages ## make .venv from the locked requirements (again only when they change)

$(VENV)/.locked: requirements/dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is %d.%d; try: make PYTHON=python3.12 ..." % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: this Python cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "==> $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "==> packages of requirements/dev.txt (a few minutes the first time)"
	@$(BIN)/python -m pip install --disable-pip-version-check --require-hashes --only-binary :all: -r requirements/dev.txt
	@touch $@

$(VENV)/.packages: $(VENV)/.locked pyproject.toml clients/python/pyproject.toml
	@echo "==> this repository's packages"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation \
		-e clients/python -e .
	@$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@

.PHONY: lock
lock: ## resolve the requirements anew (needs uv; UPGRADE=1 for the newest versions)
	$(LOCK) $(if $(UPGRADE),--upgrade) pyproject.toml -o requirements/server.txt
	$(LOCK) $(if $(UPGRADE),--upgrade) pyproject.toml requirements/dev.in -o requirements/dev.txt
	$(LOCK) $(if $(UPGRADE),--upgrade) requirements/build.in -o requirements/build.txt
	$(LOCK) $(if $(UPGRADE),--upgrade) requirements/upstream.in -o requirements/upstream.txt

# --- checks ----------------------------------------------------------------------------------------------------

.PHONY: test
test: env ## everything: environment, lint, stubs, contract, tests
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory drift
	@$(MAKE) --no-print-directory contract
	@$(MAKE) --no-print-directory deploy-tools
	@$(MAKE) --no-print-directory pytest

.PHONY: pytest
pytest: env ## the tests alone
	@echo "==> pytest"
	@$(WITH_TOOLS) python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)

.PHONY: prove-kill prove-fuzz prove-outage prove-learning
prove-kill: env ## 20,000 pairs while the server is killed 30 times; nothing may be lost (some minutes)
	@$(WITH_TOOLS) python -m tests.proofs.kill9 $(PROOF_ARGS)

prove-fuzz: env ## 50,000 broken messages to a server; nothing may break (some minutes)
	@$(WITH_TOOLS) python -m tests.proofs.fuzz $(PROOF_ARGS)

prove-outage: env ## the server is killed under a saturating fleet, and comes back (two minutes)
	@$(WITH_TOOLS) python -m bench.outage $(PROOF_ARGS)

prove-learning: env ## rows of the laboratory of learning, with the official SDK in real time (20 minutes)
	@$(WITH_TOOLS) python -m bench.learning_sdk $(PROOF_ARGS)

# Fleets of three servers over one Redis.
.PHONY: prove-replicas prove-failover prove-quiet prove-paused prove-trouble prove-recovery prove-outage-fleet prove-fairness
prove-replicas: env ## 1,000 callers on one pool through 3 servers: never over-granted (some minutes)
	@$(call need,redis-server,the proof of replicas); $(WITH_TOOLS) python -m bench.replicas.sharing $(PROOF_ARGS)

prove-failover: env ## the owner is killed 20 times at half of the most load, and stopped (some minutes)
	@$(call need,redis-server,the proof of failovers); $(WITH_TOOLS) python -m bench.replicas.failover $(PROOF_ARGS)

prove-quiet: env ## half of the most load without trouble: nobody changes the owner (30 minutes)
	@$(call need,redis-server,the proof of quiet); $(WITH_TOOLS) python -m bench.replicas.quiet $(PROOF_ARGS)

prove-paused: env ## the owner stands still for 10 s, 20 times, and grants nothing after (6 minutes)
	@$(call need,redis-server,the proof of pauses); $(WITH_TOOLS) python -m bench.replicas.paused $(PROOF_ARGS)

prove-trouble: env ## one trouble after the other, drawn at random, under load (10 minutes)
	@$(call need,redis-server go,the proof of troubles); $(WITH_TOOLS) python -m bench.replicas.trouble $(PROOF_ARGS)

prove-recovery: env ## 100,000 open reservations are taken over, warm and cold (some minutes)
	@$(call need,redis-server,the proof of recovery); $(WITH_TOOLS) python -m bench.replicas.recovery $(PROOF_ARGS)

prove-outage-fleet: env ## 3 servers and Redis are killed under a saturating fleet, and come back (3 minutes)
	@$(call need,redis-server,the proof of outages); $(WITH_TOOLS) python -m bench.replicas.outage $(PROOF_ARGS)

prove-fairness: env ## rows of the laboratory of fairness, with 3 servers over Redis (7 minutes)
	@$(call need,redis-server,the proof of fairness); $(WITH_TOOLS) python -m bench.fairness.real $(PROOF_ARGS)

# How many fresh seeds, such as "make simulate SEEDS=20000"; PROOF_ARGS="--seed 7" repeats one, "--broken" shows what is caught.
SEEDS ?= 200

.PHONY: simulate
simulate: env ## fleets on a virtual clock, with faults of every kind; nothing may break (SEEDS=n)
	@$(BIN)/python -m tests.simulation --seeds $(SEEDS) $(PROOF_ARGS)

.PHONY: lint
lint: env ## ruff, mypy --strict, buf lint
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy --strict"
	@$(BIN)/mypy --strict $(PY_SOURCES)
	@$(MAKE) --no-print-directory buf-lint

.PHONY: fmt
fmt: env ## format, and mend what can be mended
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

.PHONY: clean
clean: ## remove what the other targets made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist proto/node_modules
	find server clients tests bench proto -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# --- the contract ----------------------------------------------------------------------------------------------

# npm writes this file at the end of an installation.
proto/node_modules/.package-lock.json: proto/package-lock.json proto/package.json
	@echo "==> buf"
	@cd proto && npm ci --no-audit --no-fund
	@touch $@

.PHONY: buf-lint
buf-lint:
	@$(call need,node npm,buf lint); \
	$(MAKE) -s --no-print-directory proto/node_modules/.package-lock.json && \
	echo "==> buf lint" && cd proto && npm run --silent lint

.PHONY: proto
proto: env ## write the stubs anew from proto/
	@$(WITH_TOOLS) python proto/generate.py

.PHONY: drift
drift: env ## whether the stubs are those of proto/
	@echo "==> stubs"
	@$(WITH_TOOLS) python proto/generate.py --check

# Other languages: tests/contract/<language>/check proves that the contract works there, with these tools.
TOOLS_go := go
TOOLS_grpcurl := go
TOOLS_typescript := node npm
TOOLS_java := java mvn
CONTRACT_CHECKS := $(patsubst tests/contract/%/check,contract-%,$(wildcard tests/contract/*/check))

.PHONY: contract $(CONTRACT_CHECKS)
contract: $(CONTRACT_CHECKS) ## the contract in other languages (skipped where their tools are missing, except in CI)

$(CONTRACT_CHECKS): contract-%: env
	@$(call need,$(TOOLS_$*),the contract in $*); echo "==> the contract in $*" && $(WITH_TOOLS) tests/contract/$*/check

# --- deployment ------------------------------------------------------------------------------------------------

# Compiling takes minutes the first time, so without optimizations; running takes a tenth of a second.
build/deploy/helm: tests/deploy/tools/go.mod tests/deploy/tools/go.sum
	@echo "==> helm"
	@mkdir -p $(@D)
	@cd tests/deploy/tools && CGO_ENABLED=0 GOFLAGS="-mod=readonly -buildvcs=false '-gcflags=all=-N -l'" \
		go build -o $(CURDIR)/$@ helm.sh/helm/v3/cmd/helm

# The schemas of other people's resources, and of Compose files.
build/deploy/schemas: tests/deploy/tools/schemas.json
	@echo "==> schemas"
	@mkdir -p $(@D)
	@$(PYTHON) -c 'import json, sys; print(*(m["module"] + "@" + m["version"] for m in json.load(sys.stdin)))' <$< >$@
	@xargs go mod download <$@

.PHONY: deploy-tools
deploy-tools: ## Helm and schemas, for the tests of the chart (skipped without Go, except in CI)
	@$(call need,go,the chart's tests); $(MAKE) -s --no-print-directory build/deploy/helm build/deploy/schemas

.PHONY: check-deploy
check-deploy: env deploy-tools ## the image's recipe, the chart, the manifests and the Compose file
	@$(WITH_TOOLS) python -c 'from tests.deploy.tooling import VERSIONS; print("==> schemas of Kubernetes", *VERSIONS)'
	@$(WITH_TOOLS) python -m pytest tests/deploy -n $(PYTEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)

.PHONY: charts
charts: env build/deploy/helm ## write the chart's README and the plain manifests anew
	@$(BIN)/python deploy/helm/document.py --helm $(CURDIR)/build/deploy/helm

# --- to see and to measure -------------------------------------------------------------------------------------

# The window that is measured in each of three modes; with 56 it is four and a half minutes in all.
DEMO_SECONDS ?= 56

.PHONY: demo
demo: env ## one fleet on one limit: SDK retries, patient retries, Paceline
	@$(WITH_TOOLS) python -m bench.demo --seconds $(DEMO_SECONDS)

.PHONY: bench
bench: env ## throughput of the Session, and added latency through the Python client (on an idle machine)
	@$(WITH_TOOLS) python -m bench.session
	@$(WITH_TOOLS) python -m bench.latency

.PHONY: bench-replicas
bench-replicas: env ## round trips to Redis, throughput and waits with 1, 2 and 3 servers (on an idle machine)
	@$(call need,redis-server,the benchmark of replicas); $(WITH_TOOLS) python -m bench.replicas.trips $(PROOF_ARGS)

# To hand to the laboratory, such as "--seed 7 --processes 4".
LAB_ARGS ?=

.PHONY: lab-learning
lab-learning: env ## what the ledger learns of an upstream, on a virtual clock; writes docs/learning.md (a quarter of an hour)
	@$(WITH_TOOLS) python -m bench.lab.learning --write $(LAB_ARGS)

.PHONY: lab-fairness
lab-fairness: env ## how fairly waiters share, on a virtual clock; writes docs/fairness.md (a quarter of an hour)
	@$(WITH_TOOLS) python -m bench.fairness --write $(LAB_ARGS)
