# make book and make test do everything on a fresh machine: each first sets up .venv.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Sections of the chapters to run besides the plain ones: make test FLAGS="long mnist"
FLAGS ?=
PORT ?= 8000

ifneq ($(wildcard ../shared/data),)
export SHARETIE_DATA ?= $(abspath ../shared/data)
endif
export SHARETIE_FLAGS := $(FLAGS)
export MPLBACKEND := agg
# One thread per process: faster for small networks, and the same bits wherever the chapters run.
chapters: export OMP_NUM_THREADS := 1

# Compiled modules are kept: the tests start many processes.
test: export PYTHONDONTWRITEBYTECODE :=

.PHONY: help book test chapters bench preview clean

help:
	@echo 'make book      build the site into _docs/'
	@echo 'make test      test everything that this machine can; FLAGS="long slow" adds flagged sections'
	@echo 'make chapters  run the chapters and save their outputs; ONLY=04_tying runs one'
	@echo 'make bench     measure speed against peers and limits'
	@echo 'make preview   serve the site at http://localhost:$(PORT)'
	@echo 'make clean     remove what the other targets made'

$(VENV)/ready: settings.ini setup.py pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "make: $(PYTHON) is missing: install Python 3.11 or later, or name one: make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) says it is '$$("$(PYTHON)" -V 2>&1)', and Python 3.11 or later is needed: make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module: install it (on Debian the package python3-venv)"; exit 1; }
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --config-settings editable_mode=compat -e '.[dev]' 2>$(VENV)/pip.log \
	  || { echo "make: could not install the requirements: $$(grep -m1 -E 'connection|ERROR' $(VENV)/pip.log); all in $(VENV)/pip.log"; exit 1; }
	@touch $@

book: $(VENV)/ready
	@$(BIN)/nbdev_export
	@$(BIN)/python book/build.py

test: $(VENV)/ready
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

chapters: $(VENV)/ready
	@$(BIN)/nbdev_export
	@$(BIN)/python book/execute.py $(ONLY)

bench: $(VENV)/ready
	@for f in benchmarks/[a-z]*.py; do $(BIN)/python $$f || exit 1; done

preview: book
	@$(BIN)/python -m http.server -d _docs $(PORT)

clean:
	rm -rf $(VENV) _docs _proc build dist *.egg-info
