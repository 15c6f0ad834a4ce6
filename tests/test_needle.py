"""The needle harness on the bundled model: prompts, scoring, output files, and errors that end in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from random import Random

import pytest
import tokenizers
import torch
import transformers

from eval import models, needle, ruler, ttft
from eval.commands import UsageError
from eval.haystack import Fact, encode, encode_fact, plant, random_fact, random_facts, standard_library_text
from eval.ruler_tasks import Sample
from hf_flashprefill import FlashPrefillConfig, is_patched
from tests.inputs import tiny_gemma3, tiny_model


@pytest.fixture(scope="module")
def corpus(recall_model):
    return encode(recall_model[1], standard_library_text("held_out")[:200_000])


def test_facts_are_unique_and_repeatable():
    facts = random_facts(Random(3), 50)
    assert len({fact.name for fact in facts}) == 50
    assert facts == random_facts(Random(3), 50)
    assert all(len(fact.code) == 6 and fact.code.isdigit() for fact in facts)


def test_the_splits_share_no_file():
    train, held_out = standard_library_text("train"), standard_library_text("held_out")
    assert len(held_out) > 100_000
    assert held_out[50_000:51_000] not in train


def test_plant_puts_pieces_where_they_belong():
    corpus = list(range(1000))
    ids, positions = plant(corpus, 110, [(0.0, [-1, -2]), (0.5, [-3]), (1.0, [-4, -5, -6])], Random(0), prefix=[-9, -9, -9, -9])
    assert len(ids) == 110
    assert positions == [4, 56, 107]
    assert (ids[:6], ids[56], ids[107:]) == ([-9, -9, -9, -9, -1, -2], -3, [-4, -5, -6])
    text = [token for token in ids if token >= 0]
    assert text == list(range(text[0], text[0] + 100))


@pytest.mark.parametrize(("length", "tokens", "message"), [(4, 100, "length must be at least 5"), (200, 100, "text must have")])
def test_plant_refuses_what_does_not_fit(length, tokens, message):
    with pytest.raises(ValueError, match=message):
        plant(range(tokens), length, [(0.0, [1, 2, 3, 4, 5])], Random(0))


def test_prompts_hold_the_answers_where_they_say(recall_model, corpus):
    tokenizer = recall_model[1]
    fact = random_fact(Random(1))
    encoded = encode_fact(tokenizer, fact)
    assert tokenizer.decode(encoded.answer) == fact.code
    assert tokenizer.decode(encoded.question).endswith(fact.question)

    prompt = needle.end_prompt(tokenizer, corpus, 700, 0.3, Random(2))
    assert len(prompt.ids) == 700
    assert tokenizer.decode(prompt.ids).count("The secret code of") == 2
    assert prompt.ids[-1] != prompt.answers[0][0]

    prompt = needle.middle_prompt(tokenizer, corpus, 900, [0.0, 0.5, 1.0], Random(2))
    assert len(prompt.ids) == 900
    for start, expected in zip(prompt.answer_starts, prompt.answers, strict=True):
        assert prompt.ids[start : start + 6] == expected
        assert 400 < start < 600


def test_a_wrong_answer_is_scored_as_wrong(recall_model, corpus):
    """Scores must be able to fail: the expected code is swapped for another fact's."""
    model, tokenizer = recall_model
    for prompt in (
        needle.end_prompt(tokenizer, corpus, 600, 0.5, Random(5)),
        needle.middle_prompt(tokenizer, corpus, 600, [0.5], Random(5)),
    ):
        assert needle.answer(model, prompt).correct == [True]
        swapped = needle.Prompt(**{**vars(prompt), "answers": [encode(tokenizer, "123456")]})
        assert needle.answer(model, swapped).correct == [False]


def test_answers_are_greedy_whatever_the_model_generates_by(recall_model, corpus, monkeypatch):
    model, tokenizer = recall_model
    prompt = needle.end_prompt(tokenizer, corpus, 600, 0.5, Random(5))
    said = ruler.answer(model, tokenizer, prompt.ids, 6)[0]
    settings = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "num_beams": 2, "return_dict_in_generate": True}
    settings |= {"use_cache": False, "forced_eos_token_id": 7, "exponential_decay_length_penalty": (1, 9.0)}
    for name, value in settings.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert needle.answer(model, prompt).correct == [True]
    assert ruler.answer(model, tokenizer, prompt.ids, 6)[0] == said


