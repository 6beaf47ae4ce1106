# `make demo` and `make test` set up a virtual environment in .venv first, once.
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 10
BIN := $(VENV)/bin

.PHONY: demo test test-mesh test-slurm test-endurance test-damage test-browser docs gpu-check gpu-train lint clean

demo: $(VENV)/.installed
	$(BIN)/python train/demo.py --out runs/demo

test: $(VENV)/.installed-test lint docs
	$(BIN)/python -m pytest

# The site, in site/: every tutorial is executed, every link checked.
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# Eight simulated devices and two processes: four minutes.
test-mesh: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 0 -m mesh tests/test_mesh.py

# A real Slurm of one node (Debian: apt-get install slurm-wlm munge), as root: two minutes.
test-slurm: $(VENV)/.installed-test
	tests/one_node_slurm.sh runs/slurm
	$(BIN)/python -m pytest -n 0 -m slurm tests/test_slurm.py

# 3,000 updates in which nothing may grow, and 30 kills that may cost nothing: a table of figures.
test-endurance: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist load -rP -m endurance tests/test_endurance.py

# 10,000 damaged files of every format, each with a fixed seed: ten minutes.
test-damage: $(VENV)/.installed-test
	GHN_JAX_DAMAGES=40 $(BIN)/python -m pytest -n 0 tests/test_damage.py

# The web page in a browser (Debian: apt-get install chromium chromium-driver): a minute.
test-browser: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -e '.[web]' 'selenium>=4.20'
	$(BIN)/python -m pytest -n 0 -m browser tests/test_web_browser.py

# The engine on an accelerator, in minutes: is it right, and how fast? Writes gpu_check.json.
gpu-check:
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu_check.py $(ARGS)

# Ten minutes of the paper's training, for machines that are lent in pieces; again, it goes on.
gpu-train:
	PYTHONPATH=. timeout --signal TERM $(MINUTES)m $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) \
	  train/train_ghn.py --preset ghn2 --out runs/gpu --resume auto $(ARGS) || test $$? = 124

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; say which: make demo PYTHON=python3.11")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[test,docs]'
	touch $@

clean:
	rm -rf $(VENV)
