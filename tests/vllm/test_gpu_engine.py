"""The plugin inside vLLM's GPU build: its CUSTOM backend against vLLM's own FlashAttention and transformers, in bfloat16."""

import gc
import os
from contextlib import contextmanager

import pytest
import torch

from hf_flashprefill.integrations.vllm import STATS_PATH, register

from .engines import SETTINGS, VOCABULARY, random_prompt, save_model, stats

pytestmark = [pytest.mark.vllm, pytest.mark.gpu]

MIN_QUERY_LEN = 64
DENSE = {"alpha": 0, "min_seq_len": 1024, "min_query_len": MIN_QUERY_LEN}
LENGTHS = (5, 37, 1500, 3000)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, model in float32) of a random Llama with a head_dim that all kernels take."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "initializer_range": 0.1}
    return folder, save_model(folder, torch.bfloat16, **sizes).float().cuda()


@contextmanager
def engine(folder, chunk: int, settings: dict | None = None):
    """An engine of vLLM's GPU build in this process; stock without settings."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"attention_backend": "FLASH_ATTN"}
    if settings is not None:
        register()
        given = {"additional_config": {"flashprefill": settings}, "worker_extension_cls": STATS_PATH}
        options = {"attention_backend": "CUSTOM", **given}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # An earlier engine's memory, freed while this one measures its own, would stop it.
    gc.collect()
    torch.cuda.empty_cache()
    llm = LLM(
        str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_batched_tokens=chunk,
        gpu_memory_utilization=0.1,
        enforce_eager=True,
        **options,
    )
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(llm, prompts: list[list[int]]) -> list[tuple[torch.Tensor, int]]:
    """Log probabilities of the first answered token, -inf where vLLM does not tell, and tokens from the prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=20, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    told = []
    for output in outputs:
        logprobs = torch.full((VOCABULARY,), -torch.inf)
        for token, entry in output.outputs[0].logprobs[0].items():
            logprobs[token] = entry.logprob
        told.append((logprobs, output.num_cached_tokens))
    return told


@torch.no_grad()
def exact(model, prompt: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt], device="cuda")).logits[0, -1].log_softmax(-1).cpu()


def difference(told: torch.Tensor, other: torch.Tensor) -> float:
    """The largest between log probabilities that both know."""
    known = (told > -torch.inf) & (other > -torch.inf)
    assert known.sum() >= 15
    return (told - other)[known].abs().max().item()


@pytest.fixture(scope="module")
def prompts():
    return [random_prompt(tokens, seed=tokens) for tokens in LENGTHS]


@pytest.fixture(scope="module")
def continuations(prompts):
    return [prompts[3][:2950] + random_prompt(550, seed=1), prompts[2][:1450] + random_prompt(90, seed=2)]


@pytest.fixture(scope="module")
def stock(model, prompts, continuations):
    """What stock vLLM answers to the prompts and the continuations, which find most of their keys in the prefix cache."""
    with engine(model[0], 1024) as llm:
        return answers(llm, prompts), answers(llm, continuations)


@pytest.mark.parametrize("chunk", [300, 1024, 8192])
def test_alpha_zero_answers_as_flash_attention(stock, model, prompts, continuations, chunk):
    with engine(model[0], chunk, DENSE) as llm:
        ours = answers(llm, prompts), answers(llm, continuations)
        counted = stats(llm)
    for asked, told, dense in zip((prompts, continuations), ours, stock, strict=True):
        for prompt, (logprobs, cached), (stock_logprobs, stock_cached) in zip(asked, told, dense, strict=True):
            expected = exact(model[1], prompt)
            print(len(prompt), chunk, difference(logprobs, stock_logprobs), difference(stock_logprobs, expected))
            # Nearer to FlashAttention than that is to float32, whose rotations it rounds to bfloat16.
            assert difference(logprobs, stock_logprobs) <= 0.25 * difference(stock_logprobs, expected) + 0.02
            assert cached == stock_cached
    assert min(cached for _, cached in ours[1]) > 1000
    assert counted["sparse_calls"] >= 4
    assert all(layer["density"] == 1 and "decode" in layer["dense_calls"] for layer in counted["layers"])


def test_sparse_settings_change_long_rows_alone(stock, model, prompts):
    with engine(model[0], 8192, SETTINGS | {"min_query_len": MIN_QUERY_LEN}) as llm:
        ours = answers(llm, prompts)
        counted = stats(llm)
    changes = [difference(a, b) for (a, _), (b, _) in zip(ours, stock[0], strict=True)]
    print(changes)
    assert max(changes[:2]) < 0.05 < 0.3 < min(changes[2:])
    assert counted["sparse_calls"] == 2 * len(counted["layers"])
    assert 0.1 < counted["density"] < 0.7
