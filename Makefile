# make demo   set up everything and run the main job
# make test   the same, plus tools; lint, types, import contracts, the whole test suite
# make check  lint, types and import contracts alone
# make scenarios  the simulated fleets of the examples, at full length
PYTHON ?= python3.11
VENV := .venv
PEERS := .venv-avalanche
FLOWER := .venv-flower
DRIFT_PEERS := river alibi evidently whylogs
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt

export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1

.PHONY: demo test test-fresh check format tools scenarios bench-predict bench-forgetting bench-peers bench-drift bench-transport bench-releases bench-ingest bench-fleet bench-alerts bench-dashboard clean

demo: $(VENV)/.demo
	PYTHONPATH=examples $(BIN)/python -m demo.run

# A process for each core, four at most; the tests of a file stay together, and share what they have made.
test: check tools
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The property tests with other examples than `make test` takes, and more of them; some minutes.
test-fresh: $(VENV)/.dev tools
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 -m hypothesis --hypothesis-profile=fresh

check: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What tests use beside Python. Without root on Debian they are deselected, with a line that says so.
tools:
	@missing=""; for tool in mosquitto node npm curl chromium; do \
		command -v $$tool >/dev/null || missing="$$missing $$(echo $$tool | sed 's/^node$$/nodejs/')"; done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; \
	fi

$(VENV)/.demo: $(INPUTS)
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV): torch comes first. If this pulls CUDA packages, stop it and set PIP_EXTRA_INDEX_URL to"
	@echo "PyTorch's CPU package index (see README, Install)."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[demo,serve,export,parquet,images,simulate]' --group dev --group models
	$(PIP) --no-deps aeon    # a test reads its data files; what else it needs takes 270 MB
	@touch $@

# The example scenarios at full length, each held to what it expects; reports and pages go to build/scenarios. Ten minutes
# on two cores.
scenarios: $(VENV)/.dev
	$(BIN)/python examples/scenarios/make_checkpoints.py
	@mkdir -p build/scenarios; unmet=""; for file in examples/scenarios/*.toml; do \
		name=build/scenarios/$$(basename $$file .toml); echo "$$file"; \
		$(BIN)/edge simulate $$file --ci --html $$name.html --json $$name.json || { code=$$?; [ $$code = 1 ] || exit $$code; unmet="$$unmet $$file"; }; \
	done; \
	if [ -n "$$unmet" ]; then echo "did not hold:$$unmet"; exit 1; fi

# Speed, memory and latency of serving, written to benchmarks/predict.*; wants a machine with nothing else to do.
bench-predict: $(VENV)/.dev
	PYTHONPATH=examples:benchmarks $(BIN)/python benchmarks/predict.py

# Thousands of MQTT connections in one process, written to benchmarks/transport.*; five minutes, needs mosquitto.
bench-transport: $(VENV)/.dev
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/transport.py

# A release to 200 receivers beside a plain fan-out, written to benchmarks/releases.*; some minutes, needs mosquitto.
bench-releases: $(VENV)/.dev
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/releases.py

# From the broker to committed rows, written to benchmarks/ingest.*; five minutes, needs mosquitto.
bench-ingest: $(VENV)/.dev
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/ingest.py

# First paint of the dashboard of 10,000 devices, written to benchmarks/dashboard.*; a minute, needs chromium.
bench-dashboard: $(VENV)/.dev
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/dashboard.py

# Noise and delay of the coordinator's alerts, written to benchmarks/alerts.*; ten minutes on one core.
bench-alerts: $(VENV)/.dev
	PYTHONPATH=examples:benchmarks $(BIN)/python benchmarks/alerts.py

# Simulated fleets, beside Flower's simulation in an environment of its own (600 MB), written to benchmarks/fleet.*; about
# a quarter of an hour on two cores. Flower 1.42 does not resolve here: it gets the dependencies of 1.41.
bench-fleet: $(VENV)/.dev $(FLOWER)/.done
	PYTHONPATH=examples:benchmarks $(BIN)/python benchmarks/fleet.py --peer $(FLOWER)/bin/python

$(FLOWER)/.done: benchmarks/peers/flower-requirements.txt
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/pip install --quiet -r $<
	$(FLOWER)/bin/pip install --quiet --no-deps flwr==1.42.0
	@touch $@

# What learning forgets, and what it costs, written to benchmarks/forgetting.*; about half an hour on one core.
bench-forgetting: $(VENV)/.dev
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/forgetting.py

# The same for Avalanche, in an environment of its own (1.4 GB); an hour or more. Finished runs are kept in build/.
bench-peers: $(VENV)/.dev $(PEERS)/.done
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/forgetting.py --only peers cost --peers $(PEERS)/bin/python

$(PEERS)/.done: benchmarks/peers/avalanche-requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet torch==2.13.0
	$(PEERS)/bin/pip install --quiet --no-deps -r $<
	@touch $@

# Cost, false alarms and delays of the drift monitors beside river, alibi-detect, evidently and whylogs, each in an
# environment of its own (2.4 GB together), written to benchmarks/drift.*; 25 minutes on one core.
bench-drift: $(VENV)/.dev $(DRIFT_PEERS:%=.venv-drift-%/.done)
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/drift.py --peers '.venv-drift-{}/bin/python'

.venv-drift-%/.done: benchmarks/peers/drift-%-requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-deps -r $<
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(FLOWER) $(DRIFT_PEERS:%=.venv-drift-%) build demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
