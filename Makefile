# make demo          print a first table
# make test          run lint, types and tests; the same as make check
# make browser       test report pages in a headless Chromium (Debian: chromium, chromium-driver, npm)
# make screenshots   the same, and write docs/report.png
# make faults        look for lost work, silent errors and tracebacks (MINUTES=30)
# make mutants       do tests notice 350 small changes of the code? Takes about an hour
# make coverage      measure which lines the tests run; below 95 % it fails
# make mislabelled   count the wrong labels among the 40 highest scores of `influence self`
# make sample-runs   train the sample runs again
# make gpu           test and measure a CUDA device; without one it says so
# make study         judge the scores of all methods by retraining; DATA=FOLDER, within an hour
# make study-full    the same with its slow rows
# make docs          build the documentation into site/, and check its links
# make bench-peers   compare with public libraries, each in its own environment
# make dist          build the wheel and the source distribution into dist/
# make wheel-test    install the wheel in an empty environment; does it print the README's table?
# make clean         remove environments and caches
#
# Every target installs what it needs into .venv. On Linux without a GPU, set TORCH_INDEX to
# PyTorch's index of CPU builds (pytorch.org, "Get started"). This avoids gigabytes of CUDA
# libraries: make demo TORCH_INDEX=https://...
PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
PIP = $(VENV)/bin/pip --disable-pip-version-check
RUN = sample_runs/digits
CORE = pyproject.toml constraints.txt

.PHONY: demo test check lint types tests browser screenshots faults mutants coverage clean mislabelled sample-runs gpu bench-peers docs study study-full dist wheel-test

demo: $(VENV)/core
	$(VENV)/bin/influence score $(RUN) --queries 57 --top 4 --format table

test check: lint types tests

lint: $(VENV)/dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/dev
	$(VENV)/bin/mypy

tests: $(VENV)/dev
	$(VENV)/bin/python -m pytest

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/core: $(VENV)/bin/python $(CORE)
	$(if $(TORCH_INDEX),$(PIP) install -q -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/dev: $(VENV)/core
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

# Selenium drives the Chromium of the system; axe-core judges the accessibility of pages.
AXE_CORE = axe-core@4.14.1

browser screenshots: $(VENV)/browser .browser/axe-core
	$(if $(filter screenshots,$@),WRITE_DOCS=1) $(VENV)/bin/python -m pytest -n 0 tests/browser

$(VENV)/browser: $(VENV)/dev
	$(PIP) install -q -c constraints.txt -e '.[browser]'
	touch $@

.browser/axe-core: Makefile
	npm install --silent --no-save --ignore-scripts --prefix .browser $(AXE_CORE)
	touch $@

$(VENV)/build: $(VENV)/bin/python constraints.txt
	$(PIP) install -q -c constraints.txt build setuptools
	touch $@

# An egg-info of an earlier build would add its files to the source distribution.
dist: $(VENV)/build
	rm -rf dist build *.egg-info
	$(VENV)/bin/python -m build --quiet --no-isolation

WHEEL_PIP = .venv-wheel/bin/pip --disable-pip-version-check

wheel-test: dist
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	$(if $(TORCH_INDEX),$(WHEEL_PIP) install -q -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(WHEEL_PIP) install -q -c constraints.txt dist/*.whl
	.venv-wheel/bin/python tests/readme_table.py .venv-wheel/bin/influence

coverage: $(VENV)/dev
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest
	$(VENV)/bin/coverage combine -q
	$(VENV)/bin/coverage report --skip-covered --show-missing --fail-under=95

# The program writes its table to faults/README.md. It fails if it meets a fault.
MINUTES ?= 30

faults: $(VENV)/dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m faults --minutes $(MINUTES) --write

mutants: $(VENV)/dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m faults.mutants

mislabelled: $(VENV)/core
	$(VENV)/bin/influence self $(RUN) --top 40 | $(VENV)/bin/python $(RUN)/count_flipped.py

sample-runs: $(VENV)/core
	$(VENV)/bin/python $(RUN)/train.py
	$(VENV)/bin/python sample_runs/words/train.py

gpu: $(VENV)/dev
	$(VENV)/bin/python benchmarks/gpu.py
	$(VENV)/bin/python -m pytest tests/test_gpu.py

# Builds without the network. The variable silences advice about other builders.
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo 'read it with: $(VENV)/bin/python -m http.server -d site'

# Compares whole jobs with those of public libraries, in half an hour. WORKLOADS="w1 w3" selects
# workloads, TRAIN=1000 the training examples of each, LIMIT=300 the seconds of one process.
PEERS = captum==0.9.0 dattri==0.3.0 kronfluence==1.0.1 traker==0.3.2 bergson==2.5.1
PEER_PIP = .venv-peers/$*/bin/pip --disable-pip-version-check
WORKLOADS ?=
TRAIN ?=
LIMIT ?=

bench-peers: $(VENV)/core $(foreach peer,$(PEERS),.venv-peers/$(firstword $(subst ==, ,$(peer)))/installed)
	$(VENV)/bin/python benchmarks/peers.py $(WORKLOADS) $(if $(TRAIN),--train $(TRAIN)) $(if $(LIMIT),--limit $(LIMIT))

# Needs DATA, a folder with fashion_mnist_15k.npz and tinyshakespeare.txt.gz (benchmarks/study/runs.py).
# .study/ keeps runs, scores and trainings; an interrupted study resumes.
DATA ?=
STUDY = $(VENV)/bin/python benchmarks/study --data "$(DATA)"

study study-full: $(VENV)/dev .venv-peers/kronfluence/installed .venv-peers/traker/installed
	@test -n "$(DATA)" || { echo "make $@ DATA=FOLDER: see benchmarks/study/runs.py" >&2; exit 1; }
	$(STUDY) $(if $(findstring full,$@),--full)

# bench-peers skips a library that pip cannot install. kronfluence and bergson require torchvision
# and torchaudio but import neither. CUDA builds of these two break a CPU torch: remove them.
.venv-peers/%/installed: constraints.txt
	$(PYTHON) -m venv .venv-peers/$*
	$(if $(TORCH_INDEX),$(PEER_PIP) install -q -c constraints.txt --index-url $(TORCH_INDEX) torch)
	{ $(PEER_PIP) install -q -c constraints.txt torch $(filter $*==%,$(PEERS)) && \
	  $(PEER_PIP) uninstall -q -y torchvision torchaudio && touch $@; } || echo "$* could not be installed" >&2

clean:
	rm -rf $(VENV) .venv-peers .venv-wheel .browser build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(RUN)/.influence