def test_models_with_several_end_tokens_and_those_of_several_parts_are_asked(recall_model, corpus):
    """As instruction-tuned Llama and Qwen have, and as Gemma 3 is."""
    tokenizer = recall_model[1]
    prompt = needle.end_prompt(tokenizer, corpus, 600, 0.5, Random(5))
    chat = tiny_model(vocab_size=len(tokenizer), eos_token_id=[2, 5], pad_token_id=None)
    for model in (chat, tiny_gemma3(len(tokenizer))):
        own = model.generation_config
        assert needle.answer(model, prompt).correct == [False]
        assert len(ruler.answer(model, tokenizer, prompt.ids, 3)) == 2
        assert ttft.first_token_seconds(model, torch.tensor([prompt.ids])) > 0
        assert models.text_config(model).vocab_size == len(tokenizer)
        assert model.generation_config is own


@pytest.mark.parametrize(
    ("template", "expected"),
    [(None, []), ("<s> $A", [1]), ("<s> <u> $A", [1, 2]), ("$A </s>", []), ("<s> $A </s>", [1])],
)
def test_what_a_tokenizer_puts_in_front(template, expected):
    """With or without a begin-of-text token of that name, and whatever it puts after a text."""
    words = {"<unk>": 0, "<s>": 1, "<u>": 2, "</s>": 3, "a": 4, "b": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if template:
        special = [(token, words[token]) for token in ("<s>", "<u>", "</s>")]
        made.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    for names in ({}, {"bos_token": "<s>", "eos_token": "</s>"}):
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)
        assert models.text_prefix(tokenizer) == expected
        assert ruler.encode_sample(tokenizer, Sample("a b", " a", ["b"])) == [*expected, 4, 5, 4]


def test_a_tokenizer_that_cannot_say_a_code_alone_is_refused():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "The": 1}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(UsageError, match="the tokenizer has no tokens for the code 481923 alone"):
        encode_fact(transformers.PreTrainedTokenizerFast(tokenizer_object=made), Fact("Dalomi", "481923"))


def test_dropping_blocks_loses_answers_in_the_middle_only(recall_model, corpus):
    model, tokenizer = recall_model
    config = FlashPrefillConfig(alpha=1.0, sink_blocks=0, window_blocks=1, min_seq_len=1)
    found = {"end": 0, "middle": 0}
    for seed in range(4):
        for prompt in (
            needle.end_prompt(tokenizer, corpus, 2048, 0.3, Random(seed)),
            needle.middle_prompt(tokenizer, corpus, 2048, [0.3], Random(seed)),
        ):
            before, after = needle.compare(model, prompt, config)
            assert before.correct == [True]
            assert before.density is None
            assert after.density < 0.5
            found[prompt.placement] += after.correct[0]
    assert found["end"] == 4
    assert found["middle"] < 4
    assert not is_patched(model)


def test_the_command_writes_table_picture_and_json(tmp_path, capsys):
    path = tmp_path / "needle.json"
    arguments = [
        "--lengths",
        "600",
        "--depths",
        "0",
        "1",
        "--trials",
        "2",
        "--limit",
        "1",
        "--alpha",
        "0",
        "--output",
        str(path),
    ]
    assert needle.main([*arguments, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "middle" in printed
    assert "dense by rule" in printed
    record = json.loads(path.read_text())
    assert len(record["rows"]) == 4
    assert [row["questions"] for row in record["summary"]] == [2, 2]
    assert all(row["unpatched"] == row["patched"] and row["density"] == 1 for row in record["summary"])
    assert record["config"]["alpha"] == 0
    assert record["environment"]["torch"]
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")


def test_questions_that_stayed_dense_are_counted():
    row = needle.NeedleRow("end", 600, 0.5, True, True, None, 1.0, 1.0)
    summary = needle.summarise([vars(row), vars(replace(row, density=0.5))])
    assert "0.500, 1 of 2 dense" in needle.summary_table(summary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./no-such-folder"], "no such folder"),
        (["--dataset", "no-such-file.txt"], "no-such-file.txt"),
        (["--alpha", "2"], "alpha must be from 0 to 1"),
        (["--selector", "best"], "selector must be one of"),
        (["--depths", "1.5"], "--depths"),
        (["--trials", "0"], "--trials"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--lengths", "10"], "--lengths: length must be at least"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments, message, monkeypatch, capsys):
    from eval import commands

    monkeypatch.setattr(sys, "argv", ["needle", *arguments])
    assert commands.run_command(needle.main) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_the_exit_status_reaches_the_shell():
    command = [sys.executable, "-m", "eval.needle", "--model", "./no-such-folder"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
