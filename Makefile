# The environment is .venv, made at first need. PYTHON=/path/to/python3 chooses what it is made of.
BIN := .venv/bin
RUN := kimi-proxy start --foreground

# `make bench-savings ../a ../b`: files and folders that exist are targets with nothing to do.
TRACES := $(filter-out bench-savings,$(MAKECMDGOALS))
# Given on the command line, PATH would hide every program from the shell.
ifeq (command line,$(origin PATH))
TRACES += $(PATH)
override PATH := $(shell command -p getconf PATH)
endif

.PHONY: all help run demo test test-agents check bench bench-savings docs lock upgrade clean .venv

all: check test

help: ## print this list
	@sed -n 's/^\([a-z.-]*\):.* ## /\1	/p' $(MAKEFILE_LIST) | expand -t 15

run: .venv ## proxy on 8080, mitmweb on 8081, stats page on 8082, until Ctrl-C
	@exec $(BIN)/$(RUN)

demo: .venv ## a recorded conversation through the whole chain, no key needed
	@exec $(BIN)/python tests/demo.py

test: .venv ## the tests; ARGS='-k name' picks some
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

test-agents: .venv ## real coding agents with a model that leaks markup; needs PyPI and npm's registry
	@exec $(BIN)/python tests/agents/run.py $(ARGS)

check: .venv ## lint, format, types, and that the documentation is complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_docs.py

bench: .venv ## what the chain costs, as a ratio to bare mitmdump
	@exec $(BIN)/python tests/bench/run.py

bench-savings: .venv ## what masking saves on recorded conversations: PATH=../traces, ARGS='--live'
	@exec $(BIN)/python tests/bench/savings.py $(ARGS) $(TRACES)

docs: .venv ## write the tables that come from code into the documentation
	$(BIN)/python tests/docs.py

.venv: ## only the environment
	@sh .requirements/venv

lock: ## remake the lock file after a change of pyproject.toml
	sh .requirements/lock

upgrade: ## remake the lock file with the newest versions
	sh .requirements/lock --upgrade

clean: ## remove the environment and all caches; certs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find addons tests .requirements -name __pycache__ -prune -exec rm -rf {} +
