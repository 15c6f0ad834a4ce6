"""min_seq_len="auto" in chunks: how long a chunk is depends on the keys that it sees, and the layers and the mask agree."""

import json

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_flashprefill import FlashPrefillConfig, masking, patch_model, prefill_stats
from hf_flashprefill.backends import torch as torch_backend
from hf_flashprefill.crossover import NEVER, Crossover, LayerShape, is_long_enough, known, measure
from hf_flashprefill.crossover import __main__ as command
from hf_flashprefill.masking import _TAKES_CACHE_POSITION
from hf_flashprefill.support.situations import prompt
from tests.inputs import tiny_model
from tests.tolerance import assert_same_output

CPU = torch.device("cpu")
SHAPE = LayerShape(4, 2, 32, torch.float32)  # of tiny_model()
AUTO = FlashPrefillConfig(alpha=0, block_size=64)
CHUNK, CHUNKS = 1024, 4
SPARSE_FROM = 2000
# 1024 * (2 * 2466 - 1024) is the first product of at least 2000 * 2000: the third chunk.
DENSE_CHUNKS = 2


@pytest.fixture(autouse=True)
def _measured(tmp_path, monkeypatch):
    """Sparse prefill of tiny_model() was faster from 2000 tokens on."""
    monkeypatch.setenv("HF_FLASHPREFILL_CACHE", str(tmp_path))
    known.reload()
    known.remember(known.rule_of(AUTO), SHAPE, CPU, Crossover(SPARSE_FROM, 65536, True))
    yield
    known.reload()


@pytest.mark.parametrize(
    ("query_len", "key_len", "expected"),
    [
        (2000, 2000, True),
        (1999, 1999, False),
        (1999, 2001, True),
        (1024, 2465, False),
        (1024, 2466, True),
        (known.LEAST_CHUNK, 1 << 20, True),
        (known.LEAST_CHUNK - 1, 1 << 20, False),
    ],
)
def test_a_chunk_counts_as_the_prompt_with_as_many_pairs(query_len, key_len, expected):
    assert is_long_enough(AUTO, SPARSE_FROM, query_len, key_len) is expected
    number = FlashPrefillConfig(min_seq_len=SPARSE_FROM)
    assert is_long_enough(number, SPARSE_FROM, query_len, key_len) is (query_len >= SPARSE_FROM)
    assert not is_long_enough(AUTO, NEVER, query_len, key_len)


def chunked(model, cache) -> torch.Tensor:
    """Logits of all chunks of a prompt."""
    ids = prompt(length=CHUNKS * CHUNK)
    steps = [(at, at + CHUNK) for at in range(0, ids.shape[1], CHUNK)]
    with torch.no_grad():
        # transformers before 5.4 wants to be told where a static cache continues; later versions ignore it.
        logits = [
            model(ids[:, a:b], past_key_values=cache, use_cache=True, cache_position=torch.arange(a, b)).logits
            for a, b in steps
        ]
    return torch.cat(logits, 1)


@pytest.mark.skipif(_TAKES_CACHE_POSITION, reason="before transformers 5.4 masks cannot be made in a graph")
@torch.no_grad()
def test_in_a_graph_a_chunk_counts_its_queries():
    model = patch_model(tiny_model(), config=AUTO)
    cache = DynamicCache(config=model.config)
    model(prompt(length=CHUNKS * CHUNK), past_key_values=cache, use_cache=True)
    before, compiled = prefill_stats(model).sparse_calls, torch.compile(model, backend="eager")
    compiled(prompt(length=CHUNK), past_key_values=cache, use_cache=True)
    stats = prefill_stats(model)
    assert (stats.sparse_calls, stats.dense_calls) == (before, {"shorter than min_seq_len": 2})
    model(prompt(length=CHUNK), past_key_values=cache, use_cache=True)
    assert prefill_stats(model).sparse_calls == before + 2


class OnGPU(torch.Tensor):
    """A number that says it is on a GPU, and that nobody may read."""

    is_cuda = True

    def __int__(self):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_an_offset_on_the_device_is_read_only_where_it_decides(monkeypatch):
    offset = torch.tensor(1 << 20).as_subclass(OnGPU)
    name, call = ("cache_position", offset.expand(CHUNK)) if _TAKES_CACHE_POSITION else ("q_offset", offset)
    arguments = {"batch_size": 1, "q_length": CHUNK, "kv_length": (1 << 20) + CHUNK, name: call, "device": CPU}
    arguments |= {"config": tiny_model().config, "dtype": torch.float32}
    asked = []
    monkeypatch.setattr(masking, "base_mask", lambda base, **_: asked.append(base))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # A whole prompt, whose keys are too few wherever they stand, waits for nothing.
    masking.prefill_mask("sdpa", AUTO, **(arguments | {"kv_length": CHUNK}))
    assert asked == ["sdpa"]
    with pytest.raises(RuntimeError, match="capturing"):
        masking.prefill_mask("sdpa", AUTO, **arguments)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    masking.prefill_mask("sdpa", AUTO, **arguments)
    assert asked == ["sdpa"] * 2


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=CHUNKS * CHUNK + 5),
}


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CACHES)
def test_later_chunks_run_sparse(kind, base):
    model = tiny_model(implementation=base)
    expected = chunked(model, CACHES[kind](model.config))
    patch_model(model, config=AUTO)
    assert_same_output(chunked(model, CACHES[kind](model.config)), expected)
    stats = prefill_stats(model)
    assert stats.sparse_calls == 2 * (CHUNKS - DENSE_CHUNKS)
    assert stats.dense_calls == {"shorter than min_seq_len": 2 * DENSE_CHUNKS}


