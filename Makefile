# The two commands are `make demo` and `make test` (as root); both begin with `make setup`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup check unit test test-vm demo run bench clean
bin := .venv/bin
jobs ?= 4

help:
	@echo "make demo    see it work: real containers, about a minute, cleans up after itself (as root)"
	@echo "make run     keep an agent in the foreground on a copy of examples/state (as root)"
	@echo "make test    the whole suite, on the real kernel (as root)"
	@echo "make test-vm the live suite in emulated Debian 12 and 13 machines with systemd; hours (VM='bookworm tests/live/test_x.py')"
	@echo "make check   format, lint, types, import law     make unit   the tests that touch nothing"
	@echo "make bench   how fast, beside what else is installed (PEERS=yes installs docker.io and podman first)"
	@echo "make setup   install what is missing             make clean  remove what make made"

# What only the tests need: a registry to pull from, passwords and certificates for it, a real root file system, another
# engine that reads our images, the parser of AppArmor profiles.
test-packages := docker-registry apache2-utils openssl debootstrap podman apparmor xfsprogs

setup:
	@packaging/setup.sh --develop
	@packaging/setup.sh $(test-packages)

# Four checkers side by side; each one's output stays together.
check: setup
	@$(MAKE) --no-print-directory -j4 --output-sync=target check-format check-lint check-types check-imports
.PHONY: check-format check-lint check-types check-imports
check-format:
	@$(bin)/ruff format --check --quiet . || { echo "run: .venv/bin/ruff format ."; exit 1; }
check-lint:
	@$(bin)/ruff check --quiet .
check-types:
	@$(bin)/mypy
check-imports:
	@$(bin)/lint-imports --no-logo

unit: setup
	@$(bin)/pytest tests/unit -q -n 2

test: setup
	@$(bin)/pytest -n $(jobs) --dist loadgroup --durations 10

# By hand: no part of CI. VM: suites, and arguments for pytest.
test-vm:
	@tests/vm/run-suite $(VM)

demo: setup
	@$(bin)/python examples/demo.py $(DEMO)

run: setup
	@$(bin)/python examples/demo.py --keep

bench: setup
	@if [[ "$(PEERS)" == yes ]]; then packaging/setup.sh docker.io docker-compose podman; fi
	@$(bin)/python bench/run.py $(BENCH)

clean:
	rm -rf .bench .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find agent plugins tests bench examples -name __pycache__ -prune -exec rm -rf {} +
