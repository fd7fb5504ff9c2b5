# The commands of the README. Each works from a clean clone and makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
SOURCES := setup.py pyproject.toml $(shell find pace/_kernels -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name '*_kernel.c' -o -name parallel.c)

.PHONY: demo test check bench attention-bench sanitize test-slow ray-test build clean

demo: $(VENV)/.built  ## fetch SmolLM2 and let it speak
	$(BIN)/pace pull smollm2
	$(BIN)/pace generate smollm2 "Why is the sky blue? Answer in three sentences." --chat --max-tokens 128

test: $(VENV)/.test  ## the whole suite
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## format, lint, types, then the suite
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	find pace/_kernels -name '*.h' -o -name '*_kernel.c' -o -name parallel.c | xargs $(BIN)/clang-format --dry-run --Werror
	PACE_WERROR=1 $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pytest

bench: $(VENV)/.test  ## every kernel against its twin, then both timed beside the machine and torch
	$(BIN)/python -m pytest --benchmark

attention-bench: $(VENV)/.dev  ## attention through each cache, beside the machine and torch; draws the plots of the docs
	$(BIN)/python -m benchmarks.attention --plots docs/images

SANITIZED := build/sanitized/lib
sanitize: $(VENV)/.dev  ## the kernels' tests under the address and undefined-behaviour sanitizers
	PACE_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests && cp -r tests pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" PYTHONMALLOC=malloc \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(abspath $(BIN))/python -m pytest --capture=sys tests/kernels

test-slow: $(VENV)/.test  ## big shapes and long runs
	$(BIN)/python -m pytest -m slow

# The page's tests drive a Chromium. Where it can't be had they are skipped, and say so.
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20
CHROMIUM := { command -v chromium || command -v chromium-browser || command -v google-chrome || { \
	[ "$$(id -u)" = 0 ] && { $(APT) update; $(APT) install -y --no-install-recommends chromium; }; }; } >/dev/null 2>&1 \
	|| echo 'no Chromium here, and none could be installed: the tests of the page will be skipped'

# The backend TPP is tested on a libxsmm; Debian has it as an archive, of which a shared library is made.
XSMM_ARCHIVE := $$($(CC) -print-file-name=libxsmm.a)
LIBXSMM := { [ -e "$(XSMM_ARCHIVE)" ] || { \
	[ "$$(id -u)" = 0 ] && { $(APT) update; $(APT) install -y --no-install-recommends libxsmm-dev; }; }; \
	mkdir -p build && $(CC) -shared -o build/libxsmm.so -Wl,--whole-archive "$(XSMM_ARCHIVE)" \
	"$$($(CC) -print-file-name=libxsmmnoblas.a)" -Wl,--no-whole-archive -lpthread -lrt -ldl -lm; } >/dev/null 2>&1 \
	|| echo 'no libxsmm here, and none could be installed: the tests of the backend TPP will be skipped'

RAY_VENV := .venv-ray
ray-test:  ## deploy/ray_serve.py on a local cluster, in an environment of its own
	$(MAKE) VENV=$(RAY_VENV) $(RAY_VENV)/.test
	$(RAY_VENV)/bin/pip --disable-pip-version-check --quiet install -c constraints.txt -e '.[test,ray]'
	$(RAY_VENV)/bin/python -m pytest -m slow tests/server/test_ray.py

build: $(VENV)/.built

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.built: $(VENV)/.venv $(SOURCES)
	$(PIP) install -e .
	touch $@

$(VENV)/.test: $(VENV)/.built
	$(PIP) install -c constraints.txt -e '.[test]'
	@$(CHROMIUM)
	@$(LIBXSMM)
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(RAY_VENV) build dist *.egg-info
	find pace -name '*.so' -delete
