# make demo   from nothing to an 8-bit language model and what it cost
# make test   everything for the tests

PYTHON ?= python3
CACHE  ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fewbits
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

MODEL  := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
INT8   := build/smollm2-int8
BF16   := build/smollm2-bf16
LLAMA  := build/llama-1.2b
GENERATE := PYTHONPATH=build/peers:build/llama $(BIN)/python benchmarks/bench_generate.py
SOURCES := $(shell find src csrc -name '*.py' -o -name '*.cpp' -o -name '*.hpp')

.PHONY: help demo test lint lint-page docs browser format bench bench-peers interop certify clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make/make/p' $(MAKEFILE_LIST)

demo: $(INT8)/config.json build/compare.txt
	@cat build/compare.txt
	@echo 'Layer by layer and token by token: build/report.html'
	@echo
	@echo 'What is the capital of France?'
	@$(BIN)/fewbits generate $(INT8) "What is the capital of France?"

# make lint   ruff, clang-format, mypy; Biome and tsc for the JavaScript of the pages; the docs build
lint: .venv/dev lint-page docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.hpp')
	$(BIN)/mypy

lint-page:
	@if command -v npm > /dev/null; then $(MAKE) --no-print-directory node_modules/made && npm run --silent lint; \
	else echo 'lint-page: npm is not installed, so the JavaScript of the pages is not checked'; fi

# make docs   the documentation as a site in build/docs, from docs/ and docstrings; a warning is an error
docs: .venv/dev
	@mkdir -p build
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs > build/docs.log 2>&1 || { cat build/docs.log; exit 1; }

# make browser  install Chromium for the tests of the page, where apt-get may
browser:
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then true; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  mkdir -p build; { apt-get update && apt-get install --yes --no-install-recommends chromium; } > build/browser.log 2>&1 || \
	  echo 'browser: Chromium could not be installed, see build/browser.log; the tests of the page are skipped'; \
	else echo 'browser: no Chromium, and no right to install it; the tests of the page are skipped'; fi

# make format rewrite the sources in the project's format
format: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.hpp')

test: .venv/dev .venv/built build/triton/made browser $(MODEL)
	FEWBITS_DEMO_MODEL="$(MODEL)" $(BIN)/python -m pytest

# make bench  fewbits beside its peers, in one run
bench: bench-peers $(INT8)/config.json $(BF16)/config.json $(LLAMA)/config.json
	$(BIN)/python benchmarks/bench_convert.py $(MODEL) --json build/bench_convert.json
	PYTHONPATH=build/peers $(BIN)/python benchmarks/bench_quality.py $(BF16) --text topics docstrings --json build/bench_quality.json
	$(BIN)/python benchmarks/bench_cast.py --json build/bench_cast.json
	$(BIN)/python benchmarks/bench_rotation.py $(BF16) --json build/bench_rotation.json
	PYTHONPATH=build/peers $(BIN)/python benchmarks/bench_load.py $(LLAMA) --json build/bench_load.json
	PYTHONPATH=build/llama $(BIN)/python benchmarks/bench_quantize.py $(LLAMA) --json build/bench_quantize.json
	$(GENERATE) $(BF16) --batch 8 --json build/bench_generate.json
	$(GENERATE) $(LLAMA) --batch 8 --context 4096 --json build/bench_generate_1.2b.json
	$(BIN)/python benchmarks/roofline.py build/bench_generate.json build/bench_generate_1.2b.json --out build/speed.svg

# make bench-large  the same with 6.2B parameters: 25 GB of disk, 16 GB of memory
bench-large: bench-peers build/llama-6.2b/config.json
	$(GENERATE) build/llama-6.2b --apart --rounds 1 --only "fewbits int8" "fewbits int4" "llama.cpp Q8_0" "llama.cpp Q4_0" \
		--json build/bench_generate_6.2b.json

# make bench-peers  install what the benchmarks and the interop check run beside fewbits; builds llama.cpp
bench-peers: build/peers/made build/llama/made

# make interop  llama.cpp runs the GGUF files that fewbits writes: same tokens, same predictions
interop: build/llama/made $(MODEL)
	PYTHONPATH=build/llama $(BIN)/python tools/interop_gguf.py $(MODEL)

# make certify every float32, cast to fp16, bf16, e4m3fn and e5m2 and held against exact arithmetic; some minutes
certify: .venv/built
	$(BIN)/python tools/certify.py

# make clean  remove everything that was made; the downloaded model stays in $(CACHE)
clean:
	rm -rf .venv build dist node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The environment, in three steps, so that each is made once: tools to build with, the package, tools to develop with.
.venv/tools: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip --disable-pip-version-check install --quiet 'pip>=25.1'
	$(PIP) --group build
	@touch $@

.venv/built: .venv/tools CMakeLists.txt $(filter csrc/%,$(SOURCES))
	$(PIP) --no-build-isolation --editable .
	@touch $@

.venv/dev: .venv/built
	$(PIP) --group test --group lint --group docs
	@touch $@

# What checks the page's JavaScript, by its lock file.
node_modules/made: package.json package-lock.json
	npm ci --silent --no-audit --no-fund
	@touch $@

# The peers lie apart: transformers imports some of them wherever it finds them, at a price in time and warnings.
build/peers/made: .venv/dev
	$(PIP) --no-deps --target build/peers --upgrade --group bench
	@touch $@

# Triton lies apart for the same reason; with torch for CUDA it is there already.
build/triton/made: .venv/dev
	mkdir -p build/triton
	$(PIP) --no-deps --target build/triton --upgrade --group triton
	@touch $@

# llama.cpp is built for the machine that it is measured on.
build/llama/made: .venv/dev
	CMAKE_ARGS='-DGGML_NATIVE=ON' $(PIP) --no-deps --target build/llama --upgrade --group llama
	@touch $@

$(MODEL): tools/demo_model.py | .venv/tools
	$(BIN)/python tools/demo_model.py $@

$(INT8)/config.json $(BF16)/config.json: build/smollm2-%/config.json: $(MODEL) | .venv/built
	$(BIN)/fewbits convert $(MODEL) build/smollm2-$* --to $* --overwrite
	@touch $@

build/llama-%/config.json: $(BF16)/config.json
	rm -rf build/llama-$*
	$(BIN)/python tools/random_model.py llama-$* build/llama-$* --tokenizer $(BF16)
	@touch $@

build/compare.txt: $(INT8)/config.json
	$(BIN)/fewbits compare $(MODEL) $(INT8) --json build/compare.json --report build/report.html > $@