def test_a_number_is_compared_with_the_queries():
    model = patch_model(tiny_model(), config=AUTO, min_seq_len=CHUNK + 1)
    chunked(model, DynamicCache(config=model.config))
    assert prefill_stats(model).dense_calls == {"shorter than min_seq_len": 2 * CHUNKS}


def test_padding_in_front_is_not_in_the_way():
    model, mask = tiny_model(), torch.ones(1, CHUNKS * CHUNK, dtype=torch.long)
    mask[:, :100] = 0
    outcomes = []
    for is_patched in (False, True):
        if is_patched:
            patch_model(model, config=AUTO)
        cache, parts = DynamicCache(config=model.config), []
        for end in range(CHUNK, CHUNKS * CHUNK + 1, CHUNK):
            with torch.no_grad():
                ids = prompt(length=CHUNKS * CHUNK)[:, end - CHUNK : end]
                parts.append(model(ids, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits)
        outcomes.append(torch.cat(parts, 1)[:, 100:])
    assert_same_output(*outcomes)
    assert prefill_stats(model).sparse_calls == 2 * (CHUNKS - DENSE_CHUNKS)


def test_a_windows_keys_are_what_counts():
    """A cache that forgets leaves a layer few keys: 1024 queries of a window of 50 tokens are never many pairs."""
    model = tiny_model("mistral")
    assert model.config.sliding_window < CHUNK
    expected = chunked(model, DynamicCache(config=model.config))
    patch_model(model, config=AUTO)
    assert_same_output(chunked(model, DynamicCache(config=model.config)), expected)
    assert prefill_stats(model).dense_calls == {"shorter than min_seq_len": 2 * CHUNKS}


def test_generate_in_chunks_runs_sparse_by_default():
    # transformers before 5 leaves the last token to the first step of decode.
    model, ids = tiny_model(), prompt(length=CHUNKS * CHUNK + 1)
    options = {"prefill_chunk_size": CHUNK, "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids), "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **options)
    got = patch_model(model, config=AUTO).generate(ids, **options)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert_same_output(ours, theirs)
    assert prefill_stats(model).sparse_calls == 2 * (CHUNKS - DENSE_CHUNKS)


def test_the_clock_times_chunks_at_the_assumed_density(monkeypatch):
    seen, attend = [], torch_backend.attend_blocks

    def spy(query, key, value, index, **options):
        geometry = index.geometry
        seen.append((geometry.query_len, geometry.kv_len, geometry.query_offset, index.density()))
        attend(query, key, value, index, **options)

    monkeypatch.setattr(torch_backend, "attend_blocks", spy)
    dense, sparse = measure.time_attention(SHAPE, CPU, FlashPrefillConfig(), 8192, 1024)
    assert min(dense, sparse) > 0
    *lengths, density = seen[0]
    assert lengths == [1024, 8192, 7168]
    # Two of the eight query blocks are in full.
    assert density == pytest.approx(0.46, abs=0.02)


def test_the_command_times_chunks_and_keeps_nothing(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "time_attention", lambda *call: asked.append(call[3:]) or (4.0, 2.0))
    before = known.cache_file().read_text()
    arguments = ["--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--device", "cpu", "--query-len"]
    assert command.main([*arguments, "4000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert asked == [(length, 4000) for length in (4096, 6144, 8192, 12288, 16384, 32768, 65536)]
    assert [int(line.split()[0]) for line in lines[2:-1]] == [length for length, _ in asked]
    assert json.loads(lines[-1])["timings"][0] == [4096, 4.0, 2.0]
    assert known.cache_file().read_text() == before
    for wrong in (["0"], ["4000", "--max-seq-len", "3999"], ["70000"], ["1", "--max-seq-len", "1"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments + wrong)
        assert stopped.value.code == 2
        assert "--query-len must be from 1 to the longest length timed" in capsys.readouterr().err.splitlines()[-1]
