# Two commands: `make demo` shows what pre-training is worth, `make test` checks everything.
# The first run of either makes .venv and installs into it; TORCH can name another build of torch.

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?=
# Two test processes, a file of tests each at a time.
WORKERS ?= --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test lint types contract tests tests-unhooked clean
.DELETE_ON_ERROR:

demo: .venv/ready
	@.venv/bin/vitrail demo $(DEMO)

# The type checker computes on one core: it runs beside the tests.
test: lint contract
	@$(MAKE) --no-print-directory --jobs=2 types tests
	@$(MAKE) --no-print-directory tests-unhooked

lint: .venv/ready-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/ready-dev
	.venv/bin/mypy

contract: .venv/ready-dev
	.venv/bin/lint-imports --no-logo

tests: .venv/ready-dev
	.venv/bin/python -m pytest $(WORKERS)

tests-unhooked: .venv/ready-dev
	VITRAIL_TEST_PASS=unhooked .venv/bin/python -m pytest $(WORKERS)

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python is missing: install the package python3 (3.11 or newer)."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: install Python 3.11 or newer, or name one with PYTHON=..."; exit 2; }
	@command -v git >/dev/null || { echo "git is missing: install the package git."; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv is missing: install the package python3-venv."; exit 2; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "The virtual environment could not be made: install the package python3-venv."; exit 2; }

# A marker beside each install, so that a second run starts at once and a broken one begins again.
.venv/ready: .venv/bin/python pyproject.toml
	@echo "Installing what Vitrail needs into .venv (once) ..."
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/ready-dev: .venv/ready
	@echo "Installing what the tests need (once) ..."
	@.venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"], sep="\n")' > .venv/dev.txt
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement .venv/dev.txt
	@touch $@

clean:
	rm -rf .venv build dist
