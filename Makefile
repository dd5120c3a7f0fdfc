SHELL := /bin/bash
PY := .venv/bin/python

.PHONY: setup check
setup:
	@test -x .venv/bin/python || python3 -m venv .venv
	@.venv/bin/pip -q install -e '.[dev]'

check:
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
