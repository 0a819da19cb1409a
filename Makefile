PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test format clean

demo: .venv/installed
	$(BIN)/fusekern train demo --out runs/demo --resume auto
	$(BIN)/fusekern eval runs/demo --baseline
	$(BIN)/fusekern predict runs/demo data/scenes/images/validation --out runs/demo/predictions

test: .venv/installed fusekern/_build.json
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "fusekern needs Python >= 3.10; $(PYTHON) is `$(PYTHON) -V`. Say: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv \
	  || { echo "$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip 'setuptools>=77' 'torch>=2.11'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[test]'
	@touch $@

# The compiled modules, or why there is none: an installation has made it, a change of a source makes it anew.
fusekern/_build.json: $(wildcard csrc/*) | .venv/installed
	$(BIN)/python setup.py --quiet build_ext --inplace

clean:
	rm -rf .venv build dist *.egg-info fusekern/*.so fusekern/_build.json
