"""The other harnesses, run for real at small sizes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval import commands, layout_speed, models, operator_speed, ttft, vllm_ttft
from eval.haystack import standard_library_text
from eval.train_recall import __main__ as train_recall
from eval.train_recall import quality
from eval.train_recall.training import Stage
from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention
from hf_flashprefill.backends import torch as torch_backend

ROOT = Path(__file__).parent.parent
STAGES = ("pool", "select", "attend", "operator")


def test_operator_speed_measures_and_records(tmp_path, capsys):
    path = tmp_path / "operator.json"
    assert operator_speed.main(["--lengths", "1024", "--seconds", "0.01", "--device", "cpu", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    last_line = json.loads(printed.strip().splitlines()[-1])
    row = json.loads(path.read_text())["rows"][0]
    assert f"the means of dropped blocks add {row['overhead_of_means']:.1%} to the attention" in printed
    for stage in ("pool_blend", "select_blend", "attend", "attend_blend", "operator_blend", "sdpa"):
        assert 0 < row[stage]["quartile_low_ms"] <= row[stage]["median_ms"] <= row[stage]["quartile_high_ms"]
    index_ms = row["pool_blend"]["median_ms"] + row["select_blend"]["median_ms"]
    assert row["index_share_blend"] == pytest.approx(index_ms / (index_ms + row["attend_blend"]["median_ms"]))
    assert row["speedup_over_sdpa"] == pytest.approx(row["sdpa"]["median_ms"] / row["operator_blend"]["median_ms"])
    assert last_line == [{"length": 1024, "speedup_over_sdpa": round(row["speedup_over_sdpa"], 3)}]


def test_operator_speed_times_an_audit(tmp_path):
    path = tmp_path / "operator.json"
    arguments = ["--lengths", "512", "--seconds", "0.01", "--device", "cpu", "--output", str(path)]
    assert operator_speed.main([*arguments, "--audit-rows", "4"]) == 0
    row = json.loads(path.read_text())["rows"][0]
    assert row["audit"]["median_ms"] > 0
    with pytest.raises(commands.UsageError, match="--audit-rows must be at least 0, got -1"):
        operator_speed.main([*arguments, "--audit-rows", "-1"])


def test_a_peer_is_timed_on_the_same_tensors_and_lists(tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text(
        "def prepare(query, key, value, index):\n"
        "    assert query.shape[1] == 4 * key.shape[1] and index.counts.shape[1] == query.shape[1]\n"
        "    return lambda: query + 1\n"
    )
    arguments = ["--lengths", "512", "--seconds", "0.01", "--device", "cpu", "--output", str(tmp_path / "operator.json")]
    assert operator_speed.main([*arguments, "--peer", f"mine={peer}"]) == 0
    assert json.loads((tmp_path / "operator.json").read_text())["rows"][0]["speedup_over_mine"] > 0
    with pytest.raises(commands.UsageError, match="--peer"):
        operator_speed.main([*arguments, "--peer", "mine=nowhere.py"])
    with pytest.raises(commands.UsageError, match="--portable must come with a GPU"):
        operator_speed.main([*arguments, "--portable"])


def test_another_checkout_is_timed_in_turns_and_compared(tmp_path):
    rule = "rule = {name: getattr(config, name) for name in names}"

    def before(folder, own_rule):
        """What a run says of a copy of the package that has another rule of selection."""
        shutil.copytree(ROOT / "hf_flashprefill", folder / "hf_flashprefill", ignore=shutil.ignore_patterns("__pycache__"))
        functional = folder / "hf_flashprefill" / "functional.py"
        text = functional.read_text()
        assert rule in text
        functional.write_text(text.replace(rule, own_rule))
        path = folder / "operator.json"
        # A process of its own: the copy's custom op takes the place of ours.
        command = [sys.executable, "-m", "eval.operator_speed", "--lengths", "1024", "--seconds", "0", "--device", "cpu"]
        command += ["--before", str(folder), "--output", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        record = json.loads(path.read_text())
        assert str(folder) not in path.read_text()
        (row,) = record["rows"]
        return row, row["before"]

    row, same = before(tmp_path / "same", rule)
    assert same["share_of_time"] == {
        name: row[name]["median_ms"] / row[f"{name}_before"]["median_ms"]
        for name in ("attend", *(f"{stage}_{rule}" for rule in ("blend", "flashprefill") for stage in STAGES))
    }
    assert same["blocks_apart"] == {"blend": 0, "flashprefill": 0}
    assert same["same_bits"] == {"attend": True, "attend_blend": True, "attend_flashprefill": True}
    _, other = before(tmp_path / "other", rule + ' | {"alpha": 1.0}')
    # Of eight blocks the published rule keeps all as sinks, window and last query blocks.
    assert other["blocks_apart"]["blend"] > 0
    assert other["blocks_apart"]["flashprefill"] == 0


def test_a_checkout_without_the_same_stages_is_refused(tmp_path):
    arguments = ["--lengths", "512", "--seconds", "0", "--device", "cpu", "--output", str(tmp_path / "operator.json")]
    with pytest.raises(commands.UsageError, match="--before must be a checkout"):
        operator_speed.main([*arguments, "--before", str(tmp_path)])
    (tmp_path / "hf_flashprefill").mkdir()
    (tmp_path / "hf_flashprefill" / "__init__.py").write_text("")
    with pytest.raises(commands.UsageError, match="has other stages: .*functional"):
        operator_speed.main([*arguments, "--before", str(tmp_path)])
    assert not (tmp_path / "operator.json").exists()


def test_portable_sets_every_gluon_kernel_aside_and_puts_it_back():
    from hf_flashprefill.backends import triton
    from hf_flashprefill.backends.triton import energy_lists, shares

    def kernels():
        return triton.attend_hopper, energy_lists.energies_hopper, shares.probe_hopper

    before = kernels()
    assert None not in before
    with operator_speed.portable_kernels():
        assert kernels() == (None, None, None)
    assert kernels() == before


def test_a_failing_gate_prints_no_speed(monkeypatch, capsys, tmp_path):
    from hf_flashprefill.backends import torch as backend

    attend = backend.attend_blocks

    def wrong(*args, output, **kwargs):
        attend(*args, output=output, **kwargs)
        output[..., 5, 0] += 1

    monkeypatch.setattr(backend, "attend_blocks", wrong)
    path = tmp_path / "operator.json"
    assert operator_speed.main(["--lengths", "512", "--device", "cpu", "--output", str(path)]) == 1
    assert not path.exists()
    assert "speedup" not in capsys.readouterr().out


def test_layouts_do_the_same_work(monkeypatch, tmp_path, capsys):
    calls, kept = [], []

    def counted(query, key, value, **options):
        calls.append((query.shape[0], query.shape[2], key.shape[2]))
        if options.get("kept_pools") is not None:
            kept.append(options["kept_pools"])
        return flash_prefill_attention(query, key, value, **options)

    monkeypatch.setattr(layout_speed, "flash_prefill_attention", counted)
    path = tmp_path / "layouts.json"
    monkeypatch.setattr(
        layout_speed, "medians_ms", lambda runs, *_, **__: {n: (run(), {"median_ms": 1.0})[1] for n, run in runs.items()}
    )
    options = ["--lengths", "2048", "--chunk", "512", "--density", "0.3", "--device", "cpu", "--output", str(path)]
    assert layout_speed.main(options) == 0
    chunks = [(1, 512, end) for end in (512, 1024, 1536, 2048)]
    timed = [(1, 2048, 2048), (1, 1024, 1024), (2, 2048, 2048), (2, 2048, 2048), *chunks, *chunks, *chunks]
    # Once for its lists, the whole prompt's once more for its attention alone, and once for its time.
    assert calls == [*timed, (1, 2048, 2048), *timed]
    # The chunks of one prompt share their pools.
    assert len(kept) == 4
    assert len(set(map(id, kept))) == 1
    rows = {row["layout"]: row for row in json.loads(path.read_text())["rows"]}
    one, half, batch, padded, chunked, kept_blocks, tails = (row["blocks"] for row in rows.values())
    assert (batch, padded, chunked, kept_blocks) == (2 * one, one + half, one, one)
    # In each chunk, of eight heads, two query blocks list what they see; the other two a window of three blocks.
    assert one == 8 * (1 + 2 + 14 * 3)
    assert tails == 8 * (sum(2 * end - 1 for end in (4, 8, 12, 16)) + 1 + 2 + 6 * 3)
    overheads = [row["overhead"] for row in rows.values()]
    assert overheads[:6] == [None, None, -0.5, -0.5, 0.0, 0.0]
    assert overheads[6] == pytest.approx(1 / (tails / one) - 1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0] == {"length": 2048, "layout": "batch", "overhead": -0.5}


def test_kernels_of_layouts(tmp_path, capsys):
    """On a CPU torch's operators: attention runs at least as often in four chunks as at once. The last layout has none."""
    path = tmp_path / "layouts.json"
    options = ["--lengths", "1024", "--chunk", "256", "--seconds", "0.01", "--device", "cpu", "--output", str(path)]
    assert layout_speed.main([*options, "--kernels"]) == 0
    rows = {row["layout"]: row for row in json.loads(path.read_text())["rows"]}
    assert [name for name, row in rows.items() if "kernels" in row] == [name for name in rows if name != "chunked_tails"]
    one, chunked = ({kernel["kernel"]: kernel for kernel in rows[name]["kernels"]} for name in ("one", "chunked"))
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert chunked[attention]["launches"] >= one[attention]["launches"] >= 1
    for kernels in (one, chunked):
        times = [kernel["ms"] for kernel in kernels.values()]
        assert times == sorted(times, reverse=True)
        assert times[0] > 0
    together = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("together"))
    assert float(together.split()[2]) == pytest.approx(sum(kernel["ms"] for kernel in one.values()), abs=1e-3)


