.PHONY: style test test-gpu bench

style:
	ruff check --fix .
	ruff format .

test:
	pytest

test-gpu:
	pytest -m gpu

bench:
	python -m eval.operator_speed
	python -m eval.ttft
