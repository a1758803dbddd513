# Each target sets up .venv first, if that is not done. On Windows use the pip lines in README.md.
#   make test PYTHON=python3.13    with another Python, for a new .venv
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed

# The default preset needs no network: with this, anything that tries it fails at once.
OFFLINE := HF_HUB_OFFLINE=$${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
NOTEBOOKS := $(wildcard notebooks/*.ipynb exercises/*.ipynb solutions/*.ipynb)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_PROGRESS_BAR := off
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help lab course test compare build check-sync lint

help:
	@echo "make lab         open the first lesson in JupyterLab"
	@echo "make course      run all lessons and print a table of what they found"
	@echo "make compare LESSON=05  show an exercise beside its solution"
	@echo "make test        lint, check that notebooks match their sources, run all tests"
	@echo "make build       build the notebooks whose source changed"
	@echo "make check-sync  check that every notebook is what its source gives"
	@echo "make lint        ruff, and the style report of the notebooks"

lab: $(READY)
	$(RUN) -m jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

course: $(READY)
	@$(OFFLINE) $(RUN) tools/run_course.py

compare: $(READY)
	@test -n "$(LESSON)" || { echo "Which one? For example: make compare LESSON=05"; exit 2; }
	$(RUN) -m nbdime.webapp.nbdiffweb exercises/$(LESSON)*.ipynb solutions/$(LESSON)*.ipynb

# Tests run in as many processes as there are cores, each with one thread: the models are so small
# that a second thread gains less than a second process.
test: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tools/build_notebooks.py check-sync
	$(OFFLINE) OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile \
		--nbval-lax --nbval-cell-timeout 600 tests $(NOTEBOOKS)

build: $(READY)
	$(OFFLINE) $(RUN) tools/build_notebooks.py build

check-sync: $(READY)
	$(RUN) tools/build_notebooks.py check-sync

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tools/build_notebooks.py style

# torch by itself first, so that pip keeps the build that is there, or that the user chose.
$(READY): pyproject.toml constraints.txt
	@if ! $(RUN) tools/check_environment.py >/dev/null 2>&1; then \
		set -e; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
			"The course needs Python 3.11 or newer; try: make PYTHON=python3.12")'; \
		echo "Installing into $(VENV); this takes some minutes the first time."; \
		$(PYTHON) -m venv $(VENV); \
		$(RUN) -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"; \
		$(RUN) -m pip install --quiet -c constraints.txt -e ".[dev]"; \
	fi
	@touch $@
