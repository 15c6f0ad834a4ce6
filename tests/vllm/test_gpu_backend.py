"""The backend for GPUs, as far as it goes without one: vLLM's own FlashAttention classes, its kernel played by torch."""

import dataclasses

import pytest
import torch
from torch import nn

from hf_flashprefill.integrations.vllm import BACKEND_PATH, register

from .engines import SETTINGS

pytestmark = pytest.mark.vllm

HEADS, KEY_HEADS, SIZE, PAGE = 4, 2, 32, 16
LAYER = "model.layers.0.self_attn.attn"
# (query, sequence) tokens: decode, a long row with cached tokens, verification, a short prompt, a whole long prompt, decode.
ROWS = [(1, 700), (130, 1100), (3, 900), (40, 40), (600, 600), (1, 9)]
LONG = [1, 4]


class Layer(nn.Module):
    """What the implementations read of vLLM's Attention layer."""

    layer_name = LAYER

    def __init__(self):
        super().__init__()
        self._q_scale = self._k_scale = self._v_scale = torch.ones(())


@pytest.fixture(scope="module")
def backend():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    before = {member: member.get_path() for member in AttentionBackendEnum if member.value}
    register()
    register()
    assert {member: member.get_path() for member in AttentionBackendEnum if member.value} == before
    assert AttentionBackendEnum.CUSTOM.get_path() == BACKEND_PATH
    yield AttentionBackendEnum.CUSTOM.get_class()
    AttentionBackendEnum.CUSTOM.clear_override()


@pytest.fixture
def kernel_calls(monkeypatch):
    """Plays flash_attn_varlen_func; the (query, sequence) lengths of each call."""
    from vllm.v1.attention.backends import flash_attn

    calls = []

    def varlen(*, q, k, v, out, cu_seqlens_q, seqused_k, max_seqlen_q, max_seqlen_k, softmax_scale, block_table, **others):
        assert others["causal"] is True
        assert others["window_size"] == [-1, -1]
        assert others["scheduler_metadata"] is None
        assert not others["softcap"]
        starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
        assert starts[0] == 0
        assert starts[-1] == len(q) == len(out)
        assert max_seqlen_k >= max(lengths)
        calls.append(list(zip(torch.tensor(starts).diff().tolist(), lengths, strict=True)))
        assert max_seqlen_q == max(queries for queries, _ in calls[-1])
        for row, length in enumerate(lengths):
            query = q[starts[row] : starts[row + 1]]
            keys, values = (
                pages[block_table[row].long()].flatten(0, 1)[:length].repeat_interleave(HEADS // KEY_HEADS, 1)
                for pages in (k, v)
            )
            logits = torch.einsum("qhd,khd->hqk", query, keys) * softmax_scale
            position = torch.arange(length - len(query), length)
            logits = logits.masked_fill(torch.arange(length) > position[:, None], float("-inf"))
            out[starts[row] : starts[row + 1]] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values)

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", varlen, raising=False)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: 2)
    return calls


@pytest.fixture(scope="module")
def engine_config(model_folder, reference_model):
    from vllm.engine.arg_utils import EngineArgs

    def build(settings):
        arguments = EngineArgs(
            model=str(model_folder),
            dtype="float32",
            max_model_len=4096,
            enforce_eager=True,
            additional_config={"flashprefill": settings},
        )
        return arguments.create_engine_config()

    return build


