# The words that people and .ci/run share. Every target works in an activated environment made by `make setup`.
.PHONY: setup fmt lint types arch test test-gpu e2e bench deploy-check check ci up down

setup:
	pip install -e ".[dev]"

fmt:
	ruff check --fix
	ruff format

lint:
	ruff check
	ruff format --check

types:
	mypy

arch:
	lint-imports

test:
	pytest

test-gpu:
	pytest -m gpu

# Real processes over HTTP, and what happens when one of them dies.
e2e:
	pytest tests/system tests/service/queue

bench:
	@echo "The figures and the command of each: tests/bench/README.md"

deploy-check:
	check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	hadolint --config .hadolint.yaml Dockerfile
	pytest tests/deploy

check: lint types arch test

# All of it from nothing, as it must hold on a new machine.
ci:
	bash .ci/run

up:
	docker compose up --build --wait

down:
	docker compose down
