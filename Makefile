# `make check` is what must pass before a commit; each step also stands alone.
PYTHON ?= python

.PHONY: check format lint types architecture test

check: format lint types architecture test

format:
	ruff format .

lint:
	ruff check .

# mypy does not see that compile/, kernels/ and warmup/ are installed below toka, so it is shown a tree of links.
types:
	rm -rf build/tree && mkdir -p build/tree/toka
	ln -s $(CURDIR)/toka/* build/tree/toka/
	ln -s $(CURDIR)/compile $(CURDIR)/kernels $(CURDIR)/warmup build/tree/toka/
	cd build/tree && MYPYPATH=. mypy --config-file $(CURDIR)/pyproject.toml -p toka

architecture:
	$(PYTHON) -m pytest -q tests/contracts

test:
	$(PYTHON) -m pytest -n 2 --dist loadfile
