# Two commands matter: `make book` and `make test`.  Both set up what they need; neither does work twice.
# Another interpreter: make book PYTHON=python3.12
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
NOTEBOOKS = $(wildcard book/*.ipynb)
# As many test processes as there are cores, one thread each; the tests of one file, and the cells of one notebook,
# stay together.
PARALLEL = -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
.DEFAULT_GOAL := help
.PHONY: help install lint test book page serve lab notebooks anki measure gpu wheelhouse wheel lock audit clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile | while IFS='	' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

install: ## make .venv with the pinned packages and fetch the browser files
	@"$(PYTHON)" tools/install.py

lint: install ## check the code style and that the notebooks are stripped
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) tools/strip_notebooks.py --check $(NOTEBOOKS)

test: book ## build the book, then run every test, every notebook and the site in a real browser
	@OMP_NUM_THREADS=1 IPYTHONDIR="$(CURDIR)/_build/ipython" $(VENV_PYTHON) -m pytest $(PARALLEL) --nbval --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg $(NOTEBOOKS) tests

book: install ## run the notebooks and build the HTML book, warnings as errors
	@$(VENV_PYTHON) tools/build_book.py

page: install ## build one page alone, to look at it: make page PAGE=formats
	@$(VENV_PYTHON) tools/preview_page.py $(PAGE)

serve: ## serve the built book on this machine and print the address
	@"$(PYTHON)" tools/serve.py

lab: install ## open the notebooks in JupyterLab
	@$(VENV_PYTHON) -m jupyterlab book

notebooks: install ## run all notebooks in place and strip them for committing
	@$(VENV_PYTHON) tools/strip_notebooks.py --execute $(NOTEBOOKS)

anki: install ## write the question bank as a deck for Anki: make anki, with links: make anki SITE=https://...
	@$(VENV_PYTHON) tools/make_anki.py $(if $(SITE),--site "$(SITE)")

measure: install ## measure this machine (minutes) and write book/data/<device>.json
	@$(VENV_PYTHON) tools/measure.py

gpu: install ## on a machine with a GPU: its tests, its measurements, every notebook (10 minutes)
	@$(VENV_PYTHON) tools/gpu.py

wheelhouse: install ## fill a folder for machines without a network: make wheelhouse TO=folder
	@$(VENV_PYTHON) tools/wheelhouse.py $(TO)

wheel: install ## make the package's wheel, to lay beside a notebook that is opened alone
	@$(VENV_PYTHON) tools/wheelhouse.py --project $(or $(TO),_build/wheel)

lock: install ## write requirements.lock anew, after a change of requirements.txt
	@$(VENV_PYTHON) tools/lock.py

audit: install ## look for known vulnerabilities in the locked packages
	@$(VENV_PYTHON) tools/audit.py

clean: ## remove everything that make created, .venv included
	@rm -rf _build .assets .venv .ruff_cache .pytest_cache mixprec_lab.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