@pytest.mark.parametrize("arguments", [["--chunk", "100"], ["--density", "0"], ["--lengths", "8"], ["--kv-heads", "3"]])
def test_layouts_refuse(arguments):
    with pytest.raises(commands.UsageError, match=arguments[0]):
        layout_speed.main(arguments)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.9])
def test_imposed_densities_are_met(density):
    config = ttft.config_for_density(FlashPrefillConfig(min_seq_len=1), 8192, density)
    query = torch.randn(1, 1, 8192, 64)
    index = flash_prefill_attention(query, query, query, config=config, return_index=True).index
    # A sink, a window of one block and two dense tail blocks come to .120 of 64 blocks' triangle.
    assert index.density() == pytest.approx(max(density, 0.120), abs=0.02)


def test_ttft_counts_and_compares(tmp_path):
    path = tmp_path / "ttft.json"
    options = ["--lengths", "300", "--repeats", "2", "--min-seq-len", "1", "--device", "cpu", "--kernels"]
    assert ttft.main([*options, "--output", str(path)]) == 0
    row = json.loads(path.read_text())["rows"][0]
    assert row["dense_calls"] == {}
    assert row["density"] > 0
    assert row["speedup"] == pytest.approx(row["unpatched"]["median_s"] / row["patched"]["median_s"])
    # Without attention the rest remains, so the ceiling is what attention took.
    assert row["ceiling"] == pytest.approx(row["unpatched"]["median_s"] / row["free_attention"]["median_s"])
    for state in ("unpatched", "patched"):
        assert row["attention_s"][state] == pytest.approx(row[state]["median_s"] - row["free_attention"]["median_s"])
    kernels = {state: {kernel["kernel"] for kernel in found} for state, found in row["kernels"].items()}
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert attention in kernels["patched"] - kernels["free_attention"]
    assert "aten::mm" in kernels["patched"] & kernels["free_attention"]


