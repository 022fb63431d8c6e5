# What CONTRIBUTING.md asks for, in one word each; `make` alone checks a change.
.PHONY: check reference

check:
	ruff check .
	ruff format --check .
	mypy
	pytest -m fast

reference:
	python .ci/reference.py
