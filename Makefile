.PHONY: style test test-gpu soak bench bench-gpu

style:
	ruff check --fix .
	ruff format .

test:
	pytest

test-gpu:
	pytest -m gpu

soak:
	pytest -m soak

bench:
	python -m eval.operator_speed
	python -m eval.layout_speed
	python -m eval.ttft

SHAPE = --device cuda --heads 32 --kv-heads 8

bench-gpu:
	python -m hf_flashprefill.crossover --heads 32 --kv-heads 8 --head-dim 128
	python -m eval.operator_speed $(SHAPE) --head-dims 128 --lengths 4096 8192 16384 32768 65536 131072 262144 --seconds 0.1 \
		--audit-rows 16 --output results/gpu/operator.json
	python -m eval.operator_speed $(SHAPE) --head-dims 64 128 256 --lengths 16384 65536 --densities 1 1 --selectors flashprefill \
		--baselines sdpa_cudnn --seconds 0.1 --output results/gpu/operator-every-block.json
	python -m eval.layout_speed $(SHAPE) --head-dim 128 --lengths 32768 131072 --seconds 0.3 \
		--output results/gpu/layout.json
	python -m eval.ttft --shape llama-3.1-8b --lengths 4096 32768 131072 --density published --device cuda --repeats 1 \
		--output results/gpu/ttft-llama-3.1-8b.json
	python -m eval.ttft --shape qwen3-30b-a3b --lengths 4096 32768 131072 --density published --device cuda --repeats 1 \
		--output results/gpu/ttft-qwen3-30b-a3b.json
	pytest -m gpu tests/test_gather.py -s
