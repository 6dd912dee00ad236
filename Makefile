# make video   set everything up in .venv and make a video          make test    set up, run all tests
# make check   lint, types and import contract                      make wheel   build the package
# make deep    the long tests: kills, full disks, signals ...       make offline all tests without any network (Linux)
# make docs    docs/cli.md from the commands                        make pictures  the moving picture of README.md
#
# PYTHON=python3.12    the interpreter to use (3.11 or newer; the first found by default)
# VENV=.venv           where everything is installed; nothing outside this folder and pip's cache is touched
# TORCH_INDEX=URL      install torch from that index first, for example a CPU build; a torch already in VENV is kept

VENV ?= .venv
TORCH_INDEX ?=
PROMPT ?= a red ball floating over the sea at sunset
BIN := $(VENV)/bin
ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c '$(ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: video pictures test deep offline check lint types wheel docs record clean

video: $(BIN)/.installed
	$(BIN)/streamt2v generate "$(PROMPT)" --frames 48 -o red_ball.mp4 --overwrite

# 1200 frames of the bundled weights, sped up; repeating the command goes on where it was stopped.
pictures: $(BIN)/.installed
	$(BIN)/python benchmarks/pictures.py "$(PROMPT)"

test: $(BIN)/.installed-dev
	$(BIN)/python -m pytest

deep: $(BIN)/.installed-dev
	$(BIN)/python -m pytest -m slow

# Loopback alone: the tests of the model hub talk to a server of their own.
offline: $(BIN)/.installed-dev
	unshare --map-root-user --net sh -c 'ip link set lo up && exec $(BIN)/python -m pytest'

check: lint types

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(BIN)/.installed-dev
	$(BIN)/mypy

wheel: $(BIN)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build

# Write docs/cli.md from the commands.
docs: $(BIN)/.installed
	$(BIN)/python -m docs.generate_cli

# Write size and SHA-256 of newly trained weights into weights.toml.
record: $(BIN)/.installed
	$(BIN)/python -c "from streamt2v.weights import catalog; print(*catalog.record(), sep='\n')"

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -f $(BIN)/python; exit 1; }

# The stamps are older than pyproject.toml when dependencies may have changed; pip then installs only the difference.
$(BIN)/.installed: pyproject.toml | $(BIN)/python
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install -e .
	touch $@

$(BIN)/.installed-dev: pyproject.toml $(BIN)/.installed
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@
