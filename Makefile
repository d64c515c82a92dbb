# Every target sets itself up first; a second call costs nothing. `make` alone lists the targets.

PY ?= python3
VENV ?= .venv
ARGS ?=
OUT ?= outputs/gpu
WORKERS ?= 2
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.ready
# uv reads no pip settings: hand it the folder of local wheels, where there is one.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.DEFAULT_GOAL := help
.PHONY: help setup demo coco test check lint serve bench gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## make .venv with everything in it

$(STAMP): requirements.txt requirements-dev.txt constraints.txt
	@$(PY) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "mmllm needs Python 3.11 or newer, found %d.%d: make setup PY=python3.12" % sys.version_info[:2])'
	@if command -v uv >/dev/null; then \
	  uv venv --quiet --allow-existing --python "$$($(PY) -c 'import sys; print(sys.executable)')" $(VENV) && \
	  uv pip install --python $(PYTHON) -c constraints.txt -r requirements-dev.txt; \
	else \
	  $(PY) -m venv $(VENV) || { echo "python's venv module is missing: apt install python3-venv"; exit 1; }; \
	  $(PYTHON) -m pip install --no-compile -c constraints.txt -r requirements-dev.txt; \
	fi
	@touch $@
	@echo "ready. Next: make demo, or make test"

demo: $(STAMP)  ## draw a small world, train both stages on it, measure and caption (4 minutes on 2 cores)
	$(PYTHON) -m examples.shapes demo $(ARGS)

coco: $(STAMP)  ## the public recipe: weights, 90 GB of data, training, scores, report (hours on a GPU, see docs/evaluation.md)
	$(PYTHON) -m examples.coco $(ARGS)

test: $(STAMP)  ## run the tests (4 minutes on 2 cores; WORKERS=4 on more)
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadscope $(ARGS)

check: $(STAMP)  ## run the quick tests, after each change (under 45 seconds on 2 cores)
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadscope -m "not slow" $(ARGS)

lint: $(STAMP)  ## check the style, and that each package imports only from those below it
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

fuzz: $(STAMP)  ## try 2,000 wrong requests and images of each kind on the server (10 minutes)
	MMLLM_FUZZ=2000 $(PYTHON) -m pytest tests/serving/test_fuzz.py $(ARGS)

serve: $(STAMP)  ## serve the newest trained model on http://127.0.0.1:8000
	$(PYTHON) serve.py $(ARGS)

load: $(STAMP)  ## measure a server under load: answers, refusals, times, memory (90 seconds on 2 cores; ARGS="--url ..." for one that runs)
	$(PYTHON) -m benchmarks load $(ARGS)

bench: $(STAMP)  ## measure training, answers, captions and memory beside other programs (under 10 minutes on 2 cores)
	$(PYTHON) -m benchmarks train --rounds 1 --case "stage 1" --case "stage 2, full" --case "stage 2, LoRA" $(ARGS)
	$(PYTHON) -m benchmarks generate --new-tokens 64 --batch 1 --batch 4 --batch 8 $(ARGS)
	$(PYTHON) -m benchmarks caption --rounds 2 --images 16 $(ARGS)
	$(PYTHON) -m benchmarks memory --bf16-only --case "stage 2, full" $(ARGS)
	$(PYTHON) -m benchmarks table

gpu: $(STAMP)  ## prove and measure what needs a CUDA GPU, into outputs/gpu or OUT=... (9 minutes)
	$(PYTHON) -m benchmarks gpu --out $(OUT)

clean:  ## remove what the targets made, outputs included
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache
