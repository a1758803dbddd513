# Each target sets up .venv first, if that is not done. On Windows use the pip lines in README.md.
#   make test PYTHON=python3.13    with another Python, for a new .venv
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
SITE := .venv-site

# The default preset needs no network: with this, anything that tries it fails at once.
OFFLINE := HF_HUB_OFFLINE=$${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
NOTEBOOKS := $(wildcard notebooks/*.ipynb exercises/*.ipynb solutions/*.ipynb)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_PROGRESS_BAR := off
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help lab course test test-isa compare build check-sync lint wheel site

help:
	@echo "make lab         open the first lesson in JupyterLab"
	@echo "make course      run all lessons and print a table of what they found"
	@echo "make compare LESSON=05  show an exercise beside its solution"
	@echo "make test        lint, check that notebooks match their sources, run all tests"
	@echo "make test-isa    run the numeric tests as on processors with fewer instructions (x86-64)"
	@echo "make build       build the notebooks whose source changed"
	@echo "make check-sync  check that every notebook is what its source gives"
	@echo "make site        the course as web pages, in build/site"
	@echo "make wheel       the package as one file in build/, to upload to Colab"
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

# Other instructions, and another number of threads, add up in another order and round differently:
# a tolerance that one processor alone keeps shows here. Left out is what takes the most time and
# tells the least: saving and resuming, which compares bits of one machine, and the base's exam.
NUMERIC := $(patsubst %,tests/test_%.py,assets gold kl logprobs ppo ppo_parity reward roles rollout \
	sft train_ppo)
LEFT_OUT := save or goes_on or go_on or interrupted or killed or kept or disk or connection or \
	the_base or knows_nothing

test-isa: $(READY)
	@failed=; export OMP_WAIT_POLICY=passive; \
	for isa in "default SSE41 SSE4_2" "avx2 AVX2 AVX2"; do \
		set -- $$isa; \
		export ATEN_CPU_CAPABILITY=$$1 DNNL_MAX_CPU_ISA=$$2 MKL_ENABLE_INSTRUCTIONS=$$3; \
		$(RUN) -c 'import os, sys, torch; found = torch.backends.cpu.get_cpu_capability().lower(); \
			sys.exit(found != os.environ["ATEN_CPU_CAPABILITY"] and \
			f"torch takes {found} all the same: this needs an x86-64 processor with AVX2")' \
			|| exit 1; \
		for threads in 1 2; do \
			echo "== instructions: $$1, threads: $$threads"; \
			$(OFFLINE) OMP_NUM_THREADS=$$threads $(RUN) -m pytest -k "not ($(LEFT_OUT))" \
				$(NUMERIC) || failed="$$failed $$1/$$threads"; \
		done; \
	done; \
	test -z "$$failed" || { echo "Failed (instructions/threads):$$failed"; exit 1; }

build: $(READY)
	$(OFFLINE) $(RUN) tools/build_notebooks.py build
	$(RUN) tools/course_figures.py

check-sync: $(READY)
	$(RUN) tools/build_notebooks.py check-sync

# Written anew each time: nothing of a build that was interrupted, or of a page that is gone, is left.
site: $(SITE)/.installed
	rm -rf build/site
	$(SITE)/bin/python -m sphinx -c docs -W --keep-going -q -d build/doctrees . build/site
	@echo "Open build/site/index.html"

wheel: $(READY)
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir build .

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

# Neither the package nor torch: the site's tools read notebooks and sources, and run nothing.
SITE_TOOLS := import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*extras["optional-dependencies"]["site"], sep="\n")

$(SITE)/.installed: pyproject.toml
	@echo "Installing into $(SITE)"
	@test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	@$(SITE)/bin/python -c '$(SITE_TOOLS)' > $(SITE)/tools.txt
	@$(SITE)/bin/python -m pip install --quiet -r $(SITE)/tools.txt
	@touch $@
