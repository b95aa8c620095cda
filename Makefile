# make book | test | serve | pdf | bench | contract | gpu: each makes .venv first where it is missing or out of date.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
PY := $(BIN)/python
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# threads that wait give way on a busy machine, see nbs/W5_machine
export GOMP_SPINCOUNT ?= 10000

.PHONY: help setup book test serve pdf bench contract gpu clean

help:
	@echo "make setup   the environment in .venv, from requirements.lock"
	@echo "make book    run the chapters and render the book to _build/html"
	@echo "make test    everything that is checked"
	@echo "make serve   the book on http://localhost:$(PORT)"
	@echo "make pdf     the paper's chapters and its appendix as one file, _build/html/convmixer-edu.pdf"
	@echo "make bench   the speed of a training step, to _build/bench.json"
	@echo "make contract  every chapter with Colab's versions, from the wheel (LOWER=1: the oldest versions); gigabytes"
	@echo "make gpu     the evidence on a GPU, in MINUTES=12, to gpu/; goes on where it was"
	@echo "make clean   remove what was built, .venv excepted"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) must be Python 3.11 or newer with its venv module: name another with 'make PYTHON=...'" >&2; exit 1; }
	@[ -x $(PY) ] || $(PYTHON) -m venv .venv
	@echo "Installing what requirements.lock names (some 6 GB, PyTorch with CUDA among it) into .venv"
	@$(PY) -m pip install --quiet --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

book: $(READY)
	@$(BIN)/jupyter-book build -n .
	@echo "The book is at file://$(CURDIR)/_build/html/index.html"

test: $(READY)
	@$(PY) -m pytest $(TESTS)

serve: book
	@$(PY) -m http.server --directory _build/html $(PORT)

pdf: book
	@$(PY) tools/pdf.py

bench: $(READY)
	@$(PY) tools/bench.py

contract: $(READY)
	@$(PY) tools/contract.py $(if $(LOWER),--lower)

gpu: $(READY)
	@$(PY) tools/gpu.py --minutes $(or $(MINUTES),12)

clean:
	rm -rf _build build dist *.egg-info