@pytest.fixture
def parts(backend, engine_config, kernel_calls):
    """(builder, implementation, layer) for settings and further arguments of the implementation."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    def make(settings=None, spec_changes=None, **impl_changes):
        base = {"alpha": 0, "min_seq_len": 512, "min_query_len": 64}
        vllm_config = engine_config(base | (settings or {}))
        spec = {"block_size": PAGE, "num_kv_heads": KEY_HEADS, "head_size": SIZE, "dtype": torch.float32}
        layer = Layer()
        vllm_config.compilation_config.static_forward_context[LAYER] = layer
        arguments = {
            "alibi_slopes": None,
            "sliding_window": None,
            "kv_cache_dtype": "auto",
            "logits_soft_cap": None,
            "attn_type": "decoder",
            "kv_sharing_target_layer_name": None,
        }
        with set_current_vllm_config(vllm_config):
            impl = backend.get_impl_cls()(HEADS, SIZE, SIZE**-0.5, KEY_HEADS, **(arguments | impl_changes))
            spec = FullAttentionSpec(**(spec | (spec_changes or {})))
            builder = backend.get_builder_cls()(spec, [LAYER], vllm_config, torch.device("cpu"))
        return builder, impl, layer

    return make


def batch(rows=ROWS, **changes):
    """Common metadata, query [tokens, Hq, D] and a token-major cache seen as [P, Hkv, N, 2D]; unused pages are NaN."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    queries, lengths = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), queries.cumsum(0).to(torch.int32)])
    width = -(-int(lengths.max()) // PAGE)
    pages = torch.randperm(len(rows) * width, dtype=torch.int32).view(len(rows), width)
    cache = torch.randn(len(rows) * width, PAGE, KEY_HEADS, 2 * SIZE).transpose(1, 2)
    for row, length in enumerate(lengths.tolist()):
        cache[pages[row, -(-length // PAGE) :].long()] = float("nan")
    # A later vLLM may bring fields that nobody here has heard of.
    Later = dataclasses.make_dataclass("Later", [("novelty", object, None)], bases=(CommonAttentionMetadata,))
    common = Later(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(queries.max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=pages,
        slot_mapping=torch.arange(int(starts[-1])),
        **changes,
    )
    return common, torch.randn(int(starts[-1]), HEADS, SIZE), cache


def run(builder, impl, layer, common, query, cache, **others):
    output = torch.full_like(query, float("nan"))
    impl.forward(layer, query, None, None, cache, builder.build(0, common), output, **others)
    return output


def dense(impl, layer, common, query, cache, builder):
    """The base's answer to the whole batch."""
    builder._passing_through = True
    return run(builder, impl, layer, common, query, cache)


def layer_counts(builder):
    from hf_flashprefill.integrations.vllm.stats import engine_stats

    (layer,) = engine_stats(builder.vllm_config).layers
    return layer


def test_vllm_finds_the_installed_plugin():
    from importlib.metadata import PackageNotFoundError, distribution

    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    try:
        distribution("hf_flashprefill")
    except PackageNotFoundError:
        pytest.skip("the package is on the path but not installed")
    assert load_plugins_by_group(DEFAULT_PLUGINS_GROUP)["flashprefill"] is register


def test_long_rows_are_ours_and_runs_are_the_bases(parts, kernel_calls):
    builder, impl, layer = parts()
    common, query, cache = batch()
    output = run(builder, impl, layer, common, query, cache)
    assert kernel_calls == [ROWS[:1], ROWS[2:4], ROWS[5:]]
    torch.testing.assert_close(output, dense(impl, layer, common, query, cache, builder), atol=2e-5, rtol=1e-5)
    assert kernel_calls[3:] == [ROWS]
    counted = layer_counts(builder)
    assert counted.sparse_calls == len(LONG)
    assert counted.density == 1
    assert counted.dense_calls == {"decode": 2, "shorter than min_query_len": 2}


def test_divided_batches_write_no_persistent_buffers(parts, monkeypatch):
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    builder, _, _ = parts()
    asked, build = [], FlashAttentionMetadataBuilder.build

    def watching(self, common_prefix_len, common_attn_metadata, fast_build=False):
        asked.append((common_attn_metadata.num_reqs, fast_build))
        return build(self, common_prefix_len, common_attn_metadata, fast_build)

    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", watching)
    builder.build(0, batch()[0])
    builder.build(common_prefix_len=0, common_attn_metadata=batch(ROWS[:1])[0])
    assert asked == [(6, True), (1, True), (2, True), (1, True), (1, False)]


def test_sparse_settings_change_long_rows_alone(parts):
    # Of random keys all blocks score alike; only the largest is to pass.
    builder, impl, layer = parts(SETTINGS | {"min_seq_len": 512, "alpha": 1, "dense_tail_blocks": 0})
    common, query, cache = batch()
    output, exact = run(builder, impl, layer, common, query, cache), dense(impl, layer, common, query, cache, builder)
    starts = common.query_start_loc.tolist()
    for row in range(len(ROWS)):
        tokens = slice(starts[row], starts[row + 1])
        same = torch.allclose(output[tokens], exact[tokens], atol=2e-5, rtol=1e-5)
        assert same != (row in LONG), row
    assert layer_counts(builder).density < 1


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("sliding window", {"sliding_window": 64}),
        ("softcap", {"logits_soft_cap": 30.0}),
        ("ALiBi", {"alibi_slopes": [0.5] * HEADS}),
        ("KV sharing", {"kv_sharing_target_layer_name": "model.layers.7.self_attn.attn"}),
        ("encoder attention", {"attn_type": "encoder_decoder"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_of_other_kinds_stay_dense(parts, monkeypatch, reason, changes):
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    builder, impl, layer = parts(**changes)
    whole = []
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda self, *args, **kwargs: whole.append(args[5]))
    run(builder, impl, layer, *batch())
    assert [len(metadata.seq_lens) for metadata in whole] == [len(ROWS)]
    assert layer_counts(builder).sparse_calls == 0
    assert layer_counts(builder).dense_calls[reason] == len(LONG)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("not causal", {"causal": False}),
        ("bidirectional image tokens", {"mm_req_doc_ranges": {1: [(0, 4)]}}),
        ("R-SWA", {"rswa_prefix_lens": torch.zeros(len(ROWS))}),
        ("context parallelism", {"dcp_local_seq_lens": torch.zeros(len(ROWS))}),
        ("KV sharing fast prefill", {"num_logits_indices": 3}),
        ("vLLM's novelty is set", {"novelty": torch.zeros(len(ROWS))}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batches_of_other_kinds_stay_whole(parts, reason, changes):
    from hf_flashprefill.integrations.vllm.backend import SPLIT

    builder, _, _ = parts()
    metadata = builder.build(0, batch(**changes)[0])
    assert not hasattr(metadata, SPLIT)
    assert layer_counts(builder).dense_calls[reason] == len(LONG)


def test_cascades_chunked_attention_and_fused_outputs_stay_dense(parts, monkeypatch):
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    builder, impl, layer = parts()
    builder.build(128, batch()[0])
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda self, *args, **kwargs: None)
    run(builder, impl, layer, *batch(), output_scale=torch.ones(()))
    common, query, cache = batch()
    run(builder, impl, layer, common, query, cache.to(torch.uint8))
    reasons = layer_counts(builder).dense_calls
    for reason in ("cascade attention", "fused output quantisation", "quantised KV cache"):
        assert reasons[reason] == len(LONG), reason
    chunked, _, _ = parts(spec_changes={"attention_chunk_size": 256})
    chunked.build(0, batch()[0])
    assert layer_counts(chunked).dense_calls["chunked local attention"] == len(LONG)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("SlidingWindowSpec", {"sliding_window": 64}, "sliding window"),
        ("ChunkedLocalAttentionSpec", {"attention_chunk_size": 64}, "chunked local attention"),
        ("EncoderOnlyAttentionSpec", {}, "KV cache of kind EncoderOnlyAttentionSpec"),
    ],
)
def test_groups_of_other_kinds_are_counted_by_their_documented_names(kind, changes, reason):
    from vllm.v1 import kv_cache_interface

    from hf_flashprefill.integrations.vllm import backend

    spec = {"block_size": PAGE, "num_kv_heads": KEY_HEADS, "head_size": SIZE, "dtype": torch.float32}
    assert backend._group_dense_reason(getattr(kv_cache_interface, kind)(**spec, **changes), None) == reason


def test_layers_without_a_kernel_stay_dense(parts, monkeypatch):
    """Head dims above 256 in float32, say, which torch would serve slower than the base does."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from hf_flashprefill.integrations.vllm import backend as ours

    asked = []
    monkeypatch.setattr(ours, "lacks_kernel", lambda *kind: asked.append(kind) or True)
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda self, *args, **kwargs: None)
    builder, impl, layer = parts()
    run(builder, impl, layer, *batch())
    assert asked == [("auto", torch.device("cpu"), torch.float32, SIZE)]
    assert layer_counts(builder).sparse_calls == 0
    assert layer_counts(builder).dense_calls["no GPU kernel"] == len(LONG)


def test_captures_and_drafts_are_neither_divided_nor_counted(parts):
    from hf_flashprefill.integrations.vllm.backend import SPLIT

    builder, _, _ = parts()
    common, _, _ = batch()
    assert not hasattr(builder.build_for_cudagraph_capture(common), SPLIT)
    assert not hasattr(builder.build_for_drafting(common, 0), SPLIT)
    assert layer_counts(builder).dense_calls == {}
    assert hasattr(builder.build(0, common), SPLIT)


def test_what_the_backend_says_of_itself(backend):
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    builder = backend.get_builder_cls()
    assert backend.get_name() == "CUSTOM"
    assert not backend.forward_includes_kv_cache_update
    assert not backend.supports_batch_invariance()
    assert not backend.supports_device_cpu_query_lens_mismatch()
    assert not builder.supports_update_block_table
    # FlashAttention 3 would capture mixed batches.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlashAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport.ALWAYS)
        assert builder.get_cudagraph_support(None, None) == AttentionCGSupport.UNIFORM_BATCH
        patch.setattr(FlashAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport.NEVER)
        assert builder.get_cudagraph_support(None, None) == AttentionCGSupport.NEVER
