# Everything goes through .venv; `make setup` makes it and every other target brings it up to date first.

VENV := .venv
BIN := $(VENV)/bin
# The interpreter to make .venv with: `make setup PYTHON=python3.12`. By default the first that is new enough.
PYTHON ?=
CANDIDATES := $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --no-header

.PHONY: setup demo test test-kafka check bench lock graphiql clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt requirements-setup.txt pyproject.toml
	@$(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null || { \
		for candidate in $(CANDIDATES); do \
			if "$$candidate" -c '$(NEW_ENOUGH)' 2>/dev/null; then \
				exec "$$candidate" -m venv --clear $(VENV); \
			fi; \
		done; \
		echo "navstream needs Python 3.11 or newer with its venv module: install one," \
			"or name it: make setup PYTHON=/path/to/python3" >&2; \
		exit 1; \
	}
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-setup.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.txt \
		|| $(BIN)/python -m pip install --quiet --require-hashes -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python web/graphiql/fetch.py
	@touch $@

demo: setup
	@$(BIN)/navstream demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

# The tests that need a real Apache Kafka, which Maven fetches. Where that can not be, they are passed over.
KAFKA := .kafka

test-kafka: setup
	@mkdir -p $(KAFKA)
	@if ! command -v java >/dev/null || ! command -v mvn >/dev/null; then \
		echo "test-kafka is passed over: it needs java (17 or newer) and mvn on the path"; \
	elif ! mvn -q -B -f tests/kafka/pom.xml dependency:copy-dependencies \
			-DoutputDirectory="$(CURDIR)/$(KAFKA)/jars" >$(KAFKA)/mvn.log 2>&1; then \
		echo "test-kafka is passed over: mvn could not fetch Apache Kafka, see $(KAFKA)/mvn.log"; \
	else \
		NAVSTREAM_TEST_KAFKA_JARS="$(CURDIR)/$(KAFKA)/jars" $(BIN)/python -m pytest tests/kafka $(ARGS); \
	fi

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/navstream schema --check

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

# Writes the hash-locked requirement files anew, keeping versions that still fit; LOCK_ARGS=--upgrade moves them.
lock: setup
	$(LOCK) $(LOCK_ARGS) --extra dev pyproject.toml -o requirements.txt
	$(LOCK) $(LOCK_ARGS) --group pyproject.toml:setup -o requirements-setup.txt
	$(LOCK) $(LOCK_ARGS) --group pyproject.toml:node -o requirements-node.txt

# GraphiQL's files, once more, for when they could not be had during set-up.
graphiql: setup
	@$(BIN)/python web/graphiql/fetch.py

clean:
	rm -rf $(VENV) $(KAFKA) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
