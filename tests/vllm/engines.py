"""Small vLLM engines on the CPU, and what they answer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_flashprefill.integrations.vllm import STATS_PATH
from hf_flashprefill.support.families import tiny_model

VOCABULARY = 199
NEW_TOKENS = 8
SETTINGS = {"alpha": 0.9, "sink_blocks": 1, "window_blocks": 1, "dense_tail_blocks": 1, "min_seq_len": 1024}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
}


class Answer(NamedTuple):
    """Greedy tokens, their summed log probability, and prompt tokens the prefix cache gave."""

    tokens: list[int]
    logprob: float
    cached: int


def random_prompt(tokens: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def save_model(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    """A random Llama whose attention is uneven enough that dropping blocks shows, with a tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    changes = {"vocab_size": VOCABULARY, "max_position_embeddings": 4096, "initializer_range": 0.3} | changes
    model = tiny_model("llama", **changes).to(dtype)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2", pad_token="w0").save_pretrained(folder)
    return model


@contextmanager
def engine(folder: Path, chunk: int, settings: dict | None = None):
    """An engine in this process with steps of at most ``chunk`` tokens; stock without settings, else with our rows."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from . import cpu_plugin

    options = {}
    if settings is not None:
        options = {"additional_config": {"flashprefill": settings}, "worker_extension_cls": STATS_PATH}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if settings is not None:
            cpu_plugin.register()
        try:
            yield LLM(
                str(folder),
                dtype="float32",
                max_model_len=4096,
                max_num_batched_tokens=chunk,
                enforce_eager=True,
                # Steps of a synchronous scheduler follow from the prompts alone.
                async_scheduling=False,
                **options,
            )
        finally:
            cpu_plugin.unregister()
            cleanup_dist_env_and_memory()


def answers(llm, prompts: list[list[int]]) -> list[Answer]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [
        Answer(list(output.outputs[0].token_ids), output.outputs[0].cumulative_logprob, output.num_cached_tokens)
        for output in outputs
    ]


def stats(llm) -> dict:
    (worker,) = llm.collective_rpc("flashprefill_stats")
    return worker


def assert_same_answers(actual: list[Answer], expected: list[Answer]) -> None:
    assert [answer.tokens for answer in actual] == [answer.tokens for answer in expected]
    # Eight log probabilities in float32, the attention summed in another order.
    assert [answer.logprob for answer in actual] == pytest.approx([answer.logprob for answer in expected], abs=1e-3)


def server_command(folder: Path, chunk: int, settings: dict, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny"),
        *("--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", str(chunk), "--enforce-eager"),
        *("--host", "127.0.0.1", "--port", str(port), "--worker-extension-cls", STATS_PATH),
        *("--additional-config", json.dumps({"flashprefill": settings})),
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server(NamedTuple):
    """A running server's address."""

    base: str

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self.base + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.base + "/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, ConnectionError):
            return False


@contextmanager
def server(folder: Path, chunk: int, settings: dict, environment: dict, log: Path) -> Iterator[Server]:
    """An OpenAI-compatible server in processes of its own; its output goes to ``log``."""
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            server_command(folder, chunk, settings, port),
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        running, deadline = Server(f"http://127.0.0.1:{port}"), time.monotonic() + 180
        while not running.ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield running
    finally:
        process.terminate()
        process.wait(timeout=60)
