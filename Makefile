# `make smoke` and `make test` need nothing but Python >= 3.11 with venv; everything else they install into .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help install smoke test test-slow test-cluster test-cluster-more image manifests dashboards soak fuzz lint bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

install: .venv/installed ## create .venv and install EquiAV into it (about 5 GB, mostly torch)

smoke: .venv/installed ## generate clips, pretrain the tiny model, evaluate, write runs/smoke/report.html (under 3 minutes on two cores)
	@$(BIN)/equiav smoke

# Of these many wait: one process more than there are cores, and who is idle takes over from the others.
test: .venv/installed ## the fast tests
	@$(PYTEST) -n $$(($$(nproc) + 1)) --dist worksteal

# The tests of a file share what took minutes to make. Many wait, as above.
test-slow: .venv/installed ## tests of minutes: the whole smoke run, ViT-B size
	@$(PYTEST) -n $$(($$(nproc) + 1)) --dist loadfile -m slow --timeout 1800

test-cluster: .venv/installed ## on a real Kubernetes: that of KUBECONFIG, or one made here (root, Debian; the first time builds it, 10 minutes)
	@$(BIN)/python -m tests.cluster

test-cluster-more: .venv/installed ## there, too: a thousand simulated nodes; a queue of Kueue
	@$(BIN)/python -m tests.cluster -s -m cluster_more

image: ## build the Dockerfile with buildah, and train ten steps inside (root, Debian; BASE= another base image)
	@bash tests/image/check.sh

manifests: .venv/installed ## write k8s/80-demo.yaml anew, and IMAGE= into all of k8s/
	@$(BIN)/python -m launch.manifests $(IMAGE)

dashboards: .venv/installed ## a smoke run, watched by a Prometheus here; its dashboards as pictures (Debian's prometheus)
	@$(BIN)/python -m monitoring.demo

soak: .venv/installed ## attack runs for HOURS=1, round after round; each has to end as if nothing had happened (SEED=N repeats one)
	@$(BIN)/python -m tests.soak --hours $(or $(HOURS),1) $(if $(SEED),--seed $(SEED))

fuzz: .venv/installed ## spoiled files to every parser for MINUTES=3 (SEED=N repeats)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),3) $(if $(SEED),--seed $(SEED))

lint: .venv/installed ## ruff and pyright
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: .venv/installed ## every speed claim, measured here
	@$(BIN)/python -m benchmarks

clean: ## remove .venv and what runs wrote
	rm -rf .venv .venv-rivals runs

.venv/installed: pyproject.toml constraints.txt install.sh
	@PYTHON='$(PYTHON)' bash install.sh