def test_ttft_in_chunks(tmp_path, monkeypatch):
    pooled, pool = [], torch_backend.pool_keys_and_values
    monkeypatch.setattr(
        torch_backend, "pool_keys_and_values", lambda key, *rest: pooled.append(key.shape[2]) or pool(key, *rest)
    )
    path = tmp_path / "ttft.json"
    options = ["--lengths", "600", "--chunk", "256", "--repeats", "1", "--min-seq-len", "1", "--device", "cpu"]
    assert ttft.main([*options, "--output", str(path)]) == 0
    row = json.loads(path.read_text())["rows"][0]
    assert (row["chunk"], row["dense_calls"]) == (256, {})
    # Two calls of three chunks each; transformers before 5 leaves the last token to the first step of decode.
    by_layer = pooled[:: len(pooled) // 6]
    assert by_layer in (2 * [256, 512, 600], 2 * [256, 512, 599])


REFUSED = [["--density", "2"], ["--density", "published", "--lengths", "1000"], ["--repeats", "0"]]


@pytest.mark.parametrize("arguments", [*REFUSED, ["--chunks", "-1"], ["--set", "alpha=7"]])
def test_vllm_ttft_refuses(arguments):
    with pytest.raises(commands.UsageError, match=r"--density|--repeats|--chunks|alpha must be from 0 to 1, got 7"):
        vllm_ttft.main(arguments)


@pytest.mark.parametrize("arguments", [*REFUSED, ["--chunk", "0"]])
def test_ttft_refuses(arguments):
    with pytest.raises(commands.UsageError, match=arguments[0]):
        ttft.main(arguments)


def test_training_lowers_the_loss_and_writes_a_model_that_loads(tmp_path, monkeypatch):
    text = standard_library_text("held_out")[:300_000]
    for module in (train_recall, quality):
        monkeypatch.setattr(module, "standard_library_text", lambda split: text)
    sizes = [
        "--hidden-size",
        "32",
        "--layers",
        "1",
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--head-dim",
        "16",
        "--vocab-size",
        "400",
    ]
    steps = ["--stages", "128:25,256:25", "--tokens-per-step", "1024", "--recall-lengths", "400", "--recall-prompts", "3"]
    assert train_recall.main(["--output", str(tmp_path), "--device", "cpu", *sizes, *steps]) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert [entry["window"] for entry in record["log"]] == [256]
    assert record["log"][-1]["text_loss"] < 5.9
    assert len(record["recall"]) == 5
    assert all(0 <= row["recall"] <= 1 for row in record["recall"])
    assert "| 400 |" in (tmp_path / "README.md").read_text()
    model, tokenizer = models.load_model(str(tmp_path), "cpu", None)
    assert model.config.num_hidden_layers == 1
    # Going on from there starts where it ended.
    more = ["--init", str(tmp_path), "--output", str(tmp_path / "more"), "--packages", "tqdm", "--device", "cpu"]
    assert train_recall.main([*more, "--stages", "128:2", *steps[2:]]) == 0
    assert json.loads((tmp_path / "more" / "training.json").read_text())["log"][0]["text_loss"] < 5.9
    # Out of time, it keeps what it has; the rest of the stages is left out.
    assert train_recall.main([*more, "--stages", "128:2,256:2", *steps[2:], "--minutes", "1e-9"]) == 0
    assert [entry["step"] for entry in json.loads((tmp_path / "more" / "training.json").read_text())["log"]] == [1]
    assert "1 of\n4 steps" in (tmp_path / "more" / "README.md").read_text()
    with pytest.raises(commands.UsageError, match="--minutes must be above 0"):
        train_recall.main([*more, "--minutes", "0"])
    assert tokenizer("481923", add_special_tokens=False)["input_ids"] == tokenizer.convert_tokens_to_ids(list("481923"))


def test_stages_are_checked():
    assert train_recall.parse_stages("128:5,256:7")[1] == Stage(256, 7)
    with pytest.raises(commands.UsageError, match="--stages: stages are WINDOW:STEPS pairs"):
        train_recall.build_parser().parse_args(["--output", "x", "--stages", "128"])
