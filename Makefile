# `make train` and `make test` set up what they need; either may come first, both may be repeated.
PYTHON ?= python3
BIN := .venv/bin
PLUGINS := $(wildcard plugins/*/pyproject.toml)
CONFIG ?= configs/ppo_cartpole.yaml

.PHONY: help setup train test test-slow check bench bench-trunks gpu-check

help:
	@echo "make train      set up, then train PPO on CartPole-v1 (CONFIG=configs/... for another experiment)"
	@echo "make test       set up, then run the tests"
	@echo "make test-slow  the learning runs of several seeds (about an hour)"
	@echo "make check      formatter, linter, type checker, import contract"
	@echo "make bench      training speed beside stable-baselines3"
	@echo "make bench-trunks  what trunks cost beside nn.LSTM (NAMES='gru lstm' for some of them)"
	@echo "make gpu-check  every trunk on the CUDA device: conformance, time, memory (NAMES=...)"
	@echo "make setup      only set up: .venv with the core and every plugin, editable"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt $(PLUGINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lit-rl needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		($(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv .venv)
	$(BIN)/python -m pip install --quiet -c constraints.txt --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]' $(foreach plugin,$(PLUGINS),-e $(dir $(plugin)))
	@touch $@

train: setup
	$(BIN)/lit-rl fit --config $(CONFIG)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile tests plugins

test-slow: setup
	$(BIN)/python -m pytest -m slow -n 2 -rP tests plugins

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/lit-rl bench throughput configs/throughput/ppo_cartpole_mlp.yaml \
		configs/throughput/ppo_cartpole_mlp_compiled.yaml --peer sb3 --no_ceilings

bench-trunks: setup
	$(BIN)/python -m lit_rl.benchmarks.trunk_speed $(NAMES)

gpu-check: setup
	$(BIN)/python -m lit_rl.benchmarks.gpu_check $(NAMES)
